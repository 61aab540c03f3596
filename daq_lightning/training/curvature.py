"""The curvature of the weights that a run exports, collected from a few of its own batches.

| the end of the run | batches that are observed |
| --- | --- |
| known, and exported only then | the last |
| not known, or there are exports before | the first, and from then on one of every 32: the newest count |

Layers are observed in parts whose sums fit `curvature_memory`, one part after the other through the depth,
each for `curvature_steps` batches: four are as good as all, and the last ones as good as any. What does not
fit all at once lies in a file in the folder of the exports until it is needed.

Under DDP every rank sums its own tokens; an export adds them up on the rank that rounds the weight. A resumed
run collects anew.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, Timer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from daq_lightning.checkpoint.tensor_file import write_tensors
from daq_lightning.export.progress import size_text
from daq_lightning.export.ranks import ALONE, Ranks
from daq_lightning.model.layers import linear_layers
from daq_lightning.numerics.rounding.statistics import Curvature
from daq_lightning.training import settings_check as check
from daq_lightning.training.collected import AllCollected, Collected, InFile
from daq_lightning.training.gradients import GradientObserver
from daq_lightning.training.observer import Layer, Observer, Sums
from daq_lightning.training.parts import bytes_in, in_parts
from daq_lightning.training.strategies import why_not_observed

if TYPE_CHECKING:
    from daq_lightning.export.plan import TensorPlan
    from daq_lightning.model.live import LiveModel
    from daq_lightning.training.run_settings import RunSettings

Source: TypeAlias = Literal["auto", "activations", "gradients"]
EVERY = 32
"""Of so many batches one is observed where the end of a run is not known."""
_UNITS = {"kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


@dataclass(frozen=True, kw_only=True)
class Collecting:
    """How to collect; the fields are arguments of `DeltaAwareQuantization`, checked when it is made.

    Attributes:
        source: What is collected: "activations", and the gradients at the outputs of layers; "gradients" of
            the weights at optimizer steps, which a compiled model has too; "auto" is "activations".
        memory: Bytes of sums that are held at a time, > 0; once more while sums are taken anew.
        steps: Batches that each layer is observed for, >= 1.
        required: Whether a run that cannot collect is an error, or is exported without.
        at_end: Whether only the last weights are exported.
    """

    source: Source
    memory: int
    steps: int
    required: bool
    at_end: bool

    def __post_init__(self) -> None:
        check.choice("curvature", self.source, get_args(Source))
        check.require(self.steps is not None, "curvature_steps", self.steps, "a whole number of at least 1")
        check.count("curvature_steps", self.steps)


def settled(settings: RunSettings, trainer: Trainer) -> RunSettings:
    """The settings of a run that can or cannot be observed: codes along a curvature, or nearest.

    Raises:
        MisconfigurationException: It cannot, and was required to.
    """
    if settings.collecting is None:
        return settings
    hooks = settings.collecting.source != "gradients"
    reason = why_not_observed(trainer, hooks=hooks)
    anew = "on_failure='fallback'" if settings.validation.schemes else "budget"
    if hooks and settings.deals_anew and trainer.world_size > 1:
        # each rank has the sums of the weights that it was dealt first
        reason = reason or f"{anew} deals the weights to the ranks anew"
    if not reason:
        choices = dataclasses.replace(settings.choices, rounding="curvature")
        return dataclasses.replace(settings, choices=choices)
    if settings.collecting.required:
        raise MisconfigurationException(
            f"rounding='curvature' cannot collect it here: {reason}. Leave it out, or use rounding='nearest'."
        )
    rank_zero_info(f"Codes are rounded to nearest, not along a curvature: {reason}.")
    choices = dataclasses.replace(settings.choices, rounding="nearest")
    return dataclasses.replace(settings, choices=choices, collecting=None)


def collector_of(
    settings: RunSettings, model: LiveModel, tensors: Sequence[TensorPlan], *, resumed: bool
) -> Collector | None:
    """What collects in a run whose settings are `settled`, if anything does; says what it is going to do.

    Args:
        settings: Of the run.
        model: What is trained.
        tensors: The weights that are exported.
        resumed: Whether the run goes on from a checkpoint, in which nothing of a curvature is kept.
    """
    if settings.collecting is None:
        return None
    if settings.collecting.source == "gradients" and model.adapters is not None:
        raise MisconfigurationException(
            "curvature='gradients' reads the gradients of weights, of which adapters leave them without any: "
            "use curvature='activations'."
        )
    modules = linear_layers(model, [tensor.spec.name for tensor in tensors])
    layers = [
        Layer(
            name=tensor.spec.name,
            group=tensor.together,
            shape=tensor.spec.shape,
            modules=modules[tensor.spec.name],
        )
        for tensor in tensors
        if tensor.spec.name in modules
    ]
    collector = Collector(layers, settings.collecting, Path(settings.dirpath).absolute())
    rank_zero_info(collector.describe() + " It is collected anew in this resumed run." * resumed)
    return collector


class Collector:
    """What a run collects.

    Args:
        layers: The weights that are exported, in the order of the model.
        settings: How to collect.
        folder: Of the exports.
    """

    def __init__(self, layers: Sequence[Layer], settings: Collecting, folder: Path) -> None:
        self._settings, self._folder = settings, folder
        self._parts, self._too_large = in_parts(layers, settings.memory)
        self._steps = settings.steps  # of each part
        self._spilled: TemporaryDirectory[str] | None = None
        self._complete: dict[int, Collected] = {}  # by part: the newest
        self._sums, self._part = Sums(), 0
        self._observer: Observer | GradientObserver | None = None
        self._observed = self._batches = 0
        self._gave_up = False

    def describe(self) -> str:
        """What will be observed, for a person, before training begins."""
        sizes = [bytes_in(part) for part in self._parts]
        words = (
            f"Curvature for rounding: {sum(map(len, self._parts))} weights in {len(sizes)} "
            f"part{'s' * (len(sizes) != 1)}, "
            f"{size_text(max(sizes, default=0))} of sums at a time ({size_text(sum(sizes))} in all), "
            f"{self._settings.steps * len(sizes)} batches"
        )
        if self._too_large:
            words += (
                f"; {len(self._too_large)} weights such as {self._too_large[0]} need more than "
                "curvature_memory and are left out"
            )
        return f"{words}."

    @contextlib.contextmanager
    def giving_up(self) -> Iterator[None]:
        """Collects nothing more if something goes wrong inside, such as too little memory; a run goes on."""
        try:
            yield
        except Exception as error:
            self._gave_up, self._observer = True, None
            rank_zero_warn(f"No more curvature is collected for rounding, training goes on: {error}")

    def begin_batch(self, trainer: Trainer, batch_idx: int) -> None:
        """Hangs up hooks, or waits for gradients, if this batch is to be observed."""
        if self._gave_up or not self._parts or not self._is_due(trainer, batch_idx):
            return
        if self._from_gradients:
            self._observer = GradientObserver(self._parts[self._part], self._sums)
            return
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        factor = 1.0 if scaler is None else 1.0 / scaler.get_scale()
        self._observer = Observer(self._parts[self._part], self._sums, factor)

    def before_step(self) -> None:
        """Reads gradients, if it is they that are collected."""
        if isinstance(self._observer, GradientObserver):
            self._observer.step()

    def end_batch(self) -> None:
        """Takes the hooks away, and goes on to the next layers when these have been seen enough."""
        self._batches += 1
        if self._observer is None:
            return
        observer, self._observer = self._observer, None
        observer.close()
        if observer.error is not None:
            raise observer.error
        self._observed += 1
        if self._sums.batches >= self._steps:
            self._complete[self._part] = self._kept(Collected.of(self._sums), f"part-{self._part}")
            self._sums, self._part = Sums(), (self._part + 1) % len(self._parts)

    def curvature(self, owners: Mapping[str, int], ranks: Ranks = ALONE) -> Curvature:
        """What was collected until now, on the rank that exports a weight. A collective.

        Args:
            owners: Weight name -> that rank.
            ranks: Who exports; one that is alone has its own tokens only.
        """
        parts = []
        for part in range(len(self._parts)):
            unfinished = Collected.of(self._sums) if part == self._part else Collected({}, {}, {})
            collected = self._complete.get(part, unfinished)
            if ranks.size > 1 and not self._from_gradients:  # which are the same on all
                added = collected.summed(owners, ranks)
                collected = ranks.together(partial(self._kept, added, f"summed-{part}"))
            parts.append(collected)
        return AllCollected(parts, "gradients" if self._from_gradients else "activations")

    def close(self) -> None:
        """Takes hooks and files away."""
        if self._observer is not None:
            self._observer.close()
        if self._spilled is not None:
            self._spilled.cleanup()
        self._observer, self._spilled, self._complete, self._sums = None, None, {}, Sums()

    @property
    def _from_gradients(self) -> bool:
        return self._settings.source == "gradients"

    def _is_due(self, trainer: Trainer, batch_idx: int) -> bool:
        left = batches_left(trainer, batch_idx) if self._settings.at_end else None
        step = trainer.accumulate_grad_batches if self._from_gradients else 1
        needed = self._steps * len(self._parts) * step
        if left is None:
            return self._observed < needed or self._batches % EVERY < step
        if self._observed == 0:  # of a run that is too short, each part gets its share
            self._steps = min(self._settings.steps, max(1, left // (len(self._parts) * step)))
            needed = self._steps * len(self._parts) * step
            return left <= needed + trainer.accumulate_grad_batches
        return self._observed < needed

    def _kept(self, collected: Collected, name: str) -> Collected:
        """In memory if all parts fit, else in a file."""
        if len(self._parts) == 1:
            return collected
        if self._spilled is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._spilled = TemporaryDirectory(prefix=".curvature-", dir=self._folder)
        file = Path(self._spilled.name) / f"{name}.safetensors"
        write_tensors(file, {key: tensor.cpu() for key, tensor in collected.tensors.items()})
        return collected._replace(tensors=InFile(file))


def batches_left(trainer: Trainer, batch_idx: int) -> int | None:
    """How many batches a run has left with this one, or None if it may end earlier or is not known to end."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    if any(isinstance(callback, (EarlyStopping, Timer)) for callback in callbacks):
        return None
    per_epoch, ends = trainer.num_training_batches, []
    if trainer.max_epochs not in (None, -1) and math.isfinite(per_epoch):
        ends.append((trainer.max_epochs - trainer.current_epoch) * int(per_epoch) - batch_idx)
    if trainer.max_steps not in (None, -1):
        if not trainer.lightning_module.automatic_optimization:  # which steps as often as it likes
            return None
        accumulated = trainer.accumulate_grad_batches
        ends.append((trainer.max_steps - trainer.global_step) * accumulated - batch_idx % accumulated)
    return min(ends, default=None)


def bytes_of(memory: str | int) -> int:
    """A number of bytes, or one with a unit.

    Example:
        >>> bytes_of("2 GB"), bytes_of(1000)
        (2000000000, 1000)
    """
    number, _, unit = str(memory).strip().partition(" ")
    expected = "a number of bytes, or one with a unit after a space, such as '2 GB'"
    check.require(not isinstance(memory, bool), "curvature_memory", memory, expected)
    try:
        size = float(number) * (_UNITS[unit.strip()] if unit else 1)
    except (ValueError, KeyError):
        size = math.nan
    check.require(math.isfinite(size) and size >= 1, "curvature_memory", memory, expected)
    return int(size)
