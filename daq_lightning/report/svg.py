"""Pictures of a report, drawn by hand: colours come from the page's style sheet, so they follow its theme."""

from __future__ import annotations

from collections.abc import Sequence

from daq_lightning.report.levels import percent
from daq_lightning.report.markup import text

_WIDTH, _HEIGHT = 480, 200
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 8, 10, 30


def bar(served: float, plain: float | None) -> str:
    """A share as a bar, with a mark where plain scales are."""
    mark = "" if plain is None else f'<path class="mark" d="M{200 * plain:.1f} 0v12"/>'
    said = f"{percent(served)} served, {percent(plain)} with plain scales"
    return (
        f'<svg class="bar" viewBox="0 0 200 12" preserveAspectRatio="none" role="img" '
        f'aria-label="{text(said)}">'
        f'<rect class="track" width="200" height="12"/>'
        f'<rect class="fill" width="{200 * served:.1f}" height="12"/>{mark}</svg>'
    )


def by_depth(
    labels: Sequence[str], searched: Sequence[float | None], plain: Sequence[float | None], title: str
) -> str:
    """The share that is served, layer by layer: a line for the written scales and one for plain ones.

    Args:
        labels: Of the layers.
        searched: A share for each; None where there is no update.
        plain: The same under plain scales.
        title: What screen readers say.
    """
    count = len(labels)

    def x(index: int) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * (index / max(1, count - 1))

    def y(share: float) -> float:
        return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (1 - share)

    def line(shares: Sequence[float | None], kind: str) -> str:
        known = [(index, share) for index, share in enumerate(shares) if share is not None]
        points = " ".join(f"{x(index):.1f},{y(share):.1f}" for index, share in known)
        dots = "".join(
            f'<circle cx="{x(index):.1f}" cy="{y(share):.1f}" r="3"><title>{text(labels[index])}: '
            f"{percent(share)}</title></circle>"
            for index, share in known
        )
        return f'<g class="{kind}"><polyline points="{points}"/>{dots}</g>'

    grid = "".join(
        f'<path class="grid" d="M{_LEFT} {y(share):.1f}H{_WIDTH - _RIGHT}"/>'
        f'<text x="{_LEFT - 6}" y="{y(share) + 5:.1f}" text-anchor="end">{100 * share:.0f} %</text>'
        for share in (0, 0.25, 0.5, 0.75, 1)
    )
    ends = {0: "start", count - 1: "end"}
    axis = "".join(
        f'<text x="{x(index):.1f}" y="{_HEIGHT - 8}" text-anchor="{anchor}">{text(labels[index])}</text>'
        for index, anchor in ends.items()
    )
    return (
        f'<svg class="depth" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{text(title)}">'
        f"{grid}{axis}{line(plain, 'plain')}{line(searched, 'searched')}</svg>"
    )
