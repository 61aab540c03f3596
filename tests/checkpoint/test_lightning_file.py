"""Weights of a `.ckpt` file are read whatever its other objects are; nothing in the file is executed."""

from __future__ import annotations

import collections
import copyreg
import dataclasses
import enum
import io
import os
import pathlib
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint
from live import Tuning, data, make_trainer
from torch import nn

from daq_lightning import CheckpointError, DeltaAwareQuantization, ScaleSearch, load_checkpoint
from daq_lightning.checkpoint.lightning_file import read_lightning_checkpoint

QUICK = ScaleSearch(metric="cosine", n_coarse=3, n_fine=0)


@dataclasses.dataclass
class Recipe:
    learning_rate: float
    path: pathlib.Path


class Color(enum.Enum):
    RED = 1


class Old:
    """Pickled by `copyreg._reconstructor` under protocol 0 and 1."""


class Slots:
    __slots__ = ("a",)

    def __getstate__(self):
        return {"a": 1}

    def __setstate__(self, state):
        raise AssertionError("executed")


class Bag(dict):
    pass


class Command:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


class Evaluated:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce_ex__(self, protocol):
        return eval, (f"__import__('pathlib').Path({str(self.marker)!r}).touch()",)


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    whole = torch.randn(6, 4)
    return {
        "float32": whole,
        "view": whole[1:4].t(),
        "column": whole[:, 2],
        "bfloat16": torch.randn(3, 5).bfloat16(),
        "float16": torch.randn(3).half(),
        "float64": torch.randn(3).double(),
        "float8": torch.randn(4, 4).to(torch.float8_e4m3fn),
        "e8m0": torch.ones(3).to(torch.float8_e8m0fnu),
        "int64": torch.arange(5),
        "int8": torch.arange(5).to(torch.int8),
        "uint16": torch.tensor([1, 65535], dtype=torch.uint16),
        "bool": torch.tensor([True, False]),
        "complex": torch.randn(2, dtype=torch.complex64),
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(2.5),
        "expanded": torch.ones(1).expand(3),
        "parameter": nn.Parameter(torch.randn(2, 2)),
        "attributes": _with_attribute(nn.Parameter(torch.randn(2, 2))),
    }


def _with_attribute(parameter: nn.Parameter) -> nn.Parameter:
    parameter.note = pathlib.Path("here")
    return parameter


def hostile(marker: Path) -> dict[str, object]:
    slots = Slots()
    slots.a = 1
    bag = Bag(a=Command(marker))
    bag.attribute = Command(marker)
    nested: object = pathlib.Path("deep")
    for level in range(100):
        nested = [(nested,), {"inside": nested}] if level < 5 else [nested]
    return {
        "path": pathlib.Path("/data"),
        "dataclass": Recipe(0.1, pathlib.Path("x")),
        "enum": Color.RED,
        "command": Command(marker),
        "evaluated": Evaluated(marker),
        "old": Old(),
        "slots": slots,
        "bag": bag,
        "set": {1, Color.RED},
        "frozen": frozenset([Recipe]) if Recipe.__hash__ else frozenset([1]),
        "keys": {(1, Color.RED): 2, Color.RED: Command(marker)},
        "numpy": [np.float64(3.0), np.arange(3), np.dtype("f4")],
        "counter": collections.Counter("aab"),
        "defaultdict": collections.defaultdict(list, a=[1]),
        "function": os.system,
        "nested": nested,
        "module": nn.Linear(2, 2),
        "bytes": b"12",
        "generator": torch.get_rng_state(),
    }


def same(one: torch.Tensor, two: torch.Tensor) -> bool:
    bits = [tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in (one, two)]
    return (
        one.dtype == two.dtype
        and one.shape == two.shape
        and one.stride() == two.stride()
        and torch.equal(*bits)
    )


@pytest.mark.parametrize("protocol", [1, 2, 3, 4, 5])
def test_tensors_beside_any_objects_are_those_of_torch_and_nothing_runs(tmp_path, protocol):
    marker, path = tmp_path / "marker", tmp_path / "x=1.ckpt"
    state = collections.OrderedDict(tensors())
    state["model._extra_state"] = Recipe(1.0, pathlib.Path("y"))
    content = {"before": hostile(marker), "state_dict": state, "hyper_parameters": hostile(marker)}
    torch.save(content, path, pickle_protocol=protocol)
    read = read_lightning_checkpoint(path)
    assert not marker.exists()
    torch.save({"state_dict": tensors()}, tmp_path / "plain.ckpt")
    expected = torch.load(tmp_path / "plain.ckpt", weights_only=False)["state_dict"]
    assert list(read) == list(expected)
    for name, tensor in expected.items():
        assert same(read[name], tensor), name


def test_shared_storages_stay_shared_and_are_mapped_from_the_file(tmp_path):
    path = tmp_path / "x.ckpt"
    whole = torch.randn(4096, 4096)
    torch.save({"state_dict": {"a": whole, "b": whole[3:], "c": torch.randn(4096, 4096)}}, path)
    code = (
        "import resource, sys, torch; from daq_lightning.checkpoint.lightning_file import "
        "read_lightning_checkpoint;before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; state = "
        "read_lightning_checkpoint(sys.argv[1]);after = "
        "resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;assert state['b'].data_ptr() == "
        "state['a'].data_ptr() + 3 * 4096 * 4; print(after - before)"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True
    )
    assert int(shown.stdout) < 16 << 10, "128 MB of weights are mapped, not read"


def test_checkpoints_saved_without_checksums_are_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"state_dict": {"a": torch.ones(2)}}, tmp_path / "x.ckpt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(read_lightning_checkpoint(tmp_path / "x.ckpt")["a"], torch.ones(2))


def _saved(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def _repacked(content: bytes, changes: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """The archive with other records: checksums and sizes fit."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(buffer, "w", compression) as new:
        names = dict.fromkeys([*old.namelist(), *changes])
        for name in names:
            new.writestr(name, changes[name] if name in changes else old.read(name))
    return buffer.getvalue()


SMALL = _saved({"state_dict": {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2).bfloat16()}, "epoch": 1})


def _legacy() -> bytes:
    buffer = io.BytesIO()
    torch.save({"state_dict": {"a": torch.ones(2)}}, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def _scripted() -> bytes:
    return _repacked(SMALL, {"archive/constants.pkl": pickle.dumps(())})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a zip archive"),
        (b"PK\3\4 and so on" * 50, "not a zip archive"),
        (SMALL[: len(SMALL) // 2], "not a zip archive, or it was cut off"),
        (SMALL[:-3], "not a zip archive, or it was cut off"),
        (_legacy(), "not a zip archive"),
        (_scripted(), "TorchScript archive, which holds code"),
        (_repacked(SMALL, {}, zipfile.ZIP_DEFLATED), "compressed or encrypted"),
        (_repacked(SMALL, {"archive/data/0": b"123"}),
        "needs 24 bytes of the record data/0, which has 3 bytes"),
        (_repacked(SMALL, {"archive/byteorder": b"big"}), "big-endian"),
        (_repacked(SMALL, {"other/data.pkl": b"."}), "2 records named data.pkl"),
        (_repacked(SMALL, {"archive/data.pkl": b"\x80\x02}"}), "pickle exhausted before seeing STOP"),
        (_repacked(SMALL, {"archive/data.pkl": pickle.dumps([1])}), "has no state_dict"),
        (_repacked(SMALL, {"archive/data.pkl": b"\x80\x02h\x07."}), "refers to object 7"),
        (_repacked(SMALL, {"archive/data.pkl": b"\x80\x02t."}), "ends a group"),
        (SMALL.replace(b"state_dict", b"state_dicT"), "checksum differs"),
        (_saved({"weights": 1}), "has no state_dict"),
    ],
)  # fmt: skip
def test_files_that_are_no_checkpoints_are_refused_in_plain_words(tmp_path, content, message):
    (tmp_path / "x.ckpt").write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_lightning_checkpoint(tmp_path / "x.ckpt")
    assert str(tmp_path / "x.ckpt") in str(caught.value)
    assert "\x1b" not in str(caught.value)
    assert str(caught.value).endswith(".")


def test_a_file_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"x\.ckpt cannot be read: .*No such file"):
        read_lightning_checkpoint(tmp_path / "x.ckpt")


def _pickle_of(content: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return archive.read("archive/data.pkl")


PROGRAM = _pickle_of(SMALL)
POSITION = SMALL.index(PROGRAM)
MUTATIONS = st.lists(st.tuples(st.integers(0, len(PROGRAM) - 1), st.integers(0, 255)), min_size=1, max_size=4)


def _mutated(mutations: list[tuple[int, int]]) -> bytes:
    program = bytearray(PROGRAM)
    for position, value in mutations:
        program[position] = value
    return bytes(program)


@settings(max_examples=400, deadline=None)
@given(MUTATIONS)
def test_a_damaged_pickle_is_an_error_and_never_other_weights(tmp_path_factory, mutations):
    path = tmp_path_factory.getbasetemp() / "damaged.ckpt"
    program = _mutated(mutations)
    path.write_bytes(SMALL[:POSITION] + program + SMALL[POSITION + len(program) :])
    try:
        read = read_lightning_checkpoint(path)
    except CheckpointError:
        return
    assert program == PROGRAM
    assert torch.equal(read["a"], torch.arange(6.0).view(2, 3))


@pytest.mark.slow
@settings(max_examples=1500, deadline=None)
@given(MUTATIONS)
def test_a_forged_pickle_whose_checksum_fits_gives_an_error_or_tensors_of_this_file(
    tmp_path_factory, mutations
):
    path = tmp_path_factory.getbasetemp() / "forged.ckpt"
    path.write_bytes(_repacked(SMALL, {"archive/data.pkl": _mutated(mutations)}))
    try:
        read = read_lightning_checkpoint(path)
    except CheckpointError:
        return
    for tensor in read.values():
        assert tensor.untyped_storage().nbytes() in (24, 4)
        # every element that can be addressed is inside the storage
        spans = [(count - 1) * step for count, step in zip(tensor.shape, tensor.stride(), strict=True)]
        if tensor.numel():
            assert (
                tensor.storage_offset() + sum(spans) + 1
            ) * tensor.itemsize <= tensor.untyped_storage().nbytes()


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(SMALL) - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_bytes_altered_anywhere_in_a_file_end_in_an_error_or_a_state(tmp_path_factory, mutations):
    path = tmp_path_factory.getbasetemp() / "altered.ckpt"
    content = bytearray(SMALL)
    for position, value in mutations:
        content[position] = value
    path.write_bytes(bytes(content))
    try:
        read = read_lightning_checkpoint(path)
    except CheckpointError:
        return
    assert {name: tensor.shape for name, tensor in read.items()} == {"a": (2, 3), "b": (2,)}


def test_the_old_ways_to_construct_objects_run_nothing(tmp_path):
    marker = tmp_path / "marker"
    programs = [
        b"cos\nsystem\n(S'touch %s'\ntR." % str(marker).encode(),
        b"(S'touch %s'\nios\nsystem\n." % str(marker).encode(),
        b"(cos\nsystem\nS'touch %s'\no." % str(marker).encode(),
        pickle.dumps(Command(marker), 4),
        b"\x80\x02c__builtin__\nexec\nX\x05\x00\x00\x00print\x85R.",
        b"\x80\x02\x82\x01.",
    ]
    extension = copyreg.dispatch_table.copy()
    for program in programs:
        (tmp_path / "x.ckpt").write_bytes(_repacked(SMALL, {"archive/data.pkl": program}))
        with pytest.raises(CheckpointError, match="state_dict|EXT1"):
            read_lightning_checkpoint(tmp_path / "x.ckpt")
        assert not marker.exists()
    assert copyreg.dispatch_table == extension


class Configured(Tuning):
    def __init__(self, data_dir: Path, recipe: Recipe, color: Color, learning_rate: float = 1e-3) -> None:
        super().__init__(learning_rate=learning_rate)
        self.save_hyperparameters()

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", torch.tensor(float(self.trainer.global_step)))


def test_the_best_checkpoint_is_exported_and_serves_as_base_whatever_the_hyperparameters_are(tmp_path):
    module = Configured(tmp_path, Recipe(0.1, tmp_path), Color.RED)
    callback = DeltaAwareQuantization(dirpath=str(tmp_path / "exports"), search=QUICK, which="best")
    best = ModelCheckpoint(dirpath=tmp_path / "saved", monitor="val_loss", save_top_k=1, filename="{step}")
    trainer = make_trainer(tmp_path, callback, best, max_steps=8, val_check_interval=2)
    trainer.fit(module, data(), data())
    file = tmp_path / "saved" / "step=2.ckpt"
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        torch.load(file, weights_only=True)
    state = torch.load(file, weights_only=False)["state_dict"]
    exported = load_checkpoint(callback.exports[0])
    for name in ("lm_head.weight", "model.norm.weight", "model.embed_tokens.weight"):
        assert torch.equal(exported[name], state[f"model.{name}"].bfloat16())
    # and as the base of another run, which has the same weights by both ways of reading them
    later = DeltaAwareQuantization(dirpath=str(tmp_path / "later"), search=QUICK, base=str(file))
    make_trainer(tmp_path, later).fit(Tuning(), data())
    assert later.report is not None
