"""The Lightning callback: when to take the base, when to export. No arithmetic happens here.

    on_fit_start   find the model, plan the export, take the base      (errors before the first step)
    on_train_end   search and write `dirpath/step=<n>/`                 (the last hook with the weights on the device)
    on_fit_end     raise what went wrong there                          (after Lightning has saved its own checkpoints)

Parameters, random numbers, gradients and modes of the model are only read: training is bit-identical with and without
the callback.

Source: lightning 2.6 `Trainer.fit` (order of hooks).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from daq_lightning.checkpoint.layouts import Scheme
from daq_lightning.checkpoint.reader import Checkpoint
from daq_lightning.checkpoint.writer import check_destination
from daq_lightning.export import ExportSettings, Source, export, make_plan, match_base
from daq_lightning.metrics import delta_metrics
from daq_lightning.numerics.objectives import Metric
from daq_lightning.numerics.search import ScaleSearch
from daq_lightning.report import ExportReport
from daq_lightning.training.base import (
    Base,
    base_from_memory,
    check_resumed,
    copy_to_memory,
    open_folder,
    open_resumed,
    read_lightning_checkpoint,
    take_snapshot,
)
from daq_lightning.training.model import LiveModel, find_model, owners_of_files


class DeltaAwareQuantization(Callback):
    """Exports the trained model as an FP8 checkpoint that keeps what training changed.

    Args:
        dirpath: Folder of the exports; each is `dirpath/step=<n>/`.
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

    Attributes:
        metrics: Figures of the last export, also logged to every logger of the Trainer.
        report: The `ExportReport` of the last export.

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
    ) -> None:
        super().__init__()
        if "://" in str(dirpath):
            raise MisconfigurationException(
                f"dirpath={dirpath!r}: exports are renamed into place, which needs a local file system. Export to a "
                "local folder and upload it afterwards."
            )
        self.dirpath, self.base, self.module = str(dirpath), str(base), module
        self._choices = _make_settings(scheme, metric, alpha_range, search, ignore, scale_format)
        self.metrics: dict[str, float] = {}
        self.report: ExportReport | None = None
        self._base: Base | None = None
        self._saved_base: dict[str, Any] | None = None
        self._error: Exception | None = None

    @property
    def state_key(self) -> str:
        """Differs between two callbacks of different settings, so that both keep their state."""
        return self._generate_state_key(dirpath=self.dirpath, base=self.base, settings=repr(self._choices))

    def state_dict(self) -> dict[str, Any]:
        """The reference to the base, in primitives."""
        return {} if self._base is None else {"base": self._base.state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps the reference; it is resolved in `on_fit_start`."""
        self._saved_base = state_dict.get("base")

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

    @torch.no_grad()
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Plans the export and takes the base, so that whatever does not fit is known before the first step."""
        self._error, self._base = None, None
        if trainer.fast_dev_run or not trainer.is_global_zero:  # type: ignore[attr-defined]
            return
        model = self._live_model(pl_module)
        source = self._source(trainer, model)
        plan = make_plan(source, self._choices)
        base = self._take_base(trainer, pl_module, model, [tensor.spec.name for tensor in plan.quantized])
        match_base(plan, base.weights, source, self._choices)
        self._base = base

    @torch.no_grad()
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Exports. An error is kept until Lightning has saved its own checkpoints."""
        if self._base is None:
            return
        try:
            self._export(trainer, pl_module, Path(self.dirpath) / f"step={trainer.global_step}")
        except Exception as error:
            self._error = error

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raises what went wrong in the export."""
        error, self._error, self._base = self._error, None, None
        if error is not None:
            if sys.version_info >= (3, 11):
                error.add_note("Training itself has finished: the checkpoints that Lightning wrote are complete.")
            raise error

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Frees the base. Nothing is exported from a run that failed."""
        self._base = None

    def _live_model(self, pl_module: LightningModule) -> LiveModel:
        return LiveModel(find_model(pl_module, self.module)[1])

    def _source(self, trainer: Trainer, model: LiveModel) -> Source:
        return Source(
            weights=model.weights,
            specs=model.specs,
            keys=model.keys,
            architecture=model.architecture,
            config=model.config(),
            copy_files=lambda folder: model.copy_files(folder, *owners_of_files(trainer)),
        )

    def _take_base(self, trainer: Trainer, pl_module: LightningModule, model: LiveModel, names: list[str]) -> Base:
        """The base that the settings ask for; for a resumed run, checked against the one it started from."""
        folder = Path(self.dirpath).absolute() / "base"
        resumed = trainer.ckpt_path is not None
        if self.base in ("auto", "snapshot", "memory"):
            if resumed:
                if self._saved_base is None:
                    raise MisconfigurationException(
                        f"The run resumes from {trainer.ckpt_path}, whose callback state holds no base: the weights "
                        "before training are not at hand any more. Pass base='<folder>' with the model that the run "
                        "was started from."
                    )
                base = open_resumed(self._saved_base, folder.parent)
            elif self.base == "memory":
                base = copy_to_memory(model.weights, names)
            else:
                base = take_snapshot(model.weights, names, folder)
        elif self.base.endswith(".ckpt"):
            name, _ = find_model(pl_module, self.module)
            tensors = read_lightning_checkpoint(self.base, f"{name}." if name else "")
            base = base_from_memory("ckpt", model.view(tensors), names)
        else:
            checkpoint = Checkpoint(self.base)
            by_key = {key: name for name, key in model.architecture.keys_of(checkpoint).items()}
            aliases = {name: by_key.get(model.keys[name], name) for name in names if name not in checkpoint}
            base = open_folder(self.base, names, aliases)
        if resumed and self._saved_base is not None:
            check_resumed(self._saved_base, base)
        return base

    def _export(self, trainer: Trainer, pl_module: LightningModule, out: Path) -> None:
        assert self._base is not None
        version = 0
        free = out
        while free.exists():
            version += 1
            free = out.with_name(f"{out.name}-v{version}")
        bar = getattr(trainer.progress_bar_callback, "is_enabled", False)
        source = self._source(trainer, self._live_model(pl_module))
        self.report = export(source, self._base.weights, free, self._choices, progress=bar)
        self._publish_metrics(trainer, self.report)
        rank_zero_info(self.report.summary())

    def _publish_metrics(self, trainer: Trainer, report: ExportReport) -> None:
        """The metrics of the written and of plain absmax scales: to the attribute, the Trainer and its loggers."""
        self.metrics = {}
        for side, prefix in (("searched", "daq/"), ("absmax", "daq/absmax_")):
            collection = delta_metrics(prefix=prefix)
            collection.update(report.totals(side))  # type: ignore[arg-type]
            self.metrics |= {name: float(value) for name, value in collection.compute().items()}
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in self.metrics.items()})
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
