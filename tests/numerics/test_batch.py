"""Searching several weights at once gives what searching each of them gives."""

import numpy as np
import pytest
import torch

from daq_lightning import PerBlock, PerChannel, PerTensor, ScaleSearch, search_scale
from daq_lightning.numerics.search.search import search_batch


@pytest.mark.parametrize("scope", ["group", "layer"])
@pytest.mark.parametrize("granularity", [PerBlock(32, 32), PerBlock(48, 32), PerChannel(), PerTensor()])
def test_a_batch_equals_single_searches(granularity, scope):
    generator = torch.Generator().manual_seed(0)
    bases = [torch.randn(64, 96, generator=generator).bfloat16() for _ in range(3)]
    weights = [(base + 0.01 * torch.randn(64, 96, generator=generator)).bfloat16() for base in bases]
    search = ScaleSearch(metric="cosine", alpha_scope=scope)
    results = search_batch(weights, bases, granularity, search, names=["a", "b", "c"])
    for weight, base, result in zip(weights, bases, results, strict=True):
        single = search_scale(weight, base, granularity, search)
        assert torch.equal(result.codes.view(torch.uint8), single.codes.view(torch.uint8))
        assert torch.equal(result.scale, single.scale)
        assert torch.equal(result.alpha, single.alpha)
        for one, two in zip(result.stats, single.stats, strict=True):
            assert torch.allclose(one.double(), two.double(), rtol=1e-6)


def test_the_weight_that_is_not_finite_is_named():
    weights = [torch.ones(32, 32), torch.ones(32, 32)]
    weights[1][0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"^second .* 1 NaN"):
        search_batch(weights, weights, PerChannel(), names=["first", "second"])


@pytest.mark.parametrize("scope", ["group", "layer"])
@pytest.mark.parametrize("granularity", [PerBlock(1, 16), PerBlock(1, 48), PerBlock(128, 128), PerChannel()])
def test_sums_of_neighbours_added_up_are_those_of_each_group(granularity, scope):
    """Whichever way the search goes; NumPy adds them. Nothing else changes."""
    generator = torch.Generator().manual_seed(0)
    bases = [torch.randn(96, 192, generator=generator) for _ in range(3)]
    weights = [base + 0.02 * torch.randn(base.shape, generator=generator) for base in bases]
    each, few = (
        search_batch(
            weights,
            bases,
            granularity,
            ScaleSearch(alpha_scope=scope),
            names=list("abc"),
            reader_dtype=torch.bfloat16,
            per_group=per_group,
        )
        for per_group in (True, False)
    )
    for one, two in zip(each, few, strict=True):
        assert torch.equal(one.scale, two.scale)
        assert torch.equal(one.codes.view(torch.uint8), two.codes.view(torch.uint8))
        for name in ("stats", "absmax_stats", "dequantized_stats"):
            left, right = getattr(one, name), getattr(two, name)
            pool = len(left.n) // len(right.n)
            assert (pool > 1) == (granularity != PerBlock(128, 128))
            for field, added in zip(left, right, strict=True):
                total = field.numpy().reshape(-1, pool).sum(1)
                np.testing.assert_allclose(added.numpy(), total, rtol=1e-12, atol=0)
