"""What the report of an export says of its FP8 cache of keys and values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class CacheReport:
    """The scales of the cache, in the report under "kv_cache".

    Attributes:
        layers: Attention layer, by its name in the checkpoint -> the scales of its keys and its values.
        found_on: What they were found on, in words; "" for constant ones.
        tokens: How many tokens that was.
    """

    layers: Mapping[str, tuple[float, float]]
    found_on: str = ""
    tokens: int = 0

    @property
    def calibrated(self) -> bool:
        """Whether the scales were found on data."""
        return bool(self.found_on)

    def words(self) -> str:
        """One line for a person."""
        if not self.calibrated:
            return f"FP8 (E4M3) in {len(self.layers)} attention layers, with scales of 1.0"
        keys, values = zip(*self.layers.values(), strict=True)
        return (
            f"FP8 (E4M3) in {len(self.layers)} attention layers, scales from {self.tokens:,} tokens of "
            f"{self.found_on}: {min(keys):.3g} to {max(keys):.3g} of keys, {min(values):.3g} to "
            f"{max(values):.3g} of values"
        )

    def to_dict(self) -> dict[str, Any]:
        """Its entry in `daq_report.json`."""
        layers = {name: {"k_scale": k, "v_scale": v} for name, (k, v) in self.layers.items()}
        found = {"found_on": self.found_on, "tokens": self.tokens} if self.calibrated else {}
        return {"format": "e4m3", **found, "layers": layers}

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> CacheReport:
        """What `to_dict` wrote."""
        layers = {name: (scales["k_scale"], scales["v_scale"]) for name, scales in entry["layers"].items()}
        return cls(layers=layers, found_on=entry.get("found_on", ""), tokens=entry.get("tokens", 0))


def is_cache_report(entry: Any) -> bool:
    """Whether a foreign value is what `CacheReport.to_dict` writes."""
    if not isinstance(entry, dict) or not isinstance(entry.get("layers"), dict) or not entry["layers"]:
        return False
    tokens = entry.get("tokens", 0)
    return (
        isinstance(entry.get("found_on", ""), str)
        and type(tokens) is int
        and 0 <= tokens < 2**63
        and all(
            isinstance(scales, dict)
            and set(scales) == {"k_scale", "v_scale"}
            and all(map(_is_scale, scales.values()))
            for scales in entry["layers"].values()
        )
    )


def _is_scale(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf
