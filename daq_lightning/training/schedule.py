"""When a run exports, how its exports are called, and how many of them are kept."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from daq_lightning.training.claims import remove_own

ExportOn: TypeAlias = Literal["train_end", "checkpoint"]
Which: TypeAlias = Literal["last", "best"]


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
        check_choice("export_on", self.export_on, ("train_end", "checkpoint"))
        check_choice("which", self.which, ("last", "best"))
        for name in ("every_n_train_steps", "every_n_epochs", "keep_last"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise MisconfigurationException(f"{name}={value}: expected a number of at least 1, or None.")
        if self.export_on == "checkpoint" and self.which == "best":
            raise MisconfigurationException(
                "which='best' exports one checkpoint at the end of training; with export_on='checkpoint' every "
                "checkpoint is exported. Leave one of them out."
            )
        if self.filename == "" or Path(self.filename).name != self.filename:
            raise MisconfigurationException(
                f"filename={self.filename!r}: expected the name of a folder, such as '{{epoch}}-{{step}}'."
            )

    def due_after_step(self, step: int) -> bool:
        """Whether to export after this many optimizer steps."""
        return bool(self.every_n_train_steps and step and step % self.every_n_train_steps == 0)

    def due_after_epoch(self, epoch: int) -> bool:
        """Whether to export after the epoch of this number; the first is 0."""
        return bool(self.every_n_epochs and (epoch + 1) % self.every_n_epochs == 0)

    def due_at_end(self, which: Which) -> bool:
        """Whether to export these weights when training ends."""
        return self.export_on == "train_end" and self.which == which

    def name(self, trainer: Trainer) -> str:
        """The name of an export now, by ModelCheckpoint's own rules."""
        metrics = {name: value.detach().cpu() for name, value in trainer.callback_metrics.items()}
        for counter, value in (("epoch", trainer.current_epoch), ("step", trainer.global_step)):
            metrics[counter] = torch.tensor(value, dtype=torch.int64, device="cpu")
        formatter = ModelCheckpoint(filename=self.filename)
        return Path(formatter.format_checkpoint_name(metrics)).name.removesuffix(ModelCheckpoint.FILE_EXTENSION)


@dataclass
class Kept:
    """The folders that a run made, oldest first, and how many of them stay.

    Attributes:
        keep_last: How many exports to keep; None keeps all.
        exports: Exports.
        snapshots: Bases that were taken after exports; one more of them is kept, since the last is in use.
    """

    keep_last: int | None
    exports: list[Path] = field(default_factory=list)
    snapshots: list[Path] = field(default_factory=list)

    def forget_old(self) -> None:
        """Removes what is beyond `keep_last`."""
        if self.keep_last is None:
            return
        for folders, count in ((self.exports, self.keep_last), (self.snapshots, self.keep_last + 1)):
            while len(folders) > count:
                remove_own(folders.pop(0))


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises MisconfigurationException for a value that is none of the choices."""
    if value not in choices:
        raise MisconfigurationException(f"{name}={value!r}: expected one of {', '.join(map(repr, choices))}.")
