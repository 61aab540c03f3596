"""Folders that bitsandbytes made read as bitsandbytes dequantizes them; what contradicts itself is refused.

`bitsandbytes.safetensors` was written by bitsandbytes 0.50.2 on a CPU: of each kind, plain and nested, a
weight of 13 x 40 normal numbers (so that blocks of 64 cross rows, and the last is short) by `quantize_4bit`,
with what `dequantize_4bit` makes of it in bfloat16 ("expected") and in float32 ("expected32").
"""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from daq_lightning import CheckpointError, export_checkpoint, load_checkpoint

MADE = safetensors.torch.load_file(Path(__file__).with_name("bitsandbytes.safetensors"))
NAMES = ["nf4_plain.weight", "nf4_nested.weight", "fp4_plain.weight", "fp4_nested.weight"]
STATE = "nf4_nested.weight.quant_state.bitsandbytes__nf4"


def folder_of(folder, change=lambda tensors: None):
    tensors = {name: tensor.clone() for name, tensor in MADE.items() if not name.startswith("expected")}
    tensors["norm.weight"] = torch.ones(4).bfloat16()
    change(tensors)
    safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    quantization = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    config = {"dtype": "bfloat16", "quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("band", [64, 1 << 20])
def test_a_folder_reads_as_bitsandbytes_dequantizes_it(tmp_path, monkeypatch, band):
    monkeypatch.setattr("daq_lightning.checkpoint.bitsandbytes._BAND", band)
    folder = folder_of(tmp_path)
    checkpoint, full = load_checkpoint(folder), load_checkpoint(folder, torch.float32)
    assert set(checkpoint) == {*NAMES, "norm.weight"}
    assert checkpoint.quantized
    for name in NAMES:
        assert checkpoint.specs[name].shape == (13, 40)
        assert torch.equal(checkpoint[name], MADE[f"expected.{name}"])
        assert torch.equal(full[name], MADE[f"expected32.{name}"])


def test_such_a_folder_is_a_base_and_is_exported_from(tmp_path):
    (tmp_path / "base").mkdir()
    base = folder_of(tmp_path / "base")
    weights = {name: tensor * 1.01 for name, tensor in load_checkpoint(base).items()}
    report = export_checkpoint(weights, base, tmp_path / "out")
    assert {tensor.name for tensor in report.tensors} == set(NAMES)
    assert all(bool(tensor.searched.n_changed) for tensor in report.tensors)


def test_codes_may_be_stored_under_another_dtype(tmp_path):
    """As `bnb_4bit_quant_storage` has it for sharded training: the same bytes."""

    def recast(tensors):
        tensors["nf4_plain.weight"] = tensors["nf4_plain.weight"].flatten().view(torch.bfloat16)[:, None]

    checkpoint = load_checkpoint(folder_of(tmp_path, recast))
    assert torch.equal(checkpoint["nf4_plain.weight"], MADE["expected.nf4_plain.weight"])


def test_maps_may_have_any_shape(tmp_path):
    def upright(tensors):
        for name in ("quant_map", "nested_quant_map", "nested_absmax"):
            tensors[f"nf4_nested.weight.{name}"] = tensors[f"nf4_nested.weight.{name}"][:, None]

    checkpoint = load_checkpoint(folder_of(tmp_path, upright))
    assert torch.equal(checkpoint["nf4_nested.weight"], MADE["expected.nf4_nested.weight"])


def test_its_format_is_not_kept(tmp_path):
    (tmp_path / "base").mkdir()
    base = load_checkpoint(folder_of(tmp_path / "base"))
    with pytest.raises(CheckpointError, match="a format to train on and not one to serve: name a scheme"):
        export_checkpoint(dict(base), base, tmp_path / "out", scheme="keep")


def state_of(**changes):
    said = json.loads(bytes(MADE[STATE].tolist())) | changes
    return torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)


def changed(name, value):
    return lambda tensors: tensors.update({name: value})


DAMAGED = {
    "no map": (lambda tensors: tensors.pop("nf4_plain.weight.quant_map"), "quant_map does not hold 16"),
    "no absmax": (lambda tensors: tensors.pop("nf4_plain.weight.absmax"), "absmax does not hold 9"),
    "codes cut off": (
        changed("nf4_plain.weight", MADE["nf4_plain.weight"][:-1].clone()),
        "does not hold 260 numbers of uint8",
    ),
    "nested absmax as numbers": (changed("nf4_nested.weight.absmax", torch.ones(9)), "9 numbers of uint8"),
    "no nested map": (lambda tensors: tensors.pop("nf4_nested.weight.nested_quant_map"), "does not hold 256"),
    "no JSON": (changed(STATE, torch.tensor([1, 2], dtype=torch.uint8)), "shape and block size"),
    "JSON of another kind": (changed(STATE, torch.tensor([53], dtype=torch.uint8)), "shape and block size"),
    "another shape": (changed(STATE, state_of(shape=[13, 41])), "does not hold 267"),
    "a negative shape": (changed(STATE, state_of(shape=[-13, -40])), "shape and block size"),
    "blocks of nothing": (changed(STATE, state_of(blocksize=0)), "shape and block size"),
    "an odd block": (changed(STATE, state_of(blocksize=65)), "shape and block size"),
    "nested blocks of nothing": (changed(STATE, state_of(nested_blocksize=None)), "size of nested blocks"),
    "no offset": (changed(STATE, state_of(nested_offset="x")), "holds no offset"),
    "no state": (lambda tensors: tensors.pop(STATE), "uint8"),
    "another kind": (
        lambda tensors: tensors.update({STATE.replace("__nf4", "__int3"): tensors.pop(STATE)}),
        "is none of nf4, fp4",
    ),
    "two states": (changed(STATE.replace("__nf4", "__fp4"), MADE[STATE]), "has 2 states"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_what_contradicts_itself_is_refused(tmp_path, case):
    change, message = DAMAGED[case]
    folder_of(tmp_path, change)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path)
