"""What Triton's compiler makes of the CUDA kernels, for GPUs that need not be there.

    python tests/numerics/compiled_kernels.py        # the table of numerics/backends/README.md

The backend runs on a CPU until it launches a kernel, which Triton then compiles and does not start.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from daq_lightning.numerics.backends import cuda
from daq_lightning.numerics.formats import PerBlock, PerChannel
from daq_lightning.numerics.formats.fp8 import FP8_E4M3
from daq_lightning.numerics.objectives import METRICS
from daq_lightning.numerics.search.settings import ScaleSearch
from daq_lightning.numerics.search.stages import Task

KERNELS = ("delta_stats_kernel", "search_kernel")
TARGETS = (80, 90, 100)
DTYPES = ("bfloat16", "float32")
CONVERSION = "cvt.rn.satfinite.e4m3x2.f32"


class Variant(NamedTuple):
    """One of the programs that a kernel is compiled to."""

    metric: str = "hybrid"
    reader: str = ""
    granularity: PerBlock | PerChannel = PerBlock(128, 128)
    aligned: bool = True  # addresses and sizes are multiples of 16
    shape: tuple[int, int] = (144, 4112)
    dense: int = 0  # candidates of a dense search, instead of the paper's


class Compiled(NamedTuple):
    """What a program needs, and its text."""

    registers: int  # a thread
    stack: int  # bytes a thread: where registers are spilled to
    ptx: str


VARIANTS = [
    *(Variant(metric=metric) for metric in METRICS),
    Variant(reader="bfloat16"),
    Variant(reader="float16"),
    Variant(aligned=False),
    Variant(granularity=PerChannel()),
    Variant(granularity=PerBlock(16, 16)),
    Variant(dense=127),
    Variant(dense=127, aligned=False),
    Variant(dense=127, granularity=PerBlock(16, 16)),
    Variant(shape=(1, 1)),  # Triton makes constants of ones
]


class _Device:
    """A GPU, as far as a compiler asks; its number is its target, since kernels are kept by device."""

    def __init__(self, target: int):
        self.target = target

    def get_current_target(self):
        return GPUTarget("cuda", self.target, 32)

    def get_current_device(self):
        return self.target

    def get_current_stream(self, device):
        return 0


class _Launch:
    """In place of a kernel: compiles it where it would be launched."""

    def __init__(self, kernel):
        self.kernel, self.programs = kernel, []

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.programs.append(
            self.kernel.warmup(*arguments, grid=grid, **options)
        )


def compiled(name: str, target: int, dtype: str, variant: Variant) -> Compiled:
    """Compiles a kernel as the backend launches it."""
    weight = torch.zeros(variant.shape, dtype=getattr(torch, dtype))
    weight = weight if variant.aligned else weight[1:, 1:]
    reader = getattr(torch, variant.reader) if variant.reader else None
    launch = _Launch(getattr(cuda, name))
    changes = {
        name: launch,
        "_capability": lambda device: divmod(target, 10),
        "_fits_float32": lambda *arguments: True,
    }
    with mock.patch.multiple(cuda, **changes), mock.patch.object(driver, "_active", _Device(target)):
        if name == "search_kernel":
            metric, dense = variant.metric, variant.dense
            search = ScaleSearch.dense(dense, metric=metric) if dense else ScaleSearch(metric=metric)
            task = Task(
                weight=weight,
                base=weight,
                granularity=variant.granularity,
                search=search,
                format=FP8_E4M3,
                scale_format="float32",
                reader_dtype=reader,
            )
            cuda.search(task)
        else:
            grid = variant.granularity.grid((weight.shape[0], weight.shape[1]))
            scale = torch.ones(grid[0] * grid[1], 3)
            cuda.delta_stats(weight, weight, scale, variant.granularity, FP8_E4M3, reader)
    (program,) = launch.programs
    return Compiled(*_needs(program.asm["cubin"]), program.asm["ptx"])


def _needs(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack, as the tool that Triton brings reads them."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", done.stdout)
    assert found, done.stdout
    return int(found[1]), int(found[2])


def variants(name: str) -> list[Variant]:
    """Those that differ for a kernel: only a search has a metric and a number of candidates."""
    return [v for v in VARIANTS if name == "search_kernel" or (v.metric == "hybrid" and not v.dense)]


def row(name: str, target: int, dtype: str) -> str:
    """A row of the table: the most over all variants."""
    every = [compiled(name, target, dtype, variant) for variant in variants(name)]
    registers, stack = max(one.registers for one in every), max(one.stack for one in every)
    conversion = CONVERSION if all(CONVERSION in one.ptx for one in every) else "in arithmetic"
    return f"| `{name}` | sm_{target} | {dtype} | {registers} | {stack} | {conversion} |"


if __name__ == "__main__":
    sys.stdout.write(f"Triton {triton.__version__}\n")
    for arguments in [(name, target, dtype) for name in KERNELS for target in TARGETS for dtype in DTYPES]:
        sys.stdout.write(f"{row(*arguments)}\n")
        sys.stdout.flush()
