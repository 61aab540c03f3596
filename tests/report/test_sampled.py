"""The sampled figures of a report, and the page that every export holds."""

import copy
import dataclasses
import json
import re
from pathlib import Path

import pytest
import tiny_models
import torch

from daq_lightning import CheckpointError, ExportReport, ScaleSearch, export_checkpoint
from daq_lightning.checkpoint.manifest import Manifest
from daq_lightning.cli import main
from daq_lightning.numerics.bins import STEP_BINS
from daq_lightning.numerics.objectives import score
from daq_lightning.report.html import page
from daq_lightning.report.sampled import AlphaCurve, ByStep, Outcomes

DOCS = Path(__file__).resolve().parents[2] / "docs" / "report.md"
PANELS = ("By size of the change", "Objective over alpha")
KINDS = [*(f"self_attn.{kind}_proj" for kind in "qkvo"), "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
METRICS = ["sign", "cosine", "mse", "hybrid"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return tiny_models.make_pair(tmp_path_factory.mktemp("pair"), tiny_models.llama)


@pytest.fixture(scope="module")
def exported(pair, tmp_path_factory):
    base, post = pair
    out = tmp_path_factory.mktemp("exported") / "fp8"
    return out, export_checkpoint(post, base, out, scheme="FP8_BLOCK")


@pytest.mark.parametrize("metric", METRICS)
def test_a_sample_of_all_elements_says_what_the_sums_say(tmp_path, metric):
    generator = torch.Generator().manual_seed(3)
    names = [f"model.layers.{layer}.mlp.{kind}_proj.weight" for layer in range(4) for kind in ("up", "down")]
    base = {name: 0.02 * torch.randn(128, 128, generator=generator) for name in names}
    post = {name: tensor + 1e-4 * torch.randn(128, 128, generator=generator) for name, tensor in base.items()}
    report = export_checkpoint(
        post, base, tmp_path / "out", scheme="FP8_BLOCK", search=ScaleSearch(metric=metric)
    )
    assert sum(tensor.curve is not None for tensor in report.tensors) == 6
    for tensor in report.tensors:
        assert tensor.by_step is not None
        assert tensor.by_step.sampled == 128 * 128  # one block
        for outcomes, sums in (
            (tensor.by_step.searched, tensor.searched),
            (tensor.by_step.absmax, tensor.absmax),
        ):
            counted = [sum(outcomes.kept), sum(outcomes.lost), sum(outcomes.flipped), sum(outcomes.n)]
            assert counted == [sums.preserved, sums.lost, sums.flipped, sums.n_changed]
        if tensor.curve is not None:
            scores = dict(zip(tensor.curve.alpha, tensor.curve.score, strict=True))
            assert tensor.curve.found == pytest.approx(float(score(tensor.searched, metric)), rel=1e-9)
            assert scores[1.0] == pytest.approx(float(score(tensor.absmax, metric)), rel=1e-6)
            nearest = min(scores, key=lambda alpha: abs(alpha - tensor.alpha["mean"]))
            assert nearest == pytest.approx(tensor.alpha["mean"], rel=1e-12)  # it is one that was tried
            assert scores[nearest] == pytest.approx(tensor.curve.found, rel=1e-4)


@pytest.mark.parametrize(
    "search", [None, ScaleSearch(metric="cosine", n_coarse=5)], ids=["plain", "searched"]
)
def test_of_codes_along_a_curvature_it_counts_what_is_written_and_records_no_curve(tmp_path, search):
    generator = torch.Generator().manual_seed(3)
    shapes = {"q": (256, 128), "k": (128, 128), "v": (128, 128), "o": (128, 128)}  # q, k, v share their input
    names = {f"model.layers.0.self_attn.{kind}_proj.weight": shape for kind, shape in shapes.items()}
    base = {name: 0.02 * torch.randn(shape, generator=generator) for name, shape in names.items()}
    post = {
        name: weight + 1e-3 * torch.randn(weight.shape, generator=generator) for name, weight in base.items()
    }
    report = export_checkpoint(
        post, base, tmp_path / "out", scheme="FP8_BLOCK", rounding="curvature", search=search
    )
    assert {tensor.rounding.method for tensor in report.tensors} == {"curvature"}
    for tensor in report.tensors:
        assert tensor.curve is None
        assert tensor.by_step.sampled == 128 * 128
        assert tensor.by_step.searched != tensor.by_step.absmax
        for outcomes, sums in (
            (tensor.by_step.searched, tensor.searched),
            (tensor.by_step.absmax, tensor.absmax),
        ):
            counted = [sum(outcomes.kept), sum(outcomes.lost), sum(outcomes.flipped), sum(outcomes.n)]
            if "q_proj" not in tensor.name:  # of which it is one block of two
                assert counted == [sums.preserved, sums.lost, sums.flipped, sums.n_changed]


def test_curves_are_of_all_projections_and_over_the_depth(tmp_path):
    names = [f"model.layers.{layer}.{kind}.weight" for layer in range(12) for kind in KINDS]
    base = {name: torch.linspace(-1, 1, 16).reshape(4, 4) for name in names}
    post = {name: 1.001 * tensor for name, tensor in base.items()}
    report = export_checkpoint(post, base, tmp_path / "out", search=ScaleSearch(n_coarse=3, n_fine=0))
    with_curve = [tensor.name.split(".", 3) for tensor in report.tensors if tensor.curve is not None]
    assert [int(layer) for _, _, layer, _ in with_curve] == [1, 3, 5, 7, 9, 11]
    assert len({projection for *_, projection in with_curve}) == 6


def test_without_a_search_or_a_base_there_is_nothing_to_look_at(pair, tmp_path):
    base, post = pair
    plain = export_checkpoint(post, base, tmp_path / "plain", search=ScaleSearch.absmax())
    assert all(tensor.curve is None for tensor in plain.tensors)
    assert all(tensor.by_step.searched == tensor.by_step.absmax for tensor in plain.tensors)
    alone = export_checkpoint(
        {"layer.weight": torch.ones(4, 4)}, {}, tmp_path / "alone", missing_base="absmax"
    )
    assert [(tensor.by_step, tensor.curve) for tensor in alone.tensors] == [(None, None)]
    assert not any(panel in page(alone) for panel in PANELS)


def test_it_is_read_back_as_it_was_written(exported):
    out, report = exported
    read = ExportReport.load(out)
    assert read.to_dict() == report.to_dict()
    assert [tensor.by_step for tensor in read.tensors] == [tensor.by_step for tensor in report.tensors]
    assert [tensor.curve for tensor in read.tensors] == [tensor.curve for tensor in report.tensors]


def test_an_older_report_is_read_and_its_page_has_no_empty_panel(exported, tmp_path, capsys):
    out, _ = exported
    content = json.loads((out / "daq_report.json").read_text())
    del content["step_edges"]
    for entry in content["tensors"].values():
        entry.pop("by_step")
        entry.pop("curve", None)
    file = tmp_path / "daq_report.json"
    file.write_text(json.dumps(content))
    report = ExportReport.load(file)
    shown = page(report)
    assert not any(panel in shown for panel in PANELS)
    assert "By depth" not in shown or "Layer by projection" in shown
    new = page(ExportReport.load(out))
    assert all(panel in new for panel in PANELS)


WRONG = {
    "no object": lambda entry: entry.update(by_step=[]),
    "a negative count": lambda entry: entry["by_step"]["n"].__setitem__(0, -1),
    "a bin too many": lambda entry: entry["by_step"]["searched"]["kept"].append(0),
    "counts that do not add up": lambda entry: entry["by_step"]["absmax"]["lost"].__setitem__(3, 10**6),
    "more changes than elements": lambda entry: entry["by_step"].update(sampled=1),
    "text for a score": lambda entry: entry["curve"]["score"].__setitem__(0, "<b>"),
    "a score too many": lambda entry: entry["curve"]["score"].append(0.0),
    "alphas in disorder": lambda entry: entry["curve"]["alpha"].reverse(),
    "no alphas": lambda entry: entry.update(curve={"sampled": 1, "alpha": [], "score": [], "found": None}),
    "an infinite score": lambda entry: entry["curve"].update(found=float("inf")),
    "a missing field": lambda entry: entry["curve"].pop("sampled"),
    "no found": lambda entry: entry["curve"].pop("found"),
}


@pytest.mark.parametrize("change", WRONG)
def test_foreign_values_are_refused(exported, tmp_path, change):
    out, _ = exported
    content = json.loads((out / "daq_report.json").read_text())
    entry = next(entry for entry in content["tensors"].values() if "curve" in entry)
    WRONG[change](entry)
    file = tmp_path / "daq_report.json"
    file.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="is not the report of an export: expected (counts|scores)"):
        ExportReport.load(file)


def keys_of(value):
    if isinstance(value, dict):
        for key, inside in value.items():
            yield key
            yield from keys_of(inside)
    elif isinstance(value, list):
        for inside in value:
            yield from keys_of(inside)


def test_every_field_of_a_report_is_documented(pair, exported, tmp_path):
    base, post = pair
    out, _ = exported
    chain = export_checkpoint(post, out, tmp_path / "next", parent=str(out), chain_from="deployed")
    content = chain.to_dict()
    content["tensors"] = list(content["tensors"].values())  # their names are no fields
    content["kept"] = {}
    alone = export_checkpoint({"l.weight": torch.ones(4, 4)}, {}, tmp_path / "alone", missing_base="absmax")
    content["tensors"] += list(alone.to_dict()["tensors"].values())
    curved = export_checkpoint(post, base, tmp_path / "curved", rounding="curvature")
    content["tensors"] += list(curved.to_dict()["tensors"].values())
    named = set(re.findall(r"`(\w+)`", DOCS.read_text()))
    assert set(keys_of(content)) - named == set()
    for field in ("root", "without_base", "by_step", "curve", "rounding"):
        assert field in set(keys_of(content)), "the test sees optional fields too"


def test_every_export_holds_its_page_the_same_under_any_name(pair, exported, tmp_path, capsys):
    base, post = pair
    out, report = exported
    shown = (out / "daq_report.html").read_text()
    assert shown == page(dataclasses.replace(report, path=""))
    assert "daq_report.html" in Manifest.load(out).files
    other = tmp_path / "another-name"
    export_checkpoint(post, base, other, scheme="FP8_BLOCK")
    assert (other / "daq_report.html").read_text() == shown
    assert str(tmp_path) not in shown
    assert main(["chain", str(out)]) == 0
    (other / "daq_report.html").write_text(shown + " ")
    assert main(["chain", str(other)]) == 3
    assert "daq_report.html" in capsys.readouterr().out


def test_the_page_of_a_model_of_32_layers_is_small(exported):
    _, report = exported
    outcomes = Outcomes(kept=(12345,) * STEP_BINS, lost=(2345,) * STEP_BINS, flipped=(345,) * STEP_BINS)
    by_step = ByStep(sampled=1 << 20, searched=outcomes, absmax=outcomes)
    alphas = tuple(0.5 + 0.0237 * index for index in range(65))
    curve = AlphaCurve(
        sampled=1 << 15, alpha=alphas, score=tuple(-((a - 1.1) ** 2) / 7 for a in alphas), found=-1e-7
    )
    tensors = tuple(
        dataclasses.replace(
            copy.copy(report.tensors[0]),
            name=f"model.layers.{layer}.{kind}.weight",
            by_step=by_step,
            curve=curve if layer in (2, 7, 13, 18, 23, 29) and kind == KINDS[layer % 7] else None,
        )
        for layer in range(32)
        for kind in KINDS
    )
    shown = page(dataclasses.replace(report, tensors=tensors))
    assert shown.count('class="chart steps"') == 8
    assert shown.count('class="chart curve"') == 6
    assert len(shown.encode()) < 1_500_000
