"""The curvature of weights from batches of validation, when training is over: for what a run did not observe.

    loss   what validation_step returns: a scalar with a gradient, or a dict with one as "loss"
           else of the model inside: the loss that it returns, or cross entropy of its logits and the labels

A validation of the Trainer runs with gradients as far as the outputs of the layers that are observed; those
of weights are not computed. Weights, gradients, optimizer, buffers, modes, random numbers and the Trainer's
books are as before when it ends, also by an exception. Layers take turns as in training, batch after batch,
and the batches come again where they are fewer than the turns need.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loops.evaluation_loop import _EvaluationLoop
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from daq_lightning.model.observer import Layer, Observer, Sums
from daq_lightning.model.swap import put_back
from daq_lightning.training.validate import on_device, run_validation

if TYPE_CHECKING:
    Open = Callable[[Sequence[Layer], Sums, float], Observer]

_ADVICE = "return the loss from validation_step, as training_step does, or use curvature='activations'."


def observe_validation(
    trainer: Trainer,
    model: nn.Module,
    parts: Mapping[int, Sequence[Layer]],
    steps: int,
    *,
    observe: Open,
    keep: Callable[[int, Sums], None],
) -> int:
    """Sums over batches of validation; the model and its training are as before when it ends. A collective.

    Args:
        trainer: In a fit, between two steps or after the last.
        model: Inside of the LightningModule.
        parts: Number of a part -> its layers.
        steps: Batches that each part is observed for; as many as there are if they are fewer.
        observe: Opens an observer.
        keep: Is given the sums of each part.

    Returns:
        How many batches were seen.

    Raises:
        ValueError: A validation without a loss or without batches.
        Whatever the module raises.
    """
    watch = _Watch(model, parts, steps, observe, keep)
    blocked = contextlib.nullcontext()
    if isinstance(trainer.strategy, ParallelStrategy):  # no rank adds up gradients
        blocked = trainer.strategy.block_backward_sync()
    with on_device(trainer), put_back(trainer.lightning_module), torch.inference_mode(False), blocked:
        while watch.parts:
            watch.begin_pass()
            try:
                run_validation(trainer, kind=_WithGradients, callbacks=[watch])
            finally:
                watch.close()
            watch.end_pass()
    return watch.batches


class _WithGradients(_EvaluationLoop):
    """A validation whose steps compute with gradients, and which ends when its callback has seen enough."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.inference_mode = False

    @override
    def _evaluation_step(self, batch: Any, batch_idx: int, dataloader_idx: int, dataloader_iter: Any) -> None:
        if all(not watch.parts for watch in self.trainer.callbacks):  # type: ignore[attr-defined]
            raise StopIteration  # which ends a pass
        with torch.enable_grad():
            super()._evaluation_step(batch, batch_idx, dataloader_idx, dataloader_iter)


class _Watch(Callback):
    """Observes batches of validation, one part of the layers after the other.

    Attributes:
        parts: Those that are not complete.
        batches: How many were seen.
    """

    def __init__(
        self,
        model: nn.Module,
        parts: Mapping[int, Sequence[Layer]],
        steps: int,
        observe: Open,
        keep: Callable[[int, Sums], None],
    ) -> None:
        self.parts, self.batches = dict(parts), 0
        self._model, self._steps, self._observe, self._keep = model, steps, observe, keep
        self._sums, self._in_pass = Sums(), 0
        self._observer: Observer | None = None
        self._handles: list[RemovableHandle] = []
        self._outputs: list[Tensor] = []  # of the layers
        self._seen: tuple[Mapping[str, Any], Any] = ({}, None)  # what the model was given, and gave

    def begin_pass(self) -> None:
        """All batches come now."""
        self._in_pass = 0

    def end_pass(self) -> None:
        """All batches have come: no part needs them twice."""
        if not self._in_pass:
            raise ValueError("Validation has no batches.")
        self._steps = min(self._steps, self._in_pass)
        self._end_part()

    def close(self) -> None:
        """Takes hooks away."""
        for handle in self._handles:
            handle.remove()
        if self._observer is not None:
            self._observer.close()
        self._handles, self._outputs, self._observer, self._seen = [], [], None, ({}, None)

    @override
    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Hangs up hooks."""
        layers = next(iter(self.parts.values()))
        self._observer = self._observe(layers, self._sums, 1.0 / _scale_of(trainer))
        modules = {module for layer in layers for module in layer.modules}
        self._handles = [module.register_forward_hook(self._see_output) for module in modules]
        self._handles.append(self._model.register_forward_hook(self._see_model, with_kwargs=True))

    @override
    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Computes gradients at the outputs of layers, which are thrown away when the observer saw them."""
        loss = self._loss(outputs, batch)
        if self._outputs:
            torch.autograd.grad(loss * _scale_of(trainer), self._outputs, allow_unused=True)
        observer = self._observer
        del loss
        self.close()
        if observer is not None and observer.error is not None:
            raise observer.error
        self.batches += 1
        self._in_pass += 1
        self._end_part()

    def _end_part(self) -> None:
        if self._sums.batches >= self._steps and self.parts:
            part = next(iter(self.parts))
            self._keep(part, self._sums)
            del self.parts[part]
            self._sums = Sums()

    def _see_output(self, module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.requires_grad:
            self._outputs.append(output)

    def _see_model(self, module: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
        self._seen = (kwargs, output)

    def _loss(self, outputs: Any, batch: Any) -> Tensor:
        """What gradients are taken of.

        Raises:
            ValueError: There is nothing.
        """
        kwargs, output = self._seen
        for found in (_in(outputs, "loss", outputs), _in(output, "loss")):
            if isinstance(found, Tensor) and found.requires_grad and found.numel() == 1:
                return found
        logits = _in(output, "logits")
        labels = kwargs.get("labels")
        labels = _in(batch, "labels") if labels is None else labels
        if not (isinstance(logits, Tensor) and logits.requires_grad and isinstance(labels, Tensor)):
            raise ValueError(
                "validation_step returns no loss with a gradient, and there are no logits and labels: "
                + _ADVICE
            )
        if logits.ndim == 3 and _is_causal(self._model):  # each token predicts the next
            logits, labels = logits[:, :-1], labels[:, 1:]
        return cross_entropy(logits.flatten(0, -2).float(), labels.to(logits.device).flatten())


def _in(container: Any, name: str, default: Any = None) -> Any:
    """A member of a mapping, or of an output of transformers, which is one."""
    return container.get(name) if isinstance(container, Mapping) else getattr(container, name, default)


def _is_causal(model: Any) -> bool:
    encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return not encoder_decoder and hasattr(model, "can_generate") and bool(model.can_generate())


def _scale_of(trainer: Trainer) -> float:
    """Of a loss in float16, whose gradients would be zero."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return 1.0 if scaler is None else scaler.get_scale()
