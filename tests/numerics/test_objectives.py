"""Every sum and score is the one that numpy, written out in float64, computes."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics.pairwise import cosine_similarity

from daq_lightning.numerics.backends import delta_stats, reference
from daq_lightning.numerics.formats import PerBlock, PerChannel, PerTensor
from daq_lightning.numerics.formats.fp8 import FP8_E4M3
from daq_lightning.numerics.objectives import (
    METRICS,
    DeltaStats,
    cosine,
    gain,
    measure,
    mse,
    score,
    sign_rate,
    sums,
)
from daq_lightning.numerics.quantize import absmax_scale, dequantize, quantize

GRANULARITIES = [PerTensor(), PerChannel(), PerBlock(4, 3), PerBlock(128, 128)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
COUNTS = DeltaStats._fields[:6]


def case(shape=(7, 11), dtype=torch.float32, seed=0):
    """A weight, its base and what a coarse quantizer makes of it; some elements unchanged, some lost, some
    flipped."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator).to(dtype)
    delta = 0.05 * torch.randn(shape, generator=generator) * (torch.rand(shape, generator=generator) < 0.7)
    weight = (base.float() + delta).to(dtype)
    lost = torch.rand(shape, generator=generator) < 0.2
    dequantized = torch.where(lost, base.float(), (weight.float() * 16).round() / 16)
    return weight, base, dequantized


def oracle(weight, base, dequantized):
    """The definition, from float32 differences that are summed in float64."""
    w, b, q = (
        np.asarray(tensor.float().numpy(), np.float32).ravel() for tensor in (weight, base, dequantized)
    )
    delta, delta_q, error = (x.astype(np.float64) for x in (w - b, q - b, q - w))
    sign, sign_q = np.sign(delta), np.sign(delta_q)
    changed = delta != 0
    return {
        "n": delta.size,
        "n_changed": changed.sum(),
        "sign_equal": (sign == sign_q).sum(),
        "preserved": (changed & (sign == sign_q)).sum(),
        "flipped": (changed & (sign == -sign_q)).sum(),
        "lost": (changed & (delta_q == 0)).sum(),
        "dot": delta @ delta_q,
        "delta_sq": delta @ delta,
        "delta_q_sq": delta_q @ delta_q,
        "error_sq": error @ error,
    }


def assert_sums(stats, expected):
    for field, value in stats._asdict().items():
        if field in COUNTS:
            assert value.dtype == torch.int64
            assert int(value) == int(expected[field]), field
        else:
            assert value.dtype == torch.float64
            assert float(value) == pytest.approx(float(expected[field]), rel=1e-12, abs=1e-300), field


def integers(*values):
    return torch.tensor(values, dtype=torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (7, 11), (40, 33)], ids=str)
def test_measure_is_the_definition(shape, dtype):
    weight, base, dequantized = case(shape, dtype)
    assert_sums(measure(weight, base, dequantized), oracle(weight, base, dequantized))


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (9, 7), (130, 140)], ids=str)
def test_the_kernel_sums_what_a_reader_of_the_codes_would_see(shape, dtype, granularity):
    weight, base, _ = case(shape, dtype)
    absmax = absmax_scale(weight, granularity).flatten()
    scale_GK = absmax[:, None] * torch.tensor([1.0, 0.7, 1.9])
    stats = reference.delta_stats(weight, base, scale_GK, granularity, FP8_E4M3)
    assert stats.n.shape == scale_GK.shape
    for k in range(3):
        scale = scale_GK[:, k].reshape(granularity.grid(shape))
        read = dequantize(quantize(weight, scale, granularity), scale, granularity)
        assert_sums(stats.map(lambda field, k=k: field[:, k]).total(), oracle(weight, base, read))


def test_the_kernel_keeps_groups_apart():
    weight, base, _ = case((9, 7))
    granularity = PerBlock(4, 3)
    scale = absmax_scale(weight, granularity)
    stats = reference.delta_stats(weight, base, scale.reshape(-1, 1), granularity, FP8_E4M3)
    read = dequantize(quantize(weight, scale, granularity), scale, granularity)
    group = 0
    for top in range(0, 9, 4):
        for left in range(0, 7, 3):
            where = (slice(top, top + 4), slice(left, left + 3))
            one = stats.map(lambda field, group=group: field[group, 0])
            assert_sums(one, oracle(weight[where], base[where], read[where]))
            group += 1
    assert group == stats.n.shape[0]


def test_counts_of_changed_elements_add_up():
    stats = measure(*case((40, 33)))
    assert stats.n_changed == stats.preserved + stats.flipped + stats.lost
    assert min(int(count) for count in (stats.preserved, stats.flipped, stats.lost)) > 0


def test_scores_are_those_of_numpy_and_scikit_learn():
    weight, base, dequantized = case((40, 33))
    stats = measure(weight, base, dequantized)
    delta = (weight - base).double().numpy().ravel()
    delta_q = (dequantized - base).double().numpy().ravel()
    rho = delta @ delta_q / (delta @ delta)
    orthogonal = delta_q - rho * delta
    tau = 0.03
    assert float(sign_rate(stats)) == np.mean(np.sign(delta) == np.sign(delta_q))
    assert float(cosine(stats)) == pytest.approx(cosine_similarity([delta], [delta_q])[0, 0], rel=1e-12)
    assert float(gain(stats)) == pytest.approx(rho, rel=1e-12)
    error = (dequantized - weight).double().numpy()
    assert float(mse(stats)) == pytest.approx(np.mean(error**2), rel=1e-12)
    assert float(score(stats, "sign")) == float(sign_rate(stats))
    assert float(score(stats, "cosine")) == float(cosine(stats))
    assert float(score(stats, "mse")) == -float(mse(stats))
    hybrid = -((rho - 1) ** 2 + tau * (orthogonal @ orthogonal) / (delta @ delta))
    assert float(score(stats, "hybrid", tau=tau)) == pytest.approx(hybrid, rel=1e-9)


def test_error_of_the_delta_is_error_of_the_weight():
    """Eq. 7: the base cancels; exact for numbers whose differences float32 holds."""
    generator = torch.Generator().manual_seed(7)
    weight, base, dequantized = (
        torch.randint(-512, 512, (50, 20), generator=generator) / 64 for _ in range(3)
    )
    delta, delta_q = weight - base, dequantized - base
    of_delta = float((delta_q - delta).double().square().mean())
    stats = measure(weight, base, dequantized)
    assert float(mse(stats)) == of_delta
    expanded = stats.delta_q_sq - 2 * stats.dot + stats.delta_sq
    assert float(expanded) == float(stats.error_sq)


def test_hybrid_with_tau_one_is_mse_up_to_the_size_of_the_update():
    generator = torch.Generator().manual_seed(8)
    weight, base, dequantized = (
        torch.randint(-512, 512, (50, 20), generator=generator) / 64 for _ in range(3)
    )
    stats = measure(weight, base, dequantized)
    assert float(score(stats, "hybrid", tau=1.0)) == pytest.approx(
        float(-stats.error_sq / stats.delta_sq), rel=1e-12
    )


def test_hybrid_with_tau_zero_asks_for_the_gain_alone():
    base, weight = integers(0, 0), integers(1, 0)
    noisy = measure(weight, base, integers(1, 5))
    weak = measure(weight, base, integers(0.75, 0))
    assert float(score(noisy, "hybrid", tau=0.0)) == 0.0
    assert float(score(weak, "hybrid", tau=0.0)) == -0.0625
    assert float(score(noisy, "hybrid", tau=0.01)) == pytest.approx(-0.25)


def test_the_papers_example_of_one_weight_between_two_grids():
    """5.3 over a base of 5.0 is read as 5 under scale 512, as 6 under 768: MSE takes 5, sign and cosine take
    6."""
    weight, base = torch.tensor([[5.3]]), torch.tensor([[5.0]])
    scale_GK = torch.tensor([[512.0, 768.0]])
    # 5.3 / 512 and 5.3 / 768 lie below the smallest normal code, where the grid is even: steps of 1 and of
    # 1.5
    for scale, read in ((512.0, 5.0), (768.0, 6.0)):
        one = torch.tensor([[scale]])
        assert float(dequantize(quantize(weight, one, PerTensor()), one, PerTensor())) == read
    stats = delta_stats(weight, base, scale_GK, PerTensor())
    errors = mse(stats)[0].tolist()
    assert errors == pytest.approx([0.09, 0.49], rel=1e-5)
    assert [int(score(stats, metric)[0].argmax()) for metric in ("mse", "sign", "cosine")] == [0, 1, 1]
    assert sign_rate(stats)[0].tolist() == [0.0, 1.0]
    assert cosine(stats)[0].tolist() == pytest.approx([0.0, 1.0])
    assert gain(stats)[0].tolist() == pytest.approx([0.0, 1 / 0.3], rel=1e-5)
    assert stats.lost[0].tolist() == [1, 0]


@pytest.mark.parametrize(
    ("weight", "dequantized", "expected"),
    [
        ((1.0, 2.0), (1.0, 2.0), {"sign": 1.0, "cosine": 1.0, "gain": 1.0, "hybrid": 0.0}),  # no update, kept
        (
            (1.0, 2.0),
            (1.5, 2.0),
            {"sign": 0.5, "cosine": 0.0, "gain": math.nan, "hybrid": -math.inf},
        ),  # noise made up
        ((1.5, 2.0), (1.0, 2.0), {"sign": 0.5, "cosine": 0.0, "gain": 0.0, "hybrid": -1.0}),  # update lost
        ((1.5, 2.0), (1.5, 2.0), {"sign": 1.0, "cosine": 1.0, "gain": 1.0, "hybrid": 0.0}),  # update kept
        (
            (1.5, 2.0),
            (0.5, 2.0),
            {"sign": 0.5, "cosine": -1.0, "gain": -1.0, "hybrid": -4.0},
        ),  # update turned round
    ],
)
def test_zero_updates_and_lost_updates_have_defined_scores(weight, dequantized, expected):
    stats = measure(integers(*weight), integers(1, 2), integers(*dequantized))
    got = {metric: float(score(stats, metric)) for metric in ("sign", "cosine", "hybrid")}
    got["gain"] = float(gain(stats))
    assert got == pytest.approx(expected, nan_ok=True)


def test_updates_of_the_smallest_numbers_count_as_updates():
    base = torch.zeros(3)
    weight = torch.tensor([1e-45, -1e-45, 0.0])
    stats = measure(weight, base, weight)
    assert (int(stats.n_changed), int(stats.preserved), int(stats.sign_equal)) == (2, 2, 3)
    assert float(cosine(stats)) == pytest.approx(1.0)
    assert float(gain(stats)) == 1.0


def test_sums_add_over_disjoint_parts():
    weight, base, dequantized = case((40, 33))
    whole = measure(weight, base, dequantized)
    parts = [measure(weight[rows], base[rows], dequantized[rows]) for rows in (slice(0, 13), slice(13, 40))]
    for field, together, value in zip(DeltaStats._fields, parts[0].add(parts[1]), whole, strict=True):
        assert float(together) == pytest.approx(float(value), rel=1e-13), field


def test_sums_broadcast_over_candidates():
    weight, base, dequantized = case((4, 6))
    candidates = torch.stack([dequantized, weight, base])
    stats = sums(weight, base, candidates)
    assert stats.n.shape == stats.dot.shape == (3, 4)
    for k in range(3):
        one = sums(weight, base, candidates[k])
        assert all(torch.equal(field[k], alone) for field, alone in zip(stats, one, strict=True))


def test_a_long_sum_of_small_products_stays_exact():
    """A float32 running sum would stick: 2^22 products of 1 beside one of 2^24."""
    weight = torch.ones(1 << 22)
    weight[0] = 2.0**12
    stats = measure(weight, torch.zeros_like(weight), weight)
    assert float(stats.delta_sq) == 2.0**24 + 2.0**22 - 1


def test_unknown_metrics_and_unequal_shapes_are_refused_by_name():
    stats = measure(*case())
    with pytest.raises(ValueError, match=r"Unknown metric 'psnr': expected one of sign, cosine, mse, hybrid"):
        score(stats, "psnr")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"\(2,\), \(3,\) and \(2,\)"):
        measure(torch.ones(2), torch.ones(3), torch.ones(2))
    assert METRICS == ("sign", "cosine", "mse", "hybrid")
