"""How a run collects the curvature of its weights: the arguments, and whether it can be collected."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, Timer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from daq_lightning.training import settings_check as check
from daq_lightning.training.strategies import why_not_observed

if TYPE_CHECKING:
    from daq_lightning.training.run_settings import RunSettings

Source: TypeAlias = Literal["auto", "activations", "gradients", "validation"]


@dataclass(frozen=True, kw_only=True)
class Collecting:
    """How to collect; the fields are arguments of `DeltaAwareQuantization`, checked when it is made.

    Attributes:
        source: What is collected: "activations", and the gradients at the outputs of layers; "gradients" of
            the weights at optimizer steps, which a compiled model has too; "validation" is the activations
            of validation batches, at the export; "auto" is "activations", and "validation" for what is
            missing then.
        memory: Bytes of sums that are held at a time, > 0; once more while sums are taken anew.
        steps: Batches that each layer is observed for, >= 1.
        required: Whether a run that cannot collect is an error, or is exported without.
        at_end: Whether only the last weights are exported.
    """

    source: Source
    memory: int
    steps: int
    required: bool
    at_end: bool

    def __post_init__(self) -> None:
        check.choice("curvature", self.source, get_args(Source))
        check.count("curvature_steps", self.steps, optional=False)


def settled(settings: RunSettings, trainer: Trainer) -> RunSettings:
    """The settings of a run that can or cannot be observed: codes along a curvature, or nearest.

    Raises:
        MisconfigurationException: It cannot, and was required to.
    """
    if settings.collecting is None:
        return settings
    source: Source = settings.collecting.source
    reason = _why_not(settings, trainer, source)
    if reason and source == "auto" and not _why_not(settings, trainer, "validation"):
        rank_zero_info(f"Curvature is collected from validation, not in training: {reason}.")
        source, reason = "validation", ""
    if not reason:
        return dataclasses.replace(
            settings,
            choices=dataclasses.replace(settings.choices, rounding="curvature"),
            collecting=dataclasses.replace(settings.collecting, source=source),
        )
    if settings.collecting.required:
        raise MisconfigurationException(
            f"rounding='curvature' cannot collect it here: {reason}. Leave it out, or use rounding='nearest'."
        )
    rank_zero_info(f"Codes are rounded to nearest, not along a curvature: {reason}.")
    choices = dataclasses.replace(settings.choices, rounding="nearest")
    return dataclasses.replace(settings, choices=choices, collecting=None)


def _why_not(settings: RunSettings, trainer: Trainer, source: Source) -> str:
    """Why a curvature cannot be collected from a source, in a few words; "" if it can."""
    hooks = source != "gradients"
    if source == "validation" and not trainer.enable_validation:
        return "curvature='validation' needs a validation_step, validation dataloaders and limit_val_batches"
    return why_not_observed(trainer, hooks=hooks, compiled=source == "validation")


def batches_left(trainer: Trainer, batch_idx: int) -> int | None:
    """How many batches a run has left with this one, or None if it may end earlier or is not known to end."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    if any(isinstance(callback, (EarlyStopping, Timer)) for callback in callbacks):
        return None
    per_epoch, ends = trainer.num_training_batches, []
    if trainer.max_epochs not in (None, -1) and math.isfinite(per_epoch):
        ends.append((trainer.max_epochs - trainer.current_epoch) * int(per_epoch) - batch_idx)
    if trainer.max_steps not in (None, -1):
        if not trainer.lightning_module.automatic_optimization:  # which steps as often as it likes
            return None
        accumulated = trainer.accumulate_grad_batches
        ends.append((trainer.max_steps - trainer.global_step) * accumulated - batch_idx % accumulated)
    return min(ends, default=None)
