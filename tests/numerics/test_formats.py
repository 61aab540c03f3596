"""A format is data: all of them, and E5M2, which no layout knows, go through rounding, sums and search by one
object, and are what ml_dtypes, gfloat and NumPy say of them."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys

import gfloat
import gfloat.formats
import ml_dtypes
import numpy as np
import pytest
import torch
from outside_formats import FORMATS, HELD_AS, held, rounded, whole
from safetensors.torch import load_file
from toy_format import E5M2

from daq_lightning import export_checkpoint
from daq_lightning.checkpoint.schemes import SCALES_KEPT, SCHEMES
from daq_lightning.numerics.backends import cpu, delta_stats, reference
from daq_lightning.numerics.formats import SCALE_FORMATS, PerBlock, PerChannel, PerTensor
from daq_lightning.numerics.formats.fp4 import FP4_E2M1
from daq_lightning.numerics.formats.fp8 import FP8_E4M3
from daq_lightning.numerics.objectives import METRICS, DeltaStats, measure, score
from daq_lightning.numerics.quantize import absmax_scale, dequantize, quantize
from daq_lightning.numerics.scales import global_scale_of, round_scale
from daq_lightning.numerics.search.grid import neighbours
from daq_lightning.numerics.search.search import search_batch, search_scale
from daq_lightning.numerics.search.settings import ScaleSearch

BACKENDS = [cpu, reference]
FORMAT = pytest.mark.parametrize(("fmt", "outside"), FORMATS.values(), ids=FORMATS)
GRANULARITIES = [PerChannel(), PerBlock(16, 8), PerBlock(1, 32), PerTensor()]
OWN_GRIDS = {  # format, group, scale format
    "nvfp4": (*FORMATS["e2m1"], 16, "e4m3"),
    "mxfp4": (*FORMATS["e2m1"], 32, "ue8m0"),
    "mxfp8": (*FORMATS["e4m3"], 32, "ue8m0"),
}


def pair(shape=(40, 90), dtype=torch.bfloat16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator)
    weight = base + 0.01 * torch.randn(shape, generator=generator)
    weight[3] = 0
    weight[5] = base[5]
    return weight.to(dtype), base.to(dtype)


def bits(tensor):
    return tensor.contiguous().view(torch.uint8)


@FORMAT
def test_a_format_is_what_ml_dtypes_says_of_it(fmt, outside):
    if whole(outside):
        facts = ml_dtypes.iinfo(outside)
        assert (fmt.low, fmt.max, fmt.bits) == (facts.min, facts.max, facts.bits)
        assert fmt.min_normal / 2**fmt.mantissa_bits == 1
        assert fmt.reached == (facts.max - facts.min) / 2
        return
    facts = ml_dtypes.finfo(outside)
    assert (fmt.low, fmt.reached, fmt.bits) == (-fmt.max, fmt.max, facts.bits)
    assert fmt.max == float(facts.max)
    assert fmt.min_normal == float(facts.smallest_normal)
    assert fmt.min_normal / 2**fmt.mantissa_bits == float(facts.smallest_subnormal)
    assert fmt.mantissa_bits == facts.nmant


@FORMAT
@pytest.mark.parametrize("backend", BACKENDS, ids=lambda module: module.__name__.rpartition(".")[2])
def test_codes_are_those_of_ml_dtypes_for_every_half_and_every_midpoint(fmt, outside, backend):
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    halves = [
        every.view(dtype)[every.view(dtype).isfinite()].float() for dtype in (torch.bfloat16, torch.float16)
    ]
    grid = np.arange(fmt.low, fmt.max + 1, dtype=np.float32)
    if not whole(outside):
        grid = np.arange(1 << fmt.bits).astype(np.uint8).view(outside).astype(np.float32)
        grid = np.sort(grid[np.isfinite(grid)])
    middle = (grid[:-1] + grid[1:]) / 2
    near = np.concatenate(
        [np.nextafter(middle, np.float32(1e9)), np.nextafter(middle, np.float32(-1e9)), middle]
    )
    for values in (*halves, torch.from_numpy(near)):
        for scale in (1.0, 2.0**-20, 2.0**30, 0.37, 5.25e-5):
            scales = torch.full((1, 1), scale)
            codes = backend.quantize(values[None], scales, PerChannel(), fmt)
            with np.errstate(over="ignore"):
                scaled = values.numpy() * (np.float32(1) / np.float32(scale))
            assert codes.dtype == fmt.dtype
            assert np.array_equal(bits(codes)[0].numpy(), held(rounded(scaled, fmt, outside), fmt))


@pytest.mark.parametrize(
    ("fmt", "facts"),
    [
        (FP8_E4M3, gfloat.formats.format_info_ocp_e4m3),
        (FP4_E2M1, gfloat.formats.format_info_ocp_e2m1),
    ],
    ids=["e4m3", "e2m1"],
)
def test_values_are_rounded_as_gfloat_rounds_them(fmt, facts):
    values = (torch.randn(2, 500, generator=torch.Generator().manual_seed(0)) * fmt.max / 3).half().float()
    values[1] *= fmt.min_normal / fmt.max
    expected = [gfloat.round_float(facts, value, sat=True) for value in values.flatten().tolist()]
    codes = quantize(values, torch.ones(2, 1), PerChannel(), fmt)
    assert codes.float().flatten().tolist() == expected


@FORMAT
def test_absmax_reaches_the_largest_code_and_every_code_is_read_back(fmt, outside):
    weight, _ = pair(dtype=torch.float32)
    scale = absmax_scale(weight, PerChannel(), fmt=fmt)
    codes = quantize(weight, scale, PerChannel(), fmt)
    largest = codes.float().abs().amax(1)[weight.abs().amax(1) > 0]
    assert bool(((largest == fmt.max) | (largest == -fmt.low)).all())
    expected = bits(codes).numpy().view(HELD_AS[fmt.dtype]).astype(np.float32) * scale.numpy()
    assert np.array_equal(dequantize(codes, scale, PerChannel()).numpy(), expected)


def sums_in_float64(weight, base, scale, outside, fmt):
    """The definition, with the rounding of ml_dtypes, for the rows of a weight."""
    w, b = (tensor.float().numpy() for tensor in (weight, base))
    read = rounded(w * (np.float32(1) / scale.numpy()), fmt, outside) * scale.numpy()
    delta, delta_q, error = (x.astype(np.float64) for x in (w - b, read - b, read - w))
    changed, same = delta != 0, np.sign(delta) == np.sign(delta_q)
    return DeltaStats(
        n=np.full(len(w), w.shape[1]),
        n_changed=changed.sum(1),
        sign_equal=same.sum(1),
        preserved=(changed & same).sum(1),
        flipped=(changed & (np.sign(delta) == -np.sign(delta_q))).sum(1),
        lost=(changed & (delta_q == 0)).sum(1),
        dot=(delta * delta_q).sum(1),
        delta_sq=(delta * delta).sum(1),
        delta_q_sq=(delta_q * delta_q).sum(1),
        error_sq=(error * error).sum(1),
    )


@FORMAT
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("metric", METRICS)
def test_a_search_per_channel_finds_what_the_definition_in_float64_finds(fmt, outside, dtype, metric):
    weight, base = pair(dtype=dtype)
    search = ScaleSearch.dense(24, metric=metric)
    absmax = absmax_scale(weight, PerChannel(), fmt=fmt)
    alphas = [1.0, *(2 ** (i / 24) for i in range(24))]
    tried = [
        sums_in_float64(weight, base, (absmax.double() * alpha).float(), outside, fmt) for alpha in alphas
    ]
    columns = DeltaStats(*(torch.from_numpy(np.stack(field, 1)) for field in zip(*tried, strict=True)))
    best = score(columns, metric).amax(1)
    for backend in BACKENDS:
        result = search_scale(weight, base, PerChannel(), search, fmt=fmt, backend=backend)
        found = score(result.stats, metric)
        changed = (weight != base).any(1)
        torch.testing.assert_close(found[changed], best[changed], rtol=1e-5, atol=1e-9)
        assert bool((result.alpha[~changed] == 1).all())
        mine = sums_in_float64(weight, base, result.scale, outside, fmt)
        for name, value, expected in zip(DeltaStats._fields, result.stats, mine, strict=True):
            assert np.allclose(value.numpy(), expected, rtol=1e-5, atol=1e-9), name
        assert torch.equal(bits(result.codes), bits(quantize(weight, result.scale, PerChannel(), fmt)))


@FORMAT
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("scale_format", SCALE_FORMATS)
@pytest.mark.parametrize("metric", METRICS)
def test_the_backends_agree_bit_for_bit(fmt, outside, granularity, scale_format, metric):
    """Short numbers, and absmax scales that are powers of two: sums are exact in whatever order."""
    generator = torch.Generator().manual_seed(1)
    base = torch.randint(-46, 47, (40, 90), generator=generator) / 64
    weight = base + torch.randint(-2, 3, (40, 90), generator=generator) / 64
    weight[:, ::8] = math.frexp(fmt.reached)[0]  # the largest of every group
    search = ScaleSearch(metric=metric, alpha_min=0.5, alpha_max=2.0, n_coarse=4, n_fine=0)
    one, two = (
        search_scale(weight, base, granularity, search, scale_format=scale_format, fmt=fmt, backend=backend)
        for backend in BACKENDS
    )
    assert torch.equal(one.alpha, two.alpha)
    assert torch.equal(one.scale, two.scale)
    assert torch.equal(bits(one.codes), bits(two.codes))
    for name, left, right in zip(DeltaStats._fields[:6], one.stats, two.stats, strict=False):
        assert torch.equal(left, right), name


@FORMAT
@pytest.mark.parametrize("scale_format", SCALE_FORMATS)
def test_groups_along_a_row_are_scored_as_written_and_never_worse_than_absmax(fmt, outside, scale_format):
    weight, base = pair((12, 75))  # the last group of a row has 11
    weight[7, 32:64] = 0
    weight[8], base[8] = weight[8] * 1e-4, base[8] * 1e-4
    for metric in METRICS:
        search, groups = ScaleSearch(metric=metric), PerBlock(1, 32)
        one, two = (
            search_scale(weight, base, groups, search, scale_format=scale_format, fmt=fmt, backend=backend)
            for backend in BACKENDS
        )
        plain = absmax_scale(weight, groups, scale_format=scale_format, fmt=fmt)
        for result in (one, two):
            assert torch.equal(bits(result.codes), bits(quantize(weight, result.scale, groups, fmt)))
            for scale, stats in ((result.scale, result.stats), (plain, result.absmax_stats)):
                seen = dequantize(quantize(weight, scale, groups, fmt), scale, groups)
                for left, right in zip(stats.total(), measure(weight, base, seen), strict=True):
                    torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-9)
            found, before = score(result.stats, metric), score(result.absmax_stats, metric)
            assert bool((found >= before)[result.stats.n_changed > 0].all())
            assert torch.equal(result.scale[3], plain[3])  # zeros
            assert torch.equal(result.scale[5], plain[5])  # no change, no move
            assert not result.codes[7, 32:64].float().any()
        torch.testing.assert_close(score(one.stats, metric), score(two.stats, metric), rtol=1e-5, atol=1e-6)
    weight[2, 70] = torch.nan
    with pytest.raises(ValueError, match="1 NaN"):
        search_scale(weight, base, groups, scale_format=scale_format, fmt=fmt)


@pytest.mark.parametrize(("fmt", "outside", "group", "scale_format"), OWN_GRIDS.values(), ids=OWN_GRIDS)
@pytest.mark.parametrize("metric", METRICS)
def test_the_best_of_all_scales_that_can_be_stored_is_found(fmt, outside, group, scale_format, metric):
    """Every value of ml_dtypes' E4M3 or power of two between half of the plain scale and its double."""
    weight, base = pair((30, group), dtype=torch.float32)
    weight[20:], base[20:] = weight[20:] * 1e-3, base[20:] * 1e-3  # down to subnormal scales
    search = ScaleSearch(metric=metric, n_coarse=6)  # 16 candidates
    plain = absmax_scale(weight, PerChannel(), scale_format=scale_format, fmt=fmt)
    kept = np.exp2(np.arange(-60.0, 60.0))
    if scale_format == "e4m3":
        codes = np.arange(1, 127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
        kept = codes / float(global_scale_of(weight.abs().amax(), fmt))
    best = np.full(len(weight), -np.inf)
    for value in kept:
        inside = (value >= plain[:, 0].numpy() / 2) & (value <= plain[:, 0].numpy() * 2)
        scale = torch.where(torch.from_numpy(inside)[:, None], float(value), plain)
        stats = DeltaStats(*map(torch.from_numpy, sums_in_float64(weight, base, scale, outside, fmt)))
        best = np.fmax(best, score(stats, metric).numpy())
    changed = (weight != base).any(1)
    for backend in BACKENDS:
        result = search_scale(
            weight, base, PerBlock(1, group), search, scale_format=scale_format, fmt=fmt, backend=backend
        )
        found = score(result.stats, metric)
        torch.testing.assert_close(found[changed], torch.from_numpy(best)[changed], rtol=1e-5, atol=1e-7)
        assert np.isin(result.scale[changed].numpy(), kept).all()
        assert fmt != FP4_E2M1 or (result.alpha != 1).sum() > 3


def test_no_candidate_is_tried_twice_and_each_can_be_stored():
    shared = torch.tensor([2.0**20])
    every = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float() / shared
    for search in (ScaleSearch(n_coarse=6), ScaleSearch(), ScaleSearch.dense(64), ScaleSearch.absmax()):
        for scale_format, plain_G in (("e4m3", every), ("ue8m0", 2.0 ** torch.arange(-20, 20))):
            alpha_GK = neighbours(plain_G, search, scale_format, shared)
            scale_GK = (plain_G[:, None].double() * alpha_GK).float()
            assert torch.equal(scale_GK, round_scale(scale_GK, scale_format, shared))
            assert alpha_GK.shape[1] <= search.n_coarse + search.n_fine
            for alpha_K in alpha_GK:
                others = alpha_K[alpha_K != 1]
                assert len(others.unique()) == len(others)
                assert bool(((others >= search.alpha_min) & (others <= search.alpha_max)).all())


def test_the_global_scale_is_a_power_of_two_that_lets_the_largest_scale_be_doubled():
    for value in (*np.geomspace(1e-31, 1e33, 300), 6 * 0.875, 6 * 0.4375, 6 * 112.0):
        largest = np.float32(value)
        shared = global_scale_of(torch.tensor([largest / 7, largest]), FP4_E2M1)
        assert math.frexp(float(shared))[0] == 0.5
        assert 112 < float(largest) / 6 * float(shared) <= 224 * (1 + 1e-7)
    for value in (0.0, math.inf, math.nan):
        assert global_scale_of(torch.tensor([0.0, value]), FP4_E2M1).tolist() == [1]


def test_weights_that_are_fused_share_one_global_scale():
    pairs = [pair((8, 32), seed=seed) for seed in (0, 1)]
    weights, bases = [pairs[0][0], pairs[1][0] * 100], [pairs[0][1], pairs[1][1] * 100]
    options = {"scale_format": "e4m3", "fmt": FP4_E2M1}
    together = search_batch(weights, bases, PerBlock(1, 16), names=["q", "k"], **options)
    tall = [torch.cat([weight, weight]) for weight in weights]
    weights, bases = [weights[0], tall[1]], [bases[0], torch.cat([bases[1], bases[1]])]  # two shapes
    apart = search_batch(weights, bases, PerBlock(1, 16), names=["q", "k"], **options)
    for results in (together, apart):
        one, two = (result.global_scale for result in results)
        assert one.shape == (1,)
        assert torch.equal(one, two)
        assert math.frexp(float(one))[0] == 0.5
        stored = torch.cat([result.scale * one for result in results])
        assert 100 <= float(stored.max()) <= 448
        assert torch.equal(
            stored, torch.from_numpy(stored.numpy().astype(ml_dtypes.float8_e4m3fn).astype("f4"))
        )
    assert torch.equal(together[0].scale, apart[0].scale)


def test_the_formats_do_differ():
    weight, base = pair()
    one, two = (search_scale(weight, base, PerChannel(), fmt=fmt) for fmt in (FP8_E4M3, E5M2))
    assert one.codes.dtype != two.codes.dtype
    assert float(score(one.stats.total(), "mse")) > 2 * float(score(two.stats.total(), "mse"))  # one bit more


def test_a_batch_carries_the_format():
    pairs = [pair((32, 48), seed=seed) for seed in (0, 1)]
    weights, bases = zip(*pairs, strict=True)
    results = search_batch(weights, bases, PerChannel(), names=["a", "b"], fmt=E5M2)
    for weight, base, result in zip(weights, bases, results, strict=True):
        assert torch.equal(bits(result.codes), bits(search_scale(weight, base, PerChannel(), fmt=E5M2).codes))
    scale_G1 = results[0].scale.reshape(-1, 1)
    stats = delta_stats(weights[0], bases[0], scale_G1, PerChannel(), E5M2)
    assert torch.equal(stats.sign_equal[:, 0], results[0].stats.sign_equal)


@pytest.mark.parametrize("container", ["fp8", "compressed-tensors"])
def test_an_export_takes_the_format_from_its_scheme(tmp_path, monkeypatch, container):
    scheme = dataclasses.replace(SCHEMES["FP8_BLOCK"], format=E5M2)
    monkeypatch.setitem(SCHEMES, "FP8_BLOCK", scheme)
    (weight, base), out = pair((128, 256)), tmp_path / "out"
    report = export_checkpoint(
        {"a.weight": weight}, {"a.weight": base}, out, scheme="FP8_BLOCK", container=container
    )
    stored = load_file(out / "model.safetensors")
    found = search_scale(weight, base, PerBlock(), scale_format=SCALES_KEPT[container], fmt=E5M2)
    assert stored["a.weight"].dtype == torch.float8_e5m2
    assert torch.equal(bits(stored["a.weight"]), bits(found.codes))
    absmax = absmax_scale(weight, PerBlock(), scale_format=SCALES_KEPT[container], fmt=E5M2)
    plain = dequantize(quantize(weight, absmax, PerBlock(), E5M2), absmax, PerBlock())
    read = dequantize(stored["a.weight"], found.scale, PerBlock())
    [tensor] = report.tensors
    for stats, seen in (
        (tensor.searched, read),
        (tensor.absmax, plain),
        (tensor.dequantized, read.bfloat16()),
    ):
        for one, two in zip(stats, measure(weight, base, seen), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("module", ["numerics.formats.fp8", "numerics.search.settings", "checkpoint.schemes"])
def test_settings_formats_and_schemes_need_no_torch(module):
    code = f"import sys, daq_lightning.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
