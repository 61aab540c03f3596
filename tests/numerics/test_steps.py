"""Samples of a weight, outcomes by the size of the change, and the objective over alpha."""

import ml_dtypes
import numpy as np
import pytest
import torch

from daq_lightning import PerBlock, PerChannel, PerTensor, ScaleSearch, absmax_scale, dequantize, quantize
from daq_lightning.numerics.bins import OUTCOMES, STEP_BINS, STEP_EDGES
from daq_lightning.numerics.formats.fp8 import FP8_E4M3
from daq_lightning.numerics.objectives import measure, score
from daq_lightning.numerics.sample import MOST_ELEMENTS, sample_of
from daq_lightning.numerics.search.curve import MOST_POINTS, objective_curve, tried
from daq_lightning.numerics.steps import count_by_step, step_of

GRANULARITIES = [PerBlock(128, 128), PerBlock(16, 32), PerChannel(), PerTensor()]
SHAPES = [(1, 1), (1, 500), (500, 1), (100, 300), (256, 128), (1000, 700), (4096, 128), (128, 4096)]


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_sample_is_whole_groups_of_the_weight_each_once(shape, granularity):
    sample = sample_of(shape, granularity)
    weight = torch.arange(shape[0] * shape[1], dtype=torch.float32).reshape(shape)
    taken = sample.of_weight(weight)
    assert taken.shape == (len(sample.cells), sample.height * sample.width)
    assert sample.elements == taken.numel() == len(taken.unique())
    assert taken.numel() <= max(MOST_ELEMENTS, sample.height * sample.width)
    # a group of the sample has the plain scale of its group in the weight
    scale = absmax_scale(weight, granularity)
    expected = torch.where(taken.abs().amax(1) == 0, 1.0, taken.abs().amax(1) / FP8_E4M3.max)
    rows, cols = granularity.cell(shape)
    if (sample.height, sample.width) == (min(rows, shape[0]), min(cols, shape[1])):
        assert torch.equal(sample.of_groups(scale.flatten()), expected)


def test_blocks_of_a_sample_are_spread_over_rows_and_columns():
    cells = sample_of((4096, 4096), PerBlock(32, 32)).cells
    assert len(cells) == 31
    assert len({row for row, _ in cells}) == 31
    assert len({column for _, column in cells}) > 20


def test_a_step_is_the_distance_to_the_next_code():
    codes = np.arange(0, 0x7F, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    for scale in (1.0, 0.0123, 2.0**-100):
        weight = torch.from_numpy(codes[:-1] * np.float64(np.float32(scale))).float()
        steps = step_of(weight, torch.tensor(scale)).double().numpy()
        np.testing.assert_allclose(steps, np.diff(codes) * np.float64(np.float32(scale)), rtol=1e-6)


@pytest.fixture
def groups():
    generator = torch.Generator().manual_seed(1)
    base = 0.02 * torch.randn(6, 400, generator=generator)
    update = torch.randn(6, 400, generator=generator) * torch.logspace(-6, -2, 400)
    update[:, ::7] = 0
    weight = base + update
    plain = absmax_scale(weight, PerChannel())
    written = (1.3 * plain.double()).float()
    return weight, base, written, plain


def dequantized(weight, scale):
    return dequantize(quantize(weight, scale, PerChannel()), scale, PerChannel())


def test_outcomes_are_those_of_a_loop_over_elements(groups):
    weight, base, written, plain = groups
    sides = dequantized(weight, written), dequantized(weight, plain)
    counts = count_by_step(weight, base, *sides, plain, tensors=3)
    expected = np.zeros((2, 3, STEP_BINS, 3), dtype=np.int64)
    codes = np.arange(0, 0x7F, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    for row in range(6):
        scale = float(plain[row])
        for w, b, *quantized in zip(weight[row], base[row], *(side[row] for side in sides), strict=True):
            if w == b:
                continue
            below = codes[:-1][codes[:-1] <= np.float64(float(w.abs() * plain[row].reciprocal()[0]))].max()
            step = np.diff(codes)[np.flatnonzero(codes == below)[0]] * scale
            ratio = abs(float(w - b)) / step
            place = sum(ratio >= edge for edge in STEP_EDGES)
            for side, value in enumerate(quantized):
                agreed = np.sign(float(w) - float(b)) * np.sign(float(value) - float(b))
                expected[
                    side, row // 2, place, OUTCOMES.index({1: "kept", 0: "lost", -1: "flipped"}[agreed])
                ] += 1
    for mine, theirs in zip(counts, expected, strict=True):
        # an element whose quotient is a hair from an edge may be in the neighbouring bin
        assert np.abs(mine.numpy() - theirs).sum() <= 2
        assert mine.sum() == theirs.sum()


def test_outcomes_add_up_to_the_sums_of_the_objectives(groups):
    weight, base, written, plain = groups
    sides = dequantized(weight, written), dequantized(weight, plain)
    counts = count_by_step(weight, base, *sides, plain)
    for side, of_side in zip(sides, counts, strict=True):
        exact = measure(weight, base, side)
        assert of_side.sum() == exact.n_changed
        assert of_side[0].sum(0).tolist() == [exact.flipped, exact.lost, exact.preserved]
    assert torch.equal(counts.searched.sum(2), counts.absmax.sum(2))  # the same changes in the same bins


@pytest.mark.parametrize("tensors", [1, 2, 3, 6])
def test_tensors_together_are_counted_as_tensors_alone(groups, tensors):
    weight, base, written, plain = groups
    sides = dequantized(weight, written), dequantized(weight, plain)
    together = count_by_step(weight, base, *sides, plain, tensors=tensors)
    for index, rows in enumerate(torch.arange(6).chunk(tensors)):
        alone = count_by_step(weight[rows], base[rows], *(side[rows] for side in sides), plain[rows])
        for one, two in zip(alone, together, strict=True):
            assert torch.equal(one[0], two[index])


def test_without_a_change_there_is_nothing_to_count(groups):
    weight, _, written, plain = groups
    sides = dequantized(weight, written), dequantized(weight, plain)
    assert not any(side.any() for side in count_by_step(weight, weight, *sides, plain))


@pytest.mark.parametrize(
    "search",
    [
        ScaleSearch(),
        ScaleSearch.dense(200),
        ScaleSearch.absmax(),
        ScaleSearch(alpha_min=0.8, alpha_max=1.25, metric="sign"),
    ],
    ids=["default", "dense", "absmax", "paper"],
)
def test_candidates_are_in_the_range_and_hold_the_plain_scale(search):
    alpha = tried(search)
    assert 1.0 in alpha
    assert torch.equal(alpha, alpha.unique())
    assert len(alpha) <= MOST_POINTS + 1
    assert float(alpha.min()) >= min(1.0, search.alpha_min)
    assert float(alpha.max()) <= max(1.0, search.alpha_max)


@pytest.mark.parametrize("metric", ["sign", "cosine", "mse", "hybrid"])
def test_a_curve_is_the_score_of_the_whole_sample_under_one_alpha(groups, metric):
    weight, base, _, plain = groups
    search = ScaleSearch(metric=metric)
    found = objective_curve(weight, base, plain, search, scale_format="float32", fmt=FP8_E4M3)
    for alpha, value in list(zip(tried(search), found, strict=True))[::9]:
        scale = (plain.double() * alpha).float()
        exact = measure(weight, base, dequantized(weight, scale))
        assert float(value) == pytest.approx(float(score(exact, metric)), rel=1e-6)
