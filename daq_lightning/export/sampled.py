"""The sampled figures of a batch: outcomes by the size of the change, and for a few weights the objective.

Both come from the codes and scales that are written. What is looked at depends on shapes and names alone, so
that any number of ranks, and any batches, say the same.

Legend: S groups of the samples of a batch, E elements of a group.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from daq_lightning.numerics.backends import delta_stats
from daq_lightning.numerics.bins import OUTCOMES, STEP_BINS
from daq_lightning.numerics.formats import PerChannel
from daq_lightning.numerics.objectives import score
from daq_lightning.numerics.quantize import dequantize, min_max_scale, quantize
from daq_lightning.numerics.sample import MOST_ELEMENTS, Sample, sample_of
from daq_lightning.numerics.search.curve import objective_curve, tried
from daq_lightning.numerics.search.stages import SearchResult
from daq_lightning.numerics.steps import count_by_step
from daq_lightning.report.names import split_name
from daq_lightning.report.sampled import AlphaCurve, ByStep, Outcomes

if TYPE_CHECKING:
    from daq_lightning.export.job import Job
    from daq_lightning.export.stream import Batch, Pair

CURVES = 6
"""Weights whose objective is recorded over alpha."""
_LEAST_POINTS = 3  # of a curve


class Looked(NamedTuple):
    """The sampled figures of one weight, still on its device.

    Attributes:
        sampled: Elements.
        counts: int64 (2, B, 3): searched and absmax, bins, outcomes.
        curve: Scores under each of `alpha`, and last that of the alphas found; None where none is recorded.
        alpha: What the search could try, on the CPU.
    """

    sampled: int
    counts: Tensor
    curve: Tensor | None
    alpha: Tensor

    def packed(self) -> list[Tensor]:
        """All its numbers, as float64 vectors."""
        return [self.counts.double().flatten(), *([] if self.curve is None else [self.curve])]

    def by_step(self, arrived: Iterator[Tensor]) -> ByStep:
        """The counts, from the next of the vectors that have come to the CPU."""
        sides = []
        for side in next(arrived).reshape(2, STEP_BINS, len(OUTCOMES)).long().tolist():
            sides.append(Outcomes(**dict(zip(OUTCOMES, map(tuple, zip(*side, strict=True)), strict=True))))
        return ByStep(sampled=self.sampled, searched=sides[0], absmax=sides[1])

    def alpha_curve(self, arrived: Iterator[Tensor]) -> AlphaCurve | None:
        """The curve, from the next of the vectors, if there is one."""
        if self.curve is None:
            return None
        *scores, found = (value if math.isfinite(value) else None for value in next(arrived).tolist())
        alpha = tuple(self.alpha.tolist())
        return AlphaCurve(sampled=self.sampled, alpha=alpha, score=tuple(scores), found=found)


def curve_names(job: Job) -> frozenset[str]:
    """The weights whose objective is recorded: of every projection in turn, and evenly over the depth.

    None of codes along a curvature: a curve over alpha is of nearest rounding, which is not what is written.
    None of a base's own scales, which are not searched.
    """
    if job.settings.by_curvature or job.kept is not None or len(tried(job.settings.search)) < _LEAST_POINTS:
        return frozenset()
    by_projection: dict[str, list[str]] = {}
    for tensor in job.plan.quantized:
        if tensor.spec.name in job.base_names:
            by_projection.setdefault(split_name(tensor.spec.name)[2], []).append(tensor.spec.name)
    kinds = list(by_projection.values())
    chosen = []
    for turn in range(CURVES if kinds else 0):
        names = kinds[turn * len(kinds) // CURVES if len(kinds) > CURVES else turn % len(kinds)]
        chosen.append(names[(2 * turn + 1) * len(names) // (2 * CURVES)])
    return frozenset(chosen)


def look(
    job: Job, batch: Batch, results: Sequence[SearchResult], curves: frozenset[str]
) -> list[Looked | None]:
    """Looks at a sample of each weight of a batch; None for one without a base.

    Args:
        job: What is exported.
        batch: Weights with their bases.
        results: Their codes and scales, as they are written.
        curves: Names of the weights whose objective is recorded.
    """
    looked: list[Looked | None] = [None] * len(batch)
    compared: dict[tuple[int, ...], list[int]] = {}  # by shape: weights that share an input may differ
    for index, pair in enumerate(batch):
        if pair.base is not None:
            compared.setdefault(pair.plan.spec.shape, []).append(index)
    for shape, places in compared.items():
        sample = sample_of((shape[0], shape[1]), batch[places[0]].plan.layout.granularity)
        step = max(1, MOST_ELEMENTS // sample.elements)  # a few small weights at a time, in one thread
        for start in range(0, len(places), step):
            part = places[start : start + step]
            found = _look_at(job, sample, [batch[at] for at in part], [results[at] for at in part], curves)
            for at, figures in zip(part, found, strict=True):
                looked[at] = figures
    return looked


def _look_at(
    job: Job,
    sample: Sample,
    pairs: Sequence[Pair],
    results: Sequence[SearchResult],
    curves: frozenset[str],
) -> list[Looked]:
    """The figures of some pairs together: operations on small tensors take as long for one as for several."""
    layout, search = pairs[0].plan.layout, job.settings.search
    fmt = layout.scheme.format
    weight_SE = torch.cat([sample.of_weight(pair.weight).float() for pair in pairs])
    base_SE = torch.cat([sample.of_weight(pair.base).float() for pair in pairs if pair.base is not None])
    # as bytes: torch cannot index every kind of codes
    codes_SE = torch.cat([sample.of_weight(result.codes.view(torch.uint8)) for result in results])
    scale_S1 = torch.cat([sample.of_groups(result.scale.flatten()) for result in results])[:, None]
    shared = [result.global_scale for result in results if result.global_scale is not None]
    global_S1 = torch.cat(shared).repeat_interleave(len(sample.cells))[:, None] if shared else None
    zeros = [sample.of_groups(result.zero.flatten()) for result in results if result.zero is not None]
    zero_S1 = torch.cat(zeros)[:, None] if zeros else None
    rows = PerChannel()
    plain_S1, plain_zero_S1 = min_max_scale(
        weight_SE, rows, scale_format=layout.scale_format, fmt=fmt, global_scale=global_S1
    )
    plain_SE = quantize(weight_SE, plain_S1, rows, fmt, plain_zero_S1)
    counts = count_by_step(
        weight_SE,
        base_SE,
        dequantize(codes_SE.view(fmt.dtype), scale_S1, rows, zero=zero_S1),
        dequantize(plain_SE, plain_S1, rows, zero=plain_zero_S1),
        plain_S1,
        tensors=len(pairs),
        fmt=fmt,
    )
    looked, alpha = [], tried(search)
    for index, (pair, result) in enumerate(zip(pairs, results, strict=True)):
        curve = None
        if pair.plan.spec.name in curves:
            groups = slice(index * len(sample.cells), (index + 1) * len(sample.cells))
            scores_K = objective_curve(
                weight_SE[groups],
                base_SE[groups],
                plain_S1[groups],
                search,
                scale_format=layout.scale_format,
                fmt=fmt,
                global_scale=result.global_scale,
            )
            zero_S = None if zero_S1 is None else zero_S1[groups]
            found = delta_stats(weight_SE[groups], base_SE[groups], scale_S1[groups], rows, fmt, zero_S)
            found = found.total().map(lambda field: field[0])
            curve = torch.cat([scores_K, score(found, search.metric, tau=search.tau)[None]])
        both = torch.stack([side[index] for side in counts])
        looked.append(Looked(sampled=sample.elements, counts=both, curve=curve, alpha=alpha))
    return looked
