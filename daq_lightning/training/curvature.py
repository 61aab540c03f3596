"""The curvature of the weights that a run exports, collected from a few of its own batches.

| the end of the run | batches that are observed |
| --- | --- |
| known, and exported only then | the last |
| not known, or there are exports before | the first, and from then on one of every 32: the newest count |

Layers are observed in parts whose sums fit `curvature_memory`, one part after the other through the depth,
each for `curvature_steps` batches; the last ones are as good as any. What does not fit all at once lies in a
file in the folder of the exports until it is needed. Parts that no batch was observed for, if that is asked
for, are observed in validation when an export needs them.

Under DDP every rank sums its own tokens; an export adds them up on the rank that rounds the weight. A resumed
run collects anew.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from daq_lightning.checkpoint.small_file import write_tensors
from daq_lightning.export.collected import AllCollected, Collected, InFile
from daq_lightning.export.progress import size_text
from daq_lightning.export.ranks import ALONE, Ranks
from daq_lightning.model.observer import Layer, Observer, Sums
from daq_lightning.model.parts import bytes_in, in_parts
from daq_lightning.numerics.rounding.statistics import Curvature
from daq_lightning.training.collecting import Collecting, batches_left
from daq_lightning.training.from_validation import observe_validation
from daq_lightning.training.gradients import GradientObserver
from daq_lightning.training.observed import layers_of, observe

if TYPE_CHECKING:
    from torch import nn

    from daq_lightning.export.plan import TensorPlan
    from daq_lightning.model.live import LiveModel
    from daq_lightning.training.run_settings import RunSettings

EVERY = 32
"""Of so many batches one is observed where the end of a run is not known."""


def collector_of(
    settings: RunSettings,
    trainer: Trainer,
    model: LiveModel,
    tensors: Sequence[TensorPlan],
    *,
    resumed: bool,
) -> Collector | None:
    """What collects in a run whose settings are `settled`, if anything does; says what it is going to do.

    Args:
        settings: Of the run.
        trainer: Whose fit it is.
        model: What is trained.
        tensors: The weights that are exported.
        resumed: Whether the run goes on from a checkpoint, in which nothing of a curvature is kept.
    """
    collecting = settings.collecting
    if collecting is None:
        return None
    if collecting.source == "gradients" and model.adapters is not None:
        raise MisconfigurationException(
            "curvature='gradients' reads the gradients of weights, of which adapters leave them without any: "
            "use curvature='activations'."
        )
    layers = layers_of(model, tensors, experts=collecting.source != "gradients")
    collector = Collector(layers, collecting, settings.folder.absolute(), trainer, model.model)
    rank_zero_info(collector.describe() + " It is collected anew in this resumed run." * resumed)
    return collector


class Collector:
    """What a run collects.

    Args:
        layers: The weights that are exported, in the order of the model.
        settings: How to collect.
        folder: Of the exports.
        trainer: Whose fit it is.
        model: Inside of its module.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        settings: Collecting,
        folder: Path,
        trainer: Trainer,
        model: nn.Module,
    ) -> None:
        self._settings, self._folder, self._trainer, self._model = settings, folder, trainer, model
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
        at_end = ", from validation at an export" * self._only_validation
        words = (
            f"Curvature for rounding{at_end}: {sum(map(len, self._parts))} weights in {len(sizes)} "
            f"part{'s' * (len(sizes) != 1)}, "
            f"{size_text(max(sizes, default=0))} of sums at a time ({size_text(sum(sizes))} in all), "
            f"{self._settings.steps * len(sizes)} batches"
        )
        if self._too_large:
            words += (
                f"; {len(self._too_large)} weights such as {self._too_large[0]} need more than "
                "curvature_memory and are left out"
            )
        spare = "; what no batch was observed for is taken from validation" * (
            self._validates and not self._only_validation
        )
        return f"{words}{spare}."

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
        if self._gave_up or not self._parts or self._only_validation or not self._is_due(trainer, batch_idx):
            return
        if self._from_gradients:
            self._observer = GradientObserver(self._parts[self._part], self._sums)
            return
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        factor = 1.0 if scaler is None else 1.0 / scaler.get_scale()
        # not the validation of an export of another callback
        training = partial(getattr, trainer, "training")
        self._observer = observe(self._parts[self._part], self._sums, factor, training)

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
            self._keep(self._part, self._sums)
            self._sums, self._part = Sums(), (self._part + 1) % len(self._parts)

    def curvature(self, owners: Mapping[str, int], ranks: Ranks = ALONE) -> Curvature:
        """What was collected until now, where a weight is exported. A collective.

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

    def observe_validation(self, ranks: Ranks) -> None:
        """Sums in validation what is missing on any rank, before an export; what goes wrong is said, and the
        export goes on. A collective."""
        if not self._validates or self._trainer.interrupted:  # others may be gone
            return
        seen = {self._part} if self._sums.batches and not self._gave_up else set()
        known = set() if self._only_validation else {*self._complete, *seen}
        missing = set().union(*ranks.gather(set(range(len(self._parts))) - known))
        if not missing:
            return
        parts = {part: self._parts[part] for part in sorted(missing)}
        act = partial(
            observe_validation, self._trainer, self._model, parts, self._settings.steps, observe=observe,
            keep=partial(self._keep, source="validation"),
        )  # fmt: skip
        try:
            batches = ranks.together(act)
        except Exception as error:
            rank_zero_warn(f"No more curvature is collected from validation for rounding: {error}")
            return
        weights = sum(map(len, parts.values()))
        rank_zero_info(f"The curvature of {weights} weights is from {batches} batches of validation.")

    @property
    def _only_validation(self) -> bool:
        return self._settings.source == "validation"

    @property
    def _validates(self) -> bool:
        """Whether validation stands in for training."""
        auto = self._settings.source == "auto" and self._trainer.enable_validation
        return self._only_validation or auto

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

    def _keep(self, part: int, sums: Sums, source: str = "") -> None:
        collected = Collected.of(sums)._replace(source=source)
        self._complete[part] = self._kept(collected, f"part-{part}")

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
