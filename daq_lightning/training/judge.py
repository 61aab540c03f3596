"""Judging what was written before it is published: the Trainer's validation with the weights of the files.

    unquantized    the weights that were exported, as they are
    served         the same module with what the files hold, dequantized, and its activations quantized, the
                   cache of keys and values too if that is to be in FP8

Both run over the same batches with the same random numbers. Where the next fallback keeps the worst layers in
16 bit, what each costs is measured too: KL(unquantized || served) of one batch, with that layer alone
quantized.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from daq_lightning.checkpoint.schemes import SCHEMES
from daq_lightning.export.kv_cache import cached_modules
from daq_lightning.export.written import WrittenWeights
from daq_lightning.model.activations import quantized_activations
from daq_lightning.model.fusion import fused_groups
from daq_lightning.model.in_front import rounded
from daq_lightning.model.layers import computing_modules
from daq_lightning.model.swap import Swap, put_back
from daq_lightning.numerics.divergence import compare_logits
from daq_lightning.training.gate import ExportRejectedError, ValidationSettings
from daq_lightning.training.validate import mean_of_ranks, on_device, validate

if TYPE_CHECKING:
    from daq_lightning.export.job import Job
    from daq_lightning.export.kv_cache import CacheScales
    from daq_lightning.export.ranks import Ranks
    from daq_lightning.model.live import LiveModel
    from daq_lightning.report.figures import ExportReport


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judge:
    """Says of an export whether it may be published, and puts into its report what it saw.

    Attributes:
        trainer: In its fit.
        settings: What is measured, and what it may be.
        modes: Of `ValidationSettings.modes`.
        job: The export.
        model: The model, with the weights that are exported.
        state: The saved state that they are; None for the module as it is.
        ranks: Who judges together.
        measure_layers: Whether to find out what each layer costs if the export is rejected.
        costs: Filled with that: names of the weights of a layer -> KL.
        notes: What the report is to say of earlier attempts.
        keep: Is told of an error of the validation itself, which without limits publishes the export all the
            same.
    """

    trainer: Trainer
    settings: ValidationSettings
    modes: Mapping[str, str]
    job: Job
    model: LiveModel
    state: Mapping[str, Tensor] | None
    ranks: Ranks
    measure_layers: bool = False
    costs: dict[tuple[str, ...], float] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()
    keep: Callable[[Exception, str], None]

    def __call__(self, folder: Path, files: Collection[str], report: ExportReport) -> ExportReport:
        """The report with the figures of validation.

        Raises:
            ExportRejectedError: They are worse than they may be.
            Whatever validation raises, if there are limits: what cannot be measured is not published.
        """
        try:
            return self._judged(folder, files, report)
        except Exception as error:
            if self.settings.max_degradation:
                raise
            self.keep(error, "Validation of the export failed")
            note = f"It was not validated, since validation failed: {type(error).__name__}: {error}"
            return dataclasses.replace(report, notes=(note, *report.notes))

    def _judged(self, folder: Path, files: Collection[str], report: ExportReport) -> ExportReport:
        module, trainer = self.trainer.lightning_module, self.trainer
        written = self.ranks.together(
            lambda: WrittenWeights(self.job.plan, folder, files, trainer.strategy.root_device)
        )
        rank_zero_info(f"Validating what will be served as {report.scheme}.")
        with on_device(trainer), put_back(module) as swap:
            if self.state is not None:
                swap.state(self.state)
            before = self.ranks.together(lambda: validate(trainer))
            with self._served(swap, written):
                after = self.ranks.together(lambda: validate(trainer))
            figures = {
                name: {"unquantized": before[name], "served": after[name]} for name in before if name in after
            }
            failures = self.settings.failures(figures, self.modes)
            if failures and self.measure_layers:
                self._measure_layers(swap, written)
        if failures and self.settings.on_failure != "warn":
            raise ExportRejectedError("; ".join(failures))
        if failures:
            rank_zero_warn(f"The export as {report.scheme} loses more than it may: {'; '.join(failures)}.")
        exceeded = (f"max_degradation is exceeded: {failure}." for failure in failures)
        notes = (*self.notes, *exceeded, *report.notes)
        return dataclasses.replace(report, validation=figures, notes=notes)

    @contextlib.contextmanager
    def _served(
        self, swap: Swap, written: WrittenWeights, only: Collection[str] | None = None
    ) -> Iterator[None]:
        """The module computes as a server does; what it has been given stays in it afterwards."""
        self.ranks.together(lambda: swap.weights(self.model, written, only))
        with contextlib.ExitStack() as stack:
            if self.settings.quantize_activations:
                for scheme, names in self._by_scheme(only).items():
                    modules = computing_modules(self.model, names)
                    stack.enter_context(quantized_activations(modules, SCHEMES[scheme]))
                if self.job.cache is not None and only is None:
                    stack.enter_context(self._cached(self.job.cache))
            yield

    def _by_scheme(self, only: Collection[str] | None) -> dict[str, list[str]]:
        """Scheme -> the weights that are in it."""
        found: dict[str, list[str]] = {}
        for tensor in self.job.plan.quantized:
            if only is None or tensor.spec.name in only:
                found.setdefault(tensor.layout.scheme.name, []).append(tensor.spec.name)
        return found

    def _cached(self, cache: CacheScales) -> AbstractContextManager[None]:
        """Keys and values are those of an FP8 cache."""
        names = cached_modules(self.job.plan)
        scales = {module: (cache.values[k], cache.values[v]) for module, (k, v) in names.items()}
        return rounded(self.model.architecture.modules(names), scales)

    def _measure_layers(self, swap: Swap, written: WrittenWeights) -> None:
        """The KL of one batch with one layer quantized, for each; layers that servers fuse are one."""
        self._afresh(swap)
        reference = self._logits()
        for group in fused_groups([tensor.spec.name for tensor in self.job.plan.quantized]):
            with self._served(swap, written, only=group):
                found = self._logits()
            stats = [compare_logits(one, other) for one, other in zip(found, reference, strict=True)]
            total = sum(float(one.kld) for one in stats) / max(1, sum(int(one.n) for one in stats))
            self.costs[tuple(group)] = mean_of_ranks(self.trainer, total)
            self._afresh(swap)

    def _afresh(self, swap: Swap) -> None:
        swap.restore()
        swap.buffers()
        if self.state is not None:
            swap.state(self.state)

    def _logits(self) -> list[Tensor]:
        """What the model answers to the first batch of validation."""
        found: list[Tensor] = []

        def see(_: nn.Module, __: Any, output: Any) -> None:
            logits = getattr(output, "logits", output)
            if isinstance(logits, Tensor) and logits.is_floating_point():
                found.append(logits.detach())

        handle = self.model.model.register_forward_hook(see)
        try:
            self.ranks.together(lambda: validate(self.trainer, batches=1))
        finally:
            handle.remove()
        if not found:
            raise ExportRejectedError(
                "which layers are worst cannot be measured, since the model's forward returns no logits: "
                "name schemes instead of 'keep:N'"
            )
        return found


def judge_in(
    trainer: Trainer, settings: ValidationSettings, *, keep: Callable[[Exception, str], None]
) -> Callable[..., Judge] | None:
    """Makes the judge of each export of a fit, from what changes between them; None without validation.

    Args:
        trainer: Before its first step.
        settings: Of the run.
        keep: Of the judges.

    Raises:
        MisconfigurationException: As for `ValidationSettings.modes`.
    """
    if not settings.validate:
        return None
    return partial(Judge, trainer=trainer, settings=settings, modes=settings.modes(trainer), keep=keep)
