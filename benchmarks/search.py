"""How fast is the scale search here? One table, everything measured side by side in one process.

    python benchmarks/search.py                      # sizes 1 M to 16 M weights
    python benchmarks/search.py --sizes 1 4 16 64 --json out.json
    python benchmarks/search.py --groups W4A16 NVFP4A16 --sizes 8

Rows: the search that users call (`search_scale`, absmax and codes included); the kernel alone; the reference
backend; a materializing baseline, which holds ``[groups, candidates, elements]`` in float32 at once; plain
absmax quantization; and a copy of the bytes that must be read and written once, below which nothing can be.
Ratios are to the baseline. With --processor-time rates are those of one thread in a second of processor time,
which other processes slow down less.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from daq_lightning.numerics.backends import choose, delta_stats, reference
from daq_lightning.numerics.encode import encode
from daq_lightning.numerics.formats import Format, Granularity, PerBlock, PerChannel, ScaleFormat
from daq_lightning.numerics.formats.fp4 import FP4_E2M1
from daq_lightning.numerics.formats.fp8 import FP8_E4M3
from daq_lightning.numerics.formats.int4 import INT4
from daq_lightning.numerics.formats.int8 import INT8
from daq_lightning.numerics.quantize import absmax_scale, quantize
from daq_lightning.numerics.search.search import search_scale
from daq_lightning.numerics.search.settings import ScaleSearch
from daq_lightning.numerics.tiling import to_groups

GROUPS: dict[str, tuple[Granularity, Format, ScaleFormat]] = {
    "block": (PerBlock(128, 128), FP8_E4M3, "float32"),
    "channel": (PerChannel(), FP8_E4M3, "float32"),
    "W8A8": (PerChannel(), INT8, "bfloat16"),
    "W4A16": (PerBlock(1, 128), INT4, "bfloat16"),
    "NVFP4A16": (PerBlock(1, 16), FP4_E2M1, "e4m3"),
    "MXFP4A16": (PerBlock(1, 32), FP4_E2M1, "ue8m0"),
    "MXFP8": (PerBlock(1, 32), FP8_E4M3, "ue8m0"),
}


def materializing(
    weight: Tensor, base: Tensor, scale_GK: Tensor, granularity: Granularity, fmt: Format
) -> tuple[Tensor, ...]:
    """Every candidate of every element in memory at once, in float32."""
    weight_G1E = to_groups(weight, granularity).float()[:, None]
    base_G1E = to_groups(base, granularity).float()[:, None]
    scale_GK1 = scale_GK[:, :, None]
    dequantized = encode(weight_G1E / scale_GK1, fmt).float() * scale_GK1
    delta, delta_q, error = weight_G1E - base_G1E, dequantized - base_G1E, dequantized - weight_G1E
    same, changed = delta.sign() == delta_q.sign(), delta != 0
    counts = (same.sum(-1), (same & changed).sum(-1), ((delta_q == 0) & changed).sum(-1))
    return *counts, (delta * delta_q).sum(-1), delta_q.square().sum(-1), error.square().sum(-1)


def seconds(
    function: Callable[[], object], device: torch.device, budget: float, clock: Callable[[], float]
) -> float:
    """The best of as many runs as fit the budget, at least one."""
    wait = torch.cuda.synchronize if device.type == "cuda" else torch.cpu.synchronize
    best, start = float("inf"), time.perf_counter()
    while True:
        wait()
        began = clock()
        function()
        wait()
        best = min(best, clock() - began)
        if time.perf_counter() - start > budget:
            return best


def peak_bytes(function: Callable[[], object], device: torch.device) -> int:
    """Peak memory of tensors beyond what is held before the call."""
    function()  # whatever is allocated once
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted(
        (event.start_ns(), event.nbytes())  # pyright: ignore[reportAttributeAccessIssue]
        for event in events
        if event.name() == "[memory]"
    )
    return max(itertools.accumulate((count for _, count in changes), initial=0))


def measure(
    size: int,
    dtype: torch.dtype,
    name: str,
    device: torch.device,
    budget: float,
    clock: Callable[[], float],
) -> list[dict[str, object]]:
    """All rows of one weight of 2048 x (512 * size)."""
    granularity, fmt, scale_format = GROUPS[name]
    base = (torch.randn(2048, 512 * size, device=device) * 0.02).to(dtype)
    weight = (base.float() + torch.randn(base.shape, device=device) * 2e-4).to(dtype)
    scale = absmax_scale(weight, granularity, fmt=fmt)
    scale_GK = scale.reshape(-1, 1) * torch.linspace(0.8, 1.25, 16, device=device)
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=device)
    runs: dict[str, Callable[[], object]] = {}
    if size <= 4:  # the slow ones
        runs["materializing baseline, 16"] = lambda: materializing(weight, base, scale_GK, granularity, fmt)
        runs["reference: search, 6 + 10"] = lambda: search_scale(
            weight, base, granularity, scale_format=scale_format, fmt=fmt, backend=reference
        )
    coarse_to_fine, dense = ScaleSearch(metric="cosine"), ScaleSearch.dense(64, metric="cosine")
    runs["kernel alone, 16"] = lambda: delta_stats(weight, base, scale_GK, granularity, fmt)
    runs["search, 6 + 10"] = lambda: search_scale(
        weight, base, granularity, coarse_to_fine, scale_format=scale_format, fmt=fmt
    )
    runs["search, dense 64"] = lambda: search_scale(
        weight, base, granularity, dense, scale_format=scale_format, fmt=fmt
    )
    runs["plain absmax and codes"] = lambda: quantize(
        weight, absmax_scale(weight, granularity, scale_format=scale_format, fmt=fmt), granularity, fmt
    )
    runs["copy of the bytes"] = lambda: (weight.clone(), base.clone(), codes.clone())
    rows: list[dict[str, object]] = []
    baseline = None
    for label, function in runs.items():
        extra = peak_bytes(function, device)
        rate = weight.numel() / seconds(function, device, budget, clock)
        baseline = rate if "baseline" in label else baseline
        ratio = rate / baseline if baseline else None
        memory = extra / (4 * weight.numel())
        kind = str(dtype).removeprefix("torch.")
        keys = ("size", "dtype", "group", "what", "rate", "ratio", "memory")
        rows.append(dict(zip(keys, (size, kind, name, label, rate, ratio, memory), strict=True)))
        shown = "" if ratio is None else f"{ratio:.1f} x"
        print(
            f"{size:4} M  {kind:9} {name:8} {label:28} {rate / 1e6:10.1f} {shown:>9} {memory:7.2f}",
            flush=True,
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--sizes", type=int, nargs="+", default=[1, 4, 16], help="million weights")
    add("--dtypes", nargs="+", default=["bfloat16", "float32"])
    add("--groups", nargs="+", choices=GROUPS, default=["block", "channel"], help="and formats")
    add("--budget", type=float, default=1.0, help="seconds per row")
    add("--processor-time", action="store_true", help="instead of the clock's")
    add("--json", help="write the rows to this file")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    clock = time.process_time if arguments.processor_time else time.perf_counter

    small = torch.randn(64, 64, device=device)
    began = time.perf_counter()
    delta_stats(small, small, torch.ones(64, 2, device=device), PerChannel())
    first = time.perf_counter() - began
    name = getattr(choose(device), "__name__", "").rpartition(".")[2]
    print(f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}, backend {name}.")
    print(f"First call (builds, or loads what was built): {first:.1f} s")
    print(
        "weights    dtype     group    what                         M weights/s  to base  memory / float32 "
        "size"
    )
    rows = [
        row
        for dtype in arguments.dtypes
        for size in arguments.sizes
        for name in arguments.groups
        for row in measure(size, getattr(torch, dtype), name, device, arguments.budget, clock)
    ]
    if arguments.json:
        with open(arguments.json, "w") as out:
            json.dump({"device": str(device), "first_call": first, "rows": rows}, out)


if __name__ == "__main__":
    main()
