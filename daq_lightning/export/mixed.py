"""Mixed precision by what survives: each weight on a rung of a ladder, so that a budget of bytes loses least.

    measure    a pass over all weights: what each would lose on each rung         `losses`
    choose     a knapsack over what servers fuse: q/k/v, gate/up, experts         `numerics.knapsack`
    plan       the export anew, with a layout for each tensor                     `plan_export(placed=...)`

The rest of an export knows nothing of budgets. The ranks share the pass; all plan the same.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from daq_lightning.checkpoint.ladders import LADDERS, Budget
from daq_lightning.checkpoint.schemes import FULL
from daq_lightning.checkpoint.tensor_file import CheckpointError
from daq_lightning.checkpoint.writer import plan_shards
from daq_lightning.export.layout_choice import rungs_for, rungs_of
from daq_lightning.export.losses import kind_of, losses_of, rows_of
from daq_lightning.export.ranks import ALONE, Agreement, Ranks
from daq_lightning.export.stream import stream
from daq_lightning.export.work import share_out
from daq_lightning.model.fusion import fused_groups
from daq_lightning.numerics.knapsack import choose_options
from daq_lightning.report.placement import PlacedGroup, Placement

if TYPE_CHECKING:
    from daq_lightning.checkpoint.layouts import Layout
    from daq_lightning.checkpoint.tensor_file import TensorSpec
    from daq_lightning.export.job import Job
    from daq_lightning.export.losses import LossKind


def within_budget(
    job: Job,
    *,
    device: str | torch.device | None = None,
    progress: bool = False,
    ranks: Ranks = ALONE,
) -> Job:
    """The same export with each weight on its rung; a job without a budget comes back as it is.

    Args:
        job: What `prepare` settled, on the lowest rungs; all its weights are read once.
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
    options = _Options(job)
    capacity = options.check()
    losses = options.measured(device, progress, ranks)
    groups = list(options.rungs)
    chosen = choose_options(
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
        for group, option in zip(groups, chosen, strict=True)
    )
    return job.placed_as(
        Placement(
            budget=str(job.settings.budget) if not isinstance(job.settings.budget, int)
            else f"{job.settings.budget} bytes",
            capacity=capacity,
            elements=options.elements,
            measure=options.kind,
            groups=placed,
            notes=tuple(options.notes),
        )
    )  # fmt: skip


class _Options:
    """The rungs of each group of weights, with their bytes."""

    def __init__(self, job: Job) -> None:
        self._job, settings = job, job.settings
        self._specs: dict[str, TensorSpec] = {
            tensor.spec.name: tensor.spec
            for tensor in job.plan.tensors
            if tensor.spec.name in job.plan.placed
        }
        layouts, _ = rungs_of(settings, list(self._specs.values()))
        self._layouts: dict[str, Layout | None] = {one.scheme.name: one for one in layouts}
        if FULL in (settings.ladder or LADDERS[layouts[0].scheme.name]):
            self._layouts[FULL] = None
        self.rungs = {
            tuple(names): rungs_for(names, layouts, settings, self._specs)
            for names in fused_groups(self._specs)
        }
        self.sizes = {
            group: {rung: sum(self._bytes(name, rung) for name in group) for rung in rungs}
            for group, rungs in self.rungs.items()
        }
        self.elements = sum(spec.shape[0] * spec.shape[1] for spec in self._specs.values())
        self.kind: LossKind
        self.kind, why = kind_of(job, list(self._specs))
        self.notes = [f"The budget compares weights by error over update, since {why}."] * bool(why)
        alone = [group for group, rungs in self.rungs.items() if rungs[0] != layouts[0].scheme.name]
        if alone:
            self.notes.append(
                f"{len(alone)} groups of weights, such as {' + '.join(alone[0])}, have sizes that "
                f"{layouts[0].scheme.name} cannot hold, and begin higher."
            )
        if any(len(rows_of(spec.shape[0])) > 1 for spec in self._specs.values()):
            self.notes.append("The losses of large weights are those of 512 of their rows.")
        apart = 0 if self.kind != "update" else len(job.without_base)
        if apart:
            self.notes.append(
                f"{apart} weights without a base are compared by error over weight: no update is lost there."
            )

    def check(self) -> int:
        """The bytes that the budget allows.

        Raises:
            CheckpointError: Fewer than the lowest rungs take, or more than the highest.
        """
        settings = self._job.settings
        assert settings.budget is not None
        capacity = Budget.of(settings.budget).bytes_for(self.elements)
        low, high = (sum(end(sizes.values()) for sizes in self.sizes.values()) for end in (min, max))
        if low <= capacity <= high:
            return capacity
        below = capacity < low
        wanted, limit = (low, "the least that") if below else (high, "the most that")
        what = "a lower scheme or a larger budget" if below else "a smaller budget, or a higher ladder"
        if not below and FULL in self._layouts:
            what = "a smaller budget, or none and no quantization"
        raise CheckpointError(
            f"budget={settings.budget!r} is {capacity:,} bytes ({8 * capacity / self.elements:.4g} bits a "
            f"weight), {'below' if below else 'above'} {limit} the rungs "
            f"{', '.join(self._layouts)} can take: {wanted:,} bytes ({8 * wanted / self.elements:.4g} bits). "
            f"Use {what}. Nothing was written."
        )

    def measured(
        self, device: str | torch.device | None, progress: bool, ranks: Ranks
    ) -> dict[tuple[str, ...], dict[str, float]]:
        """What each group loses on each of its rungs: the sum over its weights. A collective."""
        job = self._job
        allowed = {name: rungs for group, rungs in self.rungs.items() for name in group}
        mine: dict[str, dict[str, float]] = {}
        agreement = Agreement(ranks)
        plan = dataclasses.replace(job.plan, tensors=tuple(job.plan.quantized))
        shards = plan_shards(plan.stored_together, job.settings.max_shard_bytes)
        work = share_out(plan, shards, ranks, together=False)
        with contextlib.closing(
            stream(job, work, ranks, agreement, device=device, progress=progress)
        ) as batches:
            for batch in batches:
                with agreement.attempt():
                    for pair in batch:
                        name = pair.plan.spec.name
                        if name in allowed and len(allowed[name]) > 1:
                            layouts = {rung: self._layouts[rung] for rung in allowed[name]}
                            mine[name] = losses_of(job, pair, layouts, self.kind)
            agreement.end()
        every: Mapping[str, dict[str, float]] = ranks.union(mine)
        return {
            group: {
                rung: sum(every[name][rung] for name in group) if len(rungs) > 1 else 0.0 for rung in rungs
            }
            for group, rungs in self.rungs.items()
        }

    def _bytes(self, name: str, rung: str) -> int:
        spec, layout = self._specs[name], self._layouts[rung]
        if layout is not None:
            return sum(part.nbytes for part in layout.stored(spec).values())
        return spec.shape[0] * spec.shape[1] * self._job.plan.dtype.itemsize
