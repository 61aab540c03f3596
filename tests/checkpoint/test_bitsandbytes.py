"""Folders in bitsandbytes' four bits open as the weights that bitsandbytes dequantizes; damaged ones are
refused, by name."""

import json
import math

import numpy as np
import pytest
import safetensors.torch
import torch
from tiny_models import llama, make_pair

from daq_lightning import CheckpointError, ScaleSearch, export_checkpoint, load_checkpoint
from daq_lightning.audit.verify import verify_checkpoint

NF4 = [-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.091050036, 0.0, 0.0795803,
       0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0]  # fmt: skip
"""The sixteen values, from the appendix of the paper (arXiv 2305.14314)."""
SHAPE, BLOCK, NESTED = (130, 200), 64, 256
SIZE = math.prod(SHAPE)


def four_bit(name, shape, *, nested=False, seed=0):
    """The tensors of a weight with random codes, and the weight by the formula, in NumPy."""
    random, count = np.random.default_rng(seed), math.prod(shape)
    blocks = -(-count // BLOCK)
    codes, values = random.integers(0, 16, count + count % 2), np.array(NF4, dtype=np.float32)
    absmax = random.uniform(0.01, 0.1, blocks).astype(np.float32)
    state = {"quant_type": "nf4", "blocksize": BLOCK, "dtype": "bfloat16", "shape": list(shape)}
    tensors = {
        name: torch.from_numpy((codes[::2] << 4 | codes[1::2]).astype(np.uint8))[:, None],
        f"{name}.quant_map": torch.from_numpy(values),
    }
    if nested:
        table = np.sort(random.uniform(-1, 1, 256)).astype(np.float32)
        own = random.uniform(0.01, 0.05, -(-blocks // NESTED)).astype(np.float32)
        coded = random.integers(0, 256, blocks)
        state |= {"nested_blocksize": NESTED, "nested_dtype": "float32", "nested_offset": 0.06}
        absmax = table[coded] * own.repeat(NESTED)[:blocks] + np.float32(0.06)
        tensors |= {
            f"{name}.absmax": torch.from_numpy(coded.astype(np.uint8)),
            f"{name}.nested_absmax": torch.from_numpy(own),
            f"{name}.nested_quant_map": torch.from_numpy(table),
        }
    else:
        tensors[f"{name}.absmax"] = torch.from_numpy(absmax)
    said = np.frombuffer(json.dumps(state).encode(), dtype=np.uint8).copy()
    tensors[f"{name}.quant_state.bitsandbytes__nf4"] = torch.from_numpy(said)
    weight = values[codes[:count]] * absmax.repeat(BLOCK)[:count]
    return tensors, torch.from_numpy(weight).bfloat16().reshape(shape)


def written(folder, tensors):
    folder.mkdir(exist_ok=True)
    safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = {"dtype": "bfloat16", "quantization_config": {"quant_method": "bitsandbytes"}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_a_folder_reads_as_the_formula_says(tmp_path, nested, storage):
    tensors, weight = four_bit("a.weight", SHAPE, nested=nested)
    # as it is stored for sharded training: the same bytes under another dtype
    tensors["a.weight"] = tensors["a.weight"].flatten().view(storage)[:, None]
    checkpoint = load_checkpoint(written(tmp_path, tensors | {"norm.weight": torch.ones(8).bfloat16()}))
    assert set(checkpoint) == {"a.weight", "norm.weight"}
    assert checkpoint.specs["a.weight"].shape == SHAPE
    assert checkpoint.quantized
    assert torch.equal(checkpoint["a.weight"], weight)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
def test_a_folder_reads_as_bitsandbytes_reads_it(tmp_path, kind, nested):
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).bfloat16()
    codes, state = functional.quantize_4bit(
        weight, blocksize=BLOCK, quant_type=kind, compress_statistics=nested
    )
    parts = {f"a.weight.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
    checkpoint = load_checkpoint(written(tmp_path, {"a.weight": codes, **parts}))
    assert torch.equal(checkpoint["a.weight"], functional.dequantize_4bit(codes, state))


def without(part):
    return lambda tensors: tensors.pop(f"a.weight.{part}")


def replaced(part, function):
    def change(tensors):
        tensors[f"a.weight{part}"] = function(tensors[f"a.weight{part}"])

    return change


def says(text):
    state = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return replaced(".quant_state.bitsandbytes__nf4", lambda _: state)


DAMAGED = {
    "no absmax": (without("absmax"), "absmax is missing"),
    "too few scales": (replaced(".absmax", lambda x: x[:-1].clone()), "values, expected"),
    "too few codes": (replaced("", lambda x: x[:-1].clone()), "bytes of codes, expected"),
    "no JSON": (says(b"{"), "no weight as bitsandbytes saves"),
    "no object": (says(b"[1]"), "no JSON object"),
    "no shape": (says(b'{"blocksize": 64}'), "'shape'"),
    "a shape of texts": (says(b'{"blocksize": 64, "shape": ["1"]}'), "sizes"),
    "huge JSON": (says(b" " * 5000), "expected JSON in bytes"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_folder_is_refused_when_it_is_opened(tmp_path, case):
    change, said = DAMAGED[case]
    tensors, _ = four_bit("a.weight", SHAPE)
    change(tensors)
    with pytest.raises(CheckpointError, match=said):
        load_checkpoint(written(tmp_path, tensors))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model whose projections are in four bits."""
    base = make_pair(tmp_path_factory.mktemp("model"), llama)[0]
    weights, tensors = load_checkpoint(base), {}
    for name, weight in list(weights.items()):
        of_one = four_bit(name, tuple(weight.shape))[0] if "_proj." in name else {name: weight.contiguous()}
        tensors |= of_one
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    safetensors.torch.save_file(tensors, base / "model.safetensors", {"format": "pt"})
    (base / "config.json").write_text(json.dumps(config))
    return base


def test_such_a_base_goes_to_a_scheme_by_name_and_to_no_other(folder, tmp_path):
    with pytest.raises(CheckpointError, match="a format to train on and not one to serve: name a scheme"):
        export_checkpoint(folder, folder, tmp_path / "out", scheme="keep")
    report = export_checkpoint(folder, folder, tmp_path / "out", scheme="W4A16", search=ScaleSearch.absmax())
    assert len(report.tensors) == 14
    assert verify_checkpoint(tmp_path / "out") == []
