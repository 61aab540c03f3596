"""Which strategies of the Trainer are exported from, and what they cannot do.

| strategy | weights |
| --- | --- |
| single device, DDP, DeepSpeed ZeRO-1 and 2 | whole on every rank |
| ModelParallelStrategy (FSDP2, tensor parallel), FSDP, DeepSpeed ZeRO-3 | sharded, see `model/sharded.py` |
| XLA | refused |
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    SingleDeviceXLAStrategy,
    XLAStrategy,
)
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from daq_lightning.training.validate import check_validation

if TYPE_CHECKING:
    from daq_lightning.training.run_settings import RunSettings

_SHARDED = (ModelParallelStrategy, FSDPStrategy, DeepSpeedStrategy)


def check_strategy(trainer: Trainer, settings: RunSettings, *, alone: bool = False) -> None:
    """Refuses a strategy whose weights cannot be read, and what one of its ranks cannot do by itself.

    Args:
        trainer: With its strategy and callbacks.
        settings: Of the exports.
        alone: Whether rank 0 is to export after an exception, when it cannot wait for the others.

    Raises:
        MisconfigurationException: XLA, a strategy that is not known, or Apple's GPUs; an export after an
            exception of what no rank has whole, or whose cache takes a validation; averages of a sharded
            model, which Lightning does not keep.
    """
    strategy, name = trainer.strategy, type(trainer.strategy).__name__
    # some of these are a DDPStrategy, so they come first
    if isinstance(strategy, (XLAStrategy, SingleDeviceXLAStrategy)):
        _refuse(name, "whose weights lie on a device that is not read from here")
    if not isinstance(strategy, (SingleDeviceStrategy, DDPStrategy, *_SHARDED)):
        _refuse(name, "which is not known to keep its weights in a way that is read here")
    if strategy.root_device.type == "mps":
        raise MisconfigurationException(
            "DeltaAwareQuantization needs float64, which Apple's GPUs (MPS) do not have: train with "
            "Trainer(accelerator='cpu'), or save the trained model as a Hugging Face folder and run "
            "`daq-lightning quantize`."
        )
    sharded = isinstance(strategy, _SHARDED)
    if alone and (sharded or (trainer.world_size > 1 and settings.base == "memory")):
        what = f"{name} shards the model" if sharded else "base='memory' is shared out"
        raise MisconfigurationException(
            f"export_on_exception=True exports from rank 0 alone, and {what}: no rank has all of it. Leave "
            "it out and add Lightning's OnExceptionCheckpoint, or use DDP with a base in a folder."
        )
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    if sharded and any(isinstance(other, WeightAveraging) for other in callbacks):
        raise MisconfigurationException(
            f"WeightAveraging does not average the weights of {name}, which are sharded: leave it out, or "
            "train with DDP."
        )
    _check_calibrating(trainer, settings, alone)


def check_judging(trainer: Trainer, settings: RunSettings) -> None:
    """Refuses a validation of exports that cannot be made.

    Raises:
        MisconfigurationException: There is no validation; or a fallback, or the best checkpoint, that the
            ranks of a sharded or shared out run cannot have.
    """
    wanted, several = settings.validation, trainer.world_size > 1
    if settings.deals_anew and several and settings.base == "memory":
        raise MisconfigurationException(
            f"{'a fallback' if wanted.schemes else 'a budget'} deals the weights to the ranks anew, and with "
            "base='memory' each rank has only the base of those that it was dealt first: use "
            "base='snapshot'."
        )
    if not wanted.validate:
        return
    check_validation(trainer, "validate=True")
    sharded = isinstance(trainer.strategy, _SHARDED)
    if settings.schedule.which == "best" and sharded and trainer.strategy.root_device.type != "cpu":
        raise MisconfigurationException(
            f"validate=True with which='best' runs when {type(trainer.strategy).__name__} has taken the "
            "model off its devices: use export_on='checkpoint', which validates each checkpoint when it is "
            "saved."
        )


def _check_calibrating(trainer: Trainer, settings: RunSettings, alone: bool) -> None:
    """Refuses scales of a cache that no validation can find."""
    if settings.choices.kv_cache != "fp8-calibrated":
        return
    calibrating = "kv_cache='fp8-calibrated'"
    check_validation(trainer, calibrating)
    if alone:
        raise MisconfigurationException(
            f"{calibrating} validates before each export, which a run that failed cannot: leave "
            "export_on_exception out, or use kv_cache='fp8', whose scales are 1."
        )
    sharded = isinstance(trainer.strategy, _SHARDED) and trainer.strategy.root_device.type != "cpu"
    if settings.schedule.which == "best" and sharded:
        raise MisconfigurationException(
            f"{calibrating} with which='best' validates when {type(trainer.strategy).__name__} has taken the "
            "model off its devices: use export_on='checkpoint'."
        )


def _refuse(name: str, why: str) -> None:
    raise MisconfigurationException(
        f"DeltaAwareQuantization does not support {name}, {why}. Train on a single CPU or GPU, with DDP, or "
        "with ModelParallelStrategy; or save the trained model as a Hugging Face folder and run "
        "`daq-lightning quantize`."
    )


def why_not_observed(trainer: Trainer, *, hooks: bool, compiled: bool = False) -> str:
    """Why a curvature cannot be collected, in a few words; "" if it can.

    Args:
        trainer: Whose model it is.
        hooks: Whether by hooks, or from gradients.
        compiled: Whether a compiled model is run as it is written meanwhile.
    """
    strategy, name = trainer.strategy, type(trainer.strategy).__name__
    if isinstance(strategy, (FSDPStrategy, DeepSpeedStrategy)):
        return f"{name} runs the layers in a way that was not looked at"
    if isinstance(strategy, ModelParallelStrategy):
        mesh = strategy.device_mesh
        if mesh is not None and mesh["tensor_parallel"].size() > 1:
            return "tensor parallel layers see a part of each activation"
        if not hooks:
            return f"under {name} no rank has whole gradients"
    assert strategy.model is not None
    if not hooks or compiled:
        return ""
    if any(map(_is_compiled, (trainer.lightning_module, *strategy.model.modules()))):
        return "a compiled model does not call hooks that come later"
    return ""


def _is_compiled(module: nn.Module) -> bool:
    """Whether `torch.compile` or `Module.compile` did; a Trainer unwraps a LightningModule of the former."""
    marks = (getattr(module, name, None) for name in ("_compiled_call_impl", "_compiler_ctx"))
    return type(module).__name__ == "OptimizedModule" or any(mark is not None for mark in marks)


def restores_late(trainer: Trainer) -> bool:
    """Whether a resumed run loads its weights only after `on_fit_start`, not saying before that it is one."""
    return trainer.strategy.restore_checkpoint_after_setup
