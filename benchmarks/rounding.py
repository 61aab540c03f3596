"""How fast is rounding with curvature here? Factors and walk apart, beside the machine's own matrix product.

    python benchmarks/rounding.py                       # the weights of a layer of width 2048
    python benchmarks/rounding.py --hidden 1024 --intermediate 4096 --json out.json

FLOPs are those that the method needs: K^3 / 3 for a factor, M N (M + N) for a walk over both sides; what it
takes to measure nearest rounding is not counted. The share is of the float32 matrix product (square, 4096)
that is timed right before and after each row, because other work on the machine slows both. Memory is the
process's peak beyond what it held before the row. The last lines add up the layers of `--parameters` weights:
q, k, v, o (hidden x hidden), gate, up (intermediate x hidden), down; q/k/v share the factor of their inputs,
and so do gate/up. Once by the clock, once by the time of the processors as if nothing else ran on them.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from daq_lightning.numerics.backends import choose
from daq_lightning.numerics.formats import PerBlock
from daq_lightning.numerics.quantize import absmax_scale
from daq_lightning.numerics.rounding.curvature import factor, update_statistics
from daq_lightning.numerics.rounding.rounding import round_with_curvature
from daq_lightning.numerics.rounding.walk import Factor

_SQUARE = 4096


def matmul_rate(device: torch.device) -> float:
    """FLOP/s of a square float32 matrix product, the best of three."""
    a, b = torch.randn(2, _SQUARE, _SQUARE, device=device)
    return 2 * _SQUARE**3 / min(seconds(lambda: a @ b, device).wall for _ in range(3))


class Cost(NamedTuple):
    """Seconds by the clock, and those of the processors (of all threads)."""

    wall: float
    busy: float


def seconds(function: Callable[[], object], device: torch.device) -> Cost:
    """What one call takes."""
    wait = torch.cuda.synchronize if device.type == "cuda" else torch.cpu.synchronize
    wait()
    began, busy = time.perf_counter(), time.process_time()
    function()
    wait()
    return Cost(time.perf_counter() - began, time.process_time() - busy)


class Peak:
    """The largest resident size while it is open, every 5 ms; on CUDA what its allocator says."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.bytes, self._done = device, 0, threading.Event()

    def _resident(self) -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    def __enter__(self) -> Peak:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
            return self
        self._before = self._resident()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self.bytes = max(self.bytes, self._resident() - self._before)

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device) - self._before
            return
        self._done.set()
        self._thread.join()


def statistics(size: int, device: torch.device) -> Tensor:
    """Of tokens in few directions, of unequal size, as activations are."""
    few = torch.randn(256, size, device=device) * torch.rand(size, device=device)
    many = 0.1 * torch.randn(size, size, device=device)
    return few.T @ few + many.T @ many


class Table:
    """Prints rows as they come and keeps them."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.rows = device, []
        columns = "seconds  processor s  M weights/s     GFLOP  GFLOP/s  share   memory"
        print(f"{'what':34}{columns}")

    def row(self, what: str, function: Callable[[], object], flops: float, weights: int = 0) -> Cost:
        before = matmul_rate(self.device)
        with Peak(self.device) as peak:
            cost = seconds(function, self.device)
        share = flops / cost.wall / ((before + matmul_rate(self.device)) / 2)
        self.rows.append(
            {"what": what, "flops": flops, "share": share, "memory": peak.bytes, **cost._asdict()}
        )
        rate = f"{weights / cost.wall / 1e6:.2f}" if weights else ""
        print(
            f"{what:33}{cost.wall:8.2f} {cost.busy:12.2f} {rate:>12} {flops / 1e9:9.0f} "
            f"{flops / cost.wall / 1e9:8.1f} {share:6.0%} {peak.bytes / 1e6:5.0f} MB",
            flush=True,
        )
        return cost


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=8192)
    parser.add_argument("--parameters", type=float, default=0.6, help="billions, for the last line")
    parser.add_argument("--json", help="write the rows to this file")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    hidden, inner = arguments.hidden, arguments.intermediate
    name = getattr(choose(device), "__name__", "").rpartition(".")[2]
    print(f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}, backend {name}.")
    print(f"float32 matrix product: {matmul_rate(device) / 1e9:.0f} GFLOP/s")
    table, granularity = Table(device), PerBlock()

    factors: dict[int, Factor] = {}
    of_factor: dict[int, Cost] = {}
    for size in sorted({hidden, inner}):
        given = statistics(size, device)

        def make(size: int = size, given: Tensor = given) -> None:
            factors[size] = factor(given, damping=0.001)

        of_factor[size] = table.row(f"factor of {size}", make, size**3 / 3)
    of_weight: dict[tuple[int, int], Cost] = {}
    losses: list[float] = []
    for m, n in ((hidden, hidden), (inner, hidden), (hidden, inner)):
        weight = torch.randn(m, n, device=device)
        scale = absmax_scale(weight, granularity)

        def rounds(weight: Tensor = weight, scale: Tensor = scale, m: int = m, n: int = n) -> None:
            found = round_with_curvature(weight, scale, granularity, inputs=factors[n], outputs=factors[m])
            losses.append(found.predicted_loss / found.nearest_loss)

        of_weight[m, n] = table.row(f"round {m} x {n}, both sides", rounds, m * n * (m + n), m * n)
        print(f"    predicted loss {losses[-1]:.3f} of nearest's")
    delta = torch.randn(inner, hidden, device=device)
    update = table.row(
        f"D^T D and D D^T of {inner} x {hidden}",
        lambda: update_statistics(delta),
        2 * inner * hidden * (inner + hidden),
    )

    layers = arguments.parameters * 1e9 / (4 * hidden**2 + 3 * hidden * inner)
    threads = torch.get_num_threads()
    for kind in ("wall", "busy"):
        share = 1.0 if kind == "wall" else 1 / threads
        factor_s = {size: getattr(cost, kind) * share for size, cost in of_factor.items()}
        round_s = {shape: getattr(cost, kind) * share for shape, cost in of_weight.items()}
        # inputs of q/k/v, o and gate/up, and outputs of q, k, v, o and down, have the hidden size
        factoring = layers * (8 * factor_s[hidden] + 3 * factor_s[inner])
        rounding = 4 * round_s[hidden, hidden] + 2 * round_s[inner, hidden] + round_s[hidden, inner]
        total = factoring + layers * rounding
        how = "by the clock" if kind == "wall" else f"processor time over {threads} threads"
        print(
            f"{arguments.parameters:g} B weights ({layers:.1f} layers), {how}: {total:.0f} s, "
            f"{factoring / total:.0%} of it factors; with the update mixed in "
            f"{3 * layers * getattr(update, kind) * share:.0f} s more"
        )
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({"device": str(device), "rows": table.rows}))


if __name__ == "__main__":
    main()
