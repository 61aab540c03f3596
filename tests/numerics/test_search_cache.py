"""The search of the C++ library, group after group in the cache, gives the bits of the search in steps."""

from __future__ import annotations

import pytest
import torch

from daq_lightning.numerics.backends import cpu
from daq_lightning.numerics.formats import PerBlock, PerChannel, PerTensor
from daq_lightning.numerics.objectives import METRICS
from daq_lightning.numerics.search.search import search_scale
from daq_lightning.numerics.search.settings import ScaleSearch
from daq_lightning.numerics.search.stages import SearchResult

SEARCHES = {
    "coarse and fine": lambda metric: ScaleSearch(metric=metric),
    "narrow": lambda metric: ScaleSearch(metric=metric, alpha_min=0.9, alpha_max=1.11, n_coarse=4, n_fine=7),
    "dense": lambda metric: ScaleSearch.dense(16, metric=metric),
    "one candidate": lambda metric: ScaleSearch(
        metric=metric, alpha_min=1.3, alpha_max=1.3, n_coarse=1, n_fine=1
    ),
    "absmax": lambda metric: ScaleSearch.absmax(),
}
GRIDS = [PerBlock(128, 128), PerChannel(), PerTensor(), PerBlock(5, 7)]


def pair(shape, dtype=torch.bfloat16, base_dtype=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator)
    changed = torch.rand(shape, generator=generator) < 0.7
    weight = base + 0.01 * torch.randn(shape, generator=generator) * changed
    weight[: shape[0] // 4] *= 1e-6  # some groups lie elsewhere
    weight[-1], base[-1] = 0, 0  # a row of zeros
    if shape[0] > 40:
        weight[10:20] = base[10:20]  # rows that did not change
    return weight.to(dtype), base.to(base_dtype or dtype)


def assert_same_bits(one: SearchResult, two: SearchResult) -> None:
    assert torch.equal(one.codes.view(torch.uint8), two.codes.view(torch.uint8))
    assert torch.equal(one.scale, two.scale)
    assert torch.equal(one.alpha, two.alpha)
    for which in ("stats", "absmax_stats"):
        for name, left, right in zip(
            one.stats._fields, getattr(one, which), getattr(two, which), strict=True
        ):
            assert torch.equal(left, right), (which, name)


def both(monkeypatch, *arguments, **options):
    in_cache = search_scale(*arguments, **options)
    with monkeypatch.context() as patch:
        patch.setattr(
            cpu, "_search_in_cache", lambda *_, **__: pytest.fail("the search in steps went elsewhere")
        )
        patch.setattr(cpu, "fits_cache", lambda *_: False)
        return in_cache, search_scale(*arguments, **options)


@pytest.mark.parametrize("granularity", GRIDS, ids=str)
@pytest.mark.parametrize("search", SEARCHES.values(), ids=SEARCHES)
@pytest.mark.parametrize("metric", METRICS)
def test_same_bits_for_every_search(monkeypatch, metric, search, granularity):
    weight, base = pair((70, 150) if granularity == PerTensor() else (300, 260))
    assert_same_bits(*both(monkeypatch, weight, base, granularity, search(metric)))


@pytest.mark.parametrize("scale_format", ["float32", "bfloat16", "ue8m0"])
@pytest.mark.parametrize(
    "dtypes", [(torch.float32, None), (torch.float16, None), (torch.bfloat16, torch.float32)]
)
def test_same_bits_for_every_dtype_and_scale_format(monkeypatch, dtypes, scale_format):
    weight, base = pair((140, 300), *dtypes)
    for granularity in (PerBlock(128, 128), PerChannel()):
        assert_same_bits(*both(monkeypatch, weight, base, granularity, scale_format=scale_format))


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (1, 1009), (3, 20_000), (257, 129), (2, 2016)], ids=str)
def test_same_bits_for_every_shape(monkeypatch, shape):
    weight, base = pair(shape)
    for granularity in GRIDS:
        assert_same_bits(*both(monkeypatch, weight, base, granularity))


def test_same_bits_for_extreme_magnitudes_and_any_number_of_threads(monkeypatch):
    weight, base = pair((256, 512), torch.float32)
    for size in (1e-37, 1e-20, 1e15, 1e18):
        assert_same_bits(*both(monkeypatch, weight * size, base * size, PerBlock(128, 128)))
    threads = torch.get_num_threads()
    one = search_scale(weight, base, PerBlock(128, 128))
    try:
        torch.set_num_threads(3)
        assert_same_bits(search_scale(weight, base, PerBlock(128, 128)), one)
    finally:
        torch.set_num_threads(threads)


def test_groups_beyond_the_cache_are_searched_in_steps():
    assert cpu.fits_cache(torch.empty(8, 1 << 15), PerChannel())
    assert not cpu.fits_cache(torch.empty(8, (1 << 15) + 1), PerChannel())
    weight, base = pair((2, 40_000))
    assert search_scale(weight, base, PerChannel()).scale.shape == (2, 1)


@pytest.mark.slow
@pytest.mark.parametrize("granularity", [PerBlock(128, 128), PerChannel()], ids=str)
def test_a_weight_of_32768_by_16384_is_searched_to_its_end(granularity):
    """Half a billion elements; weight and base repeat one row, so that only the codes need memory."""
    weight, base = pair((4, 16384))
    rows = 256
    weight, base = weight[2:3].expand(32768, -1), base[2:3].expand(32768, -1)
    result = search_scale(weight, base, granularity)
    first = search_scale(weight[:rows].contiguous(), base[:rows].contiguous(), granularity)
    assert result.codes.shape == (32768, 16384)
    for start in (0, 16384, 32768 - rows):
        part = result.codes[start : start + rows].view(torch.uint8)
        assert torch.equal(part, first.codes.view(torch.uint8))
    groups = first.scale.shape[0]
    assert torch.equal(result.scale[-groups:], first.scale)
    assert int(result.stats.n.sum()) == 32768 * 16384
