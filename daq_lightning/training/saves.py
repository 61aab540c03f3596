"""Seeing every checkpoint that Lightning saves, at the moment it is saved, on every rank.

`Callback.on_save_checkpoint` is not called with `save_weights_only=True`, and a callback's other hooks run
before those of `ModelCheckpoint`. The strategy's `save_checkpoint` sees every save with the very tensors that
go into the file (averaged ones, for example), and is called on all ranks, whichever of them write; so it is
wrapped while a fit runs.

Source: lightning 2.6 `Trainer.save_checkpoint`, `Strategy.save_checkpoint`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

Watcher = Callable[[Trainer, Path, dict[str, Any]], None]


def watch(trainer: Trainer, *, before: Watcher, after: Watcher) -> None:
    """Tells watchers of each save of a Trainer, until `unwatch`.

    Args:
        trainer: The Trainer.
        before: Called with Trainer, path and content before anything is written; may add to them.
        after: Called with the same when the strategy is done with it.
    """
    original = trainer.strategy.save_checkpoint

    def save_checkpoint(checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        before(trainer, Path(filepath), checkpoint)
        content = dict(checkpoint)  # strategies that shard take parts out
        original(checkpoint, filepath, storage_options=storage_options)
        after(trainer, Path(filepath), content)

    save_checkpoint.original = original  # type: ignore[attr-defined]
    trainer.strategy.save_checkpoint = save_checkpoint  # type: ignore[method-assign]


def unwatch(trainer: Trainer) -> None:
    """Ends the last `watch`."""
    watched = vars(trainer.strategy).pop("save_checkpoint", None)
    if watched is not None and "original" in vars(watched) and "original" in vars(watched.original):
        trainer.strategy.save_checkpoint = watched.original  # type: ignore[method-assign]


def saved_by_model_checkpoint(trainer: Trainer, path: Path) -> bool:
    """Whether a file belongs to a `ModelCheckpoint`, rather than to a tuner that saves and restores."""
    dirpaths = [getattr(saver, "dirpath", None) for saver in trainer.checkpoint_callbacks]
    folders = {Path(dirpath).absolute() for dirpath in dirpaths if dirpath}
    return path.absolute().parent in folders
