"""The state of a callback in a training checkpoint: found whatever changed since, and never that of another
one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from live import Tuning, data, fit, make_trainer, tiny_llama
from test_when import quantization, saver

from daq_lightning import DeltaAwareQuantization, load_checkpoint

CHECKPOINT = "checkpoints/step=2.ckpt"


def base_of(callback: DeltaAwareQuantization) -> dict[str, torch.Tensor]:
    """The base of the last export, read from where its manifest says that it was."""
    export = callback.exports[-1]
    lineage = json.loads((export / "daq_manifest.json").read_text())["lineage"]
    return dict(load_checkpoint((export / lineage["base_path"]).resolve()))


def is_start(callback: DeltaAwareQuantization, seed: int = 0) -> bool:
    """Whether the base is the model of a seed before any training."""
    start = tiny_llama(seed).state_dict()
    return all(torch.equal(tensor, start[name]) for name, tensor in base_of(callback).items())


def start(folder: Path, *callbacks, module=None) -> None:
    fit(folder, saver(folder), *callbacks, module=module, max_steps=2)


def resume(folder: Path, *callbacks, module=None, ckpt: Path | None = None) -> None:
    fit(folder, *callbacks, module=module, ckpt=ckpt or folder / CHECKPOINT, max_steps=4)


@pytest.mark.parametrize(
    "changes",
    [
        {"dirpath": "moved"},
        {"search": None, "metric": "sign"},
        {"scheme": "FP8_DYNAMIC"},
        {"ignore": ["model.layers.0.self_attn.o_proj"]},
        {"filename": "{epoch}-{step}"},
        {"which": "last", "every_n_train_steps": 1},
        {"export_on": "checkpoint"},
        {"module": "model"},
        {"base": "snapshot"},
        {"reference": "previous_checkpoint"},
        {"export_on_exception": True, "keep_last": 1},
    ],
    ids=str,
)
def test_a_resumed_run_finds_its_base_whatever_was_changed(tmp_path, changes):
    start(tmp_path, quantization(tmp_path))
    if "dirpath" in changes:
        changes = {"dirpath": str(tmp_path / changes["dirpath"])}
    callback = quantization(tmp_path, **changes)
    resume(tmp_path, callback, saver(tmp_path))
    assert is_start(callback)


def rewritten(folder: Path, change) -> Path:
    """The checkpoint with the state of its callbacks as another release would have saved it."""
    content = torch.load(folder / CHECKPOINT, weights_only=True)
    content["callbacks"] = change(content["callbacks"])
    torch.save(content, folder / "rewritten.ckpt")
    return folder / "rewritten.ckpt"


def _first_release(states: dict[str, Any]) -> dict[str, Any]:
    fields = {"dirpath": "elsewhere", "base": "auto", "settings": "ExportSettings(scheme='auto')"}
    (state,) = (state for key, state in states.items() if "DeltaAware" in key)
    return {f"DeltaAwareQuantization{fields!r}": {"base": state["base"], "root": state["root"]}}


def _next_release(states: dict[str, Any]) -> dict[str, Any]:
    (state,) = (state for key, state in states.items() if "DeltaAware" in key)
    state["callback"] |= {"a_field_of_tomorrow": [1, 2]}
    state["callback"].pop("export_on")
    return {"DeltaAwareQuantization{'a_field_of_tomorrow': 1}": state | {"novelty": 3}}


@pytest.mark.filterwarnings("ignore:Be aware that when using")  # of Lightning, about the foreign key
@pytest.mark.parametrize("change", [_first_release, _next_release])
def test_the_state_of_another_release_is_found(tmp_path, change):
    start(tmp_path, quantization(tmp_path))
    callback = quantization(tmp_path)
    resume(tmp_path, callback, ckpt=rewritten(tmp_path, change))
    assert is_start(callback)


def test_no_warning_asks_for_a_callback_that_is_there(tmp_path, recwarn):
    start(tmp_path, quantization(tmp_path))
    recwarn.clear()
    resume(
        tmp_path,
        quantization(tmp_path, dirpath=str(tmp_path / "moved"), scheme="FP8_DYNAMIC"),
        saver(tmp_path),
    )
    assert [
        str(warning.message) for warning in recwarn if "callbacks used to create" in str(warning.message)
    ] == []


class TwoModels(Tuning):
    """A student that is trained, and a second model that is trained too."""

    def __init__(self) -> None:
        super().__init__(tiny_llama(0))
        self.other = tiny_llama(1)

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + self.other(input_ids=batch, labels=batch).loss


@pytest.mark.parametrize("swapped", [False, True])
def test_two_models_keep_their_bases(tmp_path, swapped):
    one, two = (quantization(tmp_path, module=name) for name in ("model", "other"))
    start(tmp_path, one, two, module=TwoModels())
    one, two = (
        quantization(tmp_path, module=name, dirpath=str(tmp_path / "moved")) for name in ("model", "other")
    )
    resume(tmp_path, *((two, one) if swapped else (one, two)), module=TwoModels())
    assert is_start(one, seed=0)
    assert is_start(two, seed=1)


def test_a_callback_that_is_new_does_not_take_the_base_of_another_model(tmp_path):
    start(tmp_path, quantization(tmp_path, module="model"), module=TwoModels())
    both = [quantization(tmp_path, module=name) for name in ("model", "other")]
    with pytest.raises(MisconfigurationException, match="its callback state holds no base"):
        resume(tmp_path, *both, module=TwoModels())


@pytest.mark.parametrize(
    "changes",
    [
        {"module": "model"},
        {"which": "best"},
        {"filename": "{epoch}"},
        {"export_on": "checkpoint"},
        {"dirpath": "other"},
        {"scheme": "FP8_DYNAMIC"},
        {"base": "memory"},
        {"reference": "previous_checkpoint"},
        {"every_n_train_steps": 1},
        {"merge_adapters": False},
    ],
    ids=str,
)
def test_two_callbacks_that_differ_keep_apart(tmp_path, changes):
    if "dirpath" in changes:
        changes = {"dirpath": str(tmp_path / changes["dirpath"])}
    one, two = quantization(tmp_path), quantization(tmp_path, **changes)
    assert one.state_key != two.state_key
    trainer = make_trainer(
        tmp_path, saver(tmp_path, monitor="train_loss", filename="{step}"), one, two, max_steps=2
    )
    trainer.fit(Tuning(), data())
    assert one.state_key != two.state_key
    states = torch.load(tmp_path / CHECKPOINT, weights_only=True)["callbacks"]
    kinds = [states[callback.state_key]["base"]["kind"] for callback in (one, two)]
    assert kinds == ["snapshot", "memory" if changes == {"base": "memory"} else "snapshot"]


def test_initial_never_takes_a_base_that_moved_with_the_run(tmp_path):
    start(tmp_path, quantization(tmp_path, reference="previous_checkpoint", export_on="checkpoint"))
    with pytest.raises(MisconfigurationException, match="its callback state holds no base"):
        resume(tmp_path, quantization(tmp_path))


def test_a_lost_snapshot_is_replaced_by_the_folder_that_the_error_asks_for(tmp_path):
    start(tmp_path, quantization(tmp_path))
    for file in (tmp_path / "exports" / "base").iterdir():
        file.unlink()
    (tmp_path / "exports" / "base").rmdir()
    with pytest.raises(MisconfigurationException, match=r"does not exist.*base='<folder>'"):
        resume(tmp_path, quantization(tmp_path))
    tiny_llama().save_pretrained(tmp_path / "original")
    callback = quantization(tmp_path, base=str(tmp_path / "original"))
    resume(tmp_path, callback)
    assert base_of(callback)["lm_head.weight"].equal(tiny_llama().state_dict()["lm_head.weight"])


def test_a_run_that_began_with_a_folder_finds_it_without_being_told_again(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "original")
    start(tmp_path, quantization(tmp_path, base=str(tmp_path / "original")))
    callback = quantization(tmp_path)
    resume(tmp_path, callback)
    assert is_start(callback)


def test_weights_that_are_ignored_since_need_no_base_in_a_folder(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "original")
    start(tmp_path, quantization(tmp_path, base=str(tmp_path / "original")))
    kept = "model.layers.0.self_attn.o_proj"
    callback = quantization(tmp_path, base=str(tmp_path / "original"), ignore=[kept])
    resume(tmp_path, callback)
    assert f"{kept}.weight" in callback.report.kept


def test_a_checkpoint_saved_by_hand_after_the_fit_can_be_resumed(tmp_path):
    trainer = make_trainer(tmp_path, quantization(tmp_path), max_steps=2)
    trainer.fit(Tuning(), data())
    trainer.save_checkpoint(tmp_path / "by_hand.ckpt")
    callback = quantization(tmp_path)
    resume(tmp_path, callback, ckpt=tmp_path / "by_hand.ckpt")
    assert is_start(callback)
