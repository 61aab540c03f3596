"""When a run exports, how its exports are called, and how many of them are kept."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from daq_lightning.checkpoint.remote import Remote
from daq_lightning.training import settings_check as check
from daq_lightning.training.claims import remove_own

ExportOn: TypeAlias = Literal["train_end", "checkpoint"]
Which: TypeAlias = Literal["last", "best"]
Moment: TypeAlias = Literal["step", "epoch", "checkpoint", "end"]
"""After an optimizer step, an epoch, a file of ModelCheckpoint, and training."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """When to export; checked when it is made. The fields are those of `DeltaAwareQuantization`.

    Raises:
        MisconfigurationException: Settings that contradict each other.
    """

    export_on: ExportOn
    which: Which
    every_n_train_steps: int | None
    every_n_epochs: int | None
    keep_last: int | None
    filename: str

    def __post_init__(self) -> None:
        check.choice("export_on", self.export_on, ("train_end", "checkpoint"))
        check.choice("which", self.which, ("last", "best"))
        for name in ("every_n_train_steps", "every_n_epochs", "keep_last"):
            check.count(name, getattr(self, name))
        if self.export_on == "checkpoint" and self.which == "best":
            raise MisconfigurationException(
                "which='best' exports one checkpoint at the end of training; with export_on='checkpoint' "
                "every checkpoint is exported. Leave one of them out."
            )
        check_filename(self.filename)

    @property
    def only_at_end(self) -> bool:
        """Whether all exports are made after the last step."""
        return self.export_on == "train_end" and not (self.every_n_train_steps or self.every_n_epochs)

    def due(self, moment: Moment, trainer: Trainer) -> bool:
        """Whether to export at this moment of a run."""
        if moment == "step":
            return bool(self.every_n_train_steps) and trainer.global_step % self.every_n_train_steps == 0
        if moment == "epoch":
            return bool(self.every_n_epochs) and (trainer.current_epoch + 1) % self.every_n_epochs == 0
        return self.export_on == ("checkpoint" if moment == "checkpoint" else "train_end")

    def name(self, trainer: Trainer) -> str:
        """The name of an export now."""
        metrics = {name: value.detach().cpu() for name, value in trainer.callback_metrics.items()}
        for counter, value in (("epoch", trainer.current_epoch), ("step", trainer.global_step)):
            metrics[counter] = torch.tensor(value, dtype=torch.int64, device="cpu")
        return format_name(self.filename, metrics)


def format_name(template: str, metrics: Mapping[str, Tensor]) -> str:
    """The name of a folder, by ModelCheckpoint's rules but for two.

    A slash in the name of a metric becomes an underscore, where ModelCheckpoint makes a folder. A metric that
    was not logged yet is 0.0, a number like any metric, where ModelCheckpoint puts the integer 0, which ".2"
    cannot format.

    Args:
        template: Such as "{epoch}-{step}-{val/loss:.2f}", which becomes "epoch=1-step=20-val_loss=0.12".
        metrics: Name -> scalar.
    """
    zero = torch.tensor(0.0, dtype=torch.float32, device="cpu")
    missing = dict.fromkeys(re.findall(r"\{(.*?)[:}]", template), zero)
    name = ModelCheckpoint(filename=template).format_checkpoint_name(missing | dict(metrics))
    return name.removesuffix(ModelCheckpoint.FILE_EXTENSION).replace("/", "_")


def check_filename(template: str) -> None:
    """Raises MisconfigurationException for what cannot be formatted, or would be no name of a folder."""
    expected = "the name of a folder, such as '{epoch}-{step}'"
    check.require(
        isinstance(template, str) and template not in ("", ".", ".."), "filename", template, expected
    )
    check.require("/" not in re.sub(r"\{.*?\}", "", template), "filename", template, expected)
    try:
        zero = torch.tensor(0, dtype=torch.int64, device="cpu")
        format_name(template, {"epoch": zero, "step": zero})
    except (ValueError, LookupError, AttributeError, TypeError) as error:
        raise MisconfigurationException(
            f"filename={template!r}: cannot be formatted: {error}. Expected names in braces, each with a "
            "number format or without one, such as '{epoch}-{step}-{val_loss:.2f}'; metrics are numbers "
            "with a fraction."
        ) from error


@dataclass
class Kept:
    """The folders that a run made, oldest first, and how many of them stay.

    Attributes:
        keep_last: How many exports to keep; None keeps all.
        exports: Exports; a URL as text.
        snapshots: Bases that were taken after exports; one more of them is kept, since the last is in use.
    """

    keep_last: int | None
    exports: list[Path | str] = field(default_factory=list)
    snapshots: list[Path] = field(default_factory=list)

    def forget_old(self, *, remove: bool = True) -> None:
        """Removes what is beyond `keep_last`.

        Args:
            remove: Whether this process removes the folders too, or another one does.
        """
        if self.keep_last is None:
            return
        for folders, count in ((self.exports, self.keep_last), (self.snapshots, self.keep_last + 1)):
            while len(folders) > count:
                folder = folders.pop(0)
                if remove:
                    _remove(folder)


def _remove(folder: Path | str) -> None:
    if isinstance(folder, str):
        Remote(folder).remove()
    else:
        remove_own(folder)
