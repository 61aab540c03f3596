"""The export of two models that exist already, without a Trainer."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Literal, TypeAlias

from torch import Tensor

from daq_lightning.checkpoint.budget import memory_of
from daq_lightning.checkpoint.kv_cache import KVCache
from daq_lightning.checkpoint.manifest import ChainFrom
from daq_lightning.checkpoint.reader import Checkpoint
from daq_lightning.checkpoint.schemes import DEFAULT_SHARD_BYTES, Container, SchemeName
from daq_lightning.checkpoint.urls import check_local
from daq_lightning.export.calibration import Calibration
from daq_lightning.export.checks import check_device
from daq_lightning.export.job import prepare
from daq_lightning.export.kv_text import calibrated_on, check_text
from daq_lightning.export.mixed import within_budget
from daq_lightning.export.place import opened as opened_place
from daq_lightning.export.ranks import ALONE, Ranks
from daq_lightning.export.run import run
from daq_lightning.export.settings import ExportSettings
from daq_lightning.export.source import Source
from daq_lightning.model.hub import local_folder, push_folder
from daq_lightning.numerics.formats import ScaleFormat
from daq_lightning.numerics.rounding.settings import RoundingChoice
from daq_lightning.numerics.search.settings import ScaleSearch
from daq_lightning.report.figures import ExportReport

Weights: TypeAlias = str | os.PathLike[str] | Mapping[str, Tensor]


def export_checkpoint(
    weights: Weights,
    base: Weights,
    out: str | os.PathLike[str],
    *,
    adapter: str | os.PathLike[str] | None = None,
    scheme: SchemeName = "auto",
    search: ScaleSearch | None = None,
    rounding: RoundingChoice = "auto",
    calibrate: str | os.PathLike[str] | None = None,
    ignore: Iterable[str] = (),
    container: Container | None = None,
    scale_format: ScaleFormat | None = None,
    kv_cache: KVCache | None = None,
    kv_text: str | os.PathLike[str] | None = None,
    missing_base: Literal["error", "absmax"] = "error",
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    budget: str | int | None = None,
    ladder: Iterable[str] = (),
    parent: str | None = None,
    chain_from: ChainFrom | None = None,
    device: str | None = None,
    max_memory: str | int | None = None,
    progress: bool = False,
    distributed: bool = False,
    resume: bool = False,
    push_to_hub: str | None = None,
    private: bool = False,
) -> ExportReport:
    """Writes a quantized checkpoint whose scales preserve the difference between two sets of weights.

    Args:
        weights: The fine-tuned model: a Hugging Face folder, `org/name` (or `org/name@revision`) on the Hub,
            what `load_checkpoint` returned of a folder, or checkpoint names -> tensors. A mapping that
            computes its tensors is read once and held.
        base: The model it was trained from, likewise. A quantized folder is dequantized.
        out: Destination folder. An earlier export there is replaced on success; anything else is refused.
            Or a URL of fsspec ("s3://bucket/fp8"): written to a folder in TMPDIR, then uploaded, the manifest
            last. One export at a time writes there; a second one is refused.
        adapter: Folder of a LoRA adapter (PEFT), merged into `weights` (then the folder it was trained on) in
            float32.
        scheme: "FP8_BLOCK" (a scale per 128 x 128 block), "FP8_DYNAMIC" (per channel), "FP8A16" (per channel,
            16-bit activations), or "auto": blocks where all sizes are multiples of 128, else channels. Or
            "MXFP8", "W8A8", "W4A16", "W4A16_ASYM", these two with "_G32" for groups of 32, "NVFP4A16",
            "MXFP4A16": see docs/formats.md. "keep": format and scales of `base`, a quantized folder, so that
            an adapter trained on it comes through: see docs/qlora.md.
        search: Objective and candidates of the scale search; None takes the defaults of `ScaleSearch`.
        rounding: "nearest"; "curvature" for codes whose errors cancel where `calibrate` shows, or else the
            update says, that the model is sensitive, at plain scales unless `search` is other than the
            default; "auto" is "nearest" here.
        calibrate: A .txt or .jsonl file whose text shows it, with `rounding="curvature"`; or "self" for a
            text that the model writes. A causal language model in a folder is needed; its layers are in
            memory one at a time, but for "self", where all are.
        ignore: Modules to keep in high precision: full names, or regular expressions of full names after
            `re:`.
        container: How tensors are named and described: "fp8" or "compressed-tensors"; None takes the scheme's
            usual one.
        scale_format: None for what the readers keep, or "ue8m0" for scales that are powers of two.
        kv_cache: For servers that cache keys and values in FP8: "fp8" with scales of 1.0, "fp8-calibrated"
            with scales of each layer from `kv_text`. Takes the compressed-tensors container.
        kv_text: A .txt or .jsonl file that the fine-tuned model reads to find those scales.
        missing_base: What to do with a weight that the base lacks or has in another shape: "error", or
            "absmax" to quantize it without a search and say so in the report.
        max_shard_bytes: Bytes at which a new safetensors file begins.
        budget: What the quantized weights may take, scales included: mean bits of one ("4.5 bits") or bytes
            of all ("2.1 GB"). All are measured first, and those that lose most for their bytes go up from
            `scheme` to larger formats.
        ladder: With a budget, the schemes from the lowest up, "16" for 16 bit; left out, four bits go up to
            FP8A16 (FP8_DYNAMIC if there are experts), and all to 16.
        parent: Folder of the export that this stage of a chain follows; None takes `base` if it is one.
        chain_from: Makes this a stage of a chain: whether it was trained from the parent's high-precision
            "weights" or its "deployed" ones.
        device: Where to search; None searches where each weight lies.
        max_memory: What tensors on their way through the export may take at a time, in bytes or as "2GB", in
            each process and beyond what it has already: bounds reading ahead and writing behind.
        progress: Whether to show a progress bar.
        distributed: Whether all ranks of `torch.distributed` call this and share the work, each with whole
            files. They need a file system in common.
        resume: Whether to go on from what an export to the same place, which was cut off, has completed, and
            to leave what is complete if this one is cut off too. Only between folders.
        push_to_hub: `org/name` to upload the export to, when it is complete.
        private: Whether a repository that is created for it is private.

    Returns:
        The report, also written as `daq_report.json`.

    Raises:
        CheckpointError: A folder cannot be read, base and weights do not fit, the destination cannot be
            written, or no rungs meet the budget. `HubError`, of these: the Hub lacks a model, or the upload
            failed; the export stays.
        ValueError: NaN or Inf in a weight, a device that is not there, or settings that contradict each
            other.

    Example:
        >>> import tempfile, torch
        >>> export_checkpoint("fine-tuned/", "base/", "fp8/", scheme="FP8_BLOCK")  # doctest: +SKIP
        >>> base = {"layer.weight": torch.linspace(-1, 1, 64).reshape(8, 8)}
        >>> post = {"layer.weight": 1.01 * base["layer.weight"]}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     export_checkpoint(post, base, f"{folder}/fp8").scheme
        'FP8_DYNAMIC'

    Source: arXiv 2603.22324, Algorithm 1.
    """
    parent = None if parent is None else os.path.expanduser(parent)
    settings = ExportSettings(
        scheme=scheme,
        search=ScaleSearch() if search is None else search,
        rounding=rounding,
        ignore=tuple(ignore),
        container=container,
        scale_format=scale_format,
        kv_cache=kv_cache,
        missing_base=missing_base,
        max_shard_bytes=max_shard_bytes,
        budget=budget,
        ladder=tuple(ladder),
    )
    text = None if kv_text is None else Path(kv_text)
    check_text(kv_cache, text)
    most = None if max_memory is None else memory_of(max_memory)
    ranks = Ranks.all() if distributed else ALONE
    try:

        def opened() -> tuple[Source, Mapping[str, Tensor], Calibration | None]:
            check_device(device)
            for role, given in (("weights", weights), ("base", base), ("adapter", adapter)):
                check_local(given, role)
            before = base if isinstance(base, Mapping) else Checkpoint(local_folder(base))
            after = weights if isinstance(weights, Mapping) else local_folder(weights)
            source = Source.of(after, None if adapter is None else local_folder(adapter))
            text = None if calibrate is None else os.path.expanduser(calibrate)
            return source, before, None if text is None else Calibration.of(text, source, settings)

        source, before, calibration = ranks.together(opened)
        job = prepare(
            source,
            before,
            settings,
            parent=parent,
            chain_from=chain_from,
            ranks=ranks,
            calibration=calibration,
            max_memory=most,
        )
        with contextlib.ExitStack() as stack, opened_place(out, ranks, job) as place:  # before any measuring
            job = within_budget(job, stack=stack, device=device, progress=progress, ranks=ranks)
            job = calibrated_on(job, text, device=device, ranks=ranks)
            write = partial(run, job, device=device, progress=progress, ranks=ranks, resume=resume)
            report = place.export(job, write, resume=resume)
            if push_to_hub is not None:
                ranks.first(lambda: push_folder(place.folder, push_to_hub, private=private))
        return report
    finally:
        ranks.close()
