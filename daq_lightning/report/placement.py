"""Which weights a budget put on which rung of the ladder, and why: data, as plans, reports and cards show it.

    loss(group, rung)     what the group would lose there, in the unit that `measure` names
    bytes(group, rung)    what it would take, scales included

Losses are of nearest rounding; those of different weights may be compared, and with `measure` "update" only
by their order.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

_FULL = "16"  # as `daq_lightning.checkpoint.schemes.FULL`
_WORDS = {
    "curvature": "error weighted by the curvature that the run collected, tr(E^T H_out E H_in)",
    "inputs": "error of the layer's outputs on the inputs that the run collected, tr(E H_in E^T)",
    "update": "squared error over the squared update",
}
"""Measure -> what it is."""


@dataclass(frozen=True, kw_only=True)
class PlacedGroup:
    """Weights that servers fuse.

    Attributes:
        names: Of them.
        rung: Where they are.
        losses: Rung -> loss, for those that their sizes allow, the lowest first.
        sizes: Rung -> bytes.
    """

    names: tuple[str, ...]
    rung: str
    losses: Mapping[str, float]
    sizes: Mapping[str, int]

    @property
    def title(self) -> str:
        """The weights in a few words: of many, the first and how many."""
        first, *others = (name.removesuffix(".weight") for name in self.names)
        if len(others) > 2:
            return f"{first} and {len(others)} more"
        return " + ".join([first, *(name.rpartition(".")[2] for name in others)])

    @property
    def lowest(self) -> str:
        """The first rung that its sizes allow."""
        return next(iter(self.losses))

    @property
    def reason(self) -> str:
        """Why it is where it is."""
        if len(self.losses) == 1:
            return f"{called(self.rung)}: its sizes allow no other"
        if self.rung == self.lowest:
            return f"{called(self.rung)}: loss {self.losses[self.rung]:.2e}"
        more = self.sizes[self.rung] - self.sizes[self.lowest]
        lost = f"{self.losses[self.lowest]:.2e} -> {self.losses[self.rung]:.2e}"
        return f"{called(self.rung)}: loss {lost} for {more:,} more bytes"

    @property
    def gain(self) -> float:
        """What its rung saves of the loss of the lowest."""
        return self.losses[self.lowest] - self.losses[self.rung]


@dataclass(frozen=True, kw_only=True)
class Placement:
    """A budget and what it bought.

    Attributes:
        budget: As it was given.
        capacity: Bytes that it allows.
        elements: Of all weights that were placed.
        measure: "curvature", "inputs" or "update".
        groups: All weights, in file order.
        notes: What the user should know of the measurement.
    """

    budget: str
    capacity: int
    elements: int
    measure: str
    groups: tuple[PlacedGroup, ...]
    notes: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """Bytes that are used."""
        return sum(group.sizes[group.rung] for group in self.groups)

    @property
    def bits(self) -> float:
        """Mean bits of a weight's element."""
        return 8 * self.size / self.elements

    def loss(self, *, lowest: bool = False) -> float:
        """The sum over all groups, where they are or on their lowest rungs."""
        return math.fsum(one.losses[one.lowest if lowest else one.rung] for one in self.groups)

    def of(self, names: Collection[str]) -> Placement:
        """What is left of it where only some weights are still to be quantized."""
        groups = tuple(group for group in self.groups if set(group.names) <= set(names))
        return dataclasses.replace(self, groups=groups)

    def lines(self) -> list[str]:
        """What was bought, in a few lines: the budget, each rung, and what gained most."""
        rungs: dict[str, list[PlacedGroup]] = {}
        for group in self.groups:
            rungs.setdefault(group.rung, []).append(group)
        listed = ", ".join(
            f"{sum(len(group.names) for group in groups)} weights "
            f"({sum(group.sizes[rung] for group in groups):,} bytes) in {called(rung)}"
            for rung, groups in rungs.items()
        )
        up = sorted((group for group in self.groups if group.gain > 0), key=lambda group: -group.gain)
        best = "; ".join(f"{group.title}, {group.reason}" for group in up[:3])
        before, after = self.loss(lowest=True), self.loss()
        return [
            f"budget {self.budget}: {self.size:,} of {self.capacity:,} bytes used, {self.bits:.4g} bits a "
            f"weight: {listed}.",
            f"what went up takes the loss from {before:.3e} to {after:.3e} ({_WORDS[self.measure]}; nearest "
            f"rounding){f', most of all {best}' if best else ''}.",
            *self.notes,
        ]

    def to_dict(self) -> dict[str, Any]:
        """The content of `daq_report.json`."""
        return {
            "budget": self.budget,
            "capacity": self.capacity,
            "elements": self.elements,
            "measure": self.measure,
            "notes": list(self.notes),
            "groups": [
                {
                    "names": list(group.names),
                    "rung": group.rung,
                    "losses": dict(group.losses),
                    "bytes": dict(group.sizes),
                }
                for group in self.groups
            ],
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Placement:
        """The placement that `to_dict` wrote.

        Raises:
            ValueError: It did not write this; TypeError, KeyError and AttributeError likewise.
        """
        groups = tuple(
            PlacedGroup(
                names=tuple(map(str, entry["names"])),
                rung=str(entry["rung"]),
                losses={str(rung): float(loss) for rung, loss in entry["losses"].items()},
                sizes={str(rung): int(size) for rung, size in entry["bytes"].items()},
            )
            for entry in content["groups"]
        )
        for group in groups:
            if group.rung not in group.losses or set(group.losses) != set(group.sizes):
                raise ValueError("a rung without a loss")
        return cls(
            budget=str(content["budget"]),
            capacity=int(content["capacity"]),
            elements=int(content["elements"]),
            measure=str(content["measure"]),
            groups=groups,
            notes=tuple(map(str, content["notes"])),
        )


def is_placement(content: Any) -> bool:
    """Whether something is what `Placement.to_dict` writes; anybody may have written it."""
    try:
        found = Placement.from_dict(content)
    except (TypeError, KeyError, ValueError, AttributeError, OverflowError):
        return False
    losses = [loss for group in found.groups for loss in group.losses.values()]
    return found.elements > 0 and found.measure in _WORDS and all(map(math.isfinite, losses))


def called(rung: str) -> str:
    """A rung in words.

    Example:
        >>> called("16"), called("W4A16")
        ('16 bit', 'W4A16')
    """
    return "16 bit" if rung == _FULL else rung
