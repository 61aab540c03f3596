"""The exact search: no scale of [1, 2) x absmax scores higher, and its scale realizes the score it promises."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from daq_lightning.numerics.candidates import ScaleSearch
from daq_lightning.numerics.exact import best_scale
from daq_lightning.numerics.formats import PerBlock, PerChannel, PerTensor
from daq_lightning.numerics.kernels import delta_stats
from daq_lightning.numerics.objectives import EXACT_METRICS, measure, score
from daq_lightning.numerics.quantize import absmax_scale, dequantize, quantize, round_scale
from daq_lightning.numerics.search import search_scale

GRANULARITIES = [PerBlock(16, 16), PerBlock(9, 20), PerChannel(), PerTensor()]
KINDS = ["dense", "heavy", "grid", "integers", "sparse", "tiny"]


def pair(kind, shape, seed):
    """A bfloat16 weight and its base: usual, of 20 binades, base on an FP8 grid, with many ties, few changes."""
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
    """What rounding the scale to float32 can cost: absolute, in units of the score."""
    return 1e-9 * float(weight.double().square().amax()) if metric == "mse" else 2e-6


def scores(weight, base, scale_GK, granularity, metric):
    return score(delta_stats(weight, base, scale_GK, granularity), metric)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    shape=st.tuples(st.integers(1, 40), st.integers(1, 70)),
    granularity=st.sampled_from(GRANULARITIES),
    metric=st.sampled_from(EXACT_METRICS),
    scale_format=st.sampled_from(["float32", "bfloat16"]),
    steps=st.integers(1, 300),
    seed=st.integers(0, 1 << 30),
)
def test_no_candidate_is_better_and_the_promise_is_kept(kind, shape, granularity, metric, scale_format, steps, seed):
    weight, base = pair(kind, shape, seed)
    scale = absmax_scale(weight, granularity, scale_format=scale_format)
    best, promise = best_scale(
        weight, base, scale, granularity, metric=metric, tau=0.01, scale_format=scale_format, implementation="fused"
    )
    assert torch.equal(round_scale(best, scale_format), best)
    has_promise = promise.flatten().isfinite()
    realized = scores(weight, base, best.reshape(-1, 1), granularity, metric)[:, 0]
    tolerance = slack(weight, metric) + 1e-5 * realized.abs()
    assert bool(((realized - promise.flatten()).abs() <= tolerance)[has_promise].all())

    generator = torch.Generator().manual_seed(seed + 1)
    alpha_K = torch.cat([2 ** (torch.arange(steps) / steps), 1 + torch.rand(100, generator=generator), torch.ones(1)])
    others_GK = round_scale((scale.reshape(-1, 1).double() * alpha_K).float(), scale_format)
    others = scores(weight, base, others_GK, granularity, metric).amax(1)
    assert bool((realized >= others - tolerance)[has_promise].all())


@pytest.mark.parametrize("metric", EXACT_METRICS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_sweep_agrees_with_its_reference(kind, metric):
    weight, base = pair(kind, (45, 50), 3)
    for granularity in (PerBlock(16, 16), PerTensor()):
        for scale_format in ("float32", "bfloat16"):
            scale = absmax_scale(weight, granularity, scale_format=scale_format)
            found = [
                best_scale(
                    *(weight, base, scale, granularity),
                    metric=metric,
                    tau=0.01,
                    scale_format=scale_format,
                    implementation=implementation,
                )
                for implementation in ("fused", "eager")
            ]
            mine, theirs = (promise for _, promise in found)
            tolerance = slack(weight, metric) + 1e-5 * theirs.abs()
            assert torch.equal(mine.isfinite(), theirs.isfinite())
            assert bool(((mine - theirs).abs() <= tolerance)[mine.isfinite()].all())


@pytest.mark.parametrize("metric", EXACT_METRICS)
def test_bfloat16_scales_are_searched_without_exception(metric):
    """There are 129 of them in [1, 2] x absmax: try every one."""
    weight, base = pair("dense", (32, 48), 0)
    granularity = PerBlock(16, 16)
    scale = absmax_scale(weight, granularity, scale_format="bfloat16")
    bits = scale.bfloat16().view(torch.int16).reshape(-1, 1) + torch.arange(129, dtype=torch.int16)
    every_GK = bits.view(torch.bfloat16).float()
    expected = scores(weight, base, every_GK, granularity, metric).amax(1)
    result = search_scale(weight, base, granularity, ScaleSearch.exact(metric=metric), scale_format="bfloat16")
    assert torch.allclose(score(result.stats, metric), expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("implementation", ["eager", "fused"])
@pytest.mark.parametrize("scale_format", ["float32", "bfloat16", "ue8m0"])
@pytest.mark.parametrize("metric", EXACT_METRICS)
def test_the_result_is_what_its_codes_and_scale_give(metric, scale_format, implementation):
    weight, base = pair("grid", (33, 40), 5)
    for granularity in GRANULARITIES:
        result = search_scale(
            *(weight, base, granularity, ScaleSearch.exact(metric=metric)),
            scale_format=scale_format,
            implementation=implementation,
        )
        assert torch.equal(result.codes.float(), quantize(weight, result.scale, granularity).float())
        assert bool((score(result.stats, metric) >= score(result.absmax_stats, metric)).all())
        total = measure(weight, base, dequantize(result.codes, result.scale, granularity))
        for mine, measured in zip(result.stats.total(), total, strict=True):
            assert torch.allclose(mine.double(), measured.double(), rtol=1e-5, atol=1e-12)


def test_beats_the_grids_on_the_objective():
    weight, base = pair("grid", (256, 256), 1)
    granularity = PerBlock(128, 128)
    searches = (
        ScaleSearch.exact(metric="cosine"),
        ScaleSearch.dense(64, metric="cosine"),
        ScaleSearch(metric="cosine"),
    )
    exact, dense, coarse_to_fine = (
        float(score(search_scale(weight, base, granularity, search).stats, "cosine").mean()) for search in searches
    )
    assert exact > dense > coarse_to_fine


def test_no_evidence_no_move_and_zeros():
    weight, _ = pair("dense", (8, 32), 0)
    weight[0] = 0
    result = search_scale(weight, weight.clone(), PerChannel(), ScaleSearch.exact(metric="mse"))
    assert bool((result.alpha == 1).all())
    assert float(result.scale[0]) == 1.0
    assert not bool(result.codes[0].float().any())


def test_subnormal_groups_keep_their_scale():
    weight = torch.full((1, 16), 2.0**-125).bfloat16()
    result = search_scale(weight, torch.zeros_like(weight), PerChannel(), ScaleSearch.exact(metric="mse"))
    assert bool((result.alpha == 1).all())


def test_refuses_what_it_cannot_do_and_says_what_can():
    weight, base = pair("dense", (4, 4), 0)
    with pytest.raises(TypeError, match=r"layer.0: .*bfloat16 weights, got torch.float32; use ScaleSearch.dense\(64\)"):
        search_scale(weight.float(), base, PerChannel(), ScaleSearch.exact(), name="layer.0")
    with pytest.raises(ValueError, match=r"exact search maximizes cosine, mse, hybrid.*'sign'.*dense"):
        ScaleSearch.exact(metric="sign")
    with pytest.raises(ValueError, match=r"'layer'"):
        ScaleSearch(spacing="exact", alpha_scope="layer")
    with pytest.raises(ValueError, match="Unknown spacing 'cubic'"):
        ScaleSearch(spacing="cubic")  # pyright: ignore[reportArgumentType]


def test_dense_candidates_are_a_geometric_grid_over_one_octave():
    alpha_K = ScaleSearch.dense(8, metric="sign").coarse()
    assert torch.allclose(alpha_K[1:] / alpha_K[:-1], torch.tensor(2.0**0.125).double())
    assert float(alpha_K[0]) == 1.0
    assert float(alpha_K[-1] * 2**0.125) == pytest.approx(2.0)


@pytest.mark.parametrize("metric", ["sign", *EXACT_METRICS])
@pytest.mark.parametrize("alpha_scope", ["group", "layer"])
def test_dense_search_takes_the_best_of_its_grid(metric, alpha_scope):
    weight, base = pair("dense", (24, 40), 2)
    search = ScaleSearch.dense(16, metric=metric, alpha_scope=alpha_scope)
    result = search_scale(weight, base, PerBlock(8, 8), search)
    scale_GK = (absmax_scale(weight, PerBlock(8, 8)).reshape(-1, 1).double() * search.coarse()).float()
    stats = delta_stats(weight, base, scale_GK, PerBlock(8, 8), "eager")
    if alpha_scope == "layer":
        best, found = score(stats.total(), metric).amax(), score(result.stats.total(), metric)
    else:
        best, found = score(stats, metric).amax(1), score(result.stats, metric)
    assert torch.allclose(found, best, rtol=1e-6, atol=1e-12)
