"""What docs/security.md promises: no code from files, no way out of a folder, no memory by a number."""

from __future__ import annotations

import ast
import functools
import io
import json
import os
import pathlib
import pickle
import random
import re
import resource
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import fuzz
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

from daq_lightning import CheckpointError
from daq_lightning.audit.chain import Chain
from daq_lightning.checkpoint.adapter_config import is_number
from daq_lightning.checkpoint.folder import read_json
from daq_lightning.checkpoint.lightning_file import read_lightning_checkpoint
from daq_lightning.cli import main

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "daq_lightning").rglob("*.py"))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The files of all readers."""
    place = tmp_path_factory.mktemp("fuzz").resolve()
    fuzz.readers(place / "made")
    return place / "made"


# The package itself


def calls(path):
    """Every call of a module as (dotted name, its keyword arguments, line)."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {word.arg: word.value for word in node.keywords}, node.lineno


def test_no_pickle_is_loaded_no_text_is_run_and_remote_code_is_never_trusted():
    for path, name, words, line in ((source, *call) for source in SOURCES for call in calls(source)):
        where = f"{path.name}:{line} {name}"
        leaf = name.rpartition(".")[2]
        if name == "torch.load":
            assert ast.unparse(words["weights_only"]) == "True", where
        if leaf in ("loads", "load") and name.partition(".")[0] in (
            "pickle",
            "dill",
            "joblib",
            "marshal",
            "shelve",
        ):
            # a copy of an error of this process, to see whether the other ranks will be able to read it
            assert (path.name, name) == ("ranks.py", "pickle.loads"), where
        assert leaf not in ("Unpickler", "run_path", "run_module", "loads_all"), where
        assert name not in (
            "exec",
            "eval",
            "__import__",
            "yaml.load",
            "yaml.unsafe_load",
            "yaml.full_load",
        ), where
        if name.startswith("subprocess.") or name in ("os.system", "os.popen"):
            assert "shell" not in words, where
            assert path.name == "compiling.py", where
        if "trust_remote_code" in words:
            assert ast.unparse(words["trust_remote_code"]) == "False", where
        if name.endswith((".AutoTokenizer.from_pretrained", ".AutoConfig.from_pretrained")):
            assert {"trust_remote_code", "local_files_only"} <= set(words), where


def test_only_the_reader_of_sharded_checkpoints_unpickles_and_makes_known_classes_only():
    kinds = {
        (path.name, ast.unparse(base))
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
        for base in node.bases
        if "pickle" in ast.unparse(base).lower()
    }
    assert kinds == {("sharded_file.py", "pickle.Unpickler")}


# Numbers that claim memory


def in_little_memory(act, *arguments):
    """Runs a function of this file in a process that may take 1 GiB more than it has; what it printed."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sys.executable, __file__, act.__name__, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


def write_ckpt(path, program, records=None):
    """A `.ckpt` archive of this pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", program)
        for name, content in (records or {"data/0": b"\0" * 8}).items():
            archive.writestr(f"a/{name}", content)
    return path


def tensor_program(size, stride, offset=b"K\0"):
    """A pickle of {"state_dict": {"w": tensor}} on a storage of two floats; size and stride as programs."""
    storage = b"((X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\0" + b"0X\3\0\0\0cpuK\2tQ"
    storage = storage.replace(b"((", b"(", 1)
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + offset + size + stride + b"\x89" + b"}tR"
    return b"\x80\2}X\n\0\0\0state_dict}X\1\0\0\0w" + tensor + b"ss."


def laughs(depth):
    """A tuple of ten references to a tuple of ten references to ..."""
    program = b"K\1"
    for index in range(depth):
        memo = bytes([100 + index])
        program += b"q" + memo + b"0(" + (b"h" + memo) * 10 + b"t"
    return program + b"\x85"


def number(value):
    """An integer of eight bytes."""
    return b"\x8a\x08" + struct.pack("<q", value)


PROGRAMS = {
    "size of tuples that hold one another": (laughs(10), b"K\1\x85"),
    "repeated 2^60 times": (number(2**60) + b"\x85", b"K\0\x85"),
    "repeated 2^40 x 2^40 times": (number(2**40) * 2 + b"\x86", b"K\0K\0\x86"),
    "a size of 2^500": (b"\x8a\x50" + b"\1" * 80 + b"\x85", b"K\0\x85"),
}


def test_a_ckpt_of_some_hundred_bytes_claims_no_memory(tmp_path):
    paths = [
        write_ckpt(tmp_path / f"{index}.ckpt", tensor_program(*program))
        for index, program in enumerate(PROGRAMS.values())
    ]
    assert in_little_memory(refused, *paths).count("a tensor") == len(PROGRAMS)


def refused(*paths):
    for path in paths:
        with pytest.raises(CheckpointError) as caught:
            read_lightning_checkpoint(path)
        assert len(str(caught.value)) < 1000
        print(caught.value)


def test_a_tensor_that_repeats_its_storage_is_read_as_torch_reads_it(tmp_path):
    state = {"mask": torch.arange(3.0).expand(4, 3), "w": torch.ones(2, 2)}
    torch.save({"state_dict": state}, tmp_path / "a.ckpt")
    read = read_lightning_checkpoint(tmp_path / "a.ckpt")
    assert all(torch.equal(read[name], state[name]) for name in state)


@pytest.mark.parametrize("value", [10**400, -(10**400), float("nan"), float("inf"), True, "1", None])
def test_numbers_that_cannot_be_computed_with_are_none(value):
    assert not is_number(value)
    assert is_number(-3)
    assert is_number(0.5)


@pytest.mark.parametrize("depth", [101, 400, 900])
def test_json_that_is_nested_too_deep_is_refused(tmp_path, depth):
    (tmp_path / "a.json").write_text('{"a":' * depth + "1" + "}" * depth)
    with pytest.raises(CheckpointError, match="deeper than 100 levels"):
        read_json(tmp_path / "a.json")
    (tmp_path / "a.json").write_text('{"a":' * 100 + "1" + "}" * 100)
    assert read_json(tmp_path / "a.json")


def test_json_of_a_terabyte_is_refused_before_it_is_read(tmp_path):
    (tmp_path / "a.json").touch()
    os.truncate(tmp_path / "a.json", 2**40)  # without taking room on the disk
    with pytest.raises(CheckpointError, match="has 1099511627776 bytes"):
        read_json(tmp_path / "a.json")


# Ways out of a folder


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("config.json", "post"),
        ("model.safetensors.index.json", "post"),
        ("adapter_config.json", "adapter"),
        ("adapter_model.safetensors", "adapter"),
        ("daq_manifest.json", "fp8"),
        ("daq_report.json", "fp8"),
    ],
)
def test_a_link_out_of_the_folder_is_not_followed(made, tmp_path, capsys, name, where):
    for folder in ("base", "post", "adapter", "fp8"):
        shutil.copytree(made / folder, tmp_path / folder)
    private = tmp_path / "private"
    (tmp_path / where / name).rename(private)
    (tmp_path / where / name).symlink_to(private)
    quantize = [
        "quantize",
        str(tmp_path / "post"),
        "--base",
        str(tmp_path / "base"),
        "--out",
        str(tmp_path / "out"),
    ]
    command = {
        "post": quantize,
        "adapter": [
            "quantize",
            str(tmp_path / "base"),
            "--adapter",
            str(tmp_path / "adapter"),
            *quantize[4:],
        ],
        "fp8": ["inspect" if "report" in name else "chain", str(tmp_path / "fp8")],
    }[where]
    assert main(command) in (1, 3)
    said = "".join(capsys.readouterr())
    assert "is a link out of its folder" in said
    assert not (tmp_path / "out").exists()


def test_a_file_of_a_manifest_that_is_a_link_is_not_read(made, tmp_path):
    shutil.copytree(made / "fp8", tmp_path / "fp8")
    (tmp_path / "private").write_bytes((tmp_path / "fp8" / "generation_config.json").read_bytes())
    (tmp_path / "fp8" / "generation_config.json").unlink()
    (tmp_path / "fp8" / "generation_config.json").symlink_to(tmp_path / "private")
    problems = Chain.open(tmp_path / "fp8").verify()
    assert any("is a link out of its folder" in problem for problem in problems)


# Sharded checkpoints: a pickle that says where bytes lie


@pytest.fixture
def sharded(tmp_path):
    content = {"state_dict": {"w": torch.arange(12.0).view(3, 4), "v": torch.ones(5)}}
    dcp.save(content, checkpoint_id=tmp_path / "a.ckpt", no_dist=True)
    return tmp_path / "a.ckpt"


def place_of(metadata, name="state_dict.w"):
    return next(place for index, place in metadata.storage_data.items() if index.fqn == name)


def elsewhere(metadata, path):
    place_of(metadata).relative_path = f"../{path.parent.name}/../other.distcp"


def absolute(metadata, path):
    place_of(metadata).relative_path = "/etc/passwd"


def beyond(metadata, path):
    place_of(metadata).length = 2**40


def before(metadata, path):
    place_of(metadata).offset = -1


def compressed(metadata, path):
    place_of(metadata).transform_descriptors = ["stream.zstd"]


def huge(metadata, path):
    entry = metadata.state_dict_metadata["state_dict.w"]
    entry.size = torch.Size([2**40, 4])


def huge_piece(metadata, path):
    entry = metadata.state_dict_metadata["state_dict.w"]
    entry.size = torch.Size([2**40, 4])
    entry.chunks[0].sizes = entry.size


def half_filled(metadata, path):
    entry = metadata.state_dict_metadata["state_dict.w"]
    entry.chunks = [ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([1, 4]))]


def overlapping(metadata, path):
    whole = (path / place_of(metadata).relative_path).stat().st_size
    for place in metadata.storage_data.values():
        place.offset, place.length = 0, whole


def repeated(metadata, path):
    """As sizes, what a product makes a text of 2^30 characters of."""
    metadata.state_dict_metadata["state_dict.w"].chunks[0].sizes = ("x", 2**30)


def many_dimensions(metadata, path):
    """A product of so many factors takes long."""
    entry = metadata.state_dict_metadata["state_dict.w"]
    entry.size = entry.chunks[0].sizes = torch.Size([2**62] * 10**5)


def other_place(metadata, path):
    place_of(metadata).offset = [0]


LIES = {
    **dict.fromkeys((elsewhere, absolute), "is not in the folder"),
    **dict.fromkeys((beyond, before), "ends behind the end"),
    compressed: "are transformed",
    huge: "hold 12 numbers, it has 4398046511104",
    huge_piece: "does not hold its 4398046511104 numbers",
    half_filled: "hold 4 numbers, it has 12",
    overlapping: "overlap",
    repeated: "other dimensions",
    many_dimensions: "at most 64 dimensions",
    other_place: "two numbers for its place",
}


@pytest.mark.parametrize("lie", LIES)
def test_metadata_that_contradicts_the_files_is_refused(sharded, lie):
    assert torch.equal(read_lightning_checkpoint(sharded)["w"], torch.arange(12.0).view(3, 4))
    metadata = pickle.loads((sharded / ".metadata").read_bytes())
    shutil.copy(next(sharded.glob("*.distcp")), sharded.parent / "other.distcp")
    lie(metadata, sharded)
    (sharded / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=rf"a\.ckpt cannot be read: .*{LIES[lie]}"):
        read_lightning_checkpoint(sharded)


def with_piece(folder, content):
    """Puts other bytes in the place of the piece of `w`."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    place = place_of(metadata)
    (folder / "new.distcp").write_bytes(content)
    place.relative_path, place.offset, place.length = "new.distcp", 0, len(content)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def saved(content, program=None):
    """What `torch.save` writes, with another pickle if there is one."""
    buffer, other = io.BytesIO(), io.BytesIO()
    torch.save(content, buffer)
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(other, "w") as new:
        for name in old.namelist():
            new.writestr(name, program if program and name.endswith("data.pkl") else old.read(name))
    return other.getvalue()


TWICE_FORTY_TIMES = b"\x80\2}K\1" + b"".join(b"q%ch%c\x86" % (n, n) for n in range(40)) + b"Ns."


@pytest.mark.parametrize(
    ("piece", "said"),
    [
        (saved(torch.ones(3, 4), TWICE_FORTY_TIMES), "is no tensor, expected torch.float32 (3, 4)"),
        (saved(torch.ones(3, 4, dtype=torch.float64)), "is torch.float64 (3, 4), expected torch.float32"),
        (saved(torch.ones(4, 3)), "is torch.float32 (4, 3), expected"),
        (saved([torch.ones(3, 4)]), "is no tensor"),
    ],
)
def test_a_piece_is_read_as_data_and_has_to_be_what_the_metadata_says(sharded, monkeypatch, piece, said):
    """torch's own reader, weights only, does not come back from the first."""
    monkeypatch.setattr(torch, "load", None)
    with_piece(sharded, piece)
    state = read_lightning_checkpoint(sharded)
    assert torch.equal(state["v"], torch.ones(5))
    with pytest.raises(CheckpointError, match=re.escape(f"a piece of 'w' {said}")):
        state["w"]


@pytest.mark.parametrize(
    "target",
    [
        "torch.distributed.checkpoint.metadata Metadata",
        "pathlib PosixPath",
        "torch.serialization _get_layout",
    ],
)
def test_metadata_sets_no_attribute_of_a_class(sharded, target):
    """State of an object whose second half is set by setattr; the object is a class."""
    module, name = target.split()
    attributes = b"}X\n\0\0\0is_symlinkK\1s"
    program = f"c{module}\n{name}\n".encode() + b"N" + attributes + b"\x86b."
    (sharded / ".metadata").write_bytes(b"\x80\2" + program)
    with pytest.raises(CheckpointError):
        read_lightning_checkpoint(sharded)
    found = functools.reduce(getattr, (name,), sys.modules[module])
    assert getattr(found, "is_symlink", None) in (None, pathlib.Path.is_symlink)


# What is shown


def test_names_cannot_steer_the_terminal(made, tmp_path, capsys):
    shutil.copytree(made / "fp8", tmp_path / "fp8")
    for name in ("daq_report.json", "daq_manifest.json"):
        file = tmp_path / "fp8" / name
        content = json.loads(
            file.read_text().replace("model.layers.0.mlp.up_proj", "up\\u001b[2J\\u009b1m\\u202e")
        )
        file.write_text(json.dumps(fuzz.signed(content) if "manifest" in name else content))
    outputs = []
    for command in (["inspect"], ["inspect", "--json"], ["verify"], ["chain"]):
        main([command[0], str(tmp_path / "fp8"), *command[1:]])
        outputs.append(capsys.readouterr())
        assert not {"\x1b", "\x9b", "\u202e"} & set("".join(outputs[-1]))
    assert "up\\u001b[2J" in outputs[0].out
    assert "up\x1b[2J\x9b1m\u202e.weight" in json.loads(outputs[1].out)["tensors"]


# Every reader, a few mutations each; `python tests/fuzz.py` for many


@pytest.mark.slow
def test_mutated_files_end_in_clean_errors(tmp_path):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    result = subprocess.run(
        [
            sys.executable,
            str(ROOT / "tests" / "fuzz.py"),
            "--inputs",
            "300",
            "--seed",
            "1",
            "--keep",
            str(tmp_path),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-2000:]
    assert "300 inputs" in result.stdout
    assert "0 findings" in result.stdout


def test_mutations_change_files_and_end():
    chance = random.Random(0)
    data = json.dumps({"a": [1, {"b": "c"}]}).encode()
    for mutate in (fuzz.of_json, fuzz.of_manifest, fuzz.mutated_bytes, fuzz.mutated_text):
        assert len({mutate(data, chance) for _ in range(50)}) > 20
    saved = io.BytesIO()
    torch.save({"state_dict": {"a": torch.ones(2)}}, saved)
    assert len({fuzz.mutated_archive(saved.getvalue(), chance) for _ in range(50)}) > 20


if __name__ == "__main__":
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), resource.RLIM_INFINITY))
    globals()[sys.argv[1]](*sys.argv[2:])
