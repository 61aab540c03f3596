"""What the exports of a run gave, for everyone who asks: metrics, report, folders.

All ranks have the report of an export, and the same figures. Others want to know them too:

| who | how | when |
| --- | --- | --- |
| `trainer.callback_metrics` | every rank tells its own | with each export |
| loggers | rank 0 tells them | with each export |
| the process that started the ranks (`ddp_spawn`) | a file in the folder for temporary files | when it asks |

A process that starts ranks hands them copies of the callbacks, runs none of the hooks, and gets nothing back
but the metrics of the Trainer. So the name of the file is made with the callback, and goes to the ranks
inside it.

Source: lightning 2.6 `_MultiProcessingLauncher._recover_results_in_main_process`.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

from lightning.pytorch import Trainer
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from daq_lightning.checkpoint.folder import REPORT, read_json, replace_json
from daq_lightning.checkpoint.remote import Remote
from daq_lightning.checkpoint.urls import is_url
from daq_lightning.export.timings import Timings
from daq_lightning.metrics import delta_metrics
from daq_lightning.report.figures import ExportReport
from daq_lightning.report.rounding import predicted_loss
from daq_lightning.training.loggers import share


def _new_record() -> Path:
    return Path(tempfile.gettempdir()) / f"daq-lightning-{uuid4().hex}.json"  # a name that nobody can foresee


@dataclass
class Published:
    """Metrics and report of the last export, and the folders of all that are kept.

    Attributes:
        exports: Folders, oldest first; of those that were uploaded, the URL as text.
        metrics: Figures of the last export, as they are: where nothing changed some are NaN, which loggers
            and the Trainer are not told.
        report: Report of the last export.
        record: The file that tells the process that started the ranks.
        in_worker: Whether this process is such a rank.
    """

    exports: list[Path | str] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    report: ExportReport | None = None
    record: Path = field(default_factory=_new_record, compare=False)
    in_worker: bool = field(default=False, compare=False)

    def begin(self, trainer: Trainer) -> None:
        """A fit begins, on every rank."""
        self.exports = []
        self.in_worker = isinstance(trainer.strategy.launcher, _MultiProcessingLauncher)

    def publish(
        self, trainer: Trainer, report: ExportReport, exports: list[Path | str], timings: Timings
    ) -> None:
        """Tells of an export; on every rank.

        Args:
            trainer: Whose metrics and loggers are told.
            report: Of the export.
            exports: All that are kept; the list may change later.
            timings: What it cost.
        """
        self.report, self.exports, self.metrics = report, exports, metrics_of(report) | timings.metrics()
        warn_if_unchanged(report)
        share(trainer, self.metrics)
        if self.in_worker and trainer.is_global_zero:
            places = [path if isinstance(path, str) else str(path.absolute()) for path in exports]
            content = {"exports": places, "metrics": self.metrics}
            replace_json(self.record, content)

    def known(self) -> Published:
        """Itself, in a process that started ranks with what they left for it."""
        if not self.in_worker and self.record.is_file():
            content = read_json(self.record)
            self.record.unlink()
            # those that `keep_last` removed after the last message are left out
            places = [place if is_url(place) else Path(place) for place in content["exports"]]
            self.exports = [place for place in places if isinstance(place, str) or place.is_dir()]
            self.metrics = content["metrics"]
            self.report = _report_of(self.exports[-1]) if self.exports else None
        return self


class PublishedExports:
    """What users read of a callback that exports.

    The same on every rank, and after the fit in the process that started the ranks.
    """

    def __init__(self) -> None:
        super().__init__()
        self._published = Published()

    @property
    def metrics(self) -> dict[str, float]:
        """Figures and cost of the last export, also logged to every logger of the Trainer."""
        return self._published.known().metrics

    @property
    def report(self) -> ExportReport | None:
        """The report of the last export."""
        return self._published.known().report

    @property
    def exports(self) -> list[Any]:
        """Folders of the exports of this run that are kept, oldest first; of uploaded ones, the URLs."""
        return self._published.known().exports


def _report_of(export: Path | str) -> ExportReport:
    if isinstance(export, Path):
        return ExportReport.load(export)
    with tempfile.TemporaryDirectory() as folder:
        Remote(export).fetch([REPORT], Path(folder))
        return dataclasses.replace(ExportReport.load(folder), path=export)


def metrics_of(report: ExportReport) -> dict[str, float]:
    """The metrics of what is written ("daq/...") and of plain absmax scales ("daq/absmax_..."), and those of
    validation with the exported weights and with the unquantized ones ("daq/unquantized_...").

    "daq/predicted_loss" is that of codes along a curvature, over that of nearest rounding.
    """
    metrics: dict[str, float] = {}
    for side, prefix in (("searched", "daq/"), ("absmax", "daq/absmax_")):
        collection = delta_metrics(prefix=prefix, sync=False)  # each rank has the sums of all
        collection.update(report.totals(side))  # type: ignore[arg-type]
        metrics |= {name: float(value) for name, value in collection.compute().items()}
    for name, values in report.validation.items():
        metrics[f"daq/{name}"] = values["served"]
        metrics[f"daq/unquantized_{name}"] = values["unquantized"]
    if any(tensor.rounding is not None for tensor in report.tensors):
        metrics["daq/predicted_loss"] = predicted_loss(tensor.rounding for tensor in report.tensors)
    return metrics


def warn_if_unchanged(report: ExportReport) -> None:
    """Says what it means if every weight equals its base: nothing to keep, and figures that are NaN."""
    compared = [tensor for tensor in report.tensors if not tensor.without_base]
    if compared and not any(tensor.searched.n_changed for tensor in compared):
        rank_zero_warn(
            f"No weight changed: each of the {len(compared)} quantized weights equals the base, so there is "
            "no update to preserve, and its figures are NaN. Is the base the model before training, and was "
            "anything trained (requires_grad, learning rate)?"
        )


def warn_of_nothing(name: str) -> None:
    """Says that a run ended and a callback of this name exported nothing, and why that may be."""
    rank_zero_warn(
        f"{name} exported nothing: no export was due before training ended (no training steps, as in a "
        "resumed run that was finished; no file of ModelCheckpoint; should_export said no)."
    )


def raise_at_end(error: Exception | None) -> None:
    """Raises what went wrong in an export, after all that Lightning does at the end of training."""
    if error is None:
        return
    if sys.version_info >= (3, 11):
        error.add_note("Training itself has finished: the checkpoints that Lightning wrote are complete.")
    raise error
