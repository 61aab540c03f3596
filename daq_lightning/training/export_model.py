"""An export without a Trainer: of a model in memory, in a loop of one's own, after training or in it.

    model = AutoModelForCausalLM.from_pretrained("base/")
    ...                                                        any loop: Fabric, transformers' Trainer, none
    export_model(model, "base/", "fp8/")

The model is read as the callback reads it, one weight at a time, and only read.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from daq_lightning.checkpoint.manifest import ChainFrom, Lineage
from daq_lightning.checkpoint.reader import Checkpoint
from daq_lightning.checkpoint.schemes import DEFAULT_SHARD_BYTES, SchemeName
from daq_lightning.export.checks import check_device
from daq_lightning.export.job import lineage_of, prepare
from daq_lightning.export.mixed import within_budget
from daq_lightning.export.place import check_place
from daq_lightning.export.place import opened as opened_place
from daq_lightning.export.ranks import Ranks
from daq_lightning.export.run import run
from daq_lightning.export.settings import ExportSettings
from daq_lightning.export.source import Source
from daq_lightning.model.complete import check_complete
from daq_lightning.model.hub import local_folder
from daq_lightning.model.live import LiveModel
from daq_lightning.model.sharded import is_sharded
from daq_lightning.numerics.rounding.settings import RoundingChoice
from daq_lightning.numerics.search.settings import ScaleSearch
from daq_lightning.report.figures import ExportReport
from daq_lightning.training.published import warn_if_unchanged
from daq_lightning.training.source import live_source

_INSIDE = {
    "_FabricModule": "_original_module",
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "FullyShardedDataParallel": "module",
    "DeepSpeedEngine": "module",
    "OptimizedModule": "_orig_mod",
}
"""Class of a wrapper -> where it has the module."""


def export_model(
    module: nn.Module,
    base: str | os.PathLike[str] | Mapping[str, Tensor],
    out: str | os.PathLike[str],
    *,
    scheme: SchemeName = "auto",
    search: ScaleSearch | None = None,
    rounding: RoundingChoice = "auto",
    ignore: Iterable[str] = (),
    scale_format: Literal["ue8m0"] | None = None,
    kv_cache: Literal["fp8"] | None = None,
    budget: str | int | None = None,
    ladder: Iterable[str] = (),
    merge_adapters: bool = True,
    missing_base: Literal["error", "absmax"] = "error",
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    parent: str | None = None,
    chain_from: ChainFrom | None = None,
    submodule: str | None = None,
    tokenizer: Any = None,
    device: str | None = None,
    progress: bool = False,
) -> ExportReport:
    """Writes a model in memory as a quantized checkpoint that keeps what training changed.

    What `DeltaAwareQuantization` does at the end of a fit, for a loop without a Trainer. Weights, gradients,
    modes and random numbers of the model stay as they are. A curvature is not collected: for that, use the
    callback, or save the model and `export_checkpoint(calibrate=FILE)`.

    Where `torch.distributed` is initialized this is a collective: all ranks call it and share the work, with
    a file system in common. The files are the same for any number of ranks.

    Args:
        module: A transformers or PEFT model, or a module that holds one; as it is, or wrapped by Fabric, DDP,
            FSDP or `torch.compile`.
        base: The weights before training: a Hugging Face folder, `org/name` on the Hub, or a copy of the
            module's `state_dict` (`copy.deepcopy`; it must not be sharded). "auto": the frozen weights under
            PEFT adapters.
        out: Destination: a folder, or a URL of fsspec. An earlier export there is replaced on success;
            anything else is refused.
        scheme: As for `export_checkpoint`.
        search: As for `export_checkpoint`.
        rounding: "nearest"; "curvature" for codes along the update; "auto" is "nearest" here, but with
            `scheme="keep"`.
        ignore: Modules to keep in high precision: full names, or regular expressions after `re:`.
        scale_format: None, or "ue8m0" for scales that are powers of two.
        kv_cache: None, or "fp8" for servers that cache keys and values in FP8, with scales of 1.0.
        budget: As for `export_checkpoint`.
        ladder: As for `export_checkpoint`.
        merge_adapters: Whether PEFT adapters are merged; else the export holds the frozen model, and its
            subfolder `adapter` the adapters.
        missing_base: A weight without its like in the base is an "error", or gets a plain "absmax" scale.
        max_shard_bytes: Bytes at which a new safetensors file begins.
        parent: As for `export_checkpoint`.
        chain_from: As for `export_checkpoint`.
        submodule: Name of the model in `module`; None finds the one `PreTrainedModel`.
        tokenizer: What to save beside the weights: a tokenizer or processor.
        device: Where to search; None searches where each weight lies.
        progress: Whether to show a progress bar.

    Returns:
        The report, also written as `daq_report.json`; the same on every rank.

    Raises:
        CheckpointError: A folder cannot be read, base and model do not fit, or the destination cannot be
            written.
        ValueError: A base that is no copy, several models to choose from, layers that the model's config
            does not have, NaN or Inf in a weight, or settings that contradict each other.

    Example:
        >>> import copy, tempfile, torch
        >>> from daq_lightning import export_model
        >>> module = torch.nn.Sequential(torch.nn.Linear(16, 16))
        >>> base = copy.deepcopy(module.state_dict())
        >>> with torch.no_grad():  # stands for training
        ...     _ = module[0].weight.mul_(1.01)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     export_model(module, base, f"{folder}/fp8").scheme
        'FP8_DYNAMIC'
    """
    if kv_cache == "fp8-calibrated":  # type: ignore[comparison-overlap]
        raise ValueError(
            "kv_cache='fp8-calibrated' finds scales on data, which there is none of here: use "
            "kv_cache='fp8', whose scales are 1, or save the model and export that folder with kv_text=FILE."
        )
    settings = ExportSettings(
        scheme=scheme,
        search=ScaleSearch() if search is None else search,
        rounding=rounding,
        ignore=tuple(ignore),
        scale_format=scale_format,
        kv_cache=kv_cache,
        missing_base=missing_base,
        max_shard_bytes=max_shard_bytes,
        budget=budget,
        ladder=tuple(ladder),
    )
    ranks = Ranks.all()

    def opened() -> tuple[LiveModel, Source, Mapping[str, Tensor], Lineage]:
        check_device(device)
        check_place(out, write=False)
        inner = unwrapped(module)
        model = LiveModel(inner, submodule, merge=merge_adapters, trained=module)
        check_complete(model)
        before, lineage = _base_of(model, base)
        return model, live_source(model, SimpleNamespace(tokenizer=tokenizer), inner), before, lineage

    try:
        with torch.no_grad(), contextlib.ExitStack() as stack:
            model, source, before, lineage = ranks.together(opened)
            model.gather_adapters()
            job = prepare(
                source,
                before,
                settings,
                lineage=lineage,
                parent=None if parent is None else os.path.expanduser(parent),
                chain_from=chain_from,
                ranks=ranks,
            )
            place = stack.enter_context(opened_place(out, ranks, job))
            job = within_budget(job, stack=stack, device=device, progress=progress, ranks=ranks)
            report = place.export(job, partial(run, job, device=device, progress=progress, ranks=ranks))
    finally:
        ranks.close()
    warn_if_unchanged(report)
    return report


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside of what Fabric, DDP, FSDP, DeepSpeed and `torch.compile` put around it.

    Example:
        >>> import torch
        >>> unwrapped(torch.nn.DataParallel(torch.nn.Linear(2, 2)))
        Linear(in_features=2, out_features=2, bias=True)
    """
    names = (_INSIDE.get(kind.__name__) for kind in type(module).__mro__)
    name = next(filter(None, names), None)
    return module if name is None else unwrapped(getattr(module, name))


def _base_of(
    model: LiveModel, base: str | os.PathLike[str] | Mapping[str, Tensor]
) -> tuple[Mapping[str, Tensor], Lineage]:
    """The weights before training, and what a manifest says of where they were."""
    if isinstance(base, Mapping) and not isinstance(base, Checkpoint):
        _check_copy(model, base)
        return model.saved(base), lineage_of({})
    if not isinstance(base, Checkpoint) and os.fspath(base) in ("auto", "snapshot", "memory"):
        if base == "auto" and model.adapters is not None:
            frozen = model.view(model.adapters.base, collective=model.sharded)
            return frozen, Lineage(base_kind="adapters", base_path="", root="")
        raise ValueError(
            f"base={base!r}: without PEFT adapters the weights before training are not in the model. Pass "
            "the folder that it was loaded from, or copy.deepcopy(module.state_dict()) from before training."
        )
    folder = base if isinstance(base, Checkpoint) else Checkpoint(local_folder(base))
    return folder, lineage_of(folder)


def _check_copy(model: LiveModel, base: Mapping[str, Tensor]) -> None:
    """Refuses a state that changes as the model does, and one of which each rank has a part."""
    tensors = [tensor for tensor in base.values() if isinstance(tensor, Tensor)]
    if any(map(is_sharded, tensors)):
        raise ValueError(
            "The base is the state of a sharded model, of which each rank has a part: pass the folder that "
            "the model was loaded from."
        )
    mine = {place.data_ptr() for place in model.places().values() if isinstance(place, Tensor)}
    if mine & {tensor.data_ptr() for tensor in tensors if tensor.numel()}:
        raise ValueError(
            "The base shares memory with the model, so it has changed with it: state_dict() holds no copies. "
            "Take copy.deepcopy(module.state_dict()) before training, or pass the folder that the model was "
            "loaded from."
        )
