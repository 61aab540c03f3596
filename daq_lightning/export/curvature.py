"""What a rank knows of the curvature of the weights that it exports, wherever it comes from.

    a run that collected it     the sums of all ranks, added up for the weights that are dealt to this one
    a text                      the model reads it, once for all that is done until the export ends
    neither                     nothing

A plan that changes, for a budget or a fallback, deals the weights anew: whoever has dealt them asks here.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeAlias

from daq_lightning.export.ranks import Ranks
from daq_lightning.numerics.rounding.statistics import Curvature

if TYPE_CHECKING:
    import torch

    from daq_lightning.export.job import Job
    from daq_lightning.export.work import Work

Collect: TypeAlias = Callable[[Mapping[str, int], Ranks], Curvature]
"""Name of each weight -> the rank that exports it; the ranks -> what was collected of those of this one. A
collective."""


def with_curvature(
    job: Job,
    work: Work,
    ranks: Ranks,
    stack: contextlib.ExitStack,
    *,
    device: str | torch.device | None = None,
    progress: bool = False,
) -> Job:
    """The job with the curvature of the weights of this rank. A collective.

    Args:
        job: The export.
        work: What each rank does of it.
        ranks: Who works.
        stack: Until it is closed, the curvature can be asked for.
        device: Where to calibrate; None is the CPU.
        progress: Whether to show how far that is, on rank 0.

    Raises:
        CheckpointError, ValueError: As for `Calibration.curvature`.
    """
    if job.collected is not None:
        return dataclasses.replace(job, curvature=job.collected(work.weights, ranks))

    def calibrated() -> Job:
        if job.calibration is None or job.curvature is not None or not work.files(ranks.rank):
            return job
        names = [tensor.spec.name for tensor in job.plan.quantized]
        shown = progress and ranks.rank == 0
        curvature = job.calibration.curvature(names, device, progress=shown)
        return dataclasses.replace(job, curvature=stack.enter_context(curvature))

    return ranks.together(calibrated)
