"""The part of a callback that knows when to export, and is asked whether.

step        after an optimizer step
epoch       after an epoch
checkpoint  after each file of ModelCheckpoint, the same weights
end         when training is over
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from daq_lightning.export.ranks import ALONE, Ranks
from daq_lightning.training.collects import CollectsCurvature
from daq_lightning.training.other_callbacks import averaged_state
from daq_lightning.training.saves import saved_by_model_checkpoint
from daq_lightning.training.schedule import Moment, Schedule

if TYPE_CHECKING:
    from daq_lightning.training.run import Run


class ExportsWhenDue(CollectsCurvature):
    """Tells a run when to export.

    Attributes:
        schedule: When exports are due.
        moment: What `should_export` is asked about.
    """

    schedule: Schedule

    def __init__(self) -> None:
        super().__init__()
        self._run: Run | None = None
        self._ranks: Ranks = ALONE
        self._last_step = 0
        self.moment: Moment = "end"

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Takes hooks away, logs the survival, and exports every `every_n_train_steps` optimizer steps."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if trainer.global_step != self._last_step:  # not in between, with accumulated gradients
            self._last_step = trainer.global_step
            if self._run is not None and self._run.survival is not None:
                self._run.survival.after_step(trainer)
            self._consider("step", trainer)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Exports every `every_n_epochs` epochs."""
        self._consider("epoch", trainer)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Exports the last weights."""
        if self.schedule.which == "last":
            self._consider("end", trainer)

    def should_export(self, trainer: Trainer) -> bool:
        """Whether to export now: a policy that subclasses may override. By default, what the arguments say.

        It is asked after every optimizer step (`self.moment` is "step"), every epoch ("epoch"), every file of
        ModelCheckpoint ("checkpoint", with export_on="checkpoint"), and training ("end"); not again at a step
        whose weights are exported already. Of several ranks the first decides, and must not wait for others.

        Example:
            >>> from daq_lightning import DeltaAwareQuantization
            >>> class WhenItImproves(DeltaAwareQuantization):
            ...     def should_export(self, trainer):
            ...         return trainer.callback_metrics.get("val_loss", 9.0) < 2.0
        """
        return self.schedule.due(self.moment, trainer)

    @property
    def _has_policy(self) -> bool:
        return type(self).should_export is not ExportsWhenDue.should_export

    def _is_time(self, moment: Moment, trainer: Trainer) -> bool:
        self.moment = moment
        if self._run is None or self._run.step == trainer.global_step:
            return False
        if not self._has_policy:  # the same on all ranks
            return self.should_export(trainer)
        return self._ranks.first(lambda: self.should_export(trainer))

    def _consider(self, moment: Moment, trainer: Trainer) -> None:
        if self._run is not None and self._is_time(moment, trainer):
            self._run.export(averaged_state(trainer))

    def _before_save(self, trainer: Trainer, path: Path, content: dict[str, Any]) -> None:
        if self._run is not None and saved_by_model_checkpoint(trainer, path):
            self._run.retake_base(content, self.state_key)

    def _after_save(self, trainer: Trainer, path: Path, content: dict[str, Any]) -> None:
        """Exports what was saved; not again for the `last.ckpt` beside it."""
        if saved_by_model_checkpoint(trainer, path) and self._is_time("checkpoint", trainer):
            assert self._run is not None
            self._run.export(content["state_dict"], checkpoint=path)
