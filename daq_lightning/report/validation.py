"""The figures of a validation in JSON, which has no word for NaN."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

Validation = Mapping[str, Mapping[str, float]]
"""Figure -> "unquantized" and "served" -> its value."""


def validation_to_dict(validation: Validation) -> dict[str, dict[str, float | None]]:
    """The figures with None for what is not finite."""
    return {
        name: {side: value if math.isfinite(value) else None for side, value in values.items()}
        for name, values in validation.items()
    }


def validation_from_dict(content: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """The figures that `validation_to_dict` wrote, with NaN for None."""
    return {
        name: {side: math.nan if value is None else value for side, value in values.items()}
        for name, values in content.items()
    }
