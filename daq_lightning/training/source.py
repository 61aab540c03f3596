"""A model in memory as the source of an export."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Trainer

from daq_lightning.checkpoint.reader import Checkpoint
from daq_lightning.export.kept import KeptFormat
from daq_lightning.export.source import Source
from daq_lightning.model.live import LiveModel

if TYPE_CHECKING:
    from daq_lightning.training.run_settings import RunSettings


def source_of(trainer: Trainer, model: LiveModel) -> Source:
    """Weights, names, config and the files beside them, tokenizers of module and data module too.

    Args:
        trainer: Whose fit it is.
        model: The model in its module.
    """

    return live_source(model, trainer.lightning_module, getattr(trainer, "datamodule", None))


def live_source(model: LiveModel, *owners: object) -> Source:
    """A model in memory as the source of an export.

    Args:
        model: The model in its module.
        owners: Objects whose tokenizer or processor is saved, see `LiveModel.copy_files`.
    """
    return Source(
        weights=model.weights,
        specs=model.specs,
        outline=model.architecture.outline(model.keys),
        keys_of=model.architecture.keys_of,
        config=model.config(),
        copy_files=lambda folder: model.copy_files(folder, *owners),
        low_rank=model.adapters is not None,
    )


def training_of(trainer: Trainer, checkpoint: Path | None) -> dict[str, Any]:
    """Where in a run weights come from, for the manifest."""
    where: dict[str, Any] = {"global_step": trainer.global_step, "epoch": trainer.current_epoch}
    return where if checkpoint is None else where | {"checkpoint": str(checkpoint.absolute())}


def kept_of(settings: RunSettings) -> KeptFormat | None:
    """The format of the base, where a run keeps that.

    Raises:
        CheckpointError: The base is no quantized folder.
    """
    if settings.choices.scheme != "keep":
        return None
    folder = Path(settings.base)
    return KeptFormat.of(Checkpoint(folder) if folder.is_dir() else {})
