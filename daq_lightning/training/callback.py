"""The Lightning callback: when to take the base, when to export. No arithmetic happens here.

    on_fit_start   find the model, plan the export, take the base     errors before the first step
    checkpoint     export_on="checkpoint": after each file of ModelCheckpoint, the same weights
    on_train_end   search and write `dirpath/step=<n>/`               the weights are on the device
    on_fit_end     raise what went wrong in an export                 Lightning's checkpoints are saved

Parameters, random numbers, gradients and modes of the model are only read: training is bit-identical with and
without the callback. A failed export never stops a run: its error surfaces when training is over and saved.
All ranks take part in all of this but `on_exception`.

Source: lightning 2.6 `Trainer.fit`, `ModelCheckpoint`.
"""

from __future__ import annotations

from typing import Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from daq_lightning.checkpoint.budget import memory_of
from daq_lightning.checkpoint.kv_cache import KVCache
from daq_lightning.checkpoint.manifest import ChainFrom
from daq_lightning.checkpoint.schemes import DEFAULT_SHARD_BYTES, SchemeName
from daq_lightning.export.place import check_place
from daq_lightning.export.ranks import ALONE, Ranks
from daq_lightning.numerics.objectives import Metric
from daq_lightning.numerics.rounding.settings import RoundingChoice
from daq_lightning.numerics.search.settings import ScaleSearch
from daq_lightning.training import settings_check as check
from daq_lightning.training.collecting import Collecting, Source
from daq_lightning.training.due import ExportsWhenDue
from daq_lightning.training.gate import OnFailure, ValidationSettings
from daq_lightning.training.other_callbacks import averaged_state, check_savers, place_after_averaging
from daq_lightning.training.published import PublishedExports, raise_at_end, warn_of_nothing
from daq_lightning.training.resume import KeepsReference
from daq_lightning.training.run import Run
from daq_lightning.training.run_settings import LogSettings, MissingBase, RunSettings, make_settings
from daq_lightning.training.saves import unwatch, watch
from daq_lightning.training.schedule import ExportOn, Schedule, Which
from daq_lightning.training.strategies import check_judging, check_strategy, restores_late
from daq_lightning.training.upload import upload_last


class DeltaAwareQuantization(PublishedExports, KeepsReference, ExportsWhenDue):
    """Exports the trained model as a quantized checkpoint that keeps what training changed.

    Args:
        dirpath: Folder of the exports; each is `dirpath/<filename>/`. Or a URL of fsspec, "s3://bucket/run":
            exports are written to a folder in TMPDIR and uploaded, the manifest last.
        base: The weights before training: "auto", "snapshot", "memory", a Hugging Face folder, or a Lightning
            `.ckpt`, file or folder. See `daq_lightning.training.base`.
        scheme: "FP8_BLOCK" (128 x 128), "FP8_DYNAMIC" (per channel), "FP8A16" (per channel, 16-bit
            activations), or "auto": blocks where all sizes are multiples of 128, else channels. Or "MXFP8",
            "W8A8", "W4A16", "W4A16_ASYM", these two with "_G32", "NVFP4A16", "MXFP4A16": see
            docs/formats.md. "keep": those of `base`, a quantized folder that the model was read from: see
            docs/qlora.md.
        metric: What the scale search maximizes: "hybrid", "cosine", "sign" or "mse".
        alpha_range: Range of the multiples of the absmax scale that are tried.
        search: All settings of the search, instead of these two.
        rounding: "curvature": codes whose errors cancel where the model is sensitive to them, which a few of
            the run's own batches say. "nearest": each code by itself. "auto": "curvature", but "nearest"
            where a search is asked for, or the strategy, a compiled model, or fallbacks of several ranks do
            not let it be collected.
        curvature: What is collected: "activations", and the gradients at the outputs of layers; or the
            "gradients" of weights, without hooks; or the activations of "validation" batches at the export.
            "auto" is "activations", and "validation" for what was not seen in training.
        curvature_memory: What sums may take at a time, in bytes or as "2 GB".
        curvature_steps: Batches that each layer is observed for; more if they are small.
        ignore: Modules to keep in high precision: full names, or regular expressions after `re:`.
        module: Name of the submodule to export; None finds the one `PreTrainedModel`.
        scale_format: None, or "ue8m0" for scales that are powers of two.
        kv_cache: None, or for servers that cache keys and values in FP8: "fp8" with scales of 1.0,
            "fp8-calibrated" with scales of each layer from a validation before each export.
        budget: What quantized weights may take, as mean bits ("4.5 bits") or bytes ("2.1 GB"): each export
            measures all, and those that lose most go up from `scheme` to larger formats.
        ladder: With a budget, the schemes from the lowest up, such as ["W4A16", "FP8_DYNAMIC", "16"], of
            which "16" is 16 bit; None for the usual one of `scheme`, see docs/formats.md.
        export_on: "train_end", or "checkpoint": whenever ModelCheckpoint saves, the same weights.
        every_n_train_steps, every_n_epochs: Also export every so many optimizer steps, or epochs.
        which: What is exported at the end: the "last" weights, or the "best" checkpoint of the first
            ModelCheckpoint with a monitor.
        keep_last: How many exports of this run to keep; None keeps all.
        filename: Name of an export, as ModelCheckpoint's: "{epoch}-{step}-{val_loss:.2f}"; a metric that was
            not logged yet is 0, a slash an underscore.
        merge_adapters: Whether PEFT adapters are merged; else the export holds the frozen model, and its
            subfolder `adapter` the adapters, as PEFT and servers load them.
        reference: "initial": every export is measured against the base. "previous_checkpoint": against the
            weights of the export before it, which keeps the update small in a long run.
        parent: Folder of the export that this run goes on from, as the next stage of a chain.
        chain_from: With a parent: whether the run began with its "weights" or its "deployed" ones; checked.
        export_on_exception: Whether to export the weights of a run that failed or was interrupted.
        missing_base: A weight without its like in the base is an "error", or gets a plain "absmax" scale.
        max_shard_bytes: Size at which a new file begins; ranks share out the files, whole.
        validate: Whether to run the Trainer's validation with the exported weights before they are published;
            its figures are logged as "daq/val_loss" beside "daq/unquantized_val_loss".
        quantize_activations: Whether activations are quantized in that validation, as servers do.
        max_degradation: Figure -> by how much it may be worse than unquantized: {"val_loss": 0.02}.
        on_failure: If it is worse: "raise" publishes nothing, and raises when training is over; "warn"
            publishes and says so; "fallback" tries `schemes`.
        schemes: What to fall back to, in order: schemes, or "keep:8" for the 8 worst layers in 16 bit.
        log_per_layer: Whether figures of each weight, and pictures, go to the loggers; see `loggers.py`.
        log_survival_every_n_steps: Every so many optimizer steps log `daq/survival`, the share of the update
            that plain rounding would keep if training stopped now; see `survival.py`.
        push_to_hub: Repository on the Hub, "org/name", that the last export is uploaded to when training is
            over; if that fails, the export stays and the error is raised.

    With WeightAveraging, exports hold the averages, as ModelCheckpoint's files do. `schedule` says when it
    exports, under which name; `moment` what `should_export` is asked about.

    Raises:
        MisconfigurationException: Settings that contradict each other, a strategy whose weights cannot be
            read, or a base that does not fit the model; always before the first training step.

    Example:
        >>> import lightning.pytorch as L
        >>> from daq_lightning import DeltaAwareQuantization
        >>> export = DeltaAwareQuantization(dirpath="exports", scheme="FP8_BLOCK")
        >>> trainer = L.Trainer(max_steps=1000, callbacks=[export])
        >>> trainer.fit(module, data)  # doctest: +SKIP
        >>> print(export.exports[-1])  # doctest: +SKIP
        exports/step=1000
    """

    def __init__(
        self,
        dirpath: str = "exports",
        base: str = "auto",
        scheme: SchemeName = "auto",
        metric: Metric | None = None,
        alpha_range: tuple[float, float] | None = None,
        search: ScaleSearch | None = None,
        rounding: RoundingChoice = "auto",
        curvature: Source = "auto",
        curvature_memory: str | int = "2 GB",
        curvature_steps: int = 16,
        ignore: list[str] | None = None,
        module: str | None = None,
        scale_format: Literal["ue8m0"] | None = None,
        kv_cache: KVCache | None = None,
        budget: str | int | None = None,
        ladder: list[str] | None = None,
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
        missing_base: MissingBase = "error",
        max_shard_bytes: int = DEFAULT_SHARD_BYTES,
        validate: bool = False,
        quantize_activations: bool = True,
        max_degradation: dict[str, float] | None = None,
        on_failure: OnFailure = "raise",
        schemes: list[str] | None = None,
        log_per_layer: bool = False,
        log_survival_every_n_steps: int | None = None,
        push_to_hub: str | None = None,
    ) -> None:
        super().__init__()
        check.flag("export_on_exception", export_on_exception)
        self._export_on_exception = export_on_exception
        self.schedule = Schedule(
            export_on=export_on,
            which=which,
            every_n_train_steps=every_n_train_steps,
            every_n_epochs=every_n_epochs,
            keep_last=keep_last,
            filename=filename,
        )
        choices = make_settings(
            scheme, metric, alpha_range, search, ignore, scale_format, missing_base, max_shard_bytes,
            rounding, kv_cache, budget, ladder,
        )  # fmt: skip
        with check.as_misconfiguration():
            memory = memory_of(curvature_memory, "curvature_memory")
        collecting = Collecting(
            source=curvature,
            memory=memory,
            steps=curvature_steps,
            required=rounding == "curvature",
            at_end=self.schedule.only_at_end and not self._has_policy,
        )
        self._settings = RunSettings(
            dirpath=dirpath,
            base=base,
            module=module,
            reference=reference,
            merge_adapters=merge_adapters,
            parent=parent,
            chain_from=chain_from,
            collecting=None if choices.rounding == "nearest" else collecting,
            choices=choices,
            schedule=self.schedule,
            validation=ValidationSettings(
                validate=validate,
                quantize_activations=quantize_activations,
                max_degradation={} if max_degradation is None else max_degradation,
                on_failure=on_failure,
                schemes=() if schemes is None else schemes,
            ),
            logs=LogSettings(per_layer=log_per_layer, survival_every_n_steps=log_survival_every_n_steps),
            push_to_hub=push_to_hub,
        )

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses strategies and destinations that could not be exported, before anything is trained."""
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        self._place = [one for one in callbacks if isinstance(one, DeltaAwareQuantization)].index(self)
        if stage != "fit" or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        check_strategy(trainer, self._settings, alone=self._export_on_exception)
        check_savers(trainer, self.schedule)
        check_judging(trainer, self._settings)
        self._ranks = Ranks.all()
        self._ranks.first(lambda: check_place(self._settings.place("step=0"), write=True))
        place_after_averaging(trainer, self)

    @override
    @torch.no_grad()
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Plans the export and takes the base: whatever does not fit is known before the first step."""
        self._run, self._state, self._referenced = None, None, False
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self._published.begin(trainer)
        if not restores_late(trainer):
            self._prepare(trainer, pl_module)

    @override
    @torch.no_grad()
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prepares where weights come this late, as in sharded strategies, and notes where a run begins."""
        if restores_late(trainer) and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._prepare(trainer, pl_module)
        self._last_step = trainer.global_step

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Exports the best checkpoint and uploads, if that was asked for, then raises what went wrong."""
        run = self._run
        if run is not None and self.schedule.which == "best" and self._is_time("end", trainer):
            run.export_best()
        if run is not None and not self.exports and run.error is None:
            warn_of_nothing(type(self).__name__)
        failed = None if run is None else upload_last(self.exports, self._settings.push_to_hub, run.ranks)
        self._release(trainer)
        raise_at_end(failed if run is None or run.error is None else run.error)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Frees the base; exports only with `export_on_exception`, and never hides the error.

        Other ranks may not come here: nothing waits for them, and rank 0 exports alone.
        """
        run = self._run if self._export_on_exception and trainer.is_global_zero else None
        if run is not None and run.step != trainer.global_step:
            run.leave_alone()
            run.export(averaged_state(trainer))
        self._release(trainer)

    def _prepare(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._run = Run(
            trainer, pl_module, self._settings, self._published, self._states, self._place, self._ranks
        )
        self._state, self._states = self._run.state, []
        if self.schedule.export_on == "checkpoint":
            watch(trainer, before=self._before_save, after=self._after_save)

    def _release(self, trainer: Trainer) -> None:
        if self._run is not None:
            self._run.close(referenced=self._referenced)
        self._run = None
        unwatch(trainer)
        self._ranks.close()
        self._ranks = ALONE
