"""Sharded checkpoints are read tensor by tensor, by one process, and run nothing that they name."""

from __future__ import annotations

import os
import pickle
import re
import subprocess

import pytest
import torch
import torch.distributed.checkpoint as dcp

from daq_lightning import CheckpointError
from daq_lightning.checkpoint.lightning_file import read_lightning_checkpoint
from daq_lightning.checkpoint.sharded_file import ShardedFile

STATE = {
    "model.a": torch.arange(12.0).reshape(3, 4).bfloat16(),
    "model.b": torch.tensor(3),
    "model.empty": torch.zeros(0, 4),
}


@pytest.fixture
def folder(tmp_path):
    content = {"state_dict": STATE, "optimizer_0": {"x": torch.ones(2)}}
    dcp.save(content, checkpoint_id=tmp_path / "a.ckpt", no_dist=True)
    return tmp_path / "a.ckpt"


def test_tensors_are_read_when_asked_for(folder, recwarn):
    read = read_lightning_checkpoint(folder)
    assert set(read) == set(STATE)
    for name, tensor in STATE.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)
        assert read.spec(name).shape == tuple(tensor.shape)
    assert not [warning for warning in recwarn if "torch.distributed" in str(warning.message)]


@pytest.mark.parametrize("module", ["pathlib", "pathlib._local"])
def test_paths_are_read_under_the_names_of_every_python(folder, module):
    """Python 3.13 keeps its paths in `pathlib._local`."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    stored = pickle.dumps(metadata, protocol=2)
    found = re.findall(rb"cpathlib[._a-z]*\nPosixPath\n", stored)
    assert found
    for name in found:
        stored = stored.replace(name, f"c{module}\nPosixPath\n".encode())
    (folder / ".metadata").write_bytes(stored)
    read = ShardedFile(folder)
    assert all(torch.equal(read[name], tensor) for name, tensor in STATE.items())


class Evil:
    def __reduce__(self):
        return subprocess.call, (["touch", os.environ["EVIL"]],)


@pytest.mark.parametrize("evil", [Evil(), {"metadata": Evil()}])
def test_metadata_that_names_anything_else_is_refused_and_not_run(folder, monkeypatch, evil):
    monkeypatch.setenv("EVIL", str(folder / "ran"))
    (folder / ".metadata").write_bytes(pickle.dumps(evil))
    with pytest.raises(CheckpointError, match=r"its metadata names subprocess\.call, which"):
        read_lightning_checkpoint(folder)
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("what", ["cut", "empty", "other", "no state"])
def test_metadata_that_is_damaged_is_an_error_that_says_so(folder, what):
    path = folder / ".metadata"
    if what == "no state":
        dcp.save({"x": torch.ones(1)}, checkpoint_id=folder, no_dist=True)
    else:
        path.write_bytes({"cut": path.read_bytes()[:50], "empty": b"", "other": pickle.dumps([1, 2])}[what])
    said = r"a\.ckpt (cannot be read|has no state_dict).*Lightning's Trainer"
    with pytest.raises(CheckpointError, match=said):
        ShardedFile(folder)


def test_pieces_that_are_cut_off_or_gone_are_an_error_that_says_so(folder):
    [piece] = folder.glob("*.distcp")
    whole = piece.read_bytes()
    piece.write_bytes(whole[: len(whole) // 3])
    with pytest.raises(CheckpointError, match="cannot be read"):
        for name in STATE:
            ShardedFile(folder)[name]
    piece.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        ShardedFile(folder)["model.a"]
