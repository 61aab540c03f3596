"""A checkpoint folder is foreign input: it is read as its layout says, or refused, and nothing in it is
executed."""

import json
import os
import pickle

import pytest
import safetensors.torch
import torch

from daq_lightning import CheckpointError, load_checkpoint
from daq_lightning.checkpoint.folder import RawCheckpoint, companion_files
from daq_lightning.export.export import export_checkpoint
from daq_lightning.numerics.formats import PerBlock, PerChannel, PerTensor

FP8 = torch.float8_e4m3fn
COMPRESSED = {
    "quant_method": "compressed-tensors",
    "config_groups": {"group_0": {"weights": {"strategy": "channel"}}},
}
BLOCK = {"quant_method": "fp8", "weight_block_size": [128, 128]}


def save(folder, tensors, file="model.safetensors", config=None):
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(tensors, folder / file, {"format": "pt"})
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def sharded(folder, shards, weight_map=None):
    """A folder of shards (file -> tensors) with an index."""
    for file, tensors in shards.items():
        save(folder, tensors, file)
    names = {name: file for file, tensors in shards.items() for name in tensors}
    index = {"metadata": {}, "weight_map": names if weight_map is None else weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def one(value=1.0):
    return torch.full((2,), value)


def codes(shape=(256, 128)):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator).to(FP8)


def test_shards_are_one_mapping_and_only_what_is_asked_for_is_read(tmp_path):
    folder = sharded(tmp_path, {"a.safetensors": {"x": one(1)}, "b.safetensors": {"y": one(2), "z": one(3)}})
    checkpoint = load_checkpoint(folder)
    assert (len(checkpoint), list(checkpoint)) == (3, ["x", "y", "z"])
    os.truncate(folder / "a.safetensors", 8)
    assert torch.equal(checkpoint["y"], one(2))
    with pytest.raises(KeyError):
        checkpoint["w"]


def test_shards_without_an_index_and_a_single_file_are_read_too(tmp_path):
    save(tmp_path, {"x": one(1)}, "a.safetensors")
    save(tmp_path, {"y": one(2)}, "b.safetensors")
    assert set(load_checkpoint(tmp_path)) == {"x", "y"}
    assert set(load_checkpoint(tmp_path / "b.safetensors")) == {"y"}


def outside(tmp_path):
    return save(tmp_path / "secret", {"x": one()}) / "model.safetensors"


@pytest.mark.parametrize(
    "target",
    ["../secret/model.safetensors", "{abs}", "sub/../../secret/model.safetensors", "..", "", "a.bin", "./a"],
)
def test_an_index_may_only_name_plain_files_of_its_folder(tmp_path, target):
    target = target.format(abs=outside(tmp_path))
    folder = sharded(tmp_path / "model", {"a.safetensors": {"x": one()}}, {"x": target})
    with pytest.raises(CheckpointError, match="expected the plain name of a safetensors file"):
        load_checkpoint(folder)


@pytest.mark.parametrize("indexed", [True, False])
def test_a_link_out_of_the_folder_is_refused(tmp_path, indexed):
    secret = outside(tmp_path)
    folder = tmp_path / "model"
    if indexed:
        sharded(folder, {"b.safetensors": {"y": one()}}, {"x": "a.safetensors"})
    else:
        folder.mkdir()
    (folder / "a.safetensors").symlink_to(secret)
    with pytest.raises(CheckpointError, match="link out of its folder"):
        load_checkpoint(folder)


def test_a_link_to_a_shard_out_of_the_folder_named_model_is_refused(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(outside(tmp_path))
    with pytest.raises(CheckpointError, match="link out of its folder"):
        load_checkpoint(folder)


def test_links_inside_the_folder_and_of_the_hub_cache_are_followed(tmp_path):
    save(tmp_path / "plain", {"x": one()}, "real.safetensors")
    (tmp_path / "plain" / "model.safetensors").symlink_to("real.safetensors")
    assert set(load_checkpoint(tmp_path / "plain")) == {"x"}

    cache = tmp_path / "models--org--name"
    snapshot = cache / "snapshots" / "0a1b"
    (snapshot / "chat_templates").mkdir(parents=True)
    blob = save(cache / "blobs", {"x": one(5)}, "77aa") / "77aa"
    (cache / "blobs" / "88bb").write_text("template")
    (snapshot / "model.safetensors").symlink_to(os.path.relpath(blob, snapshot))
    (snapshot / "chat_templates" / "tools.jinja").symlink_to("../../../blobs/88bb")
    assert torch.equal(load_checkpoint(snapshot)["x"], one(5))
    assert companion_files(snapshot) == [snapshot / "chat_templates" / "tools.jinja"]


def test_a_folder_that_is_itself_a_link_is_read(tmp_path):
    save(tmp_path / "step=10", {"x": one()})
    (tmp_path / "latest").symlink_to("step=10")
    assert set(load_checkpoint(tmp_path / "latest")) == {"x"}


@pytest.mark.parametrize("place", ["tokenizer.json", "chat_templates/a.jinja", "chat_templates"])
def test_no_other_file_is_copied_through_a_link_out_of_the_folder(tmp_path, place):
    folder = save(tmp_path / "model", {"x": one()})
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "a.jinja").write_text("secret")
    (folder / place).parent.mkdir(exist_ok=True)
    (folder / place).symlink_to(
        tmp_path / "private" if place == "chat_templates" else tmp_path / "private" / "a.jinja"
    )
    with pytest.raises(CheckpointError, match="link out of its folder"):
        companion_files(folder)


def test_a_shard_that_the_index_names_and_nobody_has_is_missed(tmp_path):
    folder = sharded(tmp_path, {"a.safetensors": {"x": one()}}, {"x": "a.safetensors", "y": "b.safetensors"})
    with pytest.raises(CheckpointError, match=r"b.safetensors is missing"):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"x": "a.safetensors", "y": "a.safetensors"}, "1 tensors are not in the file it names"),
        ({"x": "b.safetensors", "y": "a.safetensors"}, "2 tensors are not in the file it names"),
        ({"x": "a.safetensors", "z": "b.safetensors"}, "1 tensors are not in the file.*1 are not listed"),
        ({"x": "a.safetensors"}, None),
        ([], "no weight_map"),
        ({}, "no weight_map"),
        ({"x": 5}, "no weight_map"),
        (None, "no weight_map"),
    ],
)
def test_an_index_that_contradicts_its_files_is_refused(tmp_path, weight_map, message):
    folder = sharded(tmp_path, {"a.safetensors": {"x": one()}, "b.safetensors": {"y": one()}})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    if message is None:  # a file that the index does not name is not part of the checkpoint
        assert set(load_checkpoint(folder)) == {"x"}
        return
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(folder)


def test_a_name_in_two_shards_is_refused(tmp_path):
    folder = sharded(
        tmp_path, {"a.safetensors": {"x": one(), "y": one()}, "b.safetensors": {"y": one(2)}},
        {"x": "a.safetensors", "y": "b.safetensors"},
    )  # fmt: skip
    with pytest.raises(CheckpointError, match="y is in both"):
        load_checkpoint(folder)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff", b"[" * 200_000, b"5", b"9" * 5000])
def test_json_that_is_none_is_refused(tmp_path, file, content):
    folder = save(tmp_path, {"x": one()})
    (folder / file).write_bytes(content)
    with pytest.raises(CheckpointError, match="JSON"):
        load_checkpoint(folder)


class Trap:
    """Unpickling this creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.pt", "model.pth"])
@pytest.mark.parametrize("whole_folder", [True, False])
def test_a_pickle_is_never_opened(tmp_path, file, whole_folder):
    trap = tmp_path / "sprung"
    (tmp_path / "model").mkdir()
    path = tmp_path / "model" / file
    path.write_bytes(pickle.dumps(Trap(trap)))
    with pytest.raises(CheckpointError, match="can run code"):
        load_checkpoint(tmp_path / "model" if whole_folder else path)
    good = save(tmp_path / "good", {"a.weight": torch.randn(4, 4)})
    for weights, base in ((path.parent, good), (good, path.parent), (good, path)):
        with pytest.raises(CheckpointError):
            export_checkpoint(weights, base, tmp_path / "out")
    assert not trap.exists()
    assert not (tmp_path / "out").exists()
    pickle.loads(path.read_bytes()).close()  # the trap would have worked
    assert trap.exists()


def test_a_pickle_behind_a_safetensors_name_is_refused(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(pickle.dumps(Trap(tmp_path / "sprung")) + bytes(200))
    with pytest.raises(CheckpointError, match="not a complete safetensors file"):
        load_checkpoint(tmp_path)
    assert not (tmp_path / "sprung").exists()


def test_what_is_not_there_is_said_so(tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere does not exist"):
        load_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"has no safetensors files"):
        load_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(CheckpointError, match="missing"):
        load_checkpoint(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="neither a folder nor a file"):
        load_checkpoint(tmp_path / "pipe")


@pytest.mark.parametrize(
    ("quantization", "shape", "granularity"),
    [
        (BLOCK, (2, 1), PerBlock(128, 128)),
        ({"quant_method": "fp8", "weight_block_size": [64, 128]}, (4, 1), PerBlock(64, 128)),
        (COMPRESSED, (256, 1), PerChannel()),
        (COMPRESSED, (256,), PerChannel()),
        (COMPRESSED, (), PerTensor()),
        (COMPRESSED, (1,), PerTensor()),
        (COMPRESSED, (1, 1), PerTensor()),
    ],
)
def test_codes_are_dequantized_by_the_shape_of_their_scale(tmp_path, quantization, shape, granularity):
    scale = torch.rand(shape, generator=torch.Generator().manual_seed(1)) + 0.5
    save(
        tmp_path, {"a.weight": codes(), "a.weight_scale": scale}, config={"quantization_config": quantization}
    )
    checkpoint = load_checkpoint(tmp_path)
    assert checkpoint.granularity("a.weight") == granularity
    assert list(checkpoint) == ["a.weight"]
    rows, cols = granularity.cell((256, 128))
    full = scale.reshape(granularity.grid((256, 128))).repeat_interleave(rows, 0).repeat_interleave(cols, 1)
    assert torch.equal(checkpoint["a.weight"], (codes().float() * full).bfloat16())


def test_a_ragged_block_is_dequantized_with_its_own_scale(tmp_path):
    scale = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    weight = codes((192, 130))
    save(tmp_path, {"a.weight": weight, "a.weight_scale_inv": scale}, config={"quantization_config": BLOCK})
    full = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[:192, :130]
    assert torch.equal(load_checkpoint(tmp_path)["a.weight"], (weight.float() * full).bfloat16())


def test_a_power_of_two_scale_may_be_stored_as_its_exponent(tmp_path):
    scale = torch.tensor([[0.25], [8.0]])
    save(tmp_path, {"a.weight": codes(), "a.weight_scale_inv": scale.to(torch.float8_e8m0fnu)},
         config={"quantization_config": BLOCK})  # fmt: skip
    full = scale.repeat_interleave(128, 0)
    assert torch.equal(load_checkpoint(tmp_path)["a.weight"], (codes().float() * full).bfloat16())


@pytest.mark.parametrize(
    "config", [{"dtype": "float16"}, {"torch_dtype": "float16"}, {"text_config": {"dtype": "float16"}}]
)
def test_codes_become_what_the_config_says_or_what_is_asked_for(tmp_path, config):
    tensors = {"a.weight": codes(), "a.weight_scale": torch.ones(256, 1), "b.weight": torch.ones(2, 2)}
    save(tmp_path, tensors, config=config | {"quantization_config": COMPRESSED})
    assert (
        load_checkpoint(tmp_path)["a.weight"].dtype
        == load_checkpoint(tmp_path).specs["a.weight"].dtype
        == torch.float16
    )
    assert load_checkpoint(tmp_path, torch.float32)["a.weight"].dtype == torch.float32
    assert load_checkpoint(tmp_path)["b.weight"].dtype == torch.float32


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", "nn", "", None, 5])
def test_a_dtype_that_weights_cannot_have_is_not_taken_from_the_config(tmp_path, dtype):
    tensors = {"a.weight": codes(), "a.weight_scale": torch.ones(256, 1)}
    save(tmp_path, tensors, config={"dtype": dtype, "text_config": dtype, "quantization_config": COMPRESSED})
    assert load_checkpoint(tmp_path)["a.weight"].dtype == torch.bfloat16


REFUSED = {
    "no scale": ({"a.weight": codes()}, COMPRESSED, "has 0 scales"),
    "two scales": (
        {"a.weight": codes(), "a.weight_scale": torch.ones(256, 1), "a.weight_scale_inv": torch.ones(2, 1)},
        BLOCK,
        "has 2 scales",
    ),
    "codes in 3-D": ({"a.weight": codes((2, 4, 4)), "a.weight_scale": torch.ones(2)}, COMPRESSED, "matrix"),
    "too few blocks": ({"a.weight": codes(), "a.weight_scale_inv": torch.ones(1, 1)}, BLOCK,
    r"shape \(1, 1\)"),
    "blocks the wrong way": ({"a.weight": codes(), "a.weight_scale_inv": torch.ones(1, 2)}, BLOCK,
    r"shape \(1, 2\)"),
    "a scale per column": ({"a.weight": codes(), "a.weight_scale": torch.ones(1, 128)}, COMPRESSED,
    "fits a weight"),
    "blocks and no size": ({"a.weight": codes(), "a.weight_scale_inv": torch.ones(2, 1)}, None, "missing"),
    "exponents as bytes": (
        {"a.weight": codes(), "a.weight_scale": torch.ones(256, 1, dtype=torch.uint8)}, COMPRESSED, "uint8"
    ),
    "a scale and no codes": ({"a.weight": torch.ones(2, 2), "a.weight_scale": torch.ones(2, 1)}, COMPRESSED,
    "not FP8"),
    "a scale of nothing": ({"a.weight": one(), "b.weight_scale_inv": torch.ones(2, 1)}, BLOCK, "not FP8"),
    "int8": ({"a.weight": torch.ones(2, 2).char()}, COMPRESSED, "int8"),
    "packed, and no shape": (
        {"a.weight_packed": torch.ones(2, 2).int(), "a.weight_scale": torch.ones(2, 1)}, COMPRESSED,
        "has no a.weight_shape",
    ),
    "gptq": ({"a.qweight": torch.ones(2, 2).int(), "a.scales": one()}, {"quant_method": "gptq"}, "gptq"),
    "bitsandbytes": ({"a.weight": torch.ones(8, 1).byte()}, {"quant_method": "bitsandbytes"}, "uint8"),
    "e5m2": ({"a.weight": torch.ones(2, 2).to(torch.float8_e5m2)}, None, "float8_e5m2"),
    "asymmetric": (
        {"a.weight": codes(), "a.weight_scale": torch.ones(256, 1)},
        {"config_groups": {"g": {"weights": {"strategy": "channel", "symmetric": False}}}}, "zero point",
    ),
    "config a list": ({"a.weight": one()}, [1], "not a JSON object"),
    "block size of zero": ({"a.weight": one()}, {"weight_block_size": [0, 128]}, "cannot be followed"),
    "block size no list": ({"a.weight": one()}, {"weight_block_size": 128}, "cannot be followed"),
    "group size of infinity": (
        {"a.weight": one()},
        {"config_groups": {"a": {"weights": {"strategy": "group", "group_size": float("inf")}}}},
        "cannot be followed",
    ),
    "groups no object": ({"a.weight": one()}, {"config_groups": ["a"]}, "cannot be followed"),
    "weights no object": ({"a.weight": one()}, {"config_groups": {"a": {"weights": [1]}}},
    "cannot be followed"),
    "two block sizes": (
        {"a.weight": one()},
        {"config_groups": {str(n): {"weights": {"strategy": "block", "block_structure": [n,
        n]}} for n in (64, 128)}},
        "several sizes",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_weights_that_cannot_be_understood_are_refused_when_the_folder_is_opened(tmp_path, case):
    tensors, quantization, message = REFUSED[case]
    save(tmp_path, tensors, config={} if quantization is None else {"quantization_config": quantization})
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path)


def test_the_raw_mapping_hides_nothing(tmp_path):
    tensors = {"a.weight": codes(), "a.weight_scale": torch.ones(256, 1)}
    save(tmp_path, tensors, config={"quantization_config": COMPRESSED})
    raw = RawCheckpoint(tmp_path)
    assert set(raw) == set(tensors)
    assert raw["a.weight"].dtype == FP8
