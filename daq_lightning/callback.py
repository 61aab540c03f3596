"""The Lightning callback: when to take the base, when to export. No arithmetic happens here.

    on_fit_start   find the model, plan the export, take the base      (errors before the first step)
    checkpoint     with export_on="checkpoint": after each file that ModelCheckpoint writes, of the same weights
    on_train_end   search and write `dirpath/step=<n>/`                 (the last hook with the weights on the device)
    on_fit_end     raise what went wrong in an export                   (after Lightning has saved its own checkpoints)

Parameters, random numbers, gradients and modes of the model are only read: training is bit-identical with and without
the callback. A failed export never stops a run: its error surfaces when training is over and saved.

Source: lightning 2.6 `Trainer.fit` (order of hooks), `ModelCheckpoint` (names, triggers).
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar, WeightAveraging
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from daq_lightning.checkpoint.layouts import Scheme
from daq_lightning.checkpoint.lineage import make_lineage
from daq_lightning.checkpoint.manifest import ChainFrom, Lineage
from daq_lightning.checkpoint.writer import check_destination
from daq_lightning.export import export
from daq_lightning.metrics import delta_metrics
from daq_lightning.numerics.objectives import Metric
from daq_lightning.numerics.search.settings import ScaleSearch
from daq_lightning.preparation import Context, ExportSettings, make_plan, match_base
from daq_lightning.report import ExportReport
from daq_lightning.source import Source
from daq_lightning.training.base import Base, BaseRequest, read_lightning_checkpoint, resolve_base, take_snapshot
from daq_lightning.training.model import LiveModel, owners_of_files
from daq_lightning.training.schedule import ExportOn, Kept, Schedule, Which, check_choice, free_name
from daq_lightning.training.watch import WatchedCheckpointIO, saved_by_model_checkpoint


class DeltaAwareQuantization(Callback):
    """Exports the trained model as an FP8 checkpoint that keeps what training changed.

    Args:
        dirpath: Folder of the exports; each is `dirpath/<filename>/`.
        base: The weights before training: "auto", "snapshot", "memory", a Hugging Face folder, or a Lightning
            `.ckpt` file. See `daq_lightning.training.base`.
        scheme: "FP8_BLOCK" (128 x 128), "FP8_DYNAMIC" (per channel), "FP8A16" (per channel, 16-bit activations), or
            "auto": blocks where all sizes are multiples of 128, else channels.
        metric: What the scale search maximizes: "hybrid", "cosine", "sign" or "mse".
        alpha_range: Range of the multiples of the absmax scale that are tried.
        search: Full settings of the search, instead of `metric` and `alpha_range`.
        ignore: Modules to keep in high precision: full names, or regular expressions after `re:`.
        module: Name of the submodule to export; None finds the one `PreTrainedModel`.
        scale_format: None, or "ue8m0" for scales that are powers of two.
        export_on: "train_end", or "checkpoint": whenever ModelCheckpoint saves, the same weights.
        every_n_train_steps: Also export every so many optimizer steps.
        every_n_epochs: Also export every so many epochs.
        which: What the export at the end of training holds: the "last" weights, or the "best" checkpoint.
        keep_last: How many exports of this run to keep; None keeps all.
        filename: Name of an export, as ModelCheckpoint's: "{epoch}-{step}-{val_loss:.2f}".
        merge_adapters: Whether PEFT adapters are merged into the export. If not, the export holds the frozen model, and
            its subfolder `adapter` the adapters, as PEFT and servers load them.
        reference: "initial": every export is measured against the base. "previous_checkpoint": against the weights
            of the export before it, which keeps the update small in a long run.
        parent: Folder of the export that this run goes on from, as the next stage of a chain.
        chain_from: With a parent: whether the run began with its high-precision "weights" or with its "deployed",
            dequantized ones. It is checked, never guessed.
        export_on_exception: Whether to export the weights of a run that failed or was interrupted.

    Attributes:
        metrics: Figures of the last export, also logged to every logger of the Trainer.
        report: The `ExportReport` of the last export.
        schedule: When it exports, and under which name.

    Raises:
        MisconfigurationException: Settings that contradict each other, a strategy whose weights cannot be read, or a
            base that does not fit the model; always before the first training step.

    Example:
        >>> callback = DeltaAwareQuantization(dirpath="exports", scheme="FP8_BLOCK", metric="cosine")
        >>> callback.metrics
        {}
    """

    def __init__(
        self,
        dirpath: str = "exports",
        base: str = "auto",
        scheme: Scheme = "auto",
        metric: Metric | None = None,
        alpha_range: tuple[float, float] | None = None,
        search: ScaleSearch | None = None,
        ignore: list[str] | None = None,
        module: str | None = None,
        scale_format: Literal["ue8m0"] | None = None,
        export_on: ExportOn = "train_end",
        every_n_train_steps: int | None = None,
        every_n_epochs: int | None = None,
        which: Which = "last",
        keep_last: int | None = None,
        filename: str = "{step}",
        reference: Literal["initial", "previous_checkpoint"] = "initial",
        merge_adapters: bool = True,
        parent: str | None = None,
        chain_from: ChainFrom | None = None,
        export_on_exception: bool = False,
    ) -> None:
        super().__init__()
        self.dirpath, self.base, self.module, self.reference = str(dirpath), str(base), module, reference
        self.export_on_exception, self.merge_adapters = export_on_exception, merge_adapters
        self.parent: str | None = parent
        self.chain_from: ChainFrom | None = chain_from
        self.schedule = Schedule(
            export_on=export_on,
            which=which,
            every_n_train_steps=every_n_train_steps,
            every_n_epochs=every_n_epochs,
            keep_last=keep_last,
            filename=filename,
        )
        check_choice("reference", reference, ("initial", "previous_checkpoint"))
        if "://" in self.dirpath:
            raise MisconfigurationException(
                f"dirpath={self.dirpath!r}: exports are renamed into place, which needs a local file system. Export to "
                "a local folder and upload it afterwards."
            )
        self._choices = _make_settings(scheme, metric, alpha_range, search, ignore, scale_format)
        self.metrics: dict[str, float] = {}
        self.report: ExportReport | None = None
        self._kept = Kept(keep_last)
        self._base: Base | None = None
        self._lineage, self._root = Lineage(), None
        self._saved_base: dict[str, Any] | None = None
        self._saved_root: str | None = None
        self._retaken: Base | None = None
        self._exported_step = -1
        self._error: Exception | None = None

    @property
    def exports(self) -> list[Path]:
        """Folders of all exports of this run that are kept, oldest first."""
        return self._kept.exports

    @property
    def state_key(self) -> str:
        """Differs between two callbacks of different settings, so that both keep their state."""
        return self._generate_state_key(dirpath=self.dirpath, base=self.base, settings=repr(self._choices))

    def state_dict(self) -> dict[str, Any]:
        """The reference to the base, in primitives."""
        return {} if self._base is None else {"base": self._base.state(), "root": self._lineage.root}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps the reference; it is resolved in `on_fit_start`."""
        self._saved_base, self._saved_root = state_dict.get("base"), state_dict.get("root")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses strategies and destinations that could not be exported, before anything is trained."""
        if stage != "fit" or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if not isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy)):
            raise MisconfigurationException(
                f"DeltaAwareQuantization reads whole weights, which {type(trainer.strategy).__name__} does not keep on "
                "one device. Train with a single device or DDP, or save a checkpoint and run `daq-lightning quantize`."
            )
        if trainer.is_global_zero:
            check_destination(Path(self.dirpath) / "step=0")
        averaging = [callback for callback in trainer.callbacks if isinstance(callback, WeightAveraging)]  # type: ignore[attr-defined]
        if averaging and trainer.callbacks.index(averaging[-1]) > trainer.callbacks.index(self):  # type: ignore[attr-defined]
            # WeightAveraging puts the averaged weights into the model in its on_train_end: this one must come after
            others = [callback for callback in trainer.callbacks if callback is not self]  # type: ignore[attr-defined]
            place = others.index(averaging[-1]) + 1
            trainer.callbacks = [*others[:place], self, *others[place:]]  # type: ignore[attr-defined]

    @torch.no_grad()
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Plans the export and takes the base, so that whatever does not fit is known before the first step."""
        self._error, self._base, self._retaken, self._exported_step = None, None, None, -1
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        problem = None
        if trainer.is_global_zero:
            try:
                self._prepare(trainer, pl_module)
            except (ValueError, MisconfigurationException) as error:
                problem = error
        problem = trainer.strategy.broadcast(problem)
        if problem is not None:
            raise problem
        if self.schedule.export_on == "checkpoint" and trainer.is_global_zero:
            trainer.strategy.checkpoint_io = WatchedCheckpointIO(
                trainer.strategy.checkpoint_io,
                before=lambda path, content: self._before_save(trainer, pl_module, path, content),
                after=lambda path, content: self._after_save(trainer, pl_module, path, content),
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Exports every `every_n_train_steps` optimizer steps."""
        if self.schedule.due_after_step(trainer.global_step):
            self._export_live(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Exports every `every_n_epochs` epochs."""
        if self.schedule.due_after_epoch(trainer.current_epoch):
            self._export_live(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Exports the last weights. An error is kept until Lightning has saved its own checkpoints."""
        if self.schedule.due_at_end("last"):
            self._export_live(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Exports the best checkpoint if that was asked for, then raises what went wrong in an export."""
        if self.schedule.due_at_end("best"):
            self._export_best(trainer, pl_module)
        if self._base is not None and not self.exports and self._error is None:
            rank_zero_warn(
                "DeltaAwareQuantization exported nothing: training ended before a first export was due (a resumed run "
                "that was finished already, or no training steps)."
            )
        error = self._error
        self._release(trainer)
        if error is not None:
            if sys.version_info >= (3, 11):
                error.add_note("Training itself has finished: the checkpoints that Lightning wrote are complete.")
            raise error

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Frees the base; exports only with `export_on_exception`, and never hides the error."""
        if self.export_on_exception:
            self._export_live(trainer, pl_module)
        self._release(trainer)

    # what the hooks call

    def _prepare(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Plan and base of the run; raises before the first step."""
        model = self._model(pl_module, None)
        source = self._source(trainer, model)
        plan = make_plan(source, self._choices)
        request = BaseRequest(
            base=self.base,
            names=tuple(tensor.spec.name for tensor in plan.quantized),
            dirpath=Path(self.dirpath).absolute(),
            resumed_from=str(trainer.ckpt_path) if trainer.ckpt_path is not None else None,
            saved=self._saved_base,
        )
        base = resolve_base(request, model)
        match_base(plan, base.weights, source, self._choices)
        root = self._saved_root if request.resumed_from and self._saved_root else base.path
        lineage = Lineage(base_kind=base.kind, base_path=base.path, root=root)
        self._lineage, self._root = make_lineage(
            lineage, base.weights, request.names, parent=self.parent, chain_from=self.chain_from
        )
        self._base, self._kept = base, Kept(self.schedule.keep_last)

    def _source(self, trainer: Trainer, model: LiveModel) -> Source:
        def copy_files(folder: Path) -> None:
            model.copy_files(folder, *owners_of_files(trainer))

        return Source(
            weights=model.weights,
            specs=model.specs,
            keys=model.keys,
            architecture=model.architecture,
            config=model.config(),
            copy_files=copy_files,
        )

    def _export_live(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Exports the weights as they are now."""
        if self._base is None or self._exported_step == trainer.global_step:
            return
        self._export(trainer, pl_module, state=None, checkpoint=None)

    def _export_best(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Exports the file that ModelCheckpoint holds for the best."""
        if self._base is None:
            return
        callback = trainer.checkpoint_callback
        path = callback.best_model_path if isinstance(callback, ModelCheckpoint) else ""
        if not path:
            self._keep_error(
                MisconfigurationException(
                    "which='best' exports ModelCheckpoint's best_model_path, and there is none: add a ModelCheckpoint "
                    "with a monitor, or use which='last'."
                )
            )
            return
        self._export(trainer, pl_module, read_lightning_checkpoint(path), checkpoint=Path(path))

    def _before_save(self, trainer: Trainer, pl_module: LightningModule, path: Path, content: dict[str, Any]) -> None:
        """Re-takes the base from what is about to be saved, so that a run resumed from the file goes on from there."""
        self._retaken = None
        if self.reference == "initial" or self._base is None or not saved_by_model_checkpoint(trainer, path):
            return
        try:
            self._retaken = self._snapshot(trainer, self._model(pl_module, content["state_dict"]))
            state = content.get("callbacks", {}).get(self.state_key)
            if state is not None:
                state["base"] = self._retaken.state()
        except Exception as error:
            self._keep_error(error)

    def _after_save(self, trainer: Trainer, pl_module: LightningModule, path: Path, content: dict[str, Any]) -> None:
        """Exports what was saved."""
        if self._base is None or not saved_by_model_checkpoint(trainer, path):
            return
        if self._exported_step == trainer.global_step:  # `last.ckpt` beside the one just exported
            return
        self._export(trainer, pl_module, content["state_dict"], checkpoint=path)

    def _model(self, pl_module: LightningModule, state: Mapping[str, Any] | None) -> LiveModel:
        """The model as it is, or with the weights of a saved state."""
        return LiveModel(pl_module, self.module, state, merge=self.merge_adapters)

    @torch.no_grad()
    def _export(
        self, trainer: Trainer, pl_module: LightningModule, state: Mapping[str, Any] | None, checkpoint: Path | None
    ) -> None:
        """One export and all that follows it; an error is kept for the end of training."""
        assert self._base is not None
        try:
            self._write(trainer, self._model(pl_module, state), checkpoint)
        except Exception as error:
            self._keep_error(error)

    def _write(self, trainer: Trainer, model: LiveModel, checkpoint: Path | None) -> None:
        assert self._base is not None
        out = free_name(Path(self.dirpath) / self.schedule.name(trainer))
        bar = isinstance(trainer.progress_bar_callback, TQDMProgressBar) and trainer.progress_bar_callback.is_enabled
        source = self._source(trainer, model)
        device = trainer.strategy.root_device
        training = {"global_step": trainer.global_step, "epoch": trainer.current_epoch}
        context = Context(
            lineage=dataclasses.replace(self._lineage, base_kind=self._base.kind, base_path=self._base.path),
            root=self._root,
            training=training | ({"checkpoint": str(checkpoint.absolute())} if checkpoint else {}),
        )
        self.report = export(
            source, self._base.weights, out, self._choices, context=context, device=device, progress=bar
        )
        self.exports.append(out)
        self._exported_step = trainer.global_step
        self._publish_metrics(trainer, self.report)
        rank_zero_info(self.report.summary())
        if self.reference == "previous_checkpoint":
            self._base = self._retaken or self._snapshot(trainer, model)
        self._kept.forget_old()

    def _snapshot(self, trainer: Trainer, model: LiveModel) -> Base:
        assert self._base is not None
        folder = Path(self.dirpath).absolute() / f"base-step={trainer.global_step}"
        base = take_snapshot(model.weights, self._base.fingerprints, folder)
        self._kept.snapshots.append(Path(base.path))
        return base

    def _keep_error(self, error: Exception) -> None:
        if self._error is None:
            self._error = error
            rank_zero_warn(f"FP8 export failed, training goes on: {error}")

    def _release(self, trainer: Trainer) -> None:
        self._base = self._retaken = self._error = None
        if isinstance(trainer.strategy.checkpoint_io, WatchedCheckpointIO):
            trainer.strategy.checkpoint_io = trainer.strategy.checkpoint_io.inner

    def _publish_metrics(self, trainer: Trainer, report: ExportReport) -> None:
        """The metrics of the written and of plain absmax scales: to the attribute, the Trainer and its loggers."""
        self.metrics = {}
        for side, prefix in (("searched", "daq/"), ("absmax", "daq/absmax_")):
            collection = delta_metrics(prefix=prefix, sync=False)  # rank 0 exports, alone
            collection.update(report.totals(side))  # type: ignore[arg-type]
            self.metrics |= {name: float(value) for name, value in collection.compute().items()}
        trainer.callback_metrics.update(
            {name: torch.tensor(value, dtype=torch.float32, device="cpu") for name, value in self.metrics.items()}
        )
        for logger in trainer.loggers:
            logger.log_metrics(self.metrics, step=trainer.global_step)


def _make_settings(
    scheme: Scheme,
    metric: Metric | None,
    alpha_range: tuple[float, float] | None,
    search: ScaleSearch | None,
    ignore: list[str] | None,
    scale_format: Literal["ue8m0"] | None,
) -> ExportSettings:
    if search is not None and (metric is not None or alpha_range is not None):
        raise MisconfigurationException("search=... already holds metric and range: leave metric and alpha_range out.")
    try:
        if search is None:
            low, high = alpha_range or (ScaleSearch.alpha_min, ScaleSearch.alpha_max)
            search = ScaleSearch(metric=metric or ScaleSearch.metric, alpha_min=low, alpha_max=high)
        return ExportSettings(scheme=scheme, search=search, ignore=tuple(ignore or ()), scale_format=scale_format)
    except ValueError as error:
        raise MisconfigurationException(str(error)) from error
