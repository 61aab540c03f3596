"""Groups of 16 and 32 are searched many at once by the C++ library: each as it would be alone."""

from __future__ import annotations

from typing import cast

import numpy as np
import pytest
import torch

from daq_lightning.numerics.backends import cpu, reference
from daq_lightning.numerics.formats import Format, PerBlock, ScaleFormat
from daq_lightning.numerics.formats.fp4 import FP4_E2M1
from daq_lightning.numerics.formats.fp8 import FP8_E4M3
from daq_lightning.numerics.formats.int4 import INT4
from daq_lightning.numerics.objectives import METRICS
from daq_lightning.numerics.scales import global_scale_of
from daq_lightning.numerics.search.search import search_scale
from daq_lightning.numerics.search.settings import Metric, ScaleSearch
from daq_lightning.numerics.search.stages import Kernels, Task, search_in_steps

SCHEMES: dict[str, tuple[Format, ScaleFormat]] = {
    "nvfp4": (FP4_E2M1, "e4m3"),
    "mxfp4": (FP4_E2M1, "ue8m0"),
    "mxfp8": (FP8_E4M3, "ue8m0"),
    "int4": (INT4, "bfloat16"),
    "fp8": (FP8_E4M3, "float32"),
}
SCHEME = pytest.mark.parametrize("scheme", SCHEMES)
SIZE = pytest.mark.parametrize("size", [16, 32])
READERS = [None, torch.bfloat16, torch.float16]
EDGES = (1.0, 1e-37, 1e-20, 1e-14, 1e14, 1e18)  # the squares of all but the first do not fit float32


def pair(rows, cols, dtype=torch.bfloat16, seed=0):
    """Groups of very unequal size, some of zeros, some without an update."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(rows, cols, generator=generator)
    weight = base * (1 + 0.02 * torch.randn(rows, cols, generator=generator))
    size = 10 ** torch.randn(rows, 1, generator=generator)
    weight, base = (weight * size).to(dtype), (base * size).to(dtype)
    weight[1], base[1], base[2] = 0, 0, weight[2]
    return weight, base


def task(weight, base, granularity, scheme, metric: str = "hybrid", reader=None, **settings):
    fmt, scale_format = SCHEMES[scheme]
    shared = global_scale_of(weight.abs().float().nan_to_num(0, 0, 0), fmt)
    return Task(
        weight=weight,
        base=base,
        granularity=granularity,
        search=ScaleSearch(metric=cast(Metric, metric), **settings),
        format=fmt,
        scale_format=scale_format,
        reader_dtype=reader,
        global_scale=shared if scale_format == "e4m3" else None,
    )


def fields(result):
    """Codes, scales and counts, then sums; per group."""
    sides = [result.stats, result.absmax_stats]
    sides += [] if result.dequantized_stats is None else [result.dequantized_stats]
    counts = [field for side in sides for field in side[:6]]
    exact = [result.codes.view(torch.uint8), result.scale, result.alpha, *counts]
    return exact, [field for side in sides for field in side[6:]]


@SCHEME
@SIZE
@pytest.mark.parametrize("metric", METRICS)
def test_many_at_once_are_found_as_one_by_one(metric, size, scheme):
    """Groups that stand upright are searched one after the other: the same values in the same order."""
    for reader, rows in zip(READERS, (7, 16, 37), strict=True):  # not always a multiple of those at once
        weight, base = pair(rows, 3 * size)
        lying = cpu.search(task(weight, base, PerBlock(1, size), scheme, metric, reader))
        upright = cpu.search(
            task(weight.T.contiguous(), base.T.contiguous(), PerBlock(size, 1), scheme, metric, reader)
        )
        (exact, sums), (expected, expected_sums) = fields(lying), fields(upright)
        turned = [field.T for field in expected[:3]]
        turned += [field.reshape(3, rows).T.flatten() for field in expected[3:]]
        for one, two in zip(exact, turned, strict=True):
            assert torch.equal(one, two)
        for one, two in zip(sums, expected_sums, strict=True):
            torch.testing.assert_close(one, two.reshape(3, rows).T.flatten(), rtol=2e-6, atol=0)
        if scheme != "mxfp8":  # powers of two change nothing of FP8
            assert bool((lying.alpha != 1).any())


@SCHEME
@SIZE
def test_the_search_in_steps_gives_the_same_bits(size, scheme):
    weight, base = pair(37, 3 * size, torch.float32)
    steps = Kernels(absmax=cpu.absmax, delta_stats=cpu.delta_stats, quantize=cpu.quantize)
    for metric, reader in zip(METRICS, [*READERS, None], strict=True):
        for edge in EDGES if metric == "cosine" else EDGES[:1]:
            given = task(weight * edge, base * edge, PerBlock(1, size), scheme, metric, reader, n_fine=7)
            for found, expected in zip(
                fields(cpu.search(given)), fields(search_in_steps(given, steps)), strict=True
            ):
                for one, two in zip(found, expected, strict=True):
                    assert torch.equal(one, two), (metric, edge)


@SCHEME
@SIZE
@pytest.mark.parametrize("reader", READERS, ids=str)
def test_sums_are_those_of_the_definition(reader, size, scheme):
    """Of the reference, which NumPy holds elsewhere; also where float32 cannot hold the products."""
    fmt, _ = SCHEMES[scheme]
    weight, base = pair(21, 2 * size, torch.float32)
    for edge in EDGES[:1] if reader == torch.float16 else EDGES:
        w, b = weight * edge, base * edge
        scale_GK = (
            w.reshape(-1, size).abs().amax(1, keepdim=True) / fmt.reached * torch.tensor([0.7, 1.0, 1.9])
        )
        given = (w, b, scale_GK.clamp(min=2.0**-126), PerBlock(1, size), fmt, reader)
        found, expected = cpu.delta_stats(*given), reference.delta_stats(*given)
        for name, one, two in zip(found._fields, found, expected, strict=True):
            scale = (expected.delta_sq * expected.delta_q_sq).sqrt() if name == "dot" else two.double().abs()
            assert bool(((one - two).abs() <= 2e-6 * scale).all()), (name, edge)


@SIZE
def test_neighbours_of_a_group_that_is_not_finite_do_not_see_it(size):
    weight, base = pair(5, 4 * size)
    clean = cpu.search(task(weight, base, PerBlock(1, size), "nvfp4"))
    broken = weight.clone()
    broken[3, size], broken[4, 1] = torch.nan, torch.inf
    found = cpu.search(task(broken, base, PerBlock(1, size), "nvfp4"))
    lost = ~found.scale.isfinite()
    assert lost.nonzero().tolist() == [[3, 1], [4, 0]]
    exact, sums = fields(found)
    expected, expected_sums = fields(clean)
    for one, two in zip(exact[1:] + sums, expected[1:] + expected_sums, strict=True):
        kept = ~lost.reshape(one.shape)
        assert torch.equal(one[kept], two[kept])
    assert int(found.stats.n.sum()) == weight.numel() - 2 * size


def test_scales_are_the_best_of_e4m3_by_brute_force():
    """NumPy tries every scale that E4M3 has within the range, in float64."""
    weight, _ = pair(24, 64, torch.float32, seed=1)
    given = task(weight, 0.9 * weight, PerBlock(1, 16), "nvfp4", "mse", n_fine=60)
    found = cpu.search(given)
    assert given.global_scale is not None
    stored = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).double().numpy()
    stored = stored / float(given.global_scale)
    grid = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    groups, plain = weight.reshape(-1, 16).double().numpy(), (found.scale / found.alpha).flatten().tolist()
    for group, scale, at in zip(groups, found.scale.flatten().tolist(), plain, strict=True):
        inside = stored[(stored >= 0.5 * at) & (stored <= 2 * at)]
        distance = np.abs(np.abs(group)[:, None, None] - grid * inside[:, None])
        errors = (distance.min(2) ** 2).sum(0)
        [mine] = np.flatnonzero(inside == scale)
        assert errors[mine] <= errors.min() * (1 + 1e-5)


@SIZE
def test_rows_of_part_of_a_group_are_searched_too(size):
    weight, base = pair(9, 2 * size + 5)
    fmt, scale_format = SCHEMES["nvfp4"]
    result = search_scale(weight, base, PerBlock(1, size), scale_format=scale_format, fmt=fmt)
    whole = search_scale(
        weight[:, : 2 * size],
        base[:, : 2 * size],
        PerBlock(1, size),
        scale_format=scale_format,
        fmt=fmt,
        global_scale=result.global_scale,
    )
    assert torch.equal(result.scale[:, :2], whole.scale)
    assert torch.equal(result.codes.view(torch.uint8)[:, : 2 * size], whole.codes.view(torch.uint8))
