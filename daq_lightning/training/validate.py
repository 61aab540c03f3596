"""The Trainer's own validation over the model as it is, in the middle of a fit, as if it had not happened.

    figures = validate(trainer)      {"val_loss": ..., "val_acc": ...}: what the module logs, over all batches

A loop of its own runs over the dataloaders of the fit, through the strategy, on all ranks. Other callbacks,
loggers and the figures of the Trainer do not see it: no checkpoint is saved, no patience is used up. Random
numbers, modes, generators of dataloaders, states of torchmetrics and the Trainer's books are as before when
it ends, also by an exception.

Source: lightning 2.6 `_EvaluationLoop`, `Trainer._run_sanity_check`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.loops.evaluation_loop import _EvaluationLoop
from lightning.pytorch.trainer.states import RunningStage, TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torchmetrics import Metric


def check_validation(trainer: Trainer, wanted: str) -> None:
    """Raises MisconfigurationException for a fit that has no validation, and an argument that wants one."""
    if not trainer.enable_validation:
        raise MisconfigurationException(
            f"{wanted} runs the Trainer's validation with the exported weights, but there is none: it needs "
            "a validation_step, validation dataloaders and limit_val_batches > 0. Add them, or leave it out; "
            "`daq-lightning evaluate` and `daq-lightning quantize --kv-text` do without a Trainer."
        )


def validate(trainer: Trainer, *, batches: int | None = None) -> dict[str, float]:
    """What the module logs in one validation over the model as it is; the mean of all ranks. A collective.

    Args:
        trainer: In a fit; its own loop may be in a validation, whose end saves a checkpoint.
        batches: How many batches of each dataloader; None takes all that the Trainer would.

    Returns:
        Name -> value, as the module logs them.

    Raises:
        Whatever the module raises.
    """
    logged = run_validation(trainer, batches=batches)
    found = {name: value for outputs in logged for name, value in outputs.items()}
    return {name: mean_of_ranks(trainer, value) for name, value in found.items()}


def run_validation(
    trainer: Trainer,
    *,
    batches: int | None = None,
    kind: type[_EvaluationLoop] = _EvaluationLoop,
    callbacks: Sequence[Callback] = (),
) -> list[dict[str, Any]]:
    """One validation; everything is as before when it ends.

    Args:
        trainer: As for `validate`.
        batches: The same.
        kind: Of the loop.
        callbacks: See it.

    Returns:
        What the module logged, of each dataloader.
    """
    fit_validation = trainer.fit_loop.epoch_loop.val_loop
    with _as_it_was(trainer):
        fit_validation.setup_data()
        loop = _loop_like(fit_validation, batches, kind)
        trainer.fit_loop.epoch_loop.val_loop = loop
        trainer.callbacks = list(callbacks)  # type: ignore[attr-defined]
        trainer.loggers = [DummyLogger() for _ in trainer.loggers]
        trainer.validating = True
        with _data_as_it_was(loop):
            return loop.run()  # type: ignore[return-value]


def _loop_like(other: _EvaluationLoop, batches: int | None, kind: type[_EvaluationLoop]) -> _EvaluationLoop:
    """A loop of validation over the same dataloaders, which has not run."""
    loop = kind(
        other.trainer,
        TrainerFn.FITTING,
        RunningStage.VALIDATING,
        verbose=False,
        inference_mode=other.inference_mode,
    )
    loop._data_source = other._data_source
    loop._combined_loader = other._combined_loader
    loop._last_val_dl_reload_epoch = math.inf  # it has just been asked for
    loop._max_batches = [most if batches is None else min(most, batches) for most in other._max_batches]
    return loop


def mean_of_ranks(trainer: Trainer, value: Any) -> float:
    """The mean of what the ranks have. A collective."""
    tensor = torch.full((), float(value), dtype=torch.float64, device=trainer.strategy.root_device)
    return float(trainer.strategy.reduce(tensor, reduce_op="mean"))


@contextlib.contextmanager
def on_device(trainer: Trainer) -> Iterator[None]:
    """After the end of training the module is on the CPU already: it goes back for as long as this lasts."""
    module, device = trainer.lightning_module, trainer.strategy.root_device
    places = {parameter.device for parameter in module.parameters()}
    if places == {torch.device("cpu")} and device.type != "cpu":
        module.to(device)
        try:
            yield
        finally:
            module.cpu()
    else:
        yield


@contextlib.contextmanager
def _as_it_was(trainer: Trainer) -> Iterator[None]:
    """Remembers what a validation changes in Trainer and module, and puts it back."""
    module, connector = trainer.lightning_module, trainer._logger_connector
    books = {name: dict(held) if isinstance(held, dict) else held for name, held in vars(connector).items()}
    random = _collect_rng_states(include_cuda=True)
    modes = {part: part.training for part in module.modules()}
    metrics = {part: _state_of(part) for part in module.modules() if isinstance(part, Metric)}
    kept = {name: vars(trainer).get(name) for name in ("callbacks", "_loggers", "_last_val_time")}
    stage, function = trainer.state.stage, module._current_fx_name
    loop = trainer.fit_loop.epoch_loop.val_loop
    try:
        yield
    finally:
        trainer.fit_loop.epoch_loop.val_loop = loop
        trainer.state.stage = stage
        module._current_fx_name = function
        vars(trainer).update(kept)
        vars(connector).update(books)
        for part, training in modes.items():
            part.training = training
        for part, state in metrics.items():
            vars(part).update(state)
        _set_rng_states(random)


@contextlib.contextmanager
def _data_as_it_was(loop: _EvaluationLoop) -> Iterator[None]:
    """Puts back where dataloaders are, and the generators of their order, which the next pass uses."""
    loaders = loop._combined_loader
    assert loaders is not None
    iterator, limits = loaders._iterator, loaders._limits  # of a pass of the fit's own loop
    holders: list[Any] = []
    for loader in loaders.flattened:
        batches = getattr(loader, "batch_sampler", None)
        holders += [loader, getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None)]
    generators = [getattr(holder, "generator", None) for holder in holders]
    states = {one: one.get_state() for one in generators if isinstance(one, torch.Generator)}
    try:
        yield
    finally:
        loaders._iterator, loaders._limits = iterator, limits
        for generator, state in states.items():
            generator.set_state(state)


def _state_of(metric: Metric) -> dict[str, Any]:
    """A copy of what a metric has seen."""

    def copied(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.clone()
        return [part.clone() if isinstance(part, Tensor) else part for part in value]

    states = {name: copied(getattr(metric, name)) for name in metric._defaults}
    return vars(metric) | states
