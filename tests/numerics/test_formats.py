"""A format is data: E5M2, which no layout knows, goes through rounding, sums and search by one object."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from toy_format import E5M2

from daq_lightning import export_checkpoint
from daq_lightning.checkpoint.schemes import SCALES_KEPT, SCHEMES
from daq_lightning.numerics.backends import cpu, delta_stats, reference
from daq_lightning.numerics.formats import PerBlock, PerChannel, PerTensor
from daq_lightning.numerics.formats.fp8 import FP8_E4M3
from daq_lightning.numerics.objectives import METRICS, DeltaStats, measure, score
from daq_lightning.numerics.quantize import absmax_scale, dequantize, quantize
from daq_lightning.numerics.search.search import search_batch, search_scale
from daq_lightning.numerics.search.settings import ScaleSearch

BACKENDS = [cpu, reference]
FORMATS = {"e4m3": (FP8_E4M3, ml_dtypes.float8_e4m3fn), "e5m2": (E5M2, ml_dtypes.float8_e5m2)}
FORMAT = pytest.mark.parametrize(("fmt", "outside"), FORMATS.values(), ids=FORMATS)
GRANULARITIES = [PerChannel(), PerBlock(16, 8), PerTensor()]


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
    facts = ml_dtypes.finfo(outside)
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
    grid = np.arange(256, dtype=np.uint8).view(outside).astype(np.float32)
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
            expected = np.clip(scaled, -np.float32(fmt.max), np.float32(fmt.max)).astype(outside)
            assert codes.dtype == fmt.dtype
            assert np.array_equal(bits(codes)[0].numpy(), expected.view(np.uint8))


@FORMAT
def test_absmax_reaches_the_largest_code_and_every_code_is_read_back(fmt, outside):
    weight, _ = pair(dtype=torch.float32)
    scale = absmax_scale(weight, PerChannel(), fmt=fmt)
    codes = quantize(weight, scale, PerChannel(), fmt)
    largest = codes.float().abs().amax(1)
    assert bool((largest[weight.abs().amax(1) > 0] == fmt.max).all())
    expected = bits(codes).numpy().view(outside).astype(np.float32) * scale.numpy()
    assert np.array_equal(dequantize(codes, scale, PerChannel()).numpy(), expected)


def sums_in_float64(weight, base, scale, outside, fmt):
    """The definition, with the rounding of ml_dtypes, for the rows of a weight."""
    w, b = (tensor.float().numpy() for tensor in (weight, base))
    scaled = np.clip(w * (np.float32(1) / scale.numpy()), -np.float32(fmt.max), np.float32(fmt.max))
    read = scaled.astype(outside).astype(np.float32) * scale.numpy()
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
@pytest.mark.parametrize("scale_format", ["float32", "bfloat16", "ue8m0"])
@pytest.mark.parametrize("metric", METRICS)
def test_the_backends_agree_bit_for_bit(fmt, outside, granularity, scale_format, metric):
    """Short numbers, and absmax scales that are powers of two: sums are exact in whatever order."""
    generator = torch.Generator().manual_seed(1)
    base = torch.randint(-54, 55, (40, 90), generator=generator) / 64
    weight = base + torch.randint(-2, 3, (40, 90), generator=generator) / 64
    weight[:, ::8] = 0.875  # the largest of every group: 448 / 2^9 and 57344 / 2^16
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


def test_the_formats_do_differ():
    weight, base = pair()
    one, two = (search_scale(weight, base, PerChannel(), fmt=fmt) for fmt, _ in FORMATS.values())
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
