"""Scales of an FP8 cache hold all that was seen and no more; it rounds as ml_dtypes does."""

import ml_dtypes
import numpy as np
import pytest
import torch

from daq_lightning.numerics.kv_cache import cache_scale, cached

PEAKS = np.concatenate(
    [
        np.exp(np.random.default_rng(0).uniform(-80, 80, 2000)),
        [448.0, 1.0, 448 * 1.0078125, np.float32(3.0) / 7, 1e-40, 3e38],
    ]
).astype(np.float32)


def test_a_scale_is_the_smallest_bfloat16_that_lets_nothing_overflow():
    scales = cache_scale(torch.from_numpy(PEAKS)).numpy()
    stored = scales.astype(ml_dtypes.bfloat16)
    assert np.array_equal(stored.astype(np.float32), scales)
    assert (scales.astype(np.float64) * 448 >= PEAKS).all()
    below = (stored.view(np.uint16) - 1).view(ml_dtypes.bfloat16).astype(np.float64)
    assert (below * 448 < PEAKS).all()


def test_what_never_was_anything_but_zero_has_the_scale_1():
    assert cache_scale(torch.zeros(2)).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_a_scale_of_no_number_is_refused(value):
    with pytest.raises(ValueError, match="finite"):
        cache_scale(torch.tensor([1.0, value]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scale", [1.0, 0.00341796875, 2.5])
def test_a_cache_rounds_as_ml_dtypes_does_and_saturates(dtype, scale):
    values = torch.randn(4000, generator=torch.Generator().manual_seed(0)) * 300 * scale
    values = values.to(dtype)
    quotient = np.clip(values.float().numpy() / np.float32(scale), -448, 448)
    expected = quotient.astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * np.float32(scale)
    assert torch.equal(cached(values, scale), torch.from_numpy(expected).to(dtype))
