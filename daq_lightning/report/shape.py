"""The shape of `daq_report.json`: anybody may have written the file, so every field is looked at before it is
used."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from daq_lightning.checkpoint.tensor_file import CheckpointError
from daq_lightning.numerics.bins import OUTCOMES, STEP_BINS
from daq_lightning.report.kv_cache import is_cache_report
from daq_lightning.report.placement import is_placement
from daq_lightning.report.rounding import is_finite, is_rounding

FLOAT_SUMS = ("dot", "delta_sq", "delta_q_sq", "error_sq")
"""The sums that are no counts."""
_LONGEST = 1 << 10  # of a list of numbers


def check_report(content: Mapping[str, Any], file: Path, sums_of: Sequence[str]) -> None:
    """Refuses a report whose fields are not what `ExportReport` says.

    Args:
        content: Of the file.
        file: For the message.
        sums_of: Names of the sums that every side has.

    Raises:
        CheckpointError: A field is missing or of another kind.
    """

    def check(holds: bool, what: str) -> None:
        if not holds:
            raise CheckpointError(f"{file} is not the report of an export: expected {what}.")

    check(isinstance(content.get("scheme"), str), "text in scheme")
    check(isinstance(content.get("search"), dict), "an object in search")
    check(content.get("dtype", "bfloat16") in ("bfloat16", "float16"), "bfloat16 or float16 in dtype")
    kept, notes, tensors = content.get("kept"), content.get("notes"), content.get("tensors")
    check(
        isinstance(kept, dict) and all(isinstance(reason, str) for reason in kept.values()), "reasons in kept"
    )
    check(isinstance(notes, list) and all(isinstance(note, str) for note in notes), "a list of text in notes")
    check(isinstance(tensors, dict) and len(tensors) > 0, "quantized tensors in tensors")
    check(_is_validation(content.get("validation", {})), "unquantized and served figures in validation")
    cache = "kv_cache" not in content or is_cache_report(content["kv_cache"])
    check(cache, "two scales of each layer in kv_cache")
    check("placement" not in content or is_placement(content["placement"]), "rungs and losses in placement")
    for name, entry in content["tensors"].items():
        check(isinstance(entry, dict), f"an object for {name}")
        shape, alpha = entry.get("shape"), entry.get("alpha")
        is_shape = isinstance(shape, list) and len(shape) == 2 and all(_is_count(size) for size in shape)
        check(is_shape, f"the two sizes of {name} in shape")
        texts = (entry.get("dtype"), entry.get("scheme"), entry.get("without_base", ""))
        check(
            all(isinstance(text, str) for text in texts), f"text in dtype, scheme and without_base of {name}"
        )
        is_alpha = isinstance(alpha, dict) and {"min", "mean", "max", "moved"} <= set(alpha)
        check(
            is_alpha and all(map(is_finite, alpha.values())), f"min, mean, max and moved in alpha of {name}"
        )
        check(
            "rounding" not in entry or is_rounding(entry["rounding"]), f"how {name} was rounded in rounding"
        )
        check("by_step" not in entry or _is_by_step(entry["by_step"]), f"counts in by_step of {name}")
        check("curve" not in entry or _is_curve(entry["curve"]), f"scores over alpha in curve of {name}")
        for side in (
            "searched",
            "absmax",
            *(side for side in ("dequantized", "plain", "root") if side in entry),
        ):
            sums = entry[side].get("sums") if isinstance(entry.get(side), dict) else None
            listed = ", ".join(sums_of)
            check(
                isinstance(sums, dict) and _are_sums(sums, sums_of), f"the sums {listed} in {side} of {name}"
            )


def _are_sums(sums: Mapping[str, Any], names: Sequence[str]) -> bool:
    if set(sums) != set(names):
        return False
    counts = [value for name, value in sums.items() if name not in FLOAT_SUMS]
    squares = [value for name, value in sums.items() if name.endswith("_sq")]
    return (
        all(map(_is_count, counts))
        and is_finite(sums["dot"])
        and all(is_finite(x) and x >= 0 for x in squares)
    )


def _is_validation(value: Any) -> bool:
    """Whether a foreign value is what `ExportReport.to_dict` writes of a validation."""
    return isinstance(value, dict) and all(
        isinstance(sides, dict)
        and set(sides) == {"unquantized", "served"}
        and all(map(_is_number_or_none, sides.values()))
        for sides in value.values()
    )


def _is_by_step(entry: Any) -> bool:
    """Whether a foreign value is what `ByStep.to_dict` writes."""
    if not isinstance(entry, dict) or not _is_count(entry.get("sampled")):
        return False
    sides: list[Any] = [entry.get("searched"), entry.get("absmax")]
    if not all(isinstance(side, dict) and set(side) == set(OUTCOMES) for side in sides):
        return False
    lists = [entry.get("n"), *(counts for side in sides for counts in side.values())]
    if not all(_is_list(counts, _is_count) and len(counts) == STEP_BINS for counts in lists):
        return False
    totals = [list(map(sum, zip(*(side[outcome] for outcome in OUTCOMES), strict=True))) for side in sides]
    return totals == [lists[0]] * 2 and sum(lists[0]) <= entry["sampled"]


def _is_curve(entry: Any) -> bool:
    """Whether a foreign value is what `AlphaCurve.to_dict` writes."""
    if not isinstance(entry, dict) or not _is_count(entry.get("sampled")):
        return False
    alpha: Any = entry.get("alpha")
    score: Any = entry.get("score")
    if not (_is_list(alpha, is_finite) and _is_list(score, _is_number_or_none)):
        return False
    ascending = all(one < two for one, two in itertools.pairwise(alpha))
    return len(alpha) == len(score) >= 1 and ascending and _is_number_or_none(entry.get("found", ""))


def _is_list(value: Any, holds: Callable[[object], bool]) -> bool:
    return isinstance(value, list) and len(value) <= _LONGEST and all(map(holds, value))


def _is_number_or_none(value: object) -> bool:
    return value is None or is_finite(value)


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63
