"""The scales of the FP8 cache, from the keys and values of a text.

    text -> windows of tokens -> the fine-tuned model, in the dtype of the export -> the largest of each layer

The whole model is in memory for as long as this takes, on rank 0. A window is read by itself, and no token is
filled in: what is seen are keys and values of the text alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from daq_lightning.checkpoint.reader import Checkpoint
from daq_lightning.checkpoint.text_file import read_documents
from daq_lightning.export.kv_cache import CacheScales, cached_modules, found_scales
from daq_lightning.export.ranks import ALONE, Ranks
from daq_lightning.model.architecture import Architecture
from daq_lightning.model.from_folder import FolderModel
from daq_lightning.model.halves import Halves
from daq_lightning.model.in_front import watched
from daq_lightning.model.tokens import load_tokenizer, most_tokens, windows_of

if TYPE_CHECKING:
    from daq_lightning.export.job import Job

_CONTEXT, _BATCH = 512, 8


def check_text(kv_cache: str | None, text: str | Path | None) -> None:
    """Raises ValueError where scales are to be found and there is no text, or the other way round."""
    if kv_cache == "fp8-calibrated" and text is None:
        raise ValueError(
            "kv_cache='fp8-calibrated' needs a text that shows keys and values: pass kv_text='FILE', a .txt "
            "or .jsonl file, or use kv_cache='fp8', whose scales are 1."
        )
    if text is not None and kv_cache != "fp8-calibrated":
        raise ValueError(
            f"kv_text={str(text)!r} is read for the scales of kv_cache='fp8-calibrated', and kv_cache is "
            f"{kv_cache!r}: pass both, or none."
        )


def calibrated_on(
    job: Job, text: str | Path | None, *, device: str | None = None, ranks: Ranks = ALONE
) -> Job:
    """The job with the scales of its cache, where these are to be found on data. A collective.

    Args:
        job: The export of a folder, with or without an adapter.
        text: A .txt or .jsonl file, see `daq_lightning.checkpoint.text_file`; all of it is read.
        device: Where the model runs; None takes the CPU.
        ranks: Who exports.

    Raises:
        ValueError: As for `check_text`; a text or a tokenizer that cannot be read; NaN.
        CheckpointError: A model that is no folder, or cannot be run.
    """
    check_text(job.settings.kv_cache, text)
    if text is None:
        return job
    scales = ranks.first(lambda: _found_on(job, Path(text).expanduser(), device or "cpu"))
    return dataclasses.replace(job, cache=scales)


def _found_on(job: Job, text: Path, device: str) -> CacheScales:
    source = job.source.weights
    if not isinstance(source, Checkpoint) or not source.path.is_dir():
        raise ValueError(
            "kv_text is read by the model of a folder, with its tokenizer: pass the folder instead of a "
            "mapping."
        )
    tokenizer = load_tokenizer([*reversed(source.places)])  # that of an adapter first
    context = min(_CONTEXT, most_tokens(source.config) or _CONTEXT)
    windows = windows_of(read_documents(text), tokenizer, context)
    model = FolderModel(source.path, len(source.raw)).load(source, job.plan.dtype).to(device)
    halves = Halves(model, str(source.path))
    halves.try_on(windows[0])
    with watched(Architecture(model).modules(cached_modules(job.plan))) as seen:
        for tokens_BT in _batches(windows):
            halves.hidden(tokens_BT)
    return found_scales(
        job.plan,
        seen.peaks(),
        found_on=text.name,
        tokens=max(seen.tokens.values(), default=0),
        text=text,
    )


def _batches(windows: Sequence[Sequence[int]]) -> Iterator[Tensor]:
    """Windows of one length together."""
    for _, group in groupby(sorted(windows, key=len), key=len):
        same = list(group)
        for start in range(0, len(same), _BATCH):
            yield torch.tensor(same[start : start + _BATCH], dtype=torch.int64, device="cpu")
