"""Room on the disk is asked about before anything is written."""

import os
import re
import shutil
import subprocess
from types import SimpleNamespace

import pytest
import tiny_models

from daq_lightning import CheckpointError, ScaleSearch, export_checkpoint
from daq_lightning.checkpoint.writer import CheckpointWriter
from daq_lightning.cli import main

QUICK = ScaleSearch(n_coarse=2, n_fine=1)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    return tiny_models.make_pair(folder, lambda: tiny_models.llama(num_hidden_layers=1))


@pytest.fixture
def free(monkeypatch):
    """Sets what the system says is free."""

    def set_to(size):
        monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(total=0, used=0, free=size))

    return set_to


def size_of(folder):
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def test_too_little_room_is_said_with_both_numbers_before_a_weight_is_read(
    pair, tmp_path, free, capsys, monkeypatch
):
    base, post = pair
    export_checkpoint(post, base, tmp_path / "whole", search=QUICK)
    needed = size_of(tmp_path / "whole")
    monkeypatch.setattr("daq_lightning.export.run._write_tensors", None)
    free(7_000)
    arguments = ["quantize", str(post), "--base", str(base), "--quiet", "--out"]
    assert main([*arguments, str(tmp_path / "a" / "out")]) == 1
    said = capsys.readouterr().err
    needs = float(re.search(rf"needs ([0-9.]+) kB, and {tmp_path}.* has 7 kB free", said)[1])
    assert needs == pytest.approx(needed / 1000, rel=0.02)  # but for the header
    assert sorted(path.name for path in tmp_path.iterdir()) == ["whole"]
    # an earlier export stays until the new one is there
    assert main([*arguments, str(tmp_path / "whole")]) == 1
    assert "An earlier export there stays" in capsys.readouterr().err
    assert size_of(tmp_path / "whole") == needed
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    assert main([*arguments, "memory://disk/out"]) == 1
    assert "TMPDIR" in capsys.readouterr().err


def test_just_enough_is_enough(pair, tmp_path, free):
    base, post = pair
    export_checkpoint(post, base, tmp_path / "whole", search=QUICK)
    header = 3_000
    free(size_of(tmp_path / "whole") + header)
    export_checkpoint(post, base, tmp_path / "out", search=QUICK)
    free(size_of(tmp_path / "whole") - header)
    with pytest.raises(CheckpointError, match="free"):
        export_checkpoint(post, base, tmp_path / "other", search=QUICK)


@pytest.mark.parametrize("resume", [False, True])
def test_what_a_killed_export_left_counts_as_free(pair, tmp_path, free, monkeypatch, resume):
    """It is removed, or gone on with, so it needs no room of its own."""
    base, post = pair
    with monkeypatch.context() as patch:

        def killed(self):
            os.close(self._lock)  # as the system does it
            self._lock, self._files = None, {}
            raise KeyboardInterrupt

        patch.setattr(CheckpointWriter, "finish", killed)
        with pytest.raises(KeyboardInterrupt):
            export_checkpoint(post, base, tmp_path / "out", search=QUICK)
    [left] = tmp_path.glob(".out.partial-*.lock")
    taken = sum(512 * path.stat().st_blocks for path in left.with_suffix("").iterdir())
    assert taken >= size_of(left.with_suffix("")) > 0
    free(0)
    export_checkpoint(post, base, tmp_path / "out", search=QUICK, resume=resume)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_real_disk_that_is_too_small(pair, tmp_path):
    base, post = pair
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        with pytest.raises(CheckpointError, match=r"needs .* kB, and .*disk has 6[0-9.]* kB free"):
            export_checkpoint(post, base, place / "out", search=QUICK)
        assert list(place.iterdir()) == []
    finally:
        subprocess.run(["umount", str(place)], check=True)
