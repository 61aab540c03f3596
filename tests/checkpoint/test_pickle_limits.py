"""What Python's unpickler would not come back from is refused before it begins; what torch writes is not."""

from __future__ import annotations

import pickle
import sys

import pytest
import torch
import torch.distributed.checkpoint as dcp

from daq_lightning import CheckpointError
from daq_lightning.checkpoint.pickle_limits import MOST_LEVELS, MOST_REPEATED, check_pickle
from daq_lightning.checkpoint.sharded_file import ShardedFile


def doubled(times):
    """A tuple that holds a tuple twice, and so on: 2^times numbers, written in few bytes."""
    return b"K\1" + b"".join(b"\x94h%c\x86" % number for number in range(times))


FORMAT = b"ctorch.distributed.checkpoint.metadata\n_MEM_FORMAT_ENCODING\n"
HOSTILE = {
    "a key whose hash takes 2^40 steps": (b"}" + doubled(40) + b"Ns.", "repeats what it holds"),
    "the same for a call": (FORMAT + doubled(40) + b"\x85R.", "repeats what it holds"),
    "the same by the opcode DUP": (b"}K\1" + b"2\x86" * 40 + b"Ns.", "uses DUP"),
    "a key whose hash takes a million frames": (b"}K\1" + b"\x85" * 10**6 + b"Ns.", "levels deep"),
    "a memo of 2^31 places": (b"Nr\xff\xff\xff\x7f.", "the number 2147483647"),
    "a list in itself": (b"]\x94h\0a.", "after it has used it"),
    "a list that grows after it was used": (b"]\x94h\0K\1a\x86.", "after it has used it"),
    "an integer of 255 bytes": (b"\x8a\xff" + b"\x7f" * 255 + b".", "64 bits"),
    "an integer of a megabit": (b"\x8b\0\0\2\0" + b"\x7f" * (1 << 17) + b".", "uses LONG4"),
    "an array of 2^60 bytes": (b"\x96" + (1 << 60).to_bytes(8, "little") + b"x.", "expected 11529215046068"),
    "a text that is used very often": (
        b"X\0\x10\0\0" + b"x" * 4096 + b"\x94" + b"h\0" * 4096 + b".", "repeats what it holds"
    ),
    "an object that is not there": (b"h\7.", "object 7, which it does not have"),
    "a group without a begin": (b"t.", "did not begin"),
    "an operand that is not there": (b"\x85.", "not there"),
    "an operand before a group": (b"N(\x86.", "not there"),
    "an object by its extension code": (b"\x82\1.", "EXT1"),
    "no end": (b"N", "before seeing STOP"),
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE)
def test_a_pickle_that_would_never_end_is_refused_unread(what):
    program, said = HOSTILE[what]
    with pytest.raises(ValueError, match=said):
        check_pickle(program)


def test_the_metadata_of_a_sharded_checkpoint_is_checked(tmp_path):
    dcp.save({"state_dict": {"w": torch.ones(2)}}, checkpoint_id=tmp_path / "a.ckpt", no_dist=True)
    (tmp_path / "a.ckpt" / ".metadata").write_bytes(pickle.dumps(1 << 100))
    with pytest.raises(CheckpointError, match=r"a\.ckpt cannot be read: its pickle has an integer of more"):
        ShardedFile(tmp_path / "a.ckpt")


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_what_torch_writes_is_far_from_the_limits(tmp_path, monkeypatch, protocol):
    names = [f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(300)]
    content = {"state_dict": {name: torch.ones(3, 4) for name in names}, "loops": {"a": [1, {"b": 2.5}]}}
    dcp.save(content, checkpoint_id=tmp_path / "a.ckpt", no_dist=True)
    metadata = pickle.loads((tmp_path / "a.ckpt" / ".metadata").read_bytes())
    limits = sys.modules[check_pickle.__module__]
    monkeypatch.setattr(limits, "MOST_REPEATED", MOST_REPEATED / 10)
    monkeypatch.setattr(limits, "MOST_LEVELS", MOST_LEVELS / 5)
    check_pickle(pickle.dumps(metadata, protocol))
    (tmp_path / "a.ckpt" / ".metadata").write_bytes(pickle.dumps(metadata, protocol))
    assert set(ShardedFile(tmp_path / "a.ckpt")) == set(names)
