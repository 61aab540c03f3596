"""The scales of the FP8 cache, from the keys and values that the Trainer's own validation caches.

    kv_cache="fp8-calibrated"     before each export, the weights that it exports run over all batches of the
                                  validation; a scale holds the largest of all ranks

It is a validation like that of a judge: loggers, other callbacks and the next step do not see it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from daq_lightning.export.kv_cache import cached_modules, found_scales
from daq_lightning.model.in_front import watched
from daq_lightning.model.swap import put_back
from daq_lightning.training.validate import on_device, validate

if TYPE_CHECKING:
    from daq_lightning.export.job import Job
    from daq_lightning.export.ranks import Ranks
    from daq_lightning.model.live import LiveModel


def calibrated(
    job: Job, trainer: Trainer, model: LiveModel, state: Mapping[str, Tensor] | None, ranks: Ranks
) -> Job:
    """The job with the scales of its cache, where these are to be found on data. A collective.

    Args:
        job: The export.
        trainer: In its fit.
        model: The model, with the weights that are exported.
        state: The saved state that they are; None for the module as it is.
        ranks: Who exports.

    Raises:
        ValueError: A layer that is not seen, or NaN, by name.
        Whatever validation raises: without scales there is no export.
    """
    if job.settings.kv_cache != "fp8-calibrated":
        return job
    rank_zero_info("Validating, to find the scales of the FP8 cache of keys and values.")
    modules = ranks.together(lambda: model.architecture.modules(cached_modules(job.plan)))
    with on_device(trainer), put_back(trainer.lightning_module) as swap:
        if state is not None:
            swap.state(state)
        with watched(modules) as seen:
            ranks.together(lambda: validate(trainer))
    parts = ranks.gather((seen.peaks(), seen.tokens))
    peaks: dict[str, tuple[float, float]] = {}
    for found, _ in parts:
        for name, pair in found.items():
            both = torch.tensor([pair, peaks.get(name, (0.0, 0.0))], dtype=torch.float64, device="cpu")
            keys, values = both.amax(0).tolist()  # of a NaN, NaN
            peaks[name] = (keys, values)
    sampler = trainer.distributed_sampler_kwargs or {}
    copies = max(1, ranks.size // sampler.get("num_replicas", 1))  # tensor parallel ranks see the same tokens
    scales = found_scales(
        job.plan,
        peaks,
        found_on="the run's validation data",
        tokens=sum(max(tokens.values(), default=0) for _, tokens in parts) // copies,
    )
    return dataclasses.replace(job, cache=scales)
