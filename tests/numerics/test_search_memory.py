"""A search needs at most half of the weight's float32 size beyond its inputs, its codes included, for any
K."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

# the peak of the resident set is reset by the kernel, so that it covers the search alone
PEAK = """
import sys
import torch
from daq_lightning.numerics.backends import cpu, reference
from daq_lightning.numerics.formats import PerBlock, PerChannel
from daq_lightning.numerics.search.settings import ScaleSearch
from daq_lightning.numerics.search.search import search_scale

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))

granularity, search, backend = eval(sys.argv[1]), eval(sys.argv[2]), eval(sys.argv[3])
small = torch.randn(512, 512).bfloat16()
search_scale(small, small * 1.01, granularity, search, backend=backend)
weight = torch.randn(*map(int, sys.argv[4].split("x"))).bfloat16()
base = weight * 1.01
with open("/proc/self/clear_refs", "w") as reset:
    reset.write("5")
before = peak()
search_scale(weight, base, granularity, search, backend=backend)
print((peak() - before) / (4 * weight.numel()))
"""

TALL, WIDE = "2048x4096", "256x32768"  # the latter has two rows of blocks
CASES = [
    ("PerBlock(128, 128)", "ScaleSearch()", "cpu", TALL),
    ("PerBlock(128, 128)", "ScaleSearch.dense(64)", "cpu", WIDE),
    ("PerChannel()", "ScaleSearch.dense(64)", "cpu", TALL),
    ("PerChannel()", "ScaleSearch.dense(256, alpha_scope='layer')", "cpu", TALL),
    ("PerBlock(128, 128)", "ScaleSearch.dense(2)", "reference", WIDE),
]


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of the resident set from /proc")
@pytest.mark.parametrize(("granularity", "search", "backend", "shape"), CASES)
def test_peak_memory_of_a_search(granularity, search, backend, shape):
    command = [sys.executable, "-c", PEAK, granularity, search, backend, shape]
    # freed memory goes back at once, so that the search cannot live on what was resident before it
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout) <= 0.5, done.stdout
