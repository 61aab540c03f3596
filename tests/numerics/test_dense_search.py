"""The dense search, held against an oracle that knows the best of ALL scales of [1, 2) x absmax."""

import pytest
import torch
from exact_oracle import EXACT_METRICS, best_scale
from hypothesis import example, given, settings
from hypothesis import strategies as st

from daq_lightning.numerics.backends import delta_stats, reference
from daq_lightning.numerics.formats import PerBlock, PerChannel, PerTensor
from daq_lightning.numerics.formats.fp8 import FP8_E4M3
from daq_lightning.numerics.objectives import score
from daq_lightning.numerics.quantize import absmax_scale, dequantize, quantize
from daq_lightning.numerics.scales import round_scale
from daq_lightning.numerics.search.grid import coarse
from daq_lightning.numerics.search.search import search_scale
from daq_lightning.numerics.search.settings import ScaleSearch

GRANULARITIES = [PerBlock(16, 16), PerBlock(9, 20), PerChannel(), PerTensor()]
KINDS = ["dense", "heavy", "grid", "integers", "sparse", "tiny"]


def pair(kind, shape, seed):
    """A bfloat16 weight and its base: usual, of 20 binades, base on an FP8 grid, with many ties, few
    changes."""
    generator = torch.Generator().manual_seed(seed)

    def normal():
        return torch.randn(shape, generator=generator)

    base = normal() * 0.02
    if kind == "heavy":
        base = normal() * torch.exp(3 * normal())
        return (base + 0.1 * base.abs() * normal()).bfloat16(), base
    if kind == "grid":
        scale = absmax_scale(base, PerBlock(8, 8))
        base = dequantize(quantize(base, scale, PerBlock(8, 8)), scale, PerBlock(8, 8))
    if kind == "integers":
        base = torch.randint(-100, 100, shape, generator=generator).float()
        return (base + torch.randint(-2, 3, shape, generator=generator)).bfloat16(), base
    if kind == "sparse":
        base = base.bfloat16().float()
        return torch.where(normal() > 1.5, base * 1.05, base).bfloat16(), base
    if kind == "tiny":
        base = base * 2.0**-70
    return (base + base.abs().mean() * 0.01 * normal()).bfloat16(), base


def slack(weight, metric):
    """What float32 sums can cost: absolute, in units of the score."""
    return 1e-9 * float(weight.double().square().amax()) if metric == "mse" else 2e-6


def moved_by_rounding(weight, base, scale, granularity):
    """How far a cosine can move, as a scale rounded to float32 moves Q by 2^-24 |Q|: 2^-24 |W| / |D_q|, of
    each group."""
    scale_G1 = scale.reshape(-1, 1)
    weight_sq = delta_stats(weight, torch.zeros_like(base), scale_G1, granularity).delta_sq[:, 0]
    delta_q_sq = delta_stats(weight, base, scale_G1, granularity).delta_q_sq[:, 0]
    return 2**-24 * (weight_sq / delta_q_sq.clamp(min=1e-30)).sqrt()


def scores(weight, base, scale_GK, granularity, metric):
    return score(delta_stats(weight, base, scale_GK, granularity), metric)


@settings(max_examples=60, deadline=None)
@example(
    kind="dense", shape=(33, 2), granularity=PerChannel(), metric="hybrid", scale_format="float32", steps=1,
    seed=2,
)  # fmt: skip
@given(
    kind=st.sampled_from(KINDS),
    shape=st.tuples(st.integers(1, 40), st.integers(1, 70)),
    granularity=st.sampled_from(GRANULARITIES),
    metric=st.sampled_from(EXACT_METRICS),
    scale_format=st.sampled_from(["float32", "bfloat16"]),
    steps=st.integers(1, 300),
    seed=st.integers(0, 1 << 30),
)
def test_no_scale_beats_the_oracle_and_it_keeps_its_promise(
    kind, shape, granularity, metric, scale_format, steps, seed
):
    weight, base = pair(kind, shape, seed)
    scale = absmax_scale(weight, granularity, scale_format=scale_format)
    best, promise = best_scale(
        weight, base, scale, granularity, metric=metric, tau=0.01, scale_format=scale_format
    )
    assert torch.equal(round_scale(best, scale_format), best)
    has_promise = promise.flatten().isfinite()
    realized = scores(weight, base, best.reshape(-1, 1), granularity, metric)[:, 0]
    tolerance = slack(weight, metric) + 1e-5 * realized.abs()
    if metric in ("hybrid", "cosine"):
        tolerance = tolerance + moved_by_rounding(weight, base, best, granularity)
    assert bool(((realized - promise.flatten()).abs() <= tolerance)[has_promise].all())

    generator = torch.Generator().manual_seed(seed + 1)
    alpha_K = torch.cat(
        [2 ** (torch.arange(steps) / steps), 1 + torch.rand(100, generator=generator), torch.ones(1)]
    )
    others_GK = round_scale((scale.reshape(-1, 1).double() * alpha_K).float(), scale_format)
    others = scores(weight, base, others_GK, granularity, metric).amax(1)
    assert bool((realized >= others - tolerance)[has_promise].all())


@pytest.mark.parametrize("metric", EXACT_METRICS)
def test_the_oracle_has_seen_every_bfloat16_scale(metric):
    """There are 129 of them in [1, 2] x absmax: try every one."""
    weight, base = pair("dense", (32, 48), 0)
    granularity = PerBlock(16, 16)
    scale = absmax_scale(weight, granularity, scale_format="bfloat16")
    bits = scale.bfloat16().view(torch.int16).reshape(-1, 1) + torch.arange(129, dtype=torch.int16)
    every_GK = bits.view(torch.bfloat16).float()
    expected = scores(weight, base, every_GK, granularity, metric).amax(1)
    best, _ = best_scale(weight, base, scale, granularity, metric=metric, tau=0.01, scale_format="bfloat16")
    found = scores(weight, base, best.reshape(-1, 1), granularity, metric)[:, 0]
    assert torch.allclose(found, expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("metric", EXACT_METRICS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_dense_search_comes_near_the_best_of_all_scales(kind, metric):
    weight, base = pair(kind, (96, 128), 4)
    granularity = PerBlock(32, 32)
    scale = absmax_scale(weight, granularity)
    _, promise = best_scale(weight, base, scale, granularity, metric=metric, tau=0.01)
    best, known = promise.flatten(), promise.flatten().isfinite()
    found = {}
    for n in (16, 64, 256):
        result = search_scale(weight, base, granularity, ScaleSearch.dense(n, metric=metric))
        found[n] = score(result.stats, metric)
        assert bool((found[n] <= best + slack(weight, metric) + 1e-5 * best.abs())[known].all()), n
    absmax = score(result.absmax_stats, metric)
    # of what there is to win over absmax, on the mean of the groups
    won = {n: float((found[n] - absmax).sum() / (best - absmax).sum()) for n in found}
    assert won[16] < won[64] < won[256] <= 1 + 1e-3
    assert won[64] > 0.8
    assert won[256] > 0.9


def test_dense_candidates_are_a_geometric_grid_over_one_octave():
    alpha_K = coarse(ScaleSearch.dense(8, metric="sign"))
    assert torch.allclose(alpha_K[1:] / alpha_K[:-1], torch.tensor(2.0**0.125).double())
    assert float(alpha_K[0]) == 1.0
    assert float(alpha_K[-1] * 2**0.125) == pytest.approx(2.0)


@pytest.mark.parametrize("metric", ["sign", *EXACT_METRICS])
@pytest.mark.parametrize("alpha_scope", ["group", "layer"])
def test_dense_search_takes_the_best_of_its_grid(metric, alpha_scope):
    weight, base = pair("dense", (24, 40), 2)
    search = ScaleSearch.dense(16, metric=metric, alpha_scope=alpha_scope)
    result = search_scale(weight, base, PerBlock(8, 8), search)
    scale_GK = (absmax_scale(weight, PerBlock(8, 8)).reshape(-1, 1).double() * coarse(search)).float()
    stats = reference.delta_stats(weight, base, scale_GK, PerBlock(8, 8), FP8_E4M3)
    if alpha_scope == "layer":
        best, found = score(stats.total(), metric).amax(), score(result.stats.total(), metric)
    else:
        best, found = score(stats, metric).amax(1), score(result.stats, metric)
    assert torch.allclose(found, best, rtol=1e-6, atol=1e-12)
