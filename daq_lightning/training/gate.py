"""Whether an export is good enough to be served: what validation may lose, and what happens if more is lost.

    max_degradation={"val_loss": 0.02}      at most 0.02 worse than unquantized, in the figure's own unit

A loss gets worse by rising, an accuracy by falling. Which a figure does is told by a ModelCheckpoint or
EarlyStopping that watches it, else by the words of its name, else by the user: "val_odd:min", "val_odd:max".
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, get_args

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from daq_lightning.checkpoint.schemes import SCHEMES
from daq_lightning.training import settings_check as check

OnFailure: TypeAlias = Literal["raise", "warn", "fallback"]
Figures: TypeAlias = Mapping[str, Mapping[str, float]]
"""Name of a figure -> "unquantized" and "served" -> value."""
_FALLS = {"loss", "perplexity", "ppl", "error", "err", "mse", "mae", "rmse", "nll", "wer", "cer", "kl", "bpb"}
_RISES = {
    "acc", "accuracy", "f1", "auc", "auroc", "precision", "recall", "bleu", "rouge", "r2", "score", "iou",
    "map", "em", "reward", "dice", "mrr", "ndcg",
}  # fmt: skip


class ExportRejectedError(RuntimeError):
    """An export lost more in validation than it may; nothing was published."""


@dataclass(frozen=True, kw_only=True)
class ValidationSettings:
    """What a run does with what it wrote before it publishes it; arguments of `DeltaAwareQuantization`.

    Attributes:
        validate: Whether the Trainer's validation runs with the exported weights.
        quantize_activations: Whether activations are quantized then, as the scheme's servers do.
        max_degradation: Figure -> by how much it may be worse than that of the unquantized model.
        on_failure: What happens if it is worse.
        schemes: What is tried instead, in order: schemes, or "keep:N" for the N worst layers in 16 bit.

    Raises:
        MisconfigurationException: A value of a wrong kind, or values that contradict each other.
    """

    validate: bool = False
    quantize_activations: bool = True
    max_degradation: Mapping[str, float] = field(default_factory=dict)
    on_failure: OnFailure = "raise"
    schemes: Sequence[str] = ()

    def __post_init__(self) -> None:
        listed = isinstance(self.schemes, (list, tuple))
        check.require(
            listed and all(map(_is_scheme, self.schemes)), "schemes", self.schemes,
            f"a list of {', '.join(SCHEMES)}, or 'keep:8' for the 8 worst layers in 16 bit",
        )  # fmt: skip
        object.__setattr__(self, "schemes", tuple(self.schemes))
        check.flag("validate", self.validate)
        check.flag("quantize_activations", self.quantize_activations)
        check.choice("on_failure", self.on_failure, get_args(OnFailure))
        limits = self.max_degradation
        check.require(
            isinstance(limits, Mapping) and all(map(_is_limit, limits.values())), "max_degradation", limits,
            "a figure with what it may lose, in its own unit, such as {'val_loss': 0.02}",
        )  # fmt: skip
        if limits and not self.validate:
            raise MisconfigurationException("max_degradation=...: needs validate=True, which measures it.")
        if (self.on_failure == "fallback") != bool(self.schemes):
            raise MisconfigurationException(
                "on_failure='fallback' and schemes=[...] belong together: schemes says what to fall back to, "
                "such as ['FP8_DYNAMIC', 'keep:8']."
            )
        if self.on_failure != "raise" and not limits:
            raise MisconfigurationException(
                f"on_failure={self.on_failure!r}: needs max_degradation, such as {{'val_loss': 0.02}}."
            )

    def modes(self, trainer: Trainer) -> dict[str, str]:
        """Name of each limit -> "min" for a figure that gets worse by rising, "max" for the others.

        Raises:
            MisconfigurationException: Of a figure it is not known.
        """
        watched = {
            one.monitor: one.mode
            for one in trainer.callbacks  # type: ignore[attr-defined]
            if isinstance(getattr(one, "monitor", None), str) and getattr(one, "mode", None) in ("min", "max")
        }
        return {name: _mode(name, watched) for name in self.max_degradation}

    def failures(self, figures: Figures, modes: Mapping[str, str]) -> list[str]:
        """What is worse than it may be, in words."""
        failed = []
        for name, limit in self.max_degradation.items():
            figure = name.rpartition(":")[0] if name.endswith((":min", ":max")) else name
            if figure not in figures:
                failed.append(
                    f"max_degradation names {figure!r}, which validation did not log; it logged "
                    f"{', '.join(figures) or 'nothing'}"
                )
                continue
            before, after = figures[figure]["unquantized"], figures[figure]["served"]
            loss = worse(after, before, modes[name])
            if not loss <= limit:
                failed.append(
                    f"{figure} went from {before:.6g} to {after:.6g}, worse by {loss:.3g} where {limit:.3g} "
                    "is allowed"
                )
        return failed


def worse(figure: float, reference: float, mode: str) -> float:
    """By how much a figure is worse than its reference, in its own unit; a NaN is worse than anything.

    Example:
        >>> worse(2.5, 2.25, "min"), worse(0.75, 0.5, "max"), worse(float("nan"), 1.0, "min")
        (0.25, -0.25, inf)
    """
    difference = figure - reference if mode == "min" else reference - figure
    return math.inf if math.isnan(difference) else difference


def kept_layers(scheme: str) -> int | None:
    """How many layers "keep:N" keeps; None for the name of a scheme."""
    found = re.fullmatch(r"keep:([1-9]\d*)", scheme)
    return None if found is None else int(found[1])


def _mode(name: str, watched: Mapping[str, str]) -> str:
    if name.endswith((":min", ":max")):
        return name[-3:]
    words = set(re.split(r"[^a-z0-9]+", name.lower()))
    falls, rises = bool(words & _FALLS), bool(words & _RISES)
    mode = watched.get(name) or ("min" if falls and not rises else "max" if rises and not falls else None)
    if mode is None:
        raise MisconfigurationException(
            f"max_degradation={{{name!r}: ...}}: whether {name!r} gets worse by rising or by falling is not "
            f"known. Say {name + ':min'!r} for a figure that should be small, {name + ':max'!r} for one that "
            "should be large."
        )
    return mode


def _is_limit(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and value >= 0 and math.isfinite(value)


def _is_scheme(value: Any) -> bool:
    return isinstance(value, str) and (value in SCHEMES or kept_layers(value) is not None)
