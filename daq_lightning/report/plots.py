"""A report as pictures, for loggers that show some: drawn by matplotlib, where it is installed.

    served_by_layer   layer by projection: the share of the update that is served (see `rows`), 0 to 1
    gain_histogram    at which strength the updates of the weights survive; 1 is right

Both show the written scales beside plain ones. Figures are drawn on a canvas of their own: neither pyplot's
open figures nor its backend are touched.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from daq_lightning.report.figures import ExportReport, Side
from daq_lightning.report.rows import Row, rows_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SHOWN: tuple[tuple[Side, str], ...] = (("searched", "as written"), ("absmax", "plain scales"))
_MOST_ROWS = 128  # layers in a heat map; beyond that they are thinner than a line of a screen
_BINS = 30
_STRONGEST = 1.5  # the last bin of gains holds all that are larger, the first all that are negative


def can_draw() -> bool:
    """Whether matplotlib is installed; it is not imported."""
    return importlib.util.find_spec("matplotlib") is not None


def pictures(report: ExportReport) -> dict[str, np.ndarray]:
    """The pictures of a report.

    Args:
        report: Of an export. Weights without an update are left out.

    Returns:
        Name -> picture, uint8 of shape (height, width, 3). None of a report without any update.

    Raises:
        ImportError: matplotlib is not installed.
    """
    rows = [row for row in rows_of(report) if row.measured]
    if not rows:
        return {}
    return {"served_by_layer": _pixels(_heat_map(rows)), "gain_histogram": _pixels(_histogram(rows))}


def _heat_map(rows: Sequence[Row]) -> Figure:
    from matplotlib.figure import Figure

    layers = list(dict.fromkeys(row.layer for row in rows))[:_MOST_ROWS]
    projections = list(dict.fromkeys(row.projection for row in rows))
    figure = Figure(figsize=(4 + 0.8 * len(projections), 2.5 + 0.22 * len(layers)), layout="constrained")
    axes = figure.subplots(1, len(_SHOWN), sharey=True)
    for axis, (side, title) in zip(axes, _SHOWN, strict=True):
        grid = np.full((len(layers), len(projections)), np.nan)
        for row in rows:
            if row.layer in layers:
                served = getattr(row, side).served
                grid[layers.index(row.layer), projections.index(row.projection)] = served
        axis.imshow(grid, vmin=0, vmax=1, aspect="auto", cmap="viridis", interpolation="nearest")
        axis.set_title(title)
        axis.set_xticks(range(len(projections)), [name.rpartition(".")[2] for name in projections])
        axis.tick_params(axis="x", rotation=90)
    axes[0].set_yticks(range(len(layers)), [layer.rpartition(".")[2] for layer in layers])
    axes[0].set_ylabel("layer")
    figure.colorbar(axes[0].images[0], ax=list(axes), label="share of the update that is served")
    return figure


def _histogram(rows: Sequence[Row]) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axis = figure.subplots()
    for side, title in _SHOWN:
        gains: list[Any] = [getattr(row, side).gain for row in rows]
        known = np.clip([gain for gain in gains if gain is not None], 0, _STRONGEST)
        axis.hist(known, bins=_BINS, range=(0, _STRONGEST), alpha=0.6, label=title)
    axis.set_xlabel("gain: 1 is the update at its strength, 0 none of it")
    axis.set_ylabel("weights, or groups of experts")
    axis.legend()
    return figure


def _pixels(figure: Figure) -> np.ndarray:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
