"""One safetensors file: read and written as the safetensors library does it, and nothing of a lying header
believed."""

import json

import hypothesis.strategies as st
import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import HealthCheck, example, given, settings

from daq_lightning.checkpoint.buffers import Buffers
from daq_lightning.checkpoint.tensor_file import (
    DTYPE_NAMES,
    CheckpointError,
    TensorSpec,
    make_header,
    read_header,
)
from daq_lightning.checkpoint.writer import CheckpointWriter


def every_kind():
    """Tensors of every dtype, of zero to three dimensions, empty ones too."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for dtype, name in DTYPE_NAMES.items():
        size = 12 * dtype.itemsize
        values = torch.randint(
            0, 2 if dtype == torch.bool else 256, (size,), dtype=torch.uint8, generator=generator
        )
        tensors[f"matrix.{name}"] = values.view(dtype).reshape(3, 4)
    half = torch.arange(8, dtype=torch.bfloat16)
    return tensors | {
        "scalar": torch.tensor(1.5),
        "cube": half.reshape(2, 2, 2).clone(),
        "empty": torch.empty(0, 4),
        "ünï": half.clone(),
        'quote"\\': half,
    }


def same(first, second):
    raw = (
        [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (first, second)]
        if first.numel()
        else [0, 0]
    )
    return first.dtype == second.dtype and first.shape == second.shape and (
        not first.numel() or torch.equal(*raw)
    )  # fmt: skip


def write_file(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_what_the_library_writes_is_read_alike(tmp_path):
    tensors = every_kind()
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors", {"format": "pt"})
    entries = read_header(tmp_path / "a.safetensors")
    assert set(entries) == set(tensors)
    assert all(same(entries[name].read(), tensor) for name, tensor in tensors.items())


def test_the_library_reads_what_is_written_here(tmp_path):
    tensors = every_kind()
    specs = [
        TensorSpec(name=name, dtype=tensor.dtype, shape=tuple(tensor.shape))
        for name, tensor in tensors.items()
    ]
    with CheckpointWriter(tmp_path / "out", specs) as writer:
        for name, tensor in reversed(tensors.items()):
            writer.write(name, tensor)
        writer.publish()
    file = tmp_path / "out" / "model.safetensors"
    loaded = safetensors.torch.load_file(file)
    assert all(same(loaded[name], tensor) for name, tensor in tensors.items())
    with safetensors.safe_open(file, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    assert int.from_bytes(file.read_bytes()[:8], "little") % 8 == 0


def test_a_transposed_tensor_is_written_in_row_major_order(tmp_path):
    tensor = torch.arange(6.0).reshape(2, 3).t()
    with CheckpointWriter(
        tmp_path / "out", [TensorSpec(name="a", dtype=tensor.dtype, shape=(3, 2))]
    ) as writer:
        writer.write("a", tensor)
        writer.publish()
    assert torch.equal(safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")["a"], tensor)


def test_a_read_tensor_belongs_to_nobody_else(tmp_path):
    safetensors.torch.save_file({"a": torch.zeros(4)}, tmp_path / "a.safetensors")
    entries = read_header(tmp_path / "a.safetensors")
    entries["a"].read().fill_(7)
    assert torch.equal(entries["a"].read(), torch.zeros(4))


LIES = {
    "overlap": ({"a": entry(offsets=(0, 8)), "b": entry(offsets=(4, 12))}, 12, "expected"),
    "gap": ({"a": entry(offsets=(0, 8)), "b": entry(offsets=(12, 20))}, 20, "expected"),
    "late begin": ({"a": entry(offsets=(4, 12))}, 12, "expected"),
    "two at one place": ({"a": entry(), "b": entry()}, 8, "expected"),
    "span too short": ({"a": entry(offsets=(0, 4))}, 4, "needs 8"),
    "span too long": ({"a": entry(offsets=(0, 12))}, 12, "needs 8"),
    "end before begin": ({"a": entry(offsets=(8, 0))}, 8, "spans -8 bytes"),
    "negative offset": ({"a": entry(offsets=(-8, 0))}, 8, "offsets"),
    "boolean offset": ({"a": entry(dtype="U8", shape=(1,), offsets=(False, True))}, 1, "offsets"),
    "three offsets": ({"a": entry(offsets=(0, 4, 8))}, 8, "offsets"),
    "offset no number": ({"a": {"dtype": "F32", "shape": [2], "data_offsets": "08"}}, 8, "offsets"),
    "negative size": ({"a": entry(shape=(-2,))}, 8, "shape"),
    "boolean size": ({"a": entry(dtype="U8", shape=(True,), offsets=(0, 1))}, 1, "shape"),
    "fractional size": ({"a": entry(shape=(2.0,))}, 8, "shape"),
    "shape no list": ({"a": {"dtype": "F32", "shape": 2, "data_offsets": [0, 8]}}, 8, "shape"),
    "huge size": ({"a": entry(shape=(2**62, 4), offsets=(0, 2**66))}, 8, "shape"),
    "huge product": ({"a": entry(shape=(2**40, 2**40))}, 8, "shape"),
    "huge shape of nothing": ({"a": entry(shape=(0, 2**40, 2**40), offsets=(0, 0))}, 0, "shape"),
    "a thousand dimensions": ({"a": entry(shape=(2**40,) * 1000)}, 8, "shape"),
    "huge offset": ({"a": entry(offsets=(10**30, 10**30 + 8))}, 8, "expected"),
    "unknown dtype": ({"a": entry(dtype="F8_E4M3FNUZ")}, 8, "dtype"),
    "dtype no text": ({"a": entry(dtype=["F32"])}, 8, "dtype"),
    "no dtype": ({"a": {"shape": [2], "data_offsets": [0, 8]}}, 8, "lacks"),
    "entry no object": ({"a": [1, 2]}, 8, "lacks"),
    "data behind the end": ({"a": entry()}, 9, "cut off or overwritten"),
    "data missing": ({"a": entry()}, 7, "cut off or overwritten"),
    "header a list": ([entry()], 0, "not an object"),
    "header a number": (5, 0, "not an object"),
    "header no JSON": (b"{'a': 1}", 0, "cannot be read"),
    "header empty": (b"", 0, "cannot be read"),
    "header not UTF-8": (b'{"\xff": 1}', 0, "cannot be read"),
    "a name twice": (
        b'{"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},'
        b' "a": {"dtype": "U8", "shape": [1], "data_offsets": [1, 2]}}', 2, "'a' occurs twice",
    ),
    "a field twice": (b'{"a": {"dtype": "U8", "dtype": "I8", "shape": [1], "data_offsets": [0, 1]}}', 1,
    "twice"),
    "deep nesting": (b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}", 0, "cannot be read"),
    "a number of 5000 digits": (b'{"a": ' + b"9" * 5000 + b"}", 0, "cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_is_refused(tmp_path, lie):
    header, size, message = LIES[lie]
    path = write_file(tmp_path / "a.safetensors", header, bytes(size))
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 100, 101 << 20])
def test_a_header_longer_than_its_file_is_not_allocated(tmp_path, length):
    path = tmp_path / "a.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match="not a complete safetensors file"):
        read_header(path)


@pytest.mark.parametrize("size", [0, 7, 8, 60, 200])
def test_a_file_that_was_cut_off_is_refused(tmp_path, size):
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file({"a": torch.zeros(64)}, path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match="again"):
        read_header(path)


def test_a_file_that_is_cut_off_after_it_was_opened_is_noticed(tmp_path):
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file({"a": torch.zeros(64)}, path)
    entries = read_header(path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="ended while reading a"):
        entries["a"].read()


def test_metadata_is_no_tensor(tmp_path):
    path = write_file(tmp_path / "a.safetensors", {"__metadata__": {"a": "b"}, "a": entry()}, bytes(8))
    assert list(read_header(path)) == ["a"]


VALID, _ = make_header(
    [TensorSpec(name=name, dtype=torch.bfloat16, shape=(2, 3)) for name in ("a", "b")], path=None
)  # fmt: skip
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4)
    | st.sampled_from(["dtype", "shape", "data_offsets", "F32", "U8", 2**64, -1]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
HEADERS = st.dictionaries(
    st.text(max_size=3),
    st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["F32", "U8", "BF16", "F4"]) | JSON,
            "shape": st.lists(st.integers(0, 3), max_size=3) | JSON,
            "data_offsets": st.tuples(st.integers(0, 16), st.integers(0, 40)) | JSON,
        }
    ),
    max_size=3,
)
QUIET = settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture],
                 derandomize=True, database=None)  # fmt: skip


def outcome(path, content):
    """The entries, if they are taken; anything but a CheckpointError surfaces."""
    path.write_bytes(content)
    try:
        entries = read_header(path)
    except CheckpointError:
        return None
    return {name: found.read() for name, found in entries.items()}


@QUIET
@given(data=st.binary(max_size=64))
@example(data=(2).to_bytes(8, "little") + b"{}")
def test_any_bytes_are_read_or_refused(tmp_path, data):
    outcome(tmp_path / "a.safetensors", data)


@QUIET
@given(position=st.integers(0, len(VALID) - 1), value=st.integers(0, 255), cut=st.integers(0, 30))
def test_a_damaged_byte_is_never_more_than_a_refusal_and_agrees_with_the_library(
    tmp_path, position, value, cut
):
    content = bytearray(VALID + bytes(range(24)))
    content[position] = value
    content = bytes(content[: len(content) - cut]) if cut < 25 else bytes(content)
    path = tmp_path / "a.safetensors"
    mine = outcome(path, content)
    try:
        theirs = safetensors.torch.load_file(path)
    except Exception:
        return  # where the library refuses, a name or a number may still be harmless here
    assert mine is not None
    assert set(mine) == set(theirs)
    assert all(same(mine[name], theirs[name]) for name in mine)


@QUIET
@given(header=HEADERS, size=st.integers(0, 48))
def test_any_header_is_read_or_refused(tmp_path, header, size):
    text = json.dumps(header).encode()
    read = outcome(tmp_path / "a.safetensors", len(text).to_bytes(8, "little") + text + bytes(size))
    if read is not None:  # then the tensors fill the data exactly
        assert sum(tensor.nbytes for tensor in read.values()) == size


def test_memory_is_used_again_only_when_no_view_of_it_is_left():
    buffers = Buffers()
    first = buffers.take(2 << 20)
    place = first.data_ptr()
    view = first.view(torch.bfloat16).reshape(1024, -1)[3:7]
    del first
    second = buffers.take(2 << 20)
    assert second.data_ptr() != place
    storage = view.untyped_storage()
    del view
    assert buffers.take(2 << 20).data_ptr() != place
    del storage
    assert buffers.take(2 << 20).data_ptr() == place
