"""The scales of a batch, searched in the layout that the plan gives it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from daq_lightning.numerics.objectives import as_searched
from daq_lightning.numerics.search.search import search_batch

if TYPE_CHECKING:
    from daq_lightning.export.job import Job
    from daq_lightning.export.stream import Pair
    from daq_lightning.numerics.search.settings import ScaleSearch
    from daq_lightning.numerics.search.stages import SearchResult


def search_scales(job: Job, batch: Sequence[Pair], search: ScaleSearch) -> list[SearchResult]:
    """The scales of weights in one layout; without a base, a weight searched against itself keeps its absmax
    scale.

    Args:
        job: What is exported.
        batch: Some of it, all in the layout of the first.
        search: Objective and candidates.

    Raises:
        ValueError: NaN or Inf in a weight, by name.
    """
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
    )
