"""How the codes of a weight were chosen, where that was not plain nearest rounding throughout."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

_LISTED = 3


@dataclass(frozen=True, kw_only=True)
class Rounding:
    """How the codes of one weight were chosen in an export that rounds along a curvature.

    Attributes:
        method: What they are.
        source: Where the curvature comes from, such as "update" or "activations and update"; "" without one.
        tokens: How many tokens it was summed over; 0 for that of the update.
        left_out: How many calls were left out of it because of NaN or Inf.
        update: Share of the update's own curvature beside what was collected.
        damping_in: Share of the identity in the curvature of the inputs.
        damping_out: The same of the outputs.
        nearest_loss: Predicted loss of nearest rounding at these scales, in units of the damped curvature.
        loss: That of the written codes; never above it.
        reason: Why they are nearest; "" for codes along the curvature.
    """

    method: Literal["curvature", "nearest"]
    source: str = ""
    tokens: int = 0
    left_out: int = 0
    update: float = 0.0
    damping_in: float = 0.0
    damping_out: float = 0.0
    nearest_loss: float = 0.0
    loss: float = 0.0
    reason: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Its entry in `daq_report.json`, under the name of the weight."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> Rounding:
        """The rounding of an entry, as `to_dict` wrote it."""
        return cls(**{field.name: entry[field.name] for field in dataclasses.fields(cls)})


def is_rounding(entry: object) -> bool:
    """Whether an entry of a report, which anybody may have written, is what `to_dict` writes."""
    if not isinstance(entry, dict) or set(entry) != {field.name for field in dataclasses.fields(Rounding)}:
        return False
    counts, numbers = ("tokens", "left_out"), ("update", "damping_in", "damping_out", "nearest_loss", "loss")
    return (
        all(isinstance(entry[name], str) for name in ("source", "reason"))
        and all(type(entry[name]) is int for name in counts)
        and all(is_finite(entry[name]) and entry[name] >= 0 for name in (*counts, *numbers))
        and entry["method"] in ("curvature", "nearest")
    )


def is_finite(value: object) -> bool:
    """Whether a value of a file is a number; True is none."""
    return (type(value) is float and math.isfinite(value)) or (type(value) is int and abs(value) < 2**63)


def predicted_loss(roundings: Iterable[Rounding | None]) -> float:
    """The mean over weights of predicted loss over that of nearest rounding; NaN where none was predicted.

    Losses of two weights have no unit in common, so they are not added.
    """
    known = [one for one in roundings if one is not None and one.nearest_loss > 0]
    return sum(one.loss / one.nearest_loss for one in known) / len(known) if known else math.nan


def notes_on_rounding(roundings: Mapping[str, Rounding | None]) -> list[str]:
    """What a reader of a report has to know of it: how many weights along which curvature, and which not.

    Args:
        roundings: Weight name -> its rounding.
    """
    known = {name: rounding for name, rounding in roundings.items() if rounding is not None}
    if not known:
        return []
    along = [rounding for rounding in known.values() if rounding.method == "curvature"]
    notes = []
    if along:
        sources = ", ".join(dict.fromkeys(rounding.source for rounding in along))
        notes.append(
            f"{len(along)} of {len(known)} weights are rounded along their curvature ({sources}): predicted "
            f"loss {predicted_loss(along):.3g} of that of nearest rounding at the same scales."
        )
        by_update = [name for name, rounding in known.items() if rounding.source == "update"]
        if by_update and len(set(rounding.source for rounding in along)) > 1:
            notes.append(f"nothing but the update is known of the curvature of {_listed(by_update)}.")
    left_out = [name for name, rounding in known.items() if rounding.left_out]
    if left_out:
        notes.append(f"batches with NaN or Inf were left out of the curvature of {_listed(left_out)}.")
    reasons: dict[str, list[str]] = {}
    for name, rounding in known.items():
        if rounding.reason:
            reasons.setdefault(rounding.reason, []).append(name)
    notes += [f"nearest rounding of {_listed(names)}: {reason}." for reason, names in reasons.items()]
    return notes


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
