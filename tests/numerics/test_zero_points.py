"""Codes with zero points, against compressed-tensors and NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization import dequantize as theirs_dequantize
from compressed_tensors.quantization import quantize as theirs_quantize
from compressed_tensors.quantization.utils import calculate_qparams

from daq_lightning.numerics.backends import cpu, delta_stats, reference
from daq_lightning.numerics.formats import PerBlock, PerChannel, PerTensor
from daq_lightning.numerics.formats.fp8 import FP8_E4M3
from daq_lightning.numerics.formats.int4 import INT4, INT4_ASYM
from daq_lightning.numerics.objectives import METRICS, measure, score
from daq_lightning.numerics.quantize import absmax_scale, dequantize, min_max_scale, quantize
from daq_lightning.numerics.rounding.written import stats_of_codes
from daq_lightning.numerics.search.curve import objective_curve, tried
from daq_lightning.numerics.search.search import search_batch, search_scale
from daq_lightning.numerics.search.settings import ScaleSearch

BACKENDS = [cpu, reference]
GROUPS = PerBlock(1, 32)


def pair(shape=(24, 96), dtype=torch.float32, seed=0):
    """Rows of one sign and of both; one of zeros, one that did not change."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator) + torch.linspace(-3, 3, shape[0])[:, None]
    weight = base + 0.01 * torch.randn(shape, generator=generator)
    weight[4], weight[6] = 0, base[6]
    return weight.to(dtype), base.to(dtype)


def test_plain_scales_zero_points_and_codes_are_those_of_compressed_tensors():
    weight, _ = pair()
    weight = torch.cat([weight[:4], weight[5:]])  # of zeros theirs are 0 / 0
    args = QuantizationArgs(num_bits=4, symmetric=False, strategy="group", group_size=32)
    parts = weight.reshape(len(weight), 3, 32)
    their_scale, their_zero = calculate_qparams(parts.amin(2), parts.amax(2), args)
    scale, zero = min_max_scale(weight, GROUPS, fmt=INT4_ASYM)
    assert torch.equal(scale, their_scale)
    assert torch.equal(zero, their_zero)
    assert zero.dtype == torch.int8
    assert {-8, 7} < set(zero.flatten().tolist())
    their_codes = theirs_quantize(weight, their_scale, their_zero, args, dtype=torch.int8)
    for backend in BACKENDS:
        codes = backend.quantize(weight, scale, GROUPS, INT4_ASYM, zero)
        assert torch.equal(codes, their_codes)
    read = theirs_dequantize(their_codes, their_scale, their_zero, args)
    assert torch.equal(dequantize(codes, scale, GROUPS, zero=zero), read)


def test_without_zero_points_the_plain_scale_is_that_of_absmax():
    weight, _ = pair()
    for fmt in (INT4, FP8_E4M3):
        scale, zero = min_max_scale(weight, GROUPS, fmt=fmt)
        assert zero is None
        assert torch.equal(scale, absmax_scale(weight, GROUPS, fmt=fmt))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("granularity", [GROUPS, PerChannel(), PerBlock(5, 40), PerTensor()], ids=str)
@pytest.mark.parametrize("metric", METRICS)
def test_what_is_found_is_scored_as_written_and_never_worse_than_plain(metric, granularity, dtype):
    weight, base = pair(dtype=dtype)
    plain, plain_zero = min_max_scale(weight, granularity, scale_format="bfloat16", fmt=INT4_ASYM)
    search, found = ScaleSearch(metric=metric), []
    for backend in BACKENDS:
        result = search_scale(
            weight, base, granularity, search,
            scale_format="bfloat16", fmt=INT4_ASYM, backend=backend, reader_dtype=torch.bfloat16,
        )  # fmt: skip
        codes = quantize(weight, result.scale, granularity, INT4_ASYM, result.zero)
        assert torch.equal(result.codes, codes)
        assert int(codes.min()) >= -8
        assert int(codes.max()) <= 7
        plain_codes = quantize(weight, plain, granularity, INT4_ASYM, plain_zero)
        for seen, stats in (
            (dequantize(codes, result.scale, granularity, zero=result.zero), result.stats),
            (dequantize(plain_codes, plain, granularity, zero=plain_zero), result.absmax_stats),
            (
                dequantize(codes, result.scale, granularity, torch.bfloat16, zero=result.zero),
                result.dequantized_stats,
            ),
        ):
            for left, right in zip(stats.total(), measure(weight, base, seen), strict=True):
                torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-9)
        other = stats_of_codes(weight, base, codes, result.scale, granularity, zero=result.zero)
        torch.testing.assert_close(other.error_sq, result.stats.error_sq.sum(), rtol=1e-5, atol=1e-9)
        changed = result.stats.n_changed > 0
        assert bool((score(result.stats, metric) >= score(result.absmax_stats, metric))[changed].all())
        found.append(result)
    if granularity == GROUPS:
        for result in found:
            assert result.zero.shape == result.scale.shape
            assert not result.zero[4].any()
            assert not result.codes[4].any()
            assert torch.equal(result.scale[6], plain[6])
            assert torch.equal(result.zero[6], plain_zero[6])
    one, two = (score(result.stats, metric) for result in found)
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("metric", METRICS)
def test_the_best_of_all_that_is_tried_is_found(metric):
    """In NumPy's float64: each alpha with the zero point of its ends, then the zero points beside it."""
    weight, base = pair((24, 32))
    search = ScaleSearch(metric=metric, n_coarse=9, n_fine=0)
    low, high = (end.astype(np.float32) for end in (weight.numpy().min(1), weight.numpy().max(1)))
    low, high = np.minimum(low, 0)[:, None], np.maximum(high, 0)[:, None]
    plain = np.where(high > low, (high - low) / np.float32(15), np.float32(1))

    def scored(scale, zero):
        codes = np.rint(np.clip(weight.numpy() * (np.float32(1) / scale), -8 - zero, 7 - zero))
        seen = torch.from_numpy(codes.astype(np.float32) * scale)
        return np.array([float(score(measure(*row), metric)) for row in zip(weight, base, seen, strict=True)])

    def of(alpha):
        scale = (plain.astype(np.float64) * alpha).astype(np.float32)
        zero = np.rint(-(low.astype(np.float64) * alpha).astype(np.float32) / scale) - 8
        return scale, np.where(high > low, np.clip(zero, -8, 7), 0)

    scale, zero = of(1.0)
    best = scored(scale, zero)
    for alpha in np.linspace(0.5, 2.0, 9):
        tried_scale, tried_zero = of(alpha)
        new = scored(tried_scale, tried_zero)
        better = (new > best)[:, None]
        best = np.maximum(best, new)
        scale, zero = np.where(better, tried_scale, scale), np.where(better, tried_zero, zero)
    beside = [scored(scale, np.clip(zero + step, -8, 7)) for step in (1, -1)]
    moved = np.maximum(*beside) > best
    best = np.maximum(best, np.maximum(*beside))
    changed = (weight != base).any(1).numpy()
    for backend in BACKENDS:
        result = search_scale(weight, base, PerChannel(), search, fmt=INT4_ASYM, backend=backend)
        found = score(result.stats, metric).numpy()
        np.testing.assert_allclose(found[changed], best[changed], rtol=1e-5, atol=1e-7)
        assert (result.zero.numpy() != zero)[moved & changed].all()
    assert metric == "mse" or (moved & changed).sum() > 1


@pytest.mark.parametrize("metric", METRICS)
def test_the_library_finds_the_same_bits_in_the_cache_as_in_steps(metric, monkeypatch):
    weight, base = pair((40, 75), torch.bfloat16)
    for search in (ScaleSearch(metric=metric), ScaleSearch.dense(8, metric=metric)):
        for scale_format in ("float32", "bfloat16", "ue8m0"):
            options = {"scale_format": scale_format, "fmt": INT4_ASYM}
            one = search_scale(weight, base, GROUPS, search, **options)
            with monkeypatch.context() as patch:
                patch.setattr(cpu, "fits_cache", lambda *_: False)
                two = search_scale(weight, base, GROUPS, search, **options)
            for name in ("codes", "scale", "alpha", "zero"):
                assert torch.equal(getattr(one, name), getattr(two, name)), name
            for left, right in zip(one.stats, two.stats, strict=True):
                assert torch.equal(left, right)


def test_zero_points_gain_where_weights_have_one_sign_and_lose_nowhere():
    weight, base = pair((24, 128))
    search = ScaleSearch(metric="mse")
    with_zero, without = (
        search_scale(weight, base, PerBlock(1, 128), search, fmt=fmt) for fmt in (INT4_ASYM, INT4)
    )
    one, two = (score(result.stats, "mse") for result in (with_zero, without))
    assert bool((one[[0, 1, 2, 21, 22, 23]] > two[[0, 1, 2, 21, 22, 23]] / 2).all())


def test_batches_layers_curves_and_what_is_not_finite():
    pairs = [pair(seed=seed) for seed in (0, 1)]
    weights, bases = zip(*pairs, strict=True)
    results = search_batch(weights, bases, GROUPS, names=["a", "b"], fmt=INT4_ASYM)
    for weight, base, result in zip(weights, bases, results, strict=True):
        alone = search_scale(weight, base, GROUPS, fmt=INT4_ASYM)
        assert torch.equal(result.zero, alone.zero)
        assert torch.equal(result.codes, alone.codes)
    weight, base = pairs[0]
    layer = search_scale(weight, base, GROUPS, ScaleSearch(alpha_scope="layer"), fmt=INT4_ASYM)
    seen = dequantize(layer.codes, layer.scale, GROUPS, zero=layer.zero)
    expected = measure(weight, base, seen)
    torch.testing.assert_close(layer.stats.total().error_sq, expected.error_sq, rtol=1e-5, atol=1e-9)
    search = ScaleSearch(metric="mse", n_fine=0)
    plain, _ = min_max_scale(weight, PerChannel(), fmt=INT4_ASYM)
    curve = objective_curve(weight, base, plain, search, scale_format="float32", fmt=INT4_ASYM)
    result = search_scale(weight, base, PerChannel(), ScaleSearch.absmax(), fmt=INT4_ASYM)
    at_one = curve[tried(search) == 1]
    assert float(at_one) == pytest.approx(float(score(result.absmax_stats.total(), "mse")))
    stats = delta_stats(weight, base, result.scale, PerChannel(), INT4_ASYM, result.zero)
    torch.testing.assert_close(stats.error_sq[:, 0], result.stats.error_sq, rtol=1e-5, atol=1e-9)
    for bad in (torch.nan, torch.inf):
        weight[2, 3] = bad
        for backend in BACKENDS:
            with pytest.raises(ValueError, match=r"1 NaN|1 Inf"):
                search_scale(weight, base, GROUPS, fmt=INT4_ASYM, backend=backend)
