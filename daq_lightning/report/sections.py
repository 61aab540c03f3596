"""The parts of a report's page that show its rows: worst first, by depth, as heat maps, as a table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from daq_lightning.report.levels import level_of, percent
from daq_lightning.report.markup import name, number, scrolling, text
from daq_lightning.report.svg import bar, by_depth

if TYPE_CHECKING:
    from daq_lightning.report.rows import Figures, Row

LEAST_WORST, MOST_WORST, MOST_ROWS = 3, 8, 2000
_STEPS = (0.5, 0.8, 0.95, 0.99)  # where the colours of a heat map change


class Column(NamedTuple):
    """A column of the table.

    Attributes:
        title: Of the button that sorts by it.
        about: What it says, in one sentence.
        value: Of a row; None where it says nothing.
        show: A value as text.
    """

    title: str
    about: str
    value: Callable[[Row], float | None]
    show: Callable[[float | None], str] = number


def _scientific(value: float | None) -> str:
    return number(value, ".2e")


def _with_update(figure: str, side: str = "searched") -> Callable[[Row], float | None]:
    """A figure of a row that was compared; without a base it would be that of rounding alone."""

    def value(row: Row) -> float | None:
        figures: Figures | None = getattr(row, side)
        return None if row.without_base or figures is None else getattr(figures, figure)

    return value


COLUMNS = (
    Column("served", "share of the update at its strength: 1 - |gain - 1|", _with_update("served"), percent),
    Column("plain served", "the same under plain (absmax) scales", _with_update("served", "absmax"), percent),
    Column(
        "worst weight",
        "share of the worst of the weights of a row",
        lambda row: None if row.without_base else row.worst_served,
        percent,
    ),
    Column("gain", "strength of the update along its own direction; 1 is full", _with_update("gain")),
    Column("plain gain", "the same under plain scales", _with_update("gain", "absmax")),
    Column("cosine", "between the update and what is left of it", _with_update("cosine")),
    Column("plain cosine", "the same under plain scales", _with_update("cosine", "absmax")),
    Column(
        "sign rate", "share of elements whose change keeps its sign (0 is a sign)", _with_update("sign_rate")
    ),
    Column("plain sign rate", "the same under plain scales", _with_update("sign_rate", "absmax")),
    Column(
        "lost", "share of the changed elements that round back to the base", _with_update("lost"), percent
    ),
    Column(
        "flipped",
        "share of the changed elements that come out on the other side of the base",
        _with_update("flipped"),
        percent,
    ),
    Column("changed", "share of elements that training changed", _with_update("changed"), percent),
    Column(
        "change RMS",
        "root mean square of the change over all elements, in units of the weight",
        _with_update("delta_rms"),
        _scientific,
    ),
    Column("error RMS", "the same of the rounding error, beside it", _with_update("error_rms"), _scientific),
    Column("error / change", "the two divided", _with_update("noise"), lambda value: number(value, ".2f")),
    Column(
        "16-bit served",
        "share that readers see which dequantize to 16 bit (transformers)",
        _with_update("served", "dequantized"),
        percent,
    ),
    Column("alpha min", "smallest multiple of a plain scale that was chosen", lambda row: row.alpha["min"]),
    Column("alpha mean", "mean multiple", lambda row: row.alpha["mean"]),
    Column("alpha max", "largest multiple", lambda row: row.alpha["max"]),
    Column("moved", "share of scales that are not the plain ones", lambda row: row.alpha["moved"], percent),
)


def validation_table(validation: Mapping[str, Mapping[str, float]]) -> str:
    """The Trainer's own figures of the model as it was and with the exported weights; "" without any."""
    if not validation:
        return ""
    rows = "".join(
        f"<tr><th scope=row>{text(figure)}</th>"
        f"<td>{number(values['unquantized'], '.6g')}</td><td>{number(values['served'], '.6g')}</td>"
        f"<td>{number(values['served'] - values['unquantized'], '+.3g')}</td></tr>"
        for figure, values in validation.items()
    )
    head = "<tr><th scope=col>figure</th>" + "".join(
        f"<th scope=col>{title}</th>" for title in ("unquantized", "as served", "difference")
    )
    return (
        "<p>The Trainer's validation, with the weights as they were and with those of the files.</p>"
        + scrolling(f"<table><thead>{head}</tr></thead><tbody>{rows}</tbody></table>", "Validation")
    )


def worst_list(worst: Sequence[Row], total_sq: float, reason: Callable[[Row], str]) -> str:
    """The rows of which least is served, with the reason; of good ones only a few.

    Args:
        worst: Rows with an update, the worst first.
        total_sq: Sum of the squared changes of all weights.
        reason: Says why.
    """
    listed = []
    poor = sum(level_of(row.searched.served) != "good" for row in worst)
    for row in worst[: min(MOST_WORST, max(LEAST_WORST, poor))]:
        served = row.searched.served or 0.0
        share = percent(row.searched.delta_sq / total_sq) if total_sq > 0 else percent(None)
        least = f"{name(row.worst_name)}, {percent(row.worst_served)} served"
        several = f"<p>{len(row.names):,} weights; worst: {least}</p>"
        listed.append(
            f'<li class="{level_of(served)}"><h3>{name(row.name)}</h3>{several * (len(row.names) > 1)}'
            f"<p><strong>{percent(served)}</strong> served ({percent(row.absmax.served)} with plain scales); "
            f"it holds {share} of the update.</p>{bar(served, row.absmax.served)}"
            f"<p>Why: {text(reason(row))}.</p></li>"
        )
    return f'<ol class="worst">{"".join(listed)}</ol>' if listed else "<p>There is no update to look at.</p>"


def depth_charts(stacks: Sequence[tuple[str, Sequence[Row]]]) -> str:
    """A chart for every stack of three layers or more.

    Args:
        stacks: Name and rows of each.
    """
    charts = []
    for stack, rows in stacks:
        layers = list(dict.fromkeys(row.layer for row in rows))
        if len(layers) < 3:
            continue
        by_layer: dict[str, list[Row]] = {layer: [] for layer in layers}
        for row in rows:
            by_layer[row.layer].append(row)
        searched = [_pooled(by_layer[layer], "searched") for layer in layers]
        plain = [_pooled(by_layer[layer], "absmax") for layer in layers]
        if any(share is not None for share in searched):
            title = f"Share of the update that is served in each layer of {stack}"
            charts.append(
                f"<figure><figcaption>{name(stack)}: share served, layer by layer</figcaption>"
                f"{by_depth([_short(layer) for layer in layers], searched, plain, title)}</figure>"
            )
    legend = '<p class="legend"><span class="searched">as written</span> <span class="plain">plain'
    return f"{''.join(charts)}{legend} scales</span></p>" if charts else ""


def heat_maps(stacks: Sequence[tuple[str, Sequence[Row]]]) -> str:
    """Layer by projection, in percent: with the written scales and with plain ones."""
    if not stacks:
        return "<p>No weight belongs to a layer.</p>"
    maps = "".join(
        scrolling(_heat_map(rows, side, f"{stack}, {called}"), f"Heat map of {stack}, {called}")
        for stack, rows in stacks
        for side, called in (("searched", "as written"), ("absmax", "plain scales"))
    )
    edges = ["below 50", "50 to 80", "80 to 95", "95 to 99", "99 and more"]
    legend = " ".join(f'<span class="h{step}">{edge}</span>' for step, edge in enumerate(edges))
    return f'<p class="legend">{legend} % served</p><div class="maps">{maps}</div>'


def _heat_map(rows: Sequence[Row], side: str, caption: str) -> str:
    projections = list(dict.fromkeys(row.projection for row in rows))
    known_last = sorted(rows, key=lambda row: not row.without_base)  # of two, the one with a base is shown
    cells = {(row.layer, row.projection): row for row in known_last}
    heads = "".join(f'<th scope="col"><span>{name(projection)}</span></th>' for projection in projections)
    lines = []
    for layer in dict.fromkeys(row.layer for row in rows):
        line = "".join(_heat_cell(cells.get((layer, projection)), side) for projection in projections)
        lines.append(f'<tr><th scope="row">{text(_short(layer))}</th>{line}</tr>')
    return (
        f'<table class="heat"><caption>{text(caption)}</caption><thead><tr><th scope="col">layer</th>{heads}'
        f"</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    )


def _heat_cell(row: Row | None, side: str) -> str:
    if row is None:
        return "<td></td>"
    served = None if row.without_base else getattr(row, side).served
    if served is None:
        return '<td class="none">-</td>'
    return f'<td class="h{sum(served >= step for step in _STEPS)}">{int(100 * served + 1e-9)}</td>'


def figure_table(ordered: Sequence[Row], reason: Callable[[Row], str]) -> str:
    """All figures, a line for each row; buttons sort it.

    Args:
        ordered: All rows, the worst first.
        reason: Says why.
    """
    titles = [("weight", "layer and projection"), *((column.title, column.about) for column in COLUMNS)]
    titles.append(("why", "what makes it so"))
    heads = "".join(
        f'<th scope="col" title="{text(about)}"{" aria-sort=ascending" * (title == "served")}>'
        f'<button type="button">{text(title)}</button></th>'
        for title, about in titles
    )
    lines = []
    for row in ordered[:MOST_ROWS]:
        values = [(column, column.value(row)) for column in COLUMNS]
        cells = "".join(
            f'<td data-v="{"" if value is None else repr(float(value))}">{column.show(value)}</td>'
            for column, value in values
        )
        several = f" <small>{len(row.names)} weights</small>" if len(row.names) > 1 else ""
        lines.append(
            f'<tr><th scope="row">{name(row.name)}{several}</th>{cells}'
            f'<td class="why">{text(reason(row))}</td></tr>'
        )
    more = len(ordered) - MOST_ROWS
    cut = f"<p>and {more} more, which are in the data to download.</p>" if more > 0 else ""
    return (
        scrolling(
            f'<table class="figures" id="figures"><thead><tr>{heads}</tr></thead>'
            f"<tbody>{''.join(lines)}</tbody></table>",
            "Table of all figures",
        )
        + cut
    )


def _pooled(rows: Sequence[Row], side: str) -> float | None:
    """The share of several rows: their mean by delta^2."""
    measured = [row for row in rows if row.measured and getattr(row, side).served is not None]
    total = sum(row.searched.delta_sq for row in measured)
    if not total > 0:
        return None
    return sum(getattr(row, side).served * (row.searched.delta_sq / total) for row in measured)


def _short(layer: str) -> str:
    """The number of a layer."""
    return layer.rpartition(".")[2]
