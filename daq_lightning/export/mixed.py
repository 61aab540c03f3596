"""Mixed precision by what survives: each weight on a rung of a ladder, so that a budget of bytes loses least.

    measure    a pass over all weights: what each would lose on each rung         `losses`
    choose     a knapsack over what servers fuse: q/k/v, gate/up, experts         `numerics.knapsack`
    plan       the export anew, with a layout for each tensor                     `plan_export(placed=...)`

The rest of an export knows nothing of budgets. The ranks share the pass, each with the statistics of the
weights that it measures; all plan the same, and deal what was collected anew when they write.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from daq_lightning.checkpoint.writer import plan_shards
from daq_lightning.export.curvature import with_curvature
from daq_lightning.export.losses import Losses, kind_of, losses_of, rows_of
from daq_lightning.export.ranks import ALONE, Agreement, Ranks
from daq_lightning.export.rungs import Options
from daq_lightning.export.scales import search_scales
from daq_lightning.export.stream import stream
from daq_lightning.export.work import share_out
from daq_lightning.numerics.knapsack import choose_options
from daq_lightning.report.placement import PlacedGroup, Placement

if TYPE_CHECKING:
    from daq_lightning.checkpoint.tensor_file import TensorSpec
    from daq_lightning.export.job import Job
    from daq_lightning.export.losses import LossKind


def within_budget(
    job: Job,
    *,
    stack: contextlib.ExitStack,
    device: str | torch.device | None = None,
    progress: bool = False,
    ranks: Ranks = ALONE,
) -> Job:
    """The same export with each weight on its rung; a job without a budget comes back as it is.

    Args:
        job: What `prepare` settled, on the lowest rungs; all its weights are read once.
        stack: Until it is closed, the curvature of a job that is calibrated can be asked for.
        device: Where to measure; None where each weight lies.
        progress: Whether to show how far it is.
        ranks: The processes that share the work; all of them call this.

    Raises:
        CheckpointError: A budget below the lowest rungs or above the highest, or weights that no rung takes.
            Nothing was written.
        ValueError: NaN or Inf in a weight, by name.
    """
    if job.settings.budget is None or job.placement is not None:
        return job
    chosen = [tensor.spec for tensor in job.plan.tensors if tensor.spec.name in job.plan.placed]
    options = Options(job.settings, job.plan.rungs, chosen, job.plan.dtype)
    capacity = options.capacity()
    job, measured = _measured(job, options, stack, device, progress, ranks)
    collected = not (job.curvature is None and job.calibration is None)
    kind, why = kind_of(measured, collected=collected)
    losses = _of_groups(measured, options, kind)
    groups = list(options.rungs)
    taken = choose_options(
        [list(options.sizes[group].values()) for group in groups],
        [list(losses[group].values()) for group in groups],
        capacity,
    )
    placed = tuple(
        PlacedGroup(
            names=group,
            rung=options.rungs[group][option],
            losses=losses[group],
            sizes=options.sizes[group],
        )
        for group, option in zip(groups, taken, strict=True)
    )
    return job.placed_as(
        Placement(
            budget=str(job.settings.budget),
            capacity=capacity,
            elements=options.elements,
            measure=kind,
            groups=placed,
            notes=(*options.notes, *_notes(job, chosen, kind, why)),
        )
    )


def _notes(job: Job, chosen: Sequence[TensorSpec], kind: LossKind, why: str) -> list[str]:
    """What the user should know of the measurement."""
    notes = [f"The budget compares weights by error over update, since {why}."] * bool(why)
    if any(len(rows_of(spec.shape[0])) > 1 for spec in chosen):
        notes.append("The losses of large weights are those of 512 of their rows.")
    if kind == "update" and job.without_base:
        notes.append(
            f"{len(job.without_base)} weights without a base are compared by error over weight: no update is "
            "lost there."
        )
    return notes


def _measured(
    job: Job,
    options: Options,
    stack: contextlib.ExitStack,
    device: str | torch.device | None,
    progress: bool,
    ranks: Ranks,
) -> tuple[Job, dict[str, dict[str, Losses]]]:
    """What each weight that has a choice loses on each of its rungs. A collective.

    Returns:
        The job, calibrated if it is to be, and name -> rung -> losses.
    """
    allowed = {name: rungs for group, rungs in options.rungs.items() for name in group}
    agreement = Agreement(ranks)
    plan = dataclasses.replace(job.plan, tensors=tuple(job.plan.quantized))
    shards = plan_shards(plan.stored_together, job.settings.max_shard_bytes)
    work = share_out(plan, shards, ranks, together=False)
    mine: dict[str, dict[str, Losses]] = {}
    known = with_curvature(job, work, ranks, stack, device=device, progress=progress)
    measured = stream(known, work, ranks, agreement, device=device, progress=progress, what="Measure")
    with contextlib.closing(measured) as batches:
        for batch in batches:
            with agreement.attempt():
                for pair in batch:
                    name = pair.plan.spec.name
                    if len(allowed[name]) > 1:
                        layouts = {rung: options.layouts[rung] for rung in allowed[name]}
                        mine[name] = losses_of(known, pair, layouts, search_scales)
        agreement.end()
    every = ranks.union(mine)
    calibrated = job if job.calibration is None else known
    return calibrated, {name: every[name] for name in allowed if name in every}


def _of_groups(
    measured: Mapping[str, Mapping[str, Losses]], options: Options, kind: LossKind
) -> dict[tuple[str, ...], dict[str, float]]:
    """The same for each group, in one way: the sum over its weights, of which an expert that no token reached
    loses nothing."""
    return {
        group: {
            rung: sum(getattr(measured[name][rung], kind) or 0.0 for name in group) if len(rungs) > 1 else 0.0
            for rung in rungs
        }
        for group, rungs in options.rungs.items()
    }
