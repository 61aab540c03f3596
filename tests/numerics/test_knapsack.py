"""What a budget buys is the best that there is: held against every combination, tried one by one."""

import itertools
import math

import numpy as np
import pytest

from daq_lightning.numerics import knapsack
from daq_lightning.numerics.knapsack import choose_options


def problem(seed, groups, unit=1):
    """Options as layers have them: larger ones mostly lose less, but not always."""
    draw = np.random.default_rng(seed)
    sizes, losses = [], []
    for _ in range(groups):
        count = int(draw.integers(1, 4))
        sizes.append([int(size) * unit for size in draw.integers(1, 40, count)])
        losses.append([float(loss) for loss in draw.exponential(1, count) / np.sqrt(np.array(sizes[-1]))])
    return sizes, losses


def brute_force(sizes, losses, capacity):
    """The least loss of all combinations that fit; float64."""
    best = math.inf
    for combination in itertools.product(*map(range, map(len, sizes))):
        size = sum(group[option] for group, option in zip(sizes, combination, strict=True))
        if size <= capacity:
            best = min(best, math.fsum(g[o] for g, o in zip(losses, combination, strict=True)))
    return best


def outcome(sizes, losses, capacity):
    chosen = choose_options(sizes, losses, capacity)
    return (
        sum(group[option] for group, option in zip(sizes, chosen, strict=True)),
        math.fsum(group[option] for group, option in zip(losses, chosen, strict=True)),
    )


@pytest.mark.parametrize("seed", range(12))
def test_no_combination_that_fits_loses_less(seed):
    sizes, losses = problem(seed, groups=1 + seed % 8)
    low, high = (sum(map(end, sizes)) for end in (min, max))
    for capacity in np.linspace(low, high, 9).astype(int):
        size, loss = outcome(sizes, losses, int(capacity))
        assert size <= capacity
        assert loss == pytest.approx(brute_force(sizes, losses, capacity), rel=1e-12)


@pytest.mark.parametrize("states", [100_000, 50])
def test_more_capacity_never_loses_more_and_is_never_exceeded(states, monkeypatch):
    monkeypatch.setattr(knapsack, "_STATES", states)
    sizes, losses = problem(3, groups=30, unit=997)
    low, high = (sum(map(end, sizes)) for end in (min, max))
    found = [outcome(sizes, losses, int(capacity)) for capacity in np.linspace(low, high, 60).astype(int)]
    for (size, loss), (_, after), capacity in zip(
        found, found[1:], np.linspace(low, high, 60).astype(int), strict=False
    ):
        assert size <= capacity
        assert after <= loss + 1e-12
    assert found[-1][1] == pytest.approx(sum(map(min, losses)), rel=1e-9)


def test_rounded_sizes_come_near_the_best(monkeypatch):
    sizes, losses = problem(5, groups=40, unit=1009)
    capacity = (sum(map(min, sizes)) + sum(map(max, sizes))) // 2
    _, exact = outcome(sizes, losses, capacity)
    monkeypatch.setattr(knapsack, "_STATES", 2000)
    _, rounded = outcome(sizes, losses, capacity)
    assert exact <= rounded <= 1.02 * exact


def test_of_equal_losses_the_smallest_is_taken():
    assert choose_options([[5, 1, 3]], [[1.0, 1.0, 1.0]], 10) == [1]


def test_what_cannot_be_met_or_compared_is_refused():
    with pytest.raises(ValueError, match="smallest options take 5, which is more than 4"):
        choose_options([[2, 3], [3]], [[1.0, 0.0], [1.0]], 4)
    with pytest.raises(ValueError, match="finite"):
        choose_options([[1, 2]], [[math.nan, 0.0]], 4)
