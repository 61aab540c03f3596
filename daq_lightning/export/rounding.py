"""The codes of a batch: scales are searched, then each weight is rounded to nearest or along its curvature.

    statistics of the weight         collected in a run
    the update D                     where there are none: D^T D and D D^T, inputs summed over the batch
    neither                          the scale search and nearest rounding, with the reason

The update of an adapter is enough where the format of a base is kept: its scales and codes are those of the
base, nearest codes would lose most of the update, and these let it through.

Weights of a batch share their input, and so its factor. What is known of one weight, and the factors of two
sides, are all that is held at a time.

Legend: M out, N in.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import torch
from torch import Tensor

from daq_lightning.numerics.objectives import DeltaStats, as_searched
from daq_lightning.numerics.rounding.curvature import Factors, factor
from daq_lightning.numerics.rounding.rounding import round_with_curvature
from daq_lightning.numerics.rounding.settings import RoundingSettings
from daq_lightning.numerics.rounding.statistics import Statistics
from daq_lightning.numerics.rounding.walk import Factor
from daq_lightning.numerics.rounding.written import measured
from daq_lightning.numerics.search.settings import ScaleSearch
from daq_lightning.report.rounding import Rounding

if TYPE_CHECKING:
    from daq_lightning.export.job import Job
    from daq_lightning.export.stream import Batch, Pair
    from daq_lightning.numerics.search.stages import SearchResult

_UPDATE = Statistics(inputs=None, outputs=None, tokens=0, source="update")


class Chosen(NamedTuple):
    """The codes and scales of one weight.

    Attributes:
        result: They, with the sums of exactly these; per group, or of the whole weight as one group.
        rounding: How they were chosen; None in an export that rounds to nearest.
        plain: Sums of the plain merge, where the format of a base is kept.
    """

    result: SearchResult
    rounding: Rounding | None
    plain: DeltaStats | None = None


Search: TypeAlias = Callable[["Sequence[Pair]", ScaleSearch], "list[SearchResult]"]


def choose_codes(job: Job, batch: Batch, search: Search) -> list[Chosen]:
    """Codes and scales of a batch.

    Args:
        job: What is exported.
        batch: Some of it.
        search: Searches the scales of some weights.

    Raises:
        ValueError: NaN or Inf in a weight, by name.
    """
    plain = job.kept is not None
    if not job.settings.by_curvature:
        results = search(batch, job.settings.search)
        return [Chosen(result, None, result.stats if plain else None) for result in results]
    sides = _Sides(job, batch)

    def choose(pair: Pair, result: SearchResult) -> Chosen:
        known = _known(job, pair)
        curved = sides.of(pair, known)
        if isinstance(curved, _Curved):
            chosen = _rounded(job, pair, result, curved)
            if plain and known is not _UPDATE and chosen.result is result:
                # one weight without its update may cost little, all of them cost the update
                curved = sides.of(pair, _UPDATE)
                chosen = _rounded(job, pair, result, curved) if isinstance(curved, _Curved) else chosen
            return chosen._replace(plain=result.stats if plain else None)
        [result] = search([pair], job.settings.search)
        return Chosen(result, Rounding(method="nearest", reason=curved), result.stats if plain else None)

    results = search(batch, job.settings.scale_search)
    return [choose(pair, result) for pair, result in zip(batch, results, strict=True)]


def _base(pair: Pair) -> Tensor:
    return as_searched(pair.weight if pair.base is None else pair.base)


def _known(job: Job, pair: Pair) -> Statistics | str:
    """What a weight is rounded along, or why there is nothing."""
    if job.kept is not None and job.kept.unchanged(pair.plan.spec.name, as_searched(pair.weight)):
        return "they did not change, and keep the codes of the base"
    collected = None if job.curvature is None else job.curvature.get(pair.plan.spec.name)
    if collected is not None and collected.tokens:
        return collected
    none_came = "no token reached it while statistics were collected, and " * (job.curvature is not None)
    if pair.base is None:
        return f"{none_came}it has no base"
    if job.source.low_rank and job.kept is None:
        return f"{none_came}the update of an adapter does not say where the model is sensitive"
    if torch.equal(_base(pair), as_searched(pair.weight)):
        return f"{none_came}it did not change"
    return _UPDATE


class _Curved(NamedTuple):
    """What a weight is rounded along.

    Attributes:
        factors: Of its sides.
        settings: How they were mixed and damped.
        statistics: What they were made from, beside the update.
        source: In words.
    """

    factors: Factors
    settings: RoundingSettings
    statistics: Statistics
    source: str


def _rounded(job: Job, pair: Pair, result: SearchResult, curved: _Curved) -> Chosen:
    """A weight along its curvature, at the scales of a result."""
    layout, weight = pair.plan.layout, as_searched(pair.weight)
    found = round_with_curvature(
        weight,
        result.scale,
        layout.granularity,
        inputs=curved.factors.inputs,
        outputs=curved.factors.outputs,
        fmt=layout.scheme.format,
        name=pair.plan.spec.name,
        zero=result.zero,
    )
    about = Rounding(
        method="nearest" if found.kept_nearest else "curvature",
        source=curved.source,
        tokens=curved.statistics.tokens,
        left_out=curved.statistics.left_out,
        update=curved.settings.update,
        damping_in=curved.settings.damping_in,
        damping_out=curved.settings.damping_out,
        nearest_loss=found.nearest_loss,
        loss=found.predicted_loss,
        reason="no codes of a smaller predicted loss were found" * found.kept_nearest,
    )
    if found.kept_nearest:
        return Chosen(result, about)
    chosen = dataclasses.replace(result, codes=found.codes)
    return Chosen(measured(chosen, weight, _base(pair), layout.granularity, job.plan.dtype), about)


class _Sides:
    """The factors of the weights of a batch; that of their inputs is kept for the next weight."""

    def __init__(self, job: Job, batch: Batch) -> None:
        # an adapter's few directions are worse than none, but on a grid that would take the update away
        self._low_rank, self._kept = job.source.low_rank and job.kept is None, job.kept is not None
        self._batch = batch
        self._made_of: tuple[Tensor | None, int, RoundingSettings] | None = None
        self._inputs: Factor | None = None

    def of(self, pair: Pair, statistics: Statistics | str) -> _Curved | str:
        """What one weight is rounded along, or why it is not."""
        if isinstance(statistics, str):
            return statistics
        settings = RoundingSettings.suited(
            inputs=statistics.inputs is not None,
            outputs=statistics.outputs is not None,
            low_rank=self._low_rank,
            bits=pair.plan.layout.scheme.format.bits,
        )
        if self._kept:
            settings = dataclasses.replace(settings, update=RoundingSettings.update)
        # the update is named where it stands beside what was collected, or in for it
        alone = statistics is _UPDATE or self._low_rank
        source = statistics.source if alone else f"{statistics.source} and update"
        try:
            return _Curved(self._factors(pair, statistics, settings), settings, statistics, source)
        except ValueError as error:  # a run is not lost because of the statistics of one weight
            return str(error).rstrip(".")

    def _factors(self, pair: Pair, statistics: Statistics, settings: RoundingSettings) -> Factors:
        """Those of one weight; a side of which not even an update is known has none.

        Raises:
            ValueError: Statistics that are no curvature, see `factor`.
        """
        inputs_NN, outputs_MM, update_MM = statistics.inputs, statistics.outputs, None
        size, made_of = pair.weight.shape[1], self._made_of
        if made_of is None or made_of[0] is not inputs_NN or made_of[1:] != (size, settings):
            update_NN = self._update_of_inputs(pair) if self._needs_update(inputs_NN, settings) else None
            self._inputs = _side(_on(inputs_NN, pair), update_NN, settings, inputs=True)
            self._made_of = (inputs_NN, size, settings)
        if self._needs_update(outputs_MM, settings):
            delta_MN = _delta(pair)
            update_MM = delta_MN @ delta_MN.T
        outputs = _side(_on(outputs_MM, pair), update_MM, settings, inputs=False)
        return Factors(inputs=self._inputs, outputs=outputs)

    def _needs_update(self, statistics: Tensor | None, settings: RoundingSettings) -> bool:
        return not self._low_rank and (statistics is None or settings.update > 0)

    def _update_of_inputs(self, pair: Pair) -> Tensor | None:
        """D^T D, summed over the weights of the batch that can take the same input."""
        update_NN = None
        for other in self._batch:
            if other.weight.shape[1] == pair.weight.shape[1]:
                delta_MN = _delta(other)
                product_NN = delta_MN.T @ delta_MN
                update_NN = product_NN if update_NN is None else update_NN.add_(product_NN)
        return update_NN


def _delta(pair: Pair) -> Tensor:
    return pair.weight.float() - _base(pair).float()


def _on(statistics: Tensor | None, pair: Pair) -> Tensor | None:
    return None if statistics is None else statistics.to(pair.weight.device)


def _side(
    statistics: Tensor | None, update: Tensor | None, settings: RoundingSettings, *, inputs: bool
) -> Factor | None:
    """The factor of one side of a weight: of its statistics with the update mixed in, or of the update."""
    if statistics is None:
        statistics, update = update, None
        if statistics is None or not bool(statistics.diagonal().any()):
            return None
    return factor(
        statistics,
        update,
        share=settings.update,
        damping=settings.damping_in if inputs else settings.damping_out,
        order=settings.order,
        name=f"the statistics of its {'inputs' if inputs else 'outputs'}",
    )
