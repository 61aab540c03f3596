"""Where a system lacks a call into the file system: the same export without it, or one clear refusal."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from test_writer import hashes, specs_of, tensors_of, write

from daq_lightning.checkpoint import locks
from daq_lightning.checkpoint.destination import check_destination
from daq_lightning.checkpoint.tensor_file import CheckpointError
from daq_lightning.checkpoint.writer import CheckpointWriter
from daq_lightning.training.claims import claim, free_name


@pytest.fixture
def macos(monkeypatch):
    monkeypatch.delattr(os, "posix_fallocate")
    monkeypatch.delattr(os, "fdatasync")


def test_an_export_without_the_calls_that_macos_lacks_has_the_same_bytes(tmp_path, monkeypatch, request):
    monkeypatch.setattr("daq_lightning.checkpoint.writer._FLUSH", 64)  # else so little is never flushed
    expected = hashes(write(tmp_path / "expected", tensors_of()))
    request.getfixturevalue("macos")
    assert hashes(write(tmp_path / "out", tensors_of())) == expected


def test_what_was_written_is_pushed_to_the_disk_without_fdatasync_too(tmp_path, macos, monkeypatch):
    monkeypatch.setattr("daq_lightning.checkpoint.writer._FLUSH", 64)
    pushed, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (pushed.append(descriptor), fsync(descriptor))[1])
    tensors = tensors_of()
    with CheckpointWriter(tmp_path / "out", specs_of(tensors)) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
        assert pushed


def test_names_are_claimed_without_the_calls_that_macos_lacks(tmp_path, macos):
    with claim(tmp_path / "base"), free_name(tmp_path / "base") as other:
        assert other == tmp_path / "base-v1"


REFUSED = {
    "destination": lambda folder: check_destination(folder / "out"),
    "writer": lambda folder: CheckpointWriter(folder / "out", specs_of(tensors_of())),
    "claim": lambda folder: claim(folder / "base").__enter__(),
}


@pytest.mark.parametrize("use", REFUSED.values(), ids=REFUSED)
def test_a_system_without_file_locks_is_refused_in_one_sentence_and_nothing_is_left(
    tmp_path, monkeypatch, use
):
    monkeypatch.setattr(locks, "fcntl", None)
    with pytest.raises(CheckpointError, match=r"on Linux and macOS: this system has no file locks.*WSL"):
        use(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_package_can_be_imported_and_says_so_where_there_is_no_fcntl(tmp_path):
    code = """
import pathlib, sys, warnings
sys.modules["fcntl"] = None  # importing it raises ImportError, as on Windows
import torch, daq_lightning, daq_lightning.training.callback
from daq_lightning.checkpoint.destination import check_destination
from daq_lightning.numerics.backends import choose
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    print(choose(torch.device("cpu")).__name__)
print(caught[-1].message)
try:
    check_destination(pathlib.Path(sys.argv[1]))
except Exception as error:
    print(type(error).__name__, error)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    backend, warning, error = done.stdout.splitlines()
    assert backend == "daq_lightning.numerics.backends.reference"
    assert "made for Linux and macOS" in warning
    assert error.startswith("CheckpointError Exports are written on Linux and macOS")
