"""A report as a table for a terminal, the worst weights first."""

from __future__ import annotations

from collections.abc import Mapping

from daq_lightning.checkpoint.families import family_of
from daq_lightning.numerics.objectives import cosine
from daq_lightning.report.figures import ExportReport, TensorReport, figures


def worst_first(report: ExportReport) -> list[TensorReport]:
    """Its tensors, lowest cosine of update and kept update first; without update or base last."""

    def rank(tensor: TensorReport) -> tuple[bool, float]:
        return bool(tensor.without_base) or float(tensor.searched.delta_sq) == 0, float(
            cosine(tensor.searched)
        )

    return sorted(report.tensors, key=rank)


def table(report: ExportReport, limit: int | None = None) -> str:
    """The report as text: what the columns mean, a line per tensor, then the totals.

    Args:
        report: The report.
        limit: Show only this many tensors, the worst.
    """
    tensors, family = worst_first(report)[:limit], family_of(report.scheme)
    width = max((len(tensor.name) for tensor in tensors), default=0)
    plain, kept = report.metrics("absmax"), report.metrics("searched")
    lines = [
        f"{report.path}: {len(report.tensors)} weights as {report.scheme}, searched for "
        f"{report.search.get('metric')}",
        "Worst first: the lowest cosine between the update (post - base) and what is left of it in "
        f"{family}.",
        "absmax: that cosine under plain scales; gain: strength of the update along its own direction, 1 is "
        "full;",
        "sign: share of elements whose change keeps its sign; lost: share whose change became zero; moved: "
        "share of",
        "scales that the search moved away from plain ones.",
        f"Figures are those of {family} kernels (vLLM, SGLang); the last line is for readers that dequantize "
        "(transformers).",
        "",
        f"{'weight':{width}} {'shape':>14} {'cosine':>8} {'absmax':>8} {'gain':>8} {'sign':>7} {'mse':>10} "
        f"{'lost':>8} {'moved':>7}",
    ]
    for tensor in tensors:
        now, before = figures(tensor.searched), figures(tensor.absmax)
        no_update = "no update" if float(tensor.searched.delta_sq) == 0 else ""
        lines.append(
            f"{tensor.name:{width}} {'x'.join(map(str, tensor.shape)):>14} {_row(now, before)} "
            f"{tensor.alpha['moved']:>7.1%} {tensor.without_base or no_update}".rstrip()
        )
    if len(tensors) < len(report.tensors):
        lines.append(f"and {len(report.tensors) - len(tensors)} more")
    lines.append(f"{'all weights':{width}} {'':>14} {_row(kept, plain)}")
    if all(tensor.dequantized is not None for tensor in report.tensors):
        rounded = f"dequantized to {report.dtype}"
        lines.append(f"{rounded:{width + 15}} {_row(report.metrics('dequantized'), plain)}")
    return "\n".join([*lines, *(f"note: {note}" for note in report.notes)])


def _row(now: Mapping[str, float], before: Mapping[str, float]) -> str:
    direction = f"{now['cosine']:>8.4f} {'(' + format(before['cosine'], '.4f') + ')':>8} {now['gain']:>8.4f}"
    if now["delta_norm"] == 0:  # nothing to keep: the cosine and gain of rounding noise mean nothing
        direction = f"{'-':>8} {'-':>8} {'-':>8}"
    return f"{direction} {now['sign_rate']:>7.4f} {now['mse']:>10.3e} {now['lost']:>8.2%}"
