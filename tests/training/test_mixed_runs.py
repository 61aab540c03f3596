"""A run with a budget places its weights by the curvature that it collected, and is validated as it is
served."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from live import data, fit, make_trainer
from test_validate import Validated, held_out

from daq_lightning import CheckpointError, DeltaAwareQuantization, ExportReport, load_checkpoint
from daq_lightning.audit.verify import verify_checkpoint
from daq_lightning.training import judge
from daq_lightning.training.strategies import check_judging


def quantization(folder, **changes):
    settings = {"dirpath": str(folder / "exports"), "scheme": "W4A16", "budget": "6.5 bits"}
    return DeltaAwareQuantization(**(settings | changes))


def test_a_run_places_weights_by_its_own_curvature(tmp_path):
    callback = quantization(tmp_path, ladder=["W4A16", "FP8A16", "16"])
    fit(tmp_path, callback)
    report = ExportReport.load(callback.exports[-1])
    placement = report.placement
    assert placement is not None
    assert placement.measure == "curvature"
    assert all(loss > 0 for group in placement.groups for rung, loss in group.losses.items() if rung != "16")
    assert {group.rung for group in placement.groups} >= {"W4A16", "FP8A16"}
    assert {tuple(group.losses) for group in placement.groups} == {("W4A16", "FP8A16", "16")}
    assert placement.size <= placement.capacity
    assert verify_checkpoint(callback.exports[-1]) == []
    assert all(tensor.rounding is not None for tensor in report.tensors)
    stored = load_checkpoint(callback.exports[-1])
    for group in placement.groups:
        for name in group.names:
            bits = 8 * sum(
                stored.raw.entries[part].nbytes for part in stored.raw.entries if part.startswith(name)
            )
            assert bits / math.prod(stored.specs[name].shape) == pytest.approx(
                {"W4A16": 4.13, "FP8A16": 8.25, "16": 16}[group.rung], abs=0.1
            )


def test_only_quantized_modules_see_quantized_activations_in_validation(tmp_path, monkeypatch):
    seen: dict[str, int] = {}
    inner = judge.quantized_activations

    def watched(modules, scheme):
        modules = list(modules)
        seen[scheme.name] = len(modules)
        return inner(modules, scheme)

    monkeypatch.setattr(judge, "quantized_activations", watched)
    callback = quantization(tmp_path, scheme="FP8_DYNAMIC", budget="12 bits", validate=True)
    make_trainer(tmp_path, callback, limit_val_batches=1).fit(Validated(), data(), held_out())
    report = ExportReport.load(callback.exports[-1])
    assert report.placement is not None
    kept = [name for group in report.placement.groups if group.rung == "16" for name in group.names]
    assert kept
    assert seen == {"FP8_DYNAMIC": len(report.tensors)}
    assert set(report.validation) == {"val_loss", "val_acc"}


def test_a_budget_that_is_none_or_cannot_be_met_is_refused_before_training(tmp_path):
    with pytest.raises(MisconfigurationException, match="mean bits"):
        quantization(tmp_path, budget="much")
    with pytest.raises(MisconfigurationException, match="a list of schemes"):
        quantization(tmp_path, ladder="W4A16")
    with pytest.raises(MisconfigurationException, match="'16' last"):
        quantization(tmp_path, ladder=["16", "W4A16"])
    callback, module = quantization(tmp_path, budget="4 bits"), Validated()
    with pytest.raises(CheckpointError, match="below the least that the rungs"):
        fit(tmp_path, callback, module=module)
    assert module.steps == 0


def test_several_ranks_cannot_deal_a_base_in_memory_anew(tmp_path):
    trainer = SimpleNamespace(world_size=2, enable_validation=False)
    held = quantization(tmp_path, base="memory")._settings
    with pytest.raises(MisconfigurationException, match="a budget deals the weights to the ranks anew"):
        check_judging(trainer, held)  # type: ignore[arg-type]
