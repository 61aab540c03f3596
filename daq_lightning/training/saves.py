"""Seeing every checkpoint that Lightning saves, at the moment it is saved.

`Callback.on_save_checkpoint` is not called with `save_weights_only=True`, and a callback's other hooks run
before those of `ModelCheckpoint`. The strategy's `CheckpointIO` sees every save with the very tensors that go
into the file (averaged ones, for example), so it is wrapped while a fit runs.

Source: lightning 2.6 `Strategy.save_checkpoint`, which calls the `CheckpointIO` on rank 0.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning.pytorch import Trainer
from typing_extensions import override

Watcher = Callable[[Path, dict[str, Any]], None]


class WatchedCheckpointIO(CheckpointIO):
    """Passes everything on to another `CheckpointIO` and tells watchers of each save, before and after it.

    Args:
        inner: The `CheckpointIO` that does the work.
        before: Called with path and content before the file is written; may add to the callbacks' state.
        after: Called with the same when the file is complete.
    """

    def __init__(self, inner: CheckpointIO, before: Watcher, after: Watcher) -> None:
        super().__init__()
        self.inner, self._before, self._after = inner, before, after

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Saves, with the watchers around it."""
        self._before(Path(path), checkpoint)
        self.inner.save_checkpoint(checkpoint, path, storage_options=storage_options)
        self._after(Path(path), checkpoint)

    @override
    def load_checkpoint(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Passed on."""
        return self.inner.load_checkpoint(*args, **kwargs)

    @override
    def remove_checkpoint(self, path: Any) -> None:
        """Passed on."""
        self.inner.remove_checkpoint(path)

    @override
    def teardown(self) -> None:
        """Passed on."""
        self.inner.teardown()


def watch(trainer: Trainer, *, before: Watcher, after: Watcher) -> None:
    """Tells watchers of each save of a Trainer, until `unwatch`; see `WatchedCheckpointIO`."""
    trainer.strategy.checkpoint_io = WatchedCheckpointIO(trainer.strategy.checkpoint_io, before, after)


def unwatch(trainer: Trainer) -> None:
    """Ends `watch`."""
    if isinstance(trainer.strategy.checkpoint_io, WatchedCheckpointIO):
        trainer.strategy.checkpoint_io = trainer.strategy.checkpoint_io.inner


def saved_by_model_checkpoint(trainer: Trainer, path: Path) -> bool:
    """Whether a file belongs to a `ModelCheckpoint`, rather than to a tuner that saves and restores."""
    dirpaths = [getattr(saver, "dirpath", None) for saver in trainer.checkpoint_callbacks]
    folders = {Path(dirpath).absolute() for dirpath in dirpaths if dirpath}
    return path.absolute().parent in folders
