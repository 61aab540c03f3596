"""The rungs that a budget chooses from: which each group of weights may have, and what they take.

    group     weights that servers fuse: q/k/v, gate/up, the experts of a layer
    rungs     the schemes of the ladder that hold their sizes, and 16 bit
    bytes     all parts of the layout, scales included

Names and shapes decide, so that a budget that cannot be met is known before anything is read.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from daq_lightning.checkpoint.budget import Budget
from daq_lightning.checkpoint.schemes import FULL, LADDERS
from daq_lightning.checkpoint.tensor_file import CheckpointError, TensorSpec
from daq_lightning.export.sizes import check_sizes
from daq_lightning.model.fusion import fused_groups

if TYPE_CHECKING:
    from daq_lightning.checkpoint.layouts import Layout
    from daq_lightning.export.settings import ExportSettings


class Placed(NamedTuple):
    """Where a weight stands on the ladder.

    Attributes:
        rung: A scheme, or "16".
        reason: Why, in a few words; "" where there is no budget.
    """

    rung: str
    reason: str = ""


class Options:
    """The choices of an export with a budget.

    Args:
        settings: What the user chose.
        layouts: The layouts that the plan makes of them, the lowest first.
        chosen: The weights to quantize.
        dtype: Of those that are kept in 16 bit.

    Attributes:
        layouts: Rung -> layout, the lowest first; None for 16 bit.
        rungs: Weights that servers fuse -> the rungs that their sizes allow, the lowest first.
        sizes: The same weights -> rung -> bytes.
        elements: Of all weights.
        notes: What the user should know of them.

    Raises:
        CheckpointError: Weights that no rung holds.
    """

    def __init__(
        self,
        settings: ExportSettings,
        layouts: Sequence[Layout],
        chosen: Sequence[TensorSpec],
        dtype: torch.dtype,
    ) -> None:
        lowest = layouts[0].scheme.name
        self._settings, self._dtype = settings, dtype
        self._specs = {spec.name: spec for spec in chosen}
        self.layouts: dict[str, Layout | None] = {layout.scheme.name: layout for layout in layouts}
        if FULL in (settings.ladder or LADDERS[lowest]):
            self.layouts[FULL] = None
        self.rungs = {tuple(names): self._rungs(names) for names in fused_groups(self._specs)}
        self.sizes = {
            group: {rung: sum(self._bytes(name, rung) for name in group) for rung in rungs}
            for group, rungs in self.rungs.items()
        }
        self.elements = sum(spec.shape[0] * spec.shape[1] for spec in chosen)
        higher = [group for group, rungs in self.rungs.items() if rungs[0] != lowest]
        self.notes = [
            f"{len(higher)} groups of weights, such as {' + '.join(group)}, have sizes that {lowest} cannot "
            "hold, and begin higher."
            for group in higher[:1]
        ]

    def capacity(self) -> int:
        """The bytes that the budget allows.

        Raises:
            CheckpointError: Fewer than the lowest rungs take, or more than the highest.
        """
        budget = self._settings.budget
        assert budget is not None
        capacity = Budget.of(budget).bytes_for(self.elements)
        low, high = (sum(end(sizes.values()) for sizes in self.sizes.values()) for end in (min, max))
        if low <= capacity <= high:
            return capacity
        below = capacity < low
        wanted = low if below else high
        instead = "a lower scheme or a larger budget" if below else "a smaller budget, or a higher ladder"
        if not below and FULL in self.layouts:
            instead = "a smaller budget, or do not quantize"
        raise CheckpointError(
            f"budget={budget!r} is {capacity:,} bytes ({8 * capacity / self.elements:.4g} bits a weight), "
            f"{'below the least' if below else 'above the most'} that the rungs {', '.join(self.layouts)} "
            f"can take: {wanted:,} bytes ({8 * wanted / self.elements:.4g} bits). Use {instead}. Nothing was "
            "written."
        )

    def _rungs(self, names: Sequence[str]) -> list[str]:
        specs = [self._specs[name] for name in names]
        found = []
        for rung, layout in self.layouts.items():
            with contextlib.suppress(CheckpointError):
                if layout is not None:
                    check_sizes(layout, specs)
                found.append(rung)
        if not found:
            layout = next(iter(self.layouts.values()))
            assert layout is not None
            check_sizes(layout, specs)
        return found

    def _bytes(self, name: str, rung: str) -> int:
        spec, layout = self._specs[name], self.layouts[rung]
        if layout is not None:
            return sum(part.nbytes for part in layout.stored(spec).values())
        return spec.shape[0] * spec.shape[1] * self._dtype.itemsize


def lowest(
    settings: ExportSettings, layouts: Sequence[Layout], chosen: Sequence[TensorSpec], dtype: torch.dtype
) -> dict[str, Placed]:
    """Every weight on the lowest rung that its sizes allow; without a budget there is only one.

    Args:
        settings: What the user chose.
        layouts: The layouts that the plan makes of them, the lowest first.
        chosen: The weights to quantize.
        dtype: Of those that are kept in 16 bit.

    Raises:
        CheckpointError: As for `Options` and `Options.capacity`.
    """
    if settings.budget is None:
        return {spec.name: Placed(layouts[0].scheme.name) for spec in chosen}
    options = Options(settings, layouts, chosen, dtype)
    options.capacity()
    why = "no scheme of the ladder fits its sizes"
    return {
        name: Placed(rungs[0], why if rungs[0] == FULL else "")
        for group, rungs in options.rungs.items()
        for name in group
    }
