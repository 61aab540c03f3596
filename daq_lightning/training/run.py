"""The exports of one fit, made by all its ranks: their base, where they belong, and what was written.

    Run(...)       plan, base and lineage            raises: nothing was trained yet
    run.export     one export of the weights as they are, of a saved state, or of the best checkpoint
    run.error      the first thing that went wrong in one, kept until training is over

Every rank has a run, and they do everything together: an error of one is an error of all. When to export is
the callback's affair.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from daq_lightning.checkpoint.destination import check_inputs
from daq_lightning.checkpoint.manifest import Lineage
from daq_lightning.checkpoint.writer import plan_shards
from daq_lightning.export.disk import bytes_of
from daq_lightning.export.job import Job, parts_of, plan_of, prepare
from daq_lightning.export.mixed import within_budget
from daq_lightning.export.place import Place, opened
from daq_lightning.export.plan import ExportPlan
from daq_lightning.export.ranks import ALONE, Ranks
from daq_lightning.export.run import run
from daq_lightning.export.source import Source
from daq_lightning.export.timings import Timings
from daq_lightning.export.work import deal, dealt
from daq_lightning.model.complete import check_complete
from daq_lightning.model.live import LiveModel, find_model
from daq_lightning.model.swap import check_swappable
from daq_lightning.report.figures import ExportReport
from daq_lightning.training import settings_check as check
from daq_lightning.training.base import read_lightning_checkpoint, resolve_base, take_snapshot
from daq_lightning.training.calibration import calibrated
from daq_lightning.training.claims import remove_own
from daq_lightning.training.collecting import settled
from daq_lightning.training.curvature import collector_of
from daq_lightning.training.fallback import check_fallbacks, export_judged
from daq_lightning.training.judge import Judge, judge_in
from daq_lightning.training.layer_logs import log_layers
from daq_lightning.training.other_callbacks import best_path, saves_on_exception
from daq_lightning.training.placed import free_place, shows_progress, warn_of_little_room
from daq_lightning.training.published import Published
from daq_lightning.training.references import Base, BaseRequest
from daq_lightning.training.resume import own_state, reference_of
from daq_lightning.training.run_settings import RunSettings
from daq_lightning.training.schedule import Kept
from daq_lightning.training.source import kept_of, source_of, training_of
from daq_lightning.training.survival import survival_in


class Run:
    """The exports of one fit.

    Args:
        trainer: Whose fit it is.
        module: What is trained.
        settings: What to export.
        published: Is told of every export.
        states: The states of callbacks in the checkpoint that the run resumes from.
        place: Number of the callback among those of its class in the Trainer.
        ranks: The processes of the fit.

    Attributes:
        ranks: Who exports. A rank that is left alone, by an exception, exports alone what it has whole.
        base: The weights that exports are measured against.
        collector: Collects the curvature of the weights, if they are rounded along it.
        state: The reference to the base, in primitives, for training checkpoints.
        step: The step whose weights were exported last, or -1.
        error: The first error of an export.
        survival: Is told of every step, and logs; None if that was not asked for.

    Raises:
        MisconfigurationException: As for `resolve_base` and `find_model`.
        ValueError: A model that cannot be exported, or a base that does not fit it.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        settings: RunSettings,
        published: Published,
        states: list[dict[str, Any]],
        place: int | None,
        ranks: Ranks,
    ) -> None:
        settings = settled(settings, trainer)
        self._trainer, self._module, self._settings, self._published = trainer, module, settings, published
        self.ranks, self.step = ranks, -1
        self._kept = Kept(settings.schedule.keep_last)
        self._retaken: Base | None = None
        self.error: Exception | None = None
        self._judge = judge_in(trainer, settings.validation, keep=self.keep)
        model_name, model, source, plan = ranks.together(self._planned)
        self._sharded = model.sharded
        # before the base is read, which ranks of different plans would do in different orders
        ranks.check_equal("The plan of the export", lambda: parts_of(plan, settings.choices))
        names = tuple(tensor.spec.name for tensor in plan.quantized)
        resumed_from = str(trainer.ckpt_path) if trainer.ckpt_path is not None else None
        own = settings.description(model=model_name, place=place)
        state = own_state(states, own) if resumed_from else None
        where, saved = reference_of(state, settings.base, names)
        dirpath = settings.folder.absolute()
        shards = plan_shards(plan.stored_together, settings.choices.max_shard_bytes)
        parts = dealt(plan, shards, deal(shards, ranks.size), ranks)
        request = BaseRequest(
            base=where,
            names=names,
            parts=tuple(tuple(tensor.spec.name for tensor in part if tensor.quantize) for part in parts),
            dirpath=dirpath,
            resumed_from=resumed_from,
            saved=saved,
        )
        resumed = resumed_from is not None
        self.collector = collector_of(settings, trainer, model, plan.quantized, resumed=resumed)
        self.base = resolve_base(request, model, ranks)
        root = (state or {}).get("root") or self.base.path
        try:
            self._job: Job = prepare(
                source,
                self.base.weights,
                settings.choices,
                plan=plan,
                lineage=Lineage(base_kind=self.base.kind, base_path=self.base.path, root=root),
                parent=settings.parent,
                chain_from=settings.chain_from,
                ranks=ranks,
                curvature=None if self.collector is None else {},
            )
            ranks.together(lambda: check_inputs(dirpath / "step=0", self._job.inputs()))
            warn_of_little_room(settings, bytes_of(shards))
            ranks.together(lambda: check_fallbacks(self._job, settings.validation.schemes))
            self.survival = survival_in(trainer, model, self._job, self.base, settings, ranks)
        except Exception:
            self.remove_unused_base()
            raise
        self.state: dict[str, Any] = {
            "base": self.base.state(),
            "root": self._job.lineage.root,
            "callback": own,
        }

    @torch.no_grad()
    def export(self, state: Mapping[str, Any] | None = None, checkpoint: Path | None = None) -> None:
        """One export and all that follows it; an error is kept for the end of training.

        Args:
            state: A `state_dict` of the LightningModule about to be saved; None exports the weights as they
                are, which is the same for a sharded model.
            checkpoint: The file that holds the same weights.
        """
        self._export(None if self._sharded else state, checkpoint)

    @torch.no_grad()
    def export_best(self) -> None:
        """One export of the file that ModelCheckpoint holds for the best."""

        def best() -> tuple[str, Mapping[str, Any]]:
            path = best_path(self._trainer)
            return path, read_lightning_checkpoint(path)

        try:
            path, state = self.ranks.together(best)
        except Exception as error:
            self.keep(error)
        else:
            self._export(state, Path(path))

    def _export(self, state: Mapping[str, Any] | None, checkpoint: Path | None) -> None:
        try:
            self._write(self.ranks.together(lambda: self._model(state)), state, checkpoint)
        except Exception as error:
            self.keep(error)

    @torch.no_grad()
    def retake_base(self, content: dict[str, Any], state_key: str) -> None:
        """Re-takes the base from a checkpoint about to be saved, so that a run resumed from it goes on there.

        Args:
            content: Of the checkpoint; the state of the callback in it is changed.
            state_key: Of the callback.
        """
        self._retaken = None
        if self._settings.reference == "initial":
            return
        try:
            kept = None if self._sharded else content["state_dict"]
            self._retaken = self._snapshot(self.ranks.together(lambda: self._model(kept)))
            state = content.get("callbacks", {}).get(state_key)
            if state is not None:
                state["base"] = self._retaken.state()
        except Exception as error:
            self.keep(error)

    def close(self, *, referenced: bool) -> None:
        """Lets everything go, and removes what nobody needs.

        Args:
            referenced: Whether a training checkpoint names the base.
        """
        if self.collector is not None:
            self.collector.close()
        if not referenced:
            self.remove_unused_base()

    def remove_unused_base(self) -> None:
        """Removes a snapshot of this run that nothing needs: no step, no export, no checkpoint to come."""
        unused = self.base.created and not self._kept.exports and not saves_on_exception(self._trainer)
        if unused and self._trainer.global_step == 0 and self._trainer.is_global_zero:
            remove_own(Path(self.base.path))

    def keep(self, error: Exception, what: str = "The export failed") -> None:
        """Keeps the first error, and warns of it at once."""
        if self.error is None:
            self.error = error
            rank_zero_warn(f"{what}, training goes on: {error}")

    def leave_alone(self) -> None:
        """From now on this rank exports alone what it has whole, and judges nothing: others may be gone."""
        self.ranks, self._judge = ALONE, None

    def _write(self, model: LiveModel, state: Mapping[str, Any] | None, checkpoint: Path | None) -> None:
        trainer, settings = self._trainer, self._settings
        model.gather_adapters()
        if self.collector is not None:
            self.collector.observe_validation(self.ranks)
        known = (training_of(trainer, checkpoint), self.collector and self.collector.curvature)
        job = self.ranks.together(lambda: self._job.after_training(source_of(trainer, model), *known))
        job = calibrated(job, trainer, model, state, self.ranks)
        free = free_place(settings, settings.schedule.name(trainer), self.ranks)
        with free as where, opened(where, self.ranks) as place, contextlib.ExitStack() as stack:
            timings = Timings()
            job = within_budget(job, stack=stack, device=trainer.strategy.root_device, ranks=self.ranks)
            write, judging = partial(self._run, place, timings), self._judge
            judge = judging and judging(job=job, model=model, state=state, ranks=self.ranks)
            report = export_judged(judge, write) if judge else write(job)
        self._kept.exports.append(place.where)
        self.step = trainer.global_step
        self._published.publish(trainer, report, self._kept.exports, timings)
        if settings.logs.per_layer:
            log_layers(trainer, report)
        rank_zero_info(report.summary())
        if settings.reference == "previous_checkpoint":
            self.base = self._retaken or self._snapshot(model)
            self._job = self._job.against(self.base.weights, kind=self.base.kind, path=self.base.path)
            self.state["base"] = self.base.state()
            if self.survival is not None:
                self.survival.retake_base()
        self._kept.forget_old(remove=trainer.is_global_zero)

    def _run(self, place: Place, timings: Timings, job: Job, judge: Judge | None = None) -> ExportReport:
        write = partial(
            run,
            job,
            device=self._trainer.strategy.root_device,
            progress=shows_progress(self._trainer),
            ranks=self.ranks,
            judge=judge,
            timings=timings,
        )
        return place.export(job, write)

    def _planned(self) -> tuple[str, LiveModel, Source, ExportPlan]:
        """What this rank has, and what happens to it."""
        with check.as_misconfiguration():
            name, _ = find_model(self._module, self._settings.module)
        model = self._model(None)
        with check.as_misconfiguration():
            check_complete(model)
            if self._judge is not None:
                check_swappable(model)
        source = source_of(self._trainer, model)
        return name, model, source, plan_of(source, self._settings.choices, kept=kept_of(self._settings))

    def _model(self, state: Mapping[str, Any] | None) -> LiveModel:
        """The model as it is, or with the weights of a saved state."""
        return LiveModel(
            self._module,
            self._settings.module,
            state,
            merge=self._settings.merge_adapters,
            trained=self._trainer.strategy.model,
        )

    def _snapshot(self, model: LiveModel) -> Base:
        folder = self._settings.folder.absolute() / f"base-step={self._trainer.global_step}"
        names = [tensor.spec.name for tensor in self._job.plan.quantized]
        base = take_snapshot(model.weights, names, folder, self.ranks, own=self._kept.snapshots)
        if base.created:
            self._kept.snapshots.append(Path(base.path))
        return base
