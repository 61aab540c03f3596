"""What a report says of a sample of each weight: outcomes by the size of the change, objective over alpha.

    by_step   of changes of so many steps, how many are kept, lost and flipped
    curve     the score of the objective if all groups had one alpha

Samples are whole groups, chosen by the shape of the weight alone (`daq_lightning.numerics.sample`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from daq_lightning.numerics.bins import OUTCOMES


@dataclass(frozen=True, kw_only=True)
class Outcomes:
    """How many changes of each bin of `STEP_EDGES` had which outcome; kept + lost + flipped are all of a
    bin."""

    kept: tuple[int, ...]
    lost: tuple[int, ...]
    flipped: tuple[int, ...]

    @property
    def n(self) -> tuple[int, ...]:
        """All changes of each bin."""
        return tuple(map(sum, zip(self.kept, self.lost, self.flipped, strict=True)))


@dataclass(frozen=True, kw_only=True)
class ByStep:
    """Outcomes by the size of the change, of some elements.

    Attributes:
        sampled: Elements looked at, changed or not.
        searched: Under the written scales.
        absmax: Under plain ones; the same changes in the same bins.
    """

    sampled: int
    searched: Outcomes
    absmax: Outcomes

    def to_dict(self) -> dict[str, Any]:
        """Its entry in `daq_report.json`."""
        sides = {side: vars(getattr(self, side)) for side in ("searched", "absmax")}
        listed = {side: {key: list(of) for key, of in outcomes.items()} for side, outcomes in sides.items()}
        return {"sampled": self.sampled, "n": list(self.searched.n), **listed}

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> ByStep:
        """The counts of an entry, as `to_dict` wrote it."""
        searched, absmax = (
            Outcomes(**{outcome: tuple(entry[side][outcome]) for outcome in OUTCOMES})
            for side in ("searched", "absmax")
        )
        return cls(sampled=entry["sampled"], searched=searched, absmax=absmax)

    @classmethod
    def added(cls, parts: Iterable[ByStep]) -> ByStep:
        """The counts of several weights together."""
        listed = list(parts)

        def total(side: Callable[[ByStep], Outcomes]) -> Outcomes:
            return Outcomes(
                **{
                    outcome: tuple(
                        sum(counts)
                        for counts in zip(*(getattr(side(part), outcome) for part in listed), strict=True)
                    )
                    for outcome in OUTCOMES
                }
            )

        return cls(
            sampled=sum(part.sampled for part in listed),
            searched=total(lambda part: part.searched),
            absmax=total(lambda part: part.absmax),
        )


@dataclass(frozen=True, kw_only=True)
class AlphaCurve:
    """The objective over alpha, of some groups of a weight.

    Attributes:
        sampled: Elements looked at.
        alpha: What the search could try, ascending; 1 is among them.
        score: Of all groups under one alpha; larger is better; None where it is not finite.
        found: With the alpha that the search gave to each group; None where it is not finite.
    """

    sampled: int
    alpha: tuple[float, ...]
    score: tuple[float | None, ...]
    found: float | None

    def to_dict(self) -> dict[str, Any]:
        """Its entry in `daq_report.json`."""
        return {
            "sampled": self.sampled,
            "alpha": list(self.alpha),
            "score": list(self.score),
            "found": self.found,
        }

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> AlphaCurve:
        """The curve of an entry, as `to_dict` wrote it."""
        return cls(
            sampled=entry["sampled"],
            alpha=tuple(entry["alpha"]),
            score=tuple(entry["score"]),
            found=entry["found"],
        )
