"""The part of a callback that lets its run observe batches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer
from typing_extensions import override

if TYPE_CHECKING:
    from daq_lightning.training.run import Run


class CollectsCurvature(Callback):
    """Tells the collector of a run where batches begin and end."""

    _run: Run | None

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Observes the layers in this batch, if it is one of those."""
        if self._run is not None and self._run.collector is not None:
            with self._run.collector.giving_up():
                self._run.collector.begin_batch(trainer, batch_idx)

    @override
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Reads gradients, which are whole, unscaled and not clipped now."""
        if self._run is not None and self._run.collector is not None:
            with self._run.collector.giving_up():
                self._run.collector.before_step()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Leaves the layers as they were."""
        if self._run is not None and self._run.collector is not None:
            with self._run.collector.giving_up():
                self._run.collector.end_batch()
