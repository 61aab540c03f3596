"""What other callbacks of a Trainer mean for an export: those that save checkpoints, and those that
average."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint, WeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

if TYPE_CHECKING:
    from daq_lightning.training.schedule import Schedule


def best_saver(trainer: Trainer) -> ModelCheckpoint | None:
    """The first ModelCheckpoint that knows which of its files is the best: one with a monitor."""
    savers = [saver for saver in trainer.checkpoint_callbacks if isinstance(saver, ModelCheckpoint)]
    return next((saver for saver in savers if saver.monitor is not None and saver.save_top_k != 0), None)


def best_path(trainer: Trainer) -> str:
    """The file that it holds for the best.

    Raises:
        MisconfigurationException: It saved none.
    """
    saver = best_saver(trainer)
    path = "" if saver is None else saver.best_model_path
    if not path:
        raise MisconfigurationException(
            "which='best' exports the best checkpoint of ModelCheckpoint, but it saved none in this run: "
            "check how often it saves, or use which='last'."
        )
    return path


def saves_on_exception(trainer: Trainer) -> bool:
    """Whether a checkpoint is saved when a run fails."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return any(isinstance(other, OnExceptionCheckpoint) for other in callbacks)


def check_savers(trainer: Trainer, schedule: Schedule) -> None:
    """Raises MisconfigurationException if the schedule waits for a checkpoint that nobody will save."""
    # a checkpoint of a run that failed is none of a run
    savers = [saver for saver in trainer.checkpoint_callbacks if not isinstance(saver, OnExceptionCheckpoint)]
    found = "there is no ModelCheckpoint"
    if savers:
        settings = (
            f"{type(saver).__name__}(monitor={getattr(saver, 'monitor', None)!r}, "
            f"save_top_k={getattr(saver, 'save_top_k', None)})"
            for saver in savers
        )
        found = f"there is only {', '.join(settings)}"
    if schedule.which == "best" and best_saver(trainer) is None:
        raise MisconfigurationException(
            "which='best' exports the best checkpoint of a ModelCheckpoint that has a monitor and keeps "
            f"files, but {found}. Add one, such as ModelCheckpoint(monitor='val_loss'), or use which='last'."
        )
    saving = [
        saver for saver in savers if getattr(saver, "save_top_k", 1) != 0 or getattr(saver, "save_last", None)
    ]
    if schedule.export_on == "checkpoint" and not saving:
        raise MisconfigurationException(
            f"export_on='checkpoint' exports what ModelCheckpoint saves, but {found}, which saves nothing. "
            "Add one, such as ModelCheckpoint(every_n_train_steps=1000), or use export_on='train_end'."
        )


def place_after_averaging(trainer: Trainer, callback: Callback) -> None:
    """Moves a callback behind the last WeightAveraging, so that it sees the average of each step."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    averaging = [other for other in callbacks if isinstance(other, WeightAveraging)]
    if averaging and callbacks.index(averaging[-1]) > callbacks.index(callback):
        others = [other for other in callbacks if other is not callback]
        place = others.index(averaging[-1]) + 1
        trainer.callbacks = [*others[:place], callback, *others[place:]]  # type: ignore[attr-defined]


def averaged_state(trainer: Trainer) -> dict[str, Tensor] | None:
    """The averaged weights under the names of the LightningModule, as a checkpoint would hold them; not a
    copy.

    None if there are none, and in validation: WeightAveraging swaps the weights then, and the module has the
    average.
    """
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    averaging = [other for other in callbacks if isinstance(other, WeightAveraging)]
    if not averaging or trainer.validating:
        return None
    model = averaging[-1]._average_model  # it has no public name
    if model is None:
        return None
    prefix = "module."
    state = model.state_dict()
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
