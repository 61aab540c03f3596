"""The figure: how far each way of quantizing is from the fine-tuned model, one panel a subject."""

from __future__ import annotations

from pathlib import Path

from benchmarks.retention import settings as s
from benchmarks.retention.rows import Rows
from benchmarks.retention.settings import RANGES, Setting
from benchmarks.retention.tables import BASES, MODELS, subjects

_LINES: list[tuple[str, list[Setting]]] = [
    ("absmax", [Setting()]),
    *(
        (f"{metric} scales", [Setting(objective=metric, low=low, high=high) for low, high in RANGES])
        for metric in ("mse", "sign", "cosine", "hybrid")
    ),
    ("update alone", [s.UPDATE]),
    ("GPTQ", s.gptq()),
    ("inputs, update", [s.INPUTS_UPDATE]),
    ("gradients", [s.GRADIENTS]),
    ("activations", [s.ACTIVATIONS]),
    ("act. + update", [s.ACTIVATIONS_UPDATE]),
    ("own text", [s.SELF]),
]
"""Of a line, the best setting of each seed is filled, the others are open."""


def draw(rows: Rows, out: Path) -> Path:
    """Writes `retention.svg` into a folder.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    shown = subjects(rows)
    figure = Figure(figsize=(2.6 * len(shown) + 1.2, 4.2), layout="constrained")
    panels = figure.subplots(1, len(shown), sharex=True, sharey=True, squeeze=False)[0]
    for panel, (model, base) in zip(panels, shown, strict=True):
        for place, (_, settings) in enumerate(_LINES):
            found = [[row["style_kld_mean"] for row in rows.of(model, base, one)] for one in settings]
            found = [each for each in found if each]
            best = min(found, key=lambda each: sum(each) / len(each), default=[])
            for each in found:
                colour = "#1f5fa8" if each is best else "none"
                panel.scatter(each, [place] * len(each), s=22, facecolor=colour, edgecolor="#1f5fa8")
        panel.set(xscale="log", title=f"{MODELS[model]}\n{BASES[base]}", xlabel="KL, nats a token")
        panel.title.set_fontsize(8)
        panel.grid(axis="x", alpha=0.3)
        panel.tick_params(labelsize=8)
        panel.minorticks_off()
    panels[0].set_yticks(range(len(_LINES)), [label for label, _ in _LINES])
    panels[0].invert_yaxis()
    with mpl.rc_context({"svg.hashsalt": "retention", "svg.fonttype": "none"}):
        figure.savefig(out / "retention.svg", metadata={"Date": None})
    return out / "retention.svg"
