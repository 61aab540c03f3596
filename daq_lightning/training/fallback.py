"""Exports that are judged before they are published, and what is tried when one is rejected.

    FP8_BLOCK      val_loss 2.31 -> 2.41: rejected
    FP8_DYNAMIC    val_loss 2.31 -> 2.36: rejected
    keep:4         of FP8_DYNAMIC, the 4 layers of the largest KL in 16 bit: published; the report says why

Every attempt is a whole export, written beside its destination; the one that passes gets the name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from daq_lightning.training.gate import ExportRejectedError, kept_layers

if TYPE_CHECKING:
    from daq_lightning.export.job import Job
    from daq_lightning.report.figures import ExportReport
    from daq_lightning.training.judge import Judge

Write = Callable[["Job", "Judge"], "ExportReport"]


def export_judged(judge: Judge, write: Write) -> ExportReport:
    """Writes the job of a judge, or the first of the fallbacks that passes. A collective.

    Args:
        judge: With the job to begin with.
        write: Writes a job, asks a judge, and publishes.

    Raises:
        ExportRejectedError: None passes; nothing was published.
    """
    schemes = list(judge.settings.schemes)
    rejected: list[str] = []
    while True:
        measure = bool(schemes) and kept_layers(schemes[0]) is not None
        judge = dataclasses.replace(judge, measure_layers=measure, costs={}, notes=tuple(rejected))
        try:
            return write(judge.job, judge)
        except ExportRejectedError as error:
            if not schemes:
                tried = "".join(f"{note} " for note in rejected)
                raise ExportRejectedError(
                    f"Nothing was published: as {_called(judge.job)}, {error}. {tried}The weights are in the "
                    "training checkpoint; allow more in max_degradation, or quantize it with "
                    "`daq-lightning quantize`."
                ) from None
            said = f"{_called(judge.job)} was rejected: {error}."
            rank_zero_warn(f"{said} Trying {schemes[0]}.")
            job, kept = _next(judge.job, schemes.pop(0), judge.costs)
            rejected += [said, *kept]
            judge = dataclasses.replace(judge, job=job)


def check_fallbacks(job: Job, schemes: Sequence[str]) -> None:
    """Raises CheckpointError for a scheme that this model cannot have; nothing is read or written."""
    for scheme in schemes:
        if kept_layers(scheme) is None:
            _as_scheme(job, scheme)


def _next(job: Job, scheme: str, costs: Mapping[tuple[str, ...], float]) -> tuple[Job, list[str]]:
    """What is tried next, and which layers it keeps."""
    count = kept_layers(scheme)
    if count is None:
        return _as_scheme(job, scheme), []
    worst = sorted(costs, key=lambda names: -costs[names])[:count]
    modules = [name.removesuffix(".weight") for names in worst for name in names]
    settings = dataclasses.replace(job.settings, ignore=(*job.settings.ignore, *modules))
    listed = ", ".join(f"{' + '.join(names)} ({costs[names]:.2e})" for names in worst)
    return job.planned_as(settings), [f"Kept in 16 bit, the largest KL alone: {listed}."]


def _as_scheme(job: Job, scheme: str) -> Job:
    settings = dataclasses.replace(
        job.settings,
        scheme=scheme,  # type: ignore[arg-type]
        container=None,
        budget=None,
        ladder=(),
    )
    return job.planned_as(settings)


def _called(job: Job) -> str:
    kept = len(job.settings.ignore)
    return job.plan.layouts.scheme + (f" with {kept} modules kept" if kept else "")
