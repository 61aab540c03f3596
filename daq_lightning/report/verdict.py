"""A report in words: how much is served of what training changed, what is worst and why, and what to do.

Served is the share that survives at its strength (`daq_lightning.report.rows`). The rounding error beside
it is no verdict of its own: rounding moves every weight by some percent of itself, and an update that is
smaller than that may still be served in full, since the errors of millions of elements have no direction in
common.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from daq_lightning.checkpoint.families import family_of
from daq_lightning.model.fusion import joined
from daq_lightning.numerics.search.settings import WIDE_RANGE
from daq_lightning.report.levels import FAIR, GOOD, Level, level_of, percent, times, worst_rows
from daq_lightning.report.markup import number
from daq_lightning.report.names import is_number

if TYPE_CHECKING:
    from daq_lightning.report.figures import ExportReport, Side
    from daq_lightning.report.rows import Figures, Row

_MANY = 0.25  # share of changed elements that makes "lost" or "flipped" a reason
_ALONG = (
    "Codes along a curvature are chosen for what the model computes, not for these figures: compare what it "
    "computes (daq-lightning evaluate), or let scales be searched (--rounding nearest)."
)
_BAD = f"{100 * FAIR:.0f} %"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a person should know first.

    Attributes:
        level: "none" if there is nothing to judge.
        headline: One sentence.
        details: What belongs beside it: plain scales, strength, noise, other readers.
        advice: What to do; empty if there is nothing to do.
    """

    level: Level
    headline: str
    details: tuple[str, ...] = ()
    advice: tuple[str, ...] = ()


def judge(report: ExportReport, rows: Sequence[Row], totals: Mapping[Side, Figures]) -> Verdict:
    """The verdict on an export.

    Args:
        report: The report.
        rows: Of the report, by layer and projection.
        totals: Of all weights that have a base.
    """
    without = len([tensor for tensor in report.tensors if tensor.without_base])
    now, plain = totals.get("searched"), totals.get("absmax")
    if now is None or plain is None:
        return Verdict(
            level="none",
            headline="Nothing could be compared: no weight has a base.",
            details=("All have plain scales.",),
            advice=("Pass the model before training as --base.",),
        )
    worst = worst_rows(rows)
    if now.changed and (now.served is None or now.gain is None or not worst):
        return Verdict(level="none", headline="The sums of this report are too large to be judged.")
    if now.served is None or now.gain is None:
        return Verdict(
            level="none",
            headline=f"No weight changed ({len(report.tensors) - without:,} compared).",
            advice=("Check that --base is the model before training, and POST the one after.",),
        )
    level, worst_level = level_of(now.served), level_of(worst[0].searched.served)
    if level == "good" and worst_level == "bad":  # much is well, but somebody has to look at that one
        level = "fair"
    least = percent(worst[0].searched.served)
    headline = f"{_served(now.served, now.gain)}; worst: {_named(worst[0])} ({least})."
    poor = sum(row.poor for row in rows)
    if worst_level == "good" and not poor:
        headline += " Nothing to do."
    details = [_beside(now, plain)]
    if poor:
        details.append(
            f"{poor:,} of {len(report.tensors) - without:,} weights are below {_BAD} on their own."
        )
    if without:
        details.append(f"{without:,} of {len(report.tensors):,} weights have no base and are not judged.")
    details += _other_readers(report, now.served, totals.get("dequantized"))
    return Verdict(
        level=level, headline=headline, details=tuple(details), advice=tuple(_advice(report, worst))
    )


def reason_of(row: Row) -> str:
    """Why so much of a row is served and no more, from its sums."""
    now = row.searched
    if row.without_base:
        return f"not compared: {row.without_base}"
    if now.served is None or now.gain is None:
        return "no update: training did not change it"
    parts = []
    if now.lost is not None and now.lost >= _MANY:
        parts.append(f"{percent(now.lost)} of its changes round back to the base: they are below half a step")
    if now.flipped is not None and now.flipped >= _MANY:
        parts.append(f"{percent(now.flipped)} of its changes come out on the other side of the base")
    if now.gain > 2 - GOOD:
        parts.append(f"amplified: its change is served {now.gain:.2f} times as strong")
    elif now.gain < 0:
        parts.append("reversed: what is left points away from the update")
    elif now.gain < GOOD:
        parts.append(f"weakened: its change is served {now.gain:.2f} times as strong")
    elif now.served < GOOD:
        parts.append("some of its weights are amplified, others weakened")
    if now.noise is not None:
        parts.append(f"rounding error (RMS) {times(now.noise)} its change")
    return "; ".join(parts)


def ignore_options(row: Row, names: Sequence[str]) -> str:
    """The options that keep a row in 16 bit, with all that servers join with it.

    Args:
        row: What is to stay in 16 bit.
        names: All quantized weights.
    """
    module = row.worst_name.removesuffix(".weight")
    parts = module.split(".")
    if "experts" in parts:  # servers hold the experts of a layer in one tensor: all or none
        stack = ".".join(parts[: parts.index("experts") + 1])
        return f"--ignore {shlex.quote(f're:{re.escape(stack)}[.].*')}"
    prefix, siblings = module.rpartition(".")[0], joined(module)
    if len(row.names) > 1:  # several of a layer: the numbers after the layer's are any
        depth = len(row.layer.split("."))
        own = [
            "[0-9]+" if at >= depth and is_number(part) else re.escape(part) for at, part in enumerate(parts)
        ]
        leaves = "|".join(map(re.escape, siblings))
        return f"--ignore {shlex.quote('re:' + '[.]'.join(own[:-1]) + f'[.]({leaves})')}"
    modules = [f"{prefix}.{sibling}" if prefix else sibling for sibling in siblings]
    known = {name.removesuffix(".weight") for name in names}
    return " ".join(f"--ignore {shlex.quote(name)}" for name in modules if name in known)


def _served(served: float, gain: float) -> str:
    if served >= GOOD or served >= gain - 0.01:  # nothing is amplified, or too little to speak of
        return f"{percent(served)} of what training changed is served"
    if gain > 2 - GOOD:
        return f"What training changed is served {gain:.2f} times as strong, {percent(served)} is right"
    return f"{percent(served)} of what training changed is served at its strength, some of it is amplified"


def _named(row: Row) -> str:
    """A row in a headline; of many weights, their pattern."""
    return row.name.removesuffix(".weight")


def _beside(now: Figures, plain: Figures) -> str:
    noise = "-" if now.noise is None else times(now.noise)
    return (
        f"Strength (gain) {number(now.gain)}; the rounding error is {noise} as large as the change. "
        f"Plain (absmax) scales would serve {percent(plain.served)}."
    )


def _other_readers(report: ExportReport, served: float, read: Figures | None) -> list[str]:
    """What readers see that dequantize to 16 bit."""
    if read is None or read.served is None:
        return [
            f"Readers that dequantize to {report.dtype} (transformers) were not measured for all weights."
        ]
    worse = level_of(read.served) != "good" and read.served < served - 0.02
    family = family_of(report.scheme)
    loss = f" Serve it with {family} kernels." if worse else ""
    return [
        f"These are the figures of {family} kernels (vLLM, SGLang). Readers that dequantize to "
        f"{report.dtype} (transformers) see {percent(read.served)}.{loss}"
    ]


def _advice(report: ExportReport, worst: Sequence[Row]) -> list[str]:
    """What to do, the most promising first; nothing where every row is good."""
    poor = [row for row in worst if level_of(row.searched.served) == "bad"]
    if not poor:
        return []
    along = any(tensor.rounding is not None for tensor in report.tensors)
    advice = [_ALONG] if along else _better_search(report.search)
    names = [tensor.name for tensor in report.tensors]
    if len(poor) <= max(3, len(worst) // 10):
        options = dict.fromkeys(ignore_options(row, names) for row in poor)
        few = "it" if len(poor) == 1 else f"the {len(poor)} worst"
        advice.append(f"Keep {few} in 16 bit: {' '.join(options)}")
    else:
        advice.append(
            f"{len(poor)} of {len(worst)} rows are below {_BAD}. Keep the worst in 16 bit (--ignore): "
            f"{_named(worst[0])} first."
        )
    if report.scheme == "FP8_BLOCK":
        advice.append("Or give every row a scale of its own: --scheme FP8_DYNAMIC.")
    elif family_of(report.scheme) in ("INT4", "FP4"):
        advice.append("Or take eight bits: --scheme W8A8 or FP8_DYNAMIC.")
    return advice


def _better_search(search: Mapping[str, object]) -> list[str]:
    low, high = search.get("alpha_min"), search.get("alpha_max")
    if low is not None and low == high:
        return ["These are plain scales: let them be searched (leave --range out)."]
    better = []
    if search.get("metric") not in ("hybrid", None):
        better.append("Search for full strength: --metric hybrid.")
    if search.get("alpha_scope") == "layer":
        better.append("Let every block or row have its own alpha: --alpha-scope group.")
    narrow = isinstance(low, (int, float)) and isinstance(high, (int, float)) and high < 2 * low
    if search.get("spacing") == "linear" and narrow:
        better.append(f"Search a wider range: --range {WIDE_RANGE[0]} {WIDE_RANGE[1]}.")
    return better
