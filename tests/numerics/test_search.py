"""The search is Algorithm 1 to the letter, never worse than absmax, and reports what it wrote."""

import itertools
import math

import ml_dtypes
import numpy as np
import pytest
import torch

from daq_lightning.numerics.backends import reference
from daq_lightning.numerics.formats import PerBlock, PerChannel, PerTensor
from daq_lightning.numerics.objectives import METRICS, DeltaStats, measure, score
from daq_lightning.numerics.quantize import absmax_scale, dequantize, quantize
from daq_lightning.numerics.scales import round_scale
from daq_lightning.numerics.search.search import search_scale
from daq_lightning.numerics.search.settings import WIDE_RANGE, ScaleSearch

RANGES = [WIDE_RANGE, (0.8, 1.25), (0.9, 1.11)]
GRANULARITIES = [PerTensor(), PerChannel(), PerBlock(4, 3)]
SCOPES = ["group", "layer"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SCALE_FORMATS = ["float32", "bfloat16", "ue8m0"]


def case(shape=(9, 10), dtype=torch.float32, seed=0, size=0.02):
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator)
    changed = torch.rand(shape, generator=generator) < 0.8
    weight = base + size * torch.randn(shape, generator=generator) * changed
    return weight.to(dtype), base.to(dtype)


def configure(metric="cosine", alpha_range=WIDE_RANGE, **options):
    return ScaleSearch(metric=metric, alpha_min=alpha_range[0], alpha_max=alpha_range[1], **options)


# --- Algorithm 1 written out: one weight, one candidate after the other, numpy and ml_dtypes only ---


def split(matrix, granularity):
    rows, cols = granularity.cell(matrix.shape)
    return [
        matrix[top : top + rows, left : left + cols].ravel()
        for top in range(0, matrix.shape[0], rows)
        for left in range(0, matrix.shape[1], cols)
    ]


def scale_as_kept(scale, scale_format):
    scale = max(np.float32(scale), np.float32(2.0**-126))
    if scale_format == "bfloat16":
        return np.float32(scale.astype(ml_dtypes.bfloat16))
    if scale_format == "ue8m0":
        return np.float32(2.0 ** math.ceil(math.log2(float(scale))))
    return scale


def score_of_scale(groups, scales, search):
    """The objective over the union of some groups, each with its scale."""
    n = equal = 0
    dot = delta_sq = delta_q_sq = error_sq = 0.0
    for (weight, base), scale in zip(groups, scales, strict=True):
        scaled = np.clip(weight * (np.float32(1) / scale), np.float32(-448), np.float32(448))
        read = scaled.astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale
        delta, delta_q = (weight - base).astype(np.float64), (read - base).astype(np.float64)
        n += delta.size
        equal += int((np.sign(delta) == np.sign(delta_q)).sum())
        dot += float(delta @ delta_q)
        delta_sq += float(delta @ delta)
        delta_q_sq += float(delta_q @ delta_q)
        error_sq += float(((read - weight).astype(np.float64) ** 2).sum())
    if search.metric == "sign":
        return equal / n
    if search.metric == "mse":
        return -error_sq / n
    if search.metric == "cosine":
        return dot / math.sqrt(delta_sq * delta_q_sq) if delta_q_sq else 0.0
    rho = dot / delta_sq
    return -((rho - 1) ** 2 + search.tau * (delta_q_sq / delta_sq - rho**2))


def algorithm_1(groups, search, scale_format):
    """Returns (alpha, the scale of each group, score)."""
    absmax = [scale_as_kept(np.abs(weight).max() / np.float32(448), scale_format) for weight, _ in groups]

    def attempt(alpha):
        scales = [scale_as_kept(np.float32(float(scale) * alpha), scale_format) for scale in absmax]
        return score_of_scale(groups, scales, search), scales

    best_alpha = 1.0
    best_score, best_scales = attempt(1.0)
    coarse = np.linspace(search.alpha_min, search.alpha_max, search.n_coarse)
    radius = (search.alpha_max - search.alpha_min) / max(1, search.n_coarse - 1) / 2
    for stage in ("coarse", "fine"):
        low, high = max(search.alpha_min, best_alpha - radius), min(search.alpha_max, best_alpha + radius)
        candidates = coarse if stage == "coarse" else np.linspace(low, high, search.n_fine)
        for alpha in sorted(candidates, key=lambda alpha: (round(abs(alpha - 1), 9), -alpha)):
            new_score, scales = attempt(float(alpha))
            if new_score > best_score:
                best_alpha, best_score, best_scales = float(alpha), new_score, scales
    return best_alpha, best_scales, best_score


@pytest.mark.parametrize("scale_format", SCALE_FORMATS)
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("metric", METRICS)
def test_finds_what_algorithm_1_written_out_finds(metric, granularity, scope, scale_format):
    for seed, alpha_range, dtype in zip(range(3), RANGES, DTYPES, strict=True):
        weight, base = case(dtype=dtype, seed=seed)
        search = configure(metric, alpha_range, alpha_scope=scope)
        result = search_scale(weight, base, granularity, search, scale_format=scale_format, backend=reference)
        fast = search_scale(weight, base, granularity, search, scale_format=scale_format)
        both = (
            score(fast.stats, metric),
            score(result.stats, metric),
        )  # near ties may go either way: scores count
        torch.testing.assert_close(*both, rtol=1e-5, atol=1e-6 if scope == "group" else 1e-2)
        groups = list(
            zip(
                split(weight.float().numpy(), granularity),
                split(base.float().numpy(), granularity),
                strict=True,
            )
        )
        parts = [groups] if scope == "layer" else [[group] for group in groups]
        found = [algorithm_1(part, search, scale_format) for part in parts]
        scales = np.array([scale for _, part_scales, _ in found for scale in part_scales], np.float32)
        assert np.array_equal(result.scale.flatten().numpy(), scales)
        alphas = result.alpha.flatten().tolist()
        assert alphas[: len(found)] == pytest.approx([alpha for alpha, _, _ in found], rel=1e-12)
        stats = result.stats if scope == "group" else result.stats.total().map(lambda field: field[None])
        assert score(stats, metric).tolist() == pytest.approx(
            [value for _, _, value in found], rel=1e-9, abs=1e-15
        )


# --- properties ---


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("metric", METRICS)
def test_never_worse_than_absmax_and_sometimes_better(metric, granularity, scope):
    better = 0
    for alpha_range, dtype, scale_format in itertools.product(RANGES, DTYPES, SCALE_FORMATS):
        weight, base = case(dtype=dtype, seed=11)
        search = configure(metric, alpha_range, alpha_scope=scope)
        result = search_scale(weight, base, granularity, search, scale_format=scale_format)
        pair = (result.stats, result.absmax_stats)
        found, absmax = (score(s if scope == "group" else s.total(), metric) for s in pair)
        assert (found >= absmax).all()
        better += int((found > absmax).sum())
        stays = found == absmax  # a strict improvement or absmax itself
        assert (result.alpha.flatten()[stays.expand(result.alpha.numel())] == 1).all()
        moved = result.alpha[result.alpha != 1]
        assert ((moved >= alpha_range[0]) & (moved <= alpha_range[1])).all()
    assert better > 0


@pytest.mark.parametrize("scale_format", SCALE_FORMATS)
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("granularity", [*GRANULARITIES, PerBlock(128, 128)], ids=str)
def test_the_sums_are_those_of_the_codes_and_scales_that_are_returned(
    granularity, dtype, scope, scale_format
):
    weight, base = case((21, 13), dtype)
    search = configure(alpha_scope=scope)
    result = search_scale(weight, base, granularity, search, scale_format=scale_format, backend=reference)
    absmax = absmax_scale(weight, granularity, scale_format=scale_format)
    assert result.codes.dtype == torch.float8_e4m3fn
    assert result.codes.shape == weight.shape
    assert result.scale.shape == result.alpha.shape == granularity.grid((21, 13))
    assert (result.scale.dtype, result.alpha.dtype) == (torch.float32, torch.float64)
    assert torch.equal(result.scale, round_scale((absmax.double() * result.alpha).float(), scale_format))
    assert torch.equal(result.scale, round_scale(result.scale, scale_format))  # what the format keeps
    assert torch.equal(result.codes.float(), quantize(weight, result.scale, granularity).float())
    plain = dequantize(quantize(weight, absmax, granularity), absmax, granularity)
    for stats, read in (
        (result.stats, dequantize(result.codes, result.scale, granularity)),
        (result.absmax_stats, plain),
    ):
        parts = [split(tensor.float().numpy(), granularity) for tensor in (weight, base, read)]
        for group, tensors in enumerate(zip(*parts, strict=True)):
            expected = measure(*(torch.from_numpy(part.copy()) for part in tensors))
            for field, value, outside in zip(DeltaStats._fields, stats, expected, strict=True):
                assert value.dtype == outside.dtype
                assert float(value[group]) == pytest.approx(float(outside), rel=1e-12), field
        assert int(stats.n.sum()) == weight.numel()


@pytest.mark.parametrize("shape", [(1, 1), (130, 140), (1, 200), (200, 1)], ids=str)
@pytest.mark.parametrize("scope", SCOPES)
def test_ragged_and_tiny_weights_are_searched(shape, scope):
    weight, base = case(shape)
    for granularity in (PerTensor(), PerChannel(), PerBlock(128, 128)):
        result = search_scale(weight, base, granularity, configure("hybrid", alpha_scope=scope))
        found, absmax = (score(stats.total(), "hybrid") for stats in (result.stats, result.absmax_stats))
        assert int(result.stats.n.sum()) == weight.numel()
        if scope == "layer":
            assert found >= absmax
            assert (result.alpha == result.alpha[0, 0]).all()


def test_mse_ignores_the_base():
    weight, base = case()
    search = configure("mse")
    first = search_scale(weight, base, PerBlock(4, 3), search)
    other = search_scale(weight, torch.flip(base, (0, 1)) * 3 + 1, PerBlock(4, 3), search)
    assert torch.equal(first.alpha, other.alpha)
    assert torch.equal(first.codes.float(), other.codes.float())
    assert torch.equal(first.stats.error_sq, other.stats.error_sq)
    assert not torch.equal(
        search_scale(weight, base, PerBlock(4, 3), configure("cosine")).alpha, first.alpha
    )  # which another objective does not


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("metric", METRICS)
def test_without_an_update_alpha_stays_one(metric, scope):
    weight, base = case()
    base[2:5] = weight[2:5]
    if scope == "layer":
        base = weight.clone()
    result = search_scale(weight, base, PerChannel(), configure(metric, alpha_scope=scope))
    frozen = slice(2, 5) if scope == "group" else slice(None)
    assert (result.alpha[frozen] == 1).all()
    assert torch.equal(result.scale[frozen], absmax_scale(weight, PerChannel())[frozen])
    if scope == "group" and metric != "sign":
        assert (result.alpha != 1).any()


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("metric", METRICS)
def test_a_group_that_became_zero_gets_scale_one_and_codes_zero(metric, scope):
    weight, base = case()
    weight[3] = 0
    result = search_scale(weight, base, PerChannel(), configure(metric, alpha_scope=scope))
    assert float(result.scale[3]) == float(result.alpha[3]) == 1
    assert result.codes[3].float().count_nonzero() == 0
    assert float(score(result.stats, metric)[3]) == float(score(result.absmax_stats, metric)[3])


@pytest.mark.parametrize(
    ("alpha_range", "n_coarse", "expected"),
    [
        ((0.5, 2.0), 7, 0.75),  # 0.5, 0.75, 1.5, 1.75 and 2 all keep both signs; 1 and 1.25 do not
        ((1.0, 2.0), 5, 1.5),
        ((1.6, 2.0), 3, 1.8),  # 5.3 / 1.6 rounds to 3: 4.8 flips the sign
        ((0.5, 1.5), 3, 1.5),  # as near as 0.5, and nothing is clipped
        ((1.0, 1.25), 2, 1.0),  # none is better: absmax
    ],
)
def test_ties_go_to_the_alpha_nearest_one(alpha_range, n_coarse, expected):
    weight, base = (
        torch.tensor([[448 * 512, 5.3]]),
        torch.tensor([[0.0, 5.0]]),
    )  # absmax scale 512: step 1 below 8
    result = search_scale(
        weight, base, PerTensor(), configure("sign", alpha_range, n_coarse=n_coarse, n_fine=0)
    )
    assert float(score(result.absmax_stats, "sign")) == 0.5
    assert float(result.alpha) == pytest.approx(expected, rel=1e-15)
    assert float(score(result.stats, "sign")) == (0.5 if expected == 1 else 1.0)


def test_the_tie_between_one_minus_and_one_plus_is_not_left_to_the_last_bit():
    """Fine grids around 1 are symmetric only up to rounding: each of these pairs is a tie on the sign
    rate."""
    weight, base = torch.tensor([[448 * 512, 5.3]]), torch.tensor([[0.0, 5.0]])
    for distance in (0.44, 0.46, 0.48, 0.5):
        search = configure("sign", (1 - distance, 1 + distance), n_coarse=2, n_fine=0)
        assert float(search_scale(weight, base, PerTensor(), search).alpha) == pytest.approx(
            1 + distance, rel=1e-12
        )


def test_an_equal_score_does_not_move_the_scale():
    """Twice the scale reads the same unless codes underflow: alpha = 2 ties with 1 on every objective."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.rand(6, 8, generator=generator) + 1
    base = weight - 0.1 * torch.randn(6, 8, generator=generator)
    for metric in METRICS:
        result = search_scale(weight, base, PerChannel(), configure(metric, (2.0, 2.0), n_coarse=1, n_fine=3))
        assert (result.alpha == 1).all()


def test_more_candidates_help():
    weight, base = case((32, 64))
    few, many = (
        search_scale(weight, base, PerChannel(), configure("cosine", n_coarse=n, n_fine=0)) for n in (4, 61)
    )  # the 4 are among the 61
    assert (score(many.stats, "cosine") >= score(few.stats, "cosine")).all()
    assert score(many.stats, "cosine").mean() > score(few.stats, "cosine").mean()


def test_groups_do_not_see_each_other():
    """There are enough groups that they are searched in several bands."""
    weight, base = case((500, 500), seed=4)
    granularity, search = PerBlock(1, 2), configure("hybrid", n_coarse=10, n_fine=0)
    whole = search_scale(weight, base, granularity, search)
    for rows in (slice(0, 3), slice(250, 260), slice(495, 500)):
        part = search_scale(weight[rows], base[rows], granularity, search)
        assert torch.equal(part.alpha, whole.alpha[rows])
        assert torch.equal(part.codes.float(), whole.codes[rows].float())


def test_the_alpha_of_a_layer_does_not_depend_on_the_order_of_rows():
    weight, base = case((500, 500), seed=5)
    granularity, search = PerBlock(1, 2), configure("cosine", n_coarse=10, n_fine=2, alpha_scope="layer")
    one = search_scale(weight, base, granularity, search)
    other = search_scale(weight.flip(0), base.flip(0), granularity, search)
    assert float(one.alpha[0, 0]) != 1
    assert torch.equal(one.alpha, other.alpha)
    assert torch.equal(
        one.stats.sign_equal.reshape(500, 250), other.stats.sign_equal.reshape(500, 250).flip(0)
    )


def test_inputs_and_global_state_stay_as_they_were():
    weight, base = case(dtype=torch.bfloat16)
    kept = weight.clone(), base.clone()
    state = torch.get_rng_state()
    search_scale(weight.requires_grad_(), base, PerBlock(4, 3))
    assert torch.equal(weight, kept[0])
    assert torch.equal(base, kept[1])
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_default_dtype() == torch.float32


def test_strided_views_are_searched_as_their_copies():
    weight, base = case((10, 12))
    one = search_scale(weight.T, base.T, PerBlock(4, 3))
    other = search_scale(weight.T.contiguous(), base.T.contiguous(), PerBlock(4, 3))
    assert torch.equal(one.scale, other.scale)
    assert torch.equal(one.codes.float(), other.codes.float())


# --- bad input ---


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("scope", SCOPES)
def test_nan_and_inf_are_refused_by_name_and_number(granularity, dtype, scope):
    for role, called in (("weight", r"layers\.3\.q_proj"), ("base", r"the base of layers\.3\.q_proj")):
        tensors = dict(zip(("weight", "base"), case(dtype=dtype), strict=True))
        tensors[role][1, 2] = tensors[role][4, 0] = torch.nan
        tensors[role][0, 0] = -torch.inf
        with pytest.raises(ValueError, match=rf"^{called} of shape \(9, 10\) has 2 NaN and 1 Inf values"):
            search_scale(
                **tensors,
                granularity=granularity,
                search=configure(alpha_scope=scope),
                name="layers.3.q_proj",
            )


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_single_bad_value_is_enough_whatever_the_objective(metric, bad):
    for role in (0, 1):
        tensors = case()
        tensors[role][-1, -1] = bad
        with pytest.raises(ValueError, match="NaN and"):
            search_scale(*tensors, PerBlock(4, 3), configure(metric))


def test_updates_beyond_float32_are_refused_as_too_large():
    with pytest.raises(ValueError, match="too large for float32"):
        search_scale(torch.full((2, 2), 3e38), torch.full((2, 2), -3e38), PerTensor())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": "snr"}, "Unknown metric 'snr'.*sign, cosine, mse, hybrid"),
        ({"alpha_min": 0.0}, "alpha_min must be a finite number > 0, got 0.0"),
        ({"alpha_min": -1.0}, "alpha_min"),
        ({"alpha_min": math.nan}, "alpha_min"),
        ({"alpha_min": 1.5, "alpha_max": 1.2}, r"\[1.5, 1.2\]; swap"),
        ({"alpha_max": math.inf}, "alpha_max must be a finite number"),
        ({"n_coarse": 0}, "n_coarse must be >= 1"),
        ({"n_fine": -1}, "n_fine >= 0"),
        ({"alpha_scope": "model"}, "Unknown alpha_scope 'model': expected 'group' or 'layer'"),
        ({"tau": -0.1}, "tau must be a finite number >= 0"),
        ({"spacing": "cubic"}, "Unknown spacing 'cubic': expected 'linear' or 'log'"),
    ],
    ids=str,
)
def test_bad_settings_are_refused_when_they_are_made(options, message):
    with pytest.raises(ValueError, match=message):
        ScaleSearch(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_coarse": 5.5}, "n_coarse must be an integer, got 5.5 of type float"),
        ({"n_coarse": "5"}, "n_coarse must be an integer, got '5' of type str"),
        ({"n_coarse": True}, "n_coarse must be an integer, got True of type bool"),
        ({"n_fine": 2.0}, "n_fine must be an integer"),
        ({"n_fine": None}, "n_fine must be an integer"),
        ({"alpha_min": "0.5"}, "alpha_min must be a number, got '0.5' of type str"),
        ({"alpha_max": [2.0]}, "alpha_max must be a number"),
        ({"alpha_min": False}, "alpha_min must be a number, got False of type bool"),
        ({"alpha_max": torch.tensor(2.0)}, "alpha_max must be a number, got .* of type Tensor"),
        ({"tau": None}, "tau must be a number"),
    ],
    ids=str,
)
def test_settings_of_another_type_are_refused_when_they_are_made(options, message):
    with pytest.raises(TypeError, match=message):
        ScaleSearch(**options)


@pytest.mark.parametrize("field", ["n_coarse", "n_fine"])
def test_candidates_beyond_use_are_refused_with_the_reason(field):
    with pytest.raises(
        ValueError, match=f"{field} must be at most 16,384, got 100000000: .* passes over the weight"
    ):
        ScaleSearch(**{field: 10**8})
    assert getattr(ScaleSearch(**{field: 16384}), field) == 16384
    with pytest.raises(ValueError, match="n_coarse must be at most"):
        ScaleSearch.dense(10**8)


def test_what_is_no_granularity_search_or_scale_format_is_named():
    weight, base = case()
    with pytest.raises(
        TypeError, match=r"PerTensor\(\), PerChannel\(\) or PerBlock\(rows, cols\), got 'block'"
    ):
        search_scale(weight, base, "block")
    with pytest.raises(TypeError, match=r"got <class '.*PerBlock'>"):
        search_scale(weight, base, PerBlock)
    with pytest.raises(
        TypeError, match=r"search must be a ScaleSearch, got 'cosine'; write ScaleSearch\(metric="
    ):
        search_scale(weight, base, PerBlock(), "cosine")
    for wrong in ("float16", None):
        message = f"Unknown scale format {wrong!r}: expected one of float32, bfloat16, ue8m0"
        with pytest.raises(ValueError, match=message):
            search_scale(weight, base, PerBlock(), scale_format=wrong)
        with pytest.raises(ValueError, match=message):
            absmax_scale(weight, PerBlock(), scale_format=wrong)
    with pytest.raises(TypeError, match="PerBlock needs whole numbers of rows and columns, got 2.5 x 128"):
        PerBlock(rows=2.5)


@pytest.mark.parametrize(
    ("weight", "base", "error", "message"),
    [
        (torch.ones(2, 3), torch.ones(3, 2), ValueError, r"up: weight has shape \(2, 3\), its base \(3, 2\)"),
        (torch.ones(6), torch.ones(6), ValueError, r"up: expected a non-empty matrix.*\(6,\) and \(6,\)"),
        (torch.ones(2, 3, 4), torch.ones(2, 3, 4), ValueError, "2-D slices"),
        (torch.ones(0, 3), torch.ones(0, 3), ValueError, "non-empty"),
        (
            torch.ones(2, 3),
            torch.ones(2, 3, device="meta"),
            ValueError,
            "up: weight is on cpu, its base on meta",
        ),
        (
            torch.ones(2, 3).double(),
            torch.ones(2, 3),
            TypeError,
            "up: weight has dtype torch.float64, expected f",
        ),
        (torch.ones(2, 3), torch.ones(2, 3).int(), TypeError, "up: base has dtype torch.int32"),
        (
            torch.ones(2, 3).to(torch.float8_e4m3fn),
            torch.ones(2, 3),
            TypeError,
            "dequantize quantized weights first",
        ),
        (
            [[1.0, 2.0]],
            torch.ones(1, 2),
            TypeError,
            r"up: weight is a list, expected a torch.Tensor; .*torch.as_tensor",
        ),
        (torch.ones(1, 2), np.ones((1, 2)), TypeError, "up: base is a ndarray, expected a torch.Tensor"),
        (torch.ones(1, 2), None, TypeError, "up: base is a NoneType"),
        (
            torch.eye(3).to_sparse(),
            torch.eye(3),
            TypeError,
            r"up: weight has the layout torch.sparse_coo.*to_dense\(\)",
        ),
        (torch.eye(3), torch.eye(3).to_sparse(), TypeError, "up: base has the layout torch.sparse_coo"),
        (
            torch.ones(2, 3, device="meta"),
            torch.ones(2, 3, device="meta"),
            ValueError,
            "up: .*meta device.* no values",
        ),
    ],
)
def test_inputs_that_do_not_fit_are_refused_with_a_remedy(weight, base, error, message):
    with pytest.raises(error, match=message):
        search_scale(weight, base, PerChannel(), name="up")


def test_mixed_dtypes_of_weight_and_base_are_searched_in_float32():
    weight, base = case()
    mixed = search_scale(weight, base.bfloat16(), PerChannel())
    upcast = search_scale(weight, base.bfloat16().float(), PerChannel())
    assert torch.equal(mixed.scale, upcast.scale)
