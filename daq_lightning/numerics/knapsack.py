"""A multiple-choice knapsack: one option for each group, so that sizes fit and losses add up to the least.

    minimize sum_i loss[i][j_i]     subject to sum_i size[i][j_i] <= capacity

Solved by dynamic programming over what is spent beyond the smallest options, in units of the sizes' greatest
common divisor: exact. Where that makes more than `_STATES` states, what a group spends is rounded up to a
larger unit: never above the capacity, at worst one unit a group short of it, and still the best of the
rounded sizes. Units do not depend on the capacity, so more of it never gives a larger loss.

Source: Kellerer, Pferschy, Pisinger, "Knapsack Problems" (2004), section 11.5.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

_STATES = 100_000


def choose_options(
    sizes: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], capacity: int
) -> list[int]:
    """Which option each group takes.

    Args:
        sizes: Of the options of each group.
        losses: Theirs, finite.
        capacity: What the sizes may add up to.

    Raises:
        ValueError: Not even the smallest options fit, or a loss is not finite.

    Example:
        >>> choose_options([[1, 3], [1, 2]], [[9.0, 1.0], [5.0, 2.0]], 4)
        [1, 0]
    """
    if not all(math.isfinite(loss) for group in losses for loss in group):
        raise ValueError(
            "Losses have to be finite to be compared; the weights they were measured on are not."
        )
    least = [min(group) for group in sizes]
    spare = capacity - sum(least)
    if spare < 0:
        raise ValueError(f"The smallest options take {sum(least)}, which is more than {capacity}.")
    if capacity >= sum(map(max, sizes)):
        pairs = (list(zip(*group, strict=True)) for group in zip(losses, sizes, strict=True))
        return [group.index(min(group)) for group in pairs]
    extra = [[size - low for size in group] for group, low in zip(sizes, least, strict=True)]
    most = sum(map(max, extra))
    unit = max(math.gcd(*(size for group in extra for size in group)), 1)
    if most // unit > _STATES:
        unit = -(-most // _STATES)
    steps = [[-(-size // unit) for size in group] for group in extra]
    states = min(spare // unit, sum(map(max, steps))) + 1
    best_S = torch.full((states,), math.inf, dtype=torch.float64, device="cpu")
    best_S[0] = 0.0
    taken: list[torch.Tensor] = []
    for group_steps, group_losses in zip(steps, losses, strict=True):
        next_S = torch.full_like(best_S, math.inf)
        option_S = torch.zeros(states, dtype=torch.int16, device="cpu")
        for option, (step, loss) in enumerate(zip(group_steps, group_losses, strict=True)):
            if step >= states:
                continue
            with_S = best_S[: states - step] + loss
            better_S = with_S < next_S[step:]
            next_S[step:][better_S] = with_S[better_S]
            option_S[step:][better_S] = option
        best_S = next_S
        taken.append(option_S)
    at = int(best_S.argmin())  # the first of equal ones, which spends least
    chosen = []
    for group_steps, option_S in zip(reversed(steps), reversed(taken), strict=True):
        chosen.append(int(option_S[at]))
        at -= group_steps[chosen[-1]]
    return chosen[::-1]
