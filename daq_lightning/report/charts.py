"""The sampled figures of a report as pictures: outcomes by the size of the change, objective over alpha."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from daq_lightning.numerics.bins import STEP_BINS, STEP_EDGES
from daq_lightning.report.levels import percent
from daq_lightning.report.markup import name, number, text
from daq_lightning.report.names import split_name
from daq_lightning.report.sampled import AlphaCurve, ByStep, Outcomes

if TYPE_CHECKING:
    from daq_lightning.report.figures import ExportReport

_WIDTH, _HEIGHT = 480, 236
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 12, 14, 52
_INSIDE_X, _INSIDE_Y = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
_MOST_PROJECTIONS = 12
_SHOWN = (("kept", "kept"), ("flipped", "flipped"), ("lost", "lost"))  # from the bottom up: class, word
_LABELS = {0: "<1/256", 4: "1/16", 7: "1/2", 8: "1", 11: "8"}  # bin -> where it begins, in steps
_FLAT = 1e-12


def step_charts(report: ExportReport) -> str:
    """Outcomes by the size of the change: of all weights, and of each projection; "" without any."""
    measured = [(tensor.name, tensor.by_step) for tensor in report.tensors if tensor.by_step is not None]
    parts = [(weight, counts) for weight, counts in measured if sum(counts.searched.n)]
    if not parts:
        return ""
    by_projection: dict[str, list[ByStep]] = {}
    for weight, counts in parts:
        by_projection.setdefault(split_name(weight)[2], []).append(counts)
    charts = [_steps("All weights", ByStep.added(counts for _, counts in parts))]
    if len(by_projection) > 1:
        charts += [
            _steps(projection, ByStep.added(counts))
            for projection, counts in list(by_projection.items())[:_MOST_PROJECTIONS]
        ]
    more = len(by_projection) - _MOST_PROJECTIONS
    cut = f"<p>and {more} more projections in daq_report.json.</p>" if more > 0 else ""
    legend = "".join(f'<span class="key {kind}">{word}</span> ' for kind, word in _SHOWN)
    return (
        "<p>What to see: how large the changes are beside a step of the format, and how far to the left they "
        "are still kept: the wide bar is what is written, the narrow one beside it what plain scales would "
        "do."
        f'</p><p class="legend">{legend}</p><div class="charts">{"".join(charts)}</div>{cut}'
    )


def curve_charts(report: ExportReport) -> str:
    """The objective over alpha of the weights that have it; "" without any."""
    curves = [(tensor.name, tensor.curve) for tensor in report.tensors if tensor.curve is not None]
    charts = [_curve(weight, curve) for weight, curve in curves if _range(curve) is not None]
    if not charts:
        return ""
    metric = text(report.search.get("metric", "objective"))
    return (
        f"<p>What to see: how the objective ({metric}; higher is better) of some blocks or rows of a weight "
        "changes if their scales are one multiple of the plain ones. A dashed line well above the dot means "
        "that the search was worth it; a curve above the dashed line, that a finer one would find more "
        "(--n-coarse).</p>"
        '<p class="legend"><span class="searched">one alpha for all</span> <span class="plain">an alpha for '
        f'each, as found</span> <span>&#9679; plain scales</span></p><div class="charts">{"".join(charts)}'
        "</div>"
    )


def _steps(called: str, counts: ByStep) -> str:
    changed = sum(counts.searched.n)
    most = max(counts.searched.n)
    slot = _INSIDE_X / STEP_BINS
    bars = "".join(
        _stack(_LEFT + slot * index + 0.08 * slot, 0.56 * slot, counts.searched, index, most, "written")
        + _stack(_LEFT + slot * index + 0.68 * slot, 0.24 * slot, counts.absmax, index, most, "plain")
        for index in range(STEP_BINS)
    )
    axis = "".join(
        f'<text x="{_LEFT + slot * index:.1f}" y="{_HEIGHT - 26}" '
        f'text-anchor="{"middle" if index else "start"}">{text(label)}</text>'
        for index, label in _LABELS.items()
    )
    kept, plain = (sum(side.kept) / changed for side in (counts.searched, counts.absmax))
    said = f"{percent(kept)} of {changed:,} sampled changes kept, {percent(plain)} with plain scales"
    top = most / changed
    grid = _grid((0, top / 2, top), 0, top, lambda share: f"{100 * share:.0f} %")
    return (
        f"<figure><figcaption>{name(called)}: {text(said)}</figcaption>"
        f'<svg class="chart steps" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{text(f"{called}: {said}")}">{grid}{axis}'
        f'<text x="{_LEFT + _INSIDE_X / 2:.0f}" y="{_HEIGHT - 6}" text-anchor="middle">'
        f"size of the change, in steps</text>{bars}</svg></figure>"
    )


def _stack(x: float, width: float, outcomes: Outcomes, index: int, most: int, side: str) -> str:
    """One bar: the outcomes of a bin on top of each other."""
    bottom, parts, n = float(_TOP + _INSIDE_Y), "", outcomes.n[index]
    if n == 0:
        return ""
    for kind, _ in _SHOWN:
        count = getattr(outcomes, kind)[index]
        height = _INSIDE_Y * count / most
        bottom -= height
        if height > 0.05:
            parts += (
                f'<rect class="{kind}" x="{x:.1f}" y="{bottom:.1f}" width="{width:.1f}" '
                f'height="{height:.1f}"/>'
            )
    ends = f"{_steps_in_words(index)}, {side}: {percent(outcomes.kept[index] / n)} of {n:,} kept"
    return f"<g><title>{text(ends)}</title>{parts}</g>"


def _steps_in_words(index: int) -> str:
    low = f"{STEP_EDGES[index - 1]:g}" if index else "0"
    return f"{low} to {STEP_EDGES[index]:g} steps" if index < len(STEP_EDGES) else f"{low} steps and more"


def _range(curve: AlphaCurve) -> tuple[float, float] | None:
    """What of the scores is shown: the best ones, and as far down as most candidates reach; None if nothing
    can be."""
    known = sorted(score for score in curve.score if score is not None)
    if len(known) < 3:
        return None
    best = known[-1] if curve.found is None else max(known[-1], curve.found)
    low = max(known[0], best - 3 * (best - known[len(known) // 4]))
    plain = dict(zip(curve.alpha, curve.score, strict=True)).get(1.0)
    low = low if plain is None else min(low, plain)
    # all alike: a line in the middle
    margin = 0.06 * (best - low) if best - low > _FLAT * max(1.0, abs(best)) else max(1e-3, abs(best) * 0.1)
    return low - margin, best + margin


def _curve(weight: str, curve: AlphaCurve) -> str:
    limits = _range(curve)
    assert limits is not None
    low, high = limits
    first, last = curve.alpha[0], curve.alpha[-1]

    def x(alpha: float) -> float:
        return _LEFT + _INSIDE_X * (alpha - first) / (last - first) if last > first else _LEFT

    def y(score: float) -> float:
        return _TOP + _INSIDE_Y * (1 - (max(low, score) - low) / (high - low))

    known = [
        (alpha, score) for alpha, score in zip(curve.alpha, curve.score, strict=True) if score is not None
    ]
    points = " ".join(f"{x(alpha):.1f},{y(score):.1f}" for alpha, score in known)
    plain = "".join(
        f'<circle cx="{x(alpha):.1f}" cy="{y(score):.1f}" r="5"><title>plain scales: {score:.5g}</title>'
        "</circle>"
        for alpha, score in known
        if alpha == 1
    )
    found = "" if curve.found is None else f"M{_LEFT} {y(curve.found):.1f}H{_WIDTH - _RIGHT}"
    best_alpha, best = max(known, key=lambda pair: pair[1])
    said = f"best with one alpha {best:.4g} at {best_alpha:.3g}, as found {number(curve.found, '.4g')}"
    ticks = [tick for tick in (0.5, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0) if first <= tick <= last]
    ticks = _apart(sorted({first, last, *ticks}), x)
    axis = "".join(
        f'<text x="{x(tick):.1f}" y="{_HEIGHT - 26}" text-anchor="middle">{tick:.3g}</text>' for tick in ticks
    )
    grid = _grid((low, (low + high) / 2, high), low, high, lambda score: f"{score:.2g}")
    return (
        f"<figure><figcaption>{name(weight)}: {text(said)}</figcaption>"
        f'<svg class="chart curve" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{text(f"{weight}: {said}")}">{grid}{axis}'
        f'<text x="{_LEFT + _INSIDE_X / 2:.0f}" y="{_HEIGHT - 6}" text-anchor="middle">alpha</text>'
        f'<path class="found" d="{found}"/><polyline points="{points}"/>{plain}</svg></figure>'
    )


def _apart(ticks: Sequence[float], x: Callable[[float], float]) -> list[float]:
    """The ticks that leave each other room, the first always."""
    kept: list[float] = []
    for tick in ticks:
        if not kept or x(tick) - x(kept[-1]) >= 44:
            kept.append(tick)
    return kept


def _grid(values: Sequence[float], low: float, high: float, show: Callable[[float], str]) -> str:
    """Horizontal lines with what they stand for."""
    lines = ""
    for value in values:
        y = _TOP + _INSIDE_Y * (1 - (value - low) / (high - low))
        lines += (
            f'<path class="grid" d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}"/>'
            f'<text x="{_LEFT - 6}" y="{y + 5:.1f}" text-anchor="end">{text(show(value))}</text>'
        )
    return lines
