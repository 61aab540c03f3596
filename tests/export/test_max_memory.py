"""`--max-memory` is a bound on resident memory, and changes no byte of an export."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models
import torch
from live import folder_bytes
from safetensors.torch import load_file, save_file

from daq_lightning import CheckpointError, ScaleSearch, export_checkpoint
from daq_lightning.checkpoint.budget import memory_of
from daq_lightning.cli import main
from daq_lightning.export.memory import OVERHEAD, Room

QUICK = ScaleSearch(n_coarse=2, n_fine=1)
MEASURED = """
import sys
import torch
from daq_lightning import ScaleSearch, export_checkpoint, load_checkpoint
from daq_lightning.numerics.backends.heap import return_freed_memory
torch.set_num_threads(1)

def memory(kind):
    [line] = [line for line in open("/proc/self/status") if line.startswith(kind)]
    return int(line.split()[1]) * 1024

folder, scheme, limit = sys.argv[1], sys.argv[2], int(sys.argv[3])
for size, most in (("small", None), ("large", None), ("large", limit)):  # the first warms up
    post, base = (load_checkpoint(f"{folder}/{size}-{role}.safetensors") for role in ("post", "base"))
    return_freed_memory()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak begins anew
    before = memory("VmRSS")
    out = f"{folder}/{scheme}-{size}-{most}"
    export_checkpoint(post, base, out, scheme=scheme, search=ScaleSearch.absmax(), max_memory=most)
    print(memory("VmHWM") - before)
"""


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return tiny_models.make_pair(tmp_path_factory.mktemp("pair"), tiny_models.qwen3_moe)


@pytest.fixture(scope="module")
def matrices(tmp_path_factory):
    """Folder of weights in float32, a small one and five of 16 MB, in two files each."""
    folder = tmp_path_factory.mktemp("matrices")
    for size, shape, count in (("small", (128, 128), 1), ("large", (2048, 2048), 5)):
        for role, change in (("base", 0.0), ("post", 1e-3)):
            weights = {f"layers.{i}.x.weight": torch.full(shape, 0.1 + change * i) for i in range(count)}
            save_file(weights, folder / f"{size}-{role}.safetensors")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["FP8_BLOCK", "NVFP4A16"])
def test_the_peak_of_resident_memory_stays_below_it(matrices, scheme):
    post, base = (load_file(matrices / f"large-{role}.safetensors") for role in ("post", "base"))
    with pytest.raises(CheckpointError) as caught:
        export_checkpoint(post, base, matrices / "out", scheme=scheme, max_memory=1)
    limit = int(float(re.search(r"needs: (\d+) MB", str(caught.value))[1]) * 1e6) + 1_000_000
    root = str(Path(__file__).resolve().parents[2])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    arguments = [sys.executable, "-c", MEASURED, str(matrices), scheme, str(limit)]
    result = subprocess.run(arguments, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-2000:]
    free, bounded = (int(line) for line in result.stdout.splitlines()[-2:])
    assert bounded <= limit
    assert bounded < 0.8 * free  # else it would bound nothing


@pytest.mark.parametrize("rounding", ["nearest", "curvature"])
def test_a_bound_changes_no_byte(pair, tmp_path, rounding):
    base, post = pair
    options = {"search": QUICK, "rounding": rounding}
    export_checkpoint(post, base, tmp_path / "free", **options)
    for limit in ("90MB", "2 GB"):
        export_checkpoint(post, base, tmp_path / "out", max_memory=limit, **options)
        assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "free")


def test_the_command_refuses_too_little_in_words(pair, tmp_path, capsys):
    base, post = pair
    arguments = ["quantize", str(post), "--base", str(base), "--out", str(tmp_path / "out"), "--quiet"]
    arguments += ["--n-coarse", "2", "--max-memory"]
    assert main([*arguments, "1 kB"]) == 1
    said = capsys.readouterr().err
    assert re.search(r"--max-memory 1 kB is less than what \S+ needs: 6[78]\.?\d* MB", said)
    assert main([*arguments, "much"]) == 2
    assert "'2GB'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert main([*arguments, "2GB", "--budget", "9 bits"]) == 0


@pytest.mark.parametrize("said", ["much", "", "-1GB", "2 bits", "GB", True, "1.2.3 GB", 0, "9" * 400 + "GB"])
def test_what_is_no_amount_of_memory_is_refused(said):
    with pytest.raises(ValueError, match="max_memory"):
        memory_of(said)


def test_room_is_given_back_once():
    room = Room(OVERHEAD + 10)
    assert room.take(6, wait=False)
    assert not room.take(5, wait=False)
    assert room.take(4, wait=False)
    give = room.giver(6)
    give()
    give()
    assert room.take(6, wait=False)
    assert not room.take(1, wait=False)
    assert Room(None).take(1 << 60, wait=False)
