"""The pictures of a report show its figures, and drawing them changes nothing else."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_html import model, report_of, weight

from daq_lightning.report import plots
from daq_lightning.report.rows import rows_of

pytest.importorskip("matplotlib")


def gain(layer, projection):
    return 0.9 - 0.1 * layer if projection == "mlp.up_proj" else 1.2


def test_a_heat_map_has_the_share_served_of_every_layer_and_projection():
    rows = rows_of(model(3, gain=gain))
    figure = plots._heat_map(rows)
    searched, plain = (np.asarray(axis.images[0].get_array()) for axis in figure.axes[:2])
    assert searched.shape == plain.shape == (3, 7)
    up = [label.get_text() for label in figure.axes[0].get_xticklabels()].index("up_proj")
    assert searched[:, up] == pytest.approx([0.9, 0.8, 0.7])
    assert searched[:, 0] == pytest.approx([0.8] * 3)  # an update at 1.2 times its strength
    assert plain[:, up] == pytest.approx([0.4] * 3)


def test_a_histogram_counts_every_weight_once_for_each_kind_of_scales():
    figure = plots._histogram(rows_of(model(3, gain=lambda layer, projection: 9.0 if layer else 1.0)))
    searched, plain = figure.axes[0].containers
    assert sum(bar.get_height() for bar in searched) == sum(bar.get_height() for bar in plain) == 21
    assert searched[-1].get_height() == 14  # those beyond the last bin


def test_pictures_are_pixels_and_a_report_without_an_update_has_none():
    drawn = plots.pictures(model(2))
    assert list(drawn) == ["served_by_layer", "gain_histogram"]
    for picture in drawn.values():
        assert (picture.dtype, picture.ndim, picture.shape[2]) == (np.uint8, 3, 3)
        assert len(np.unique(picture)) > 20
    assert plots.pictures(report_of(weight("a.weight", delta_sq=0.0))) == {}
    assert plots.pictures(report_of(weight("a.weight", without_base="no such weight"))) == {}


def test_weights_outside_of_layers_are_shown_too():
    assert set(plots.pictures(report_of(weight("head.weight")))) == {"served_by_layer", "gain_histogram"}


def test_matplotlib_is_imported_to_draw_and_pyplot_never():
    code = (
        "import sys; from daq_lightning.report import plots; assert 'matplotlib' not in sys.modules; "
        "plots.can_draw(); assert 'matplotlib' not in sys.modules; "
        "from test_html import model; plots.pictures(model(1)); "
        "assert 'matplotlib' in sys.modules; assert 'matplotlib.pyplot' not in sys.modules"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
