"""The scales of a batch of weights: searched, or those of the base whose format is kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from daq_lightning.numerics.objectives import as_searched
from daq_lightning.numerics.search.search import search_batch, search_scale
from daq_lightning.numerics.search.settings import ScaleSearch

if TYPE_CHECKING:
    from daq_lightning.export.job import Job
    from daq_lightning.export.stream import Pair
    from daq_lightning.numerics.search.stages import SearchResult


def search_scales(job: Job, batch: Sequence[Pair], search: ScaleSearch) -> list[SearchResult]:
    """The scales of weights in one layout; without a base, a weight searched against itself keeps its absmax
    scale. Where the format of the base is kept, they are the base's.

    Args:
        job: What is exported.
        batch: Some of it, all in the layout of the first.
        search: Objective and candidates.

    Raises:
        ValueError: NaN or Inf in a weight, by name.
    """
    if job.kept is not None:
        return [job.kept.merged(pair, _at_absmax(job, pair), job.plan.dtype) for pair in batch]
    layout = batch[0].plan.layout
    return search_batch(
        [as_searched(pair.weight) for pair in batch],
        [as_searched(pair.weight if pair.base is None else pair.base) for pair in batch],
        layout.granularity,
        search,
        scale_format=layout.scale_format,
        fmt=layout.scheme.format,
        names=[pair.plan.spec.name for pair in batch],
        reader_dtype=job.plan.dtype,
        per_group=False,
    )


def _at_absmax(job: Job, pair: Pair) -> SearchResult:
    """A weight at absmax scales, in units of the global scale of the base whose format is kept."""
    assert job.kept is not None
    weight, name = as_searched(pair.weight), pair.plan.spec.name
    factor = job.kept.global_scale(name)
    return search_scale(
        weight,
        weight if pair.base is None else as_searched(pair.base),
        pair.plan.layout.granularity,
        ScaleSearch.absmax(),
        scale_format=pair.plan.layout.scale_format,
        fmt=pair.plan.layout.scheme.format,
        name=name,
        global_scale=None if factor is None else factor.to(weight.device),
    )
