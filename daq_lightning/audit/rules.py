"""The rules that readers of an FP8 folder rely on, one function each.

A rule looks at the files as they are stored and yields what is wrong, one line per problem. `CHECKS` lists
them with what to do about it.

Sources: the readers, as listed in `daq_lightning.checkpoint.layouts`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from daq_lightning.audit.kv_rules import check_kv_cache
from daq_lightning.checkpoint.folder import INDEX, MANIFEST, REPORT, SINGLE, config_dtype, read_index
from daq_lightning.checkpoint.kv_cache import is_cache_scale
from daq_lightning.checkpoint.layouts import read_layout
from daq_lightning.checkpoint.tensor_file import read_metadata
from daq_lightning.model.fusion import FUSED
from daq_lightning.model.outline import matches
from daq_lightning.numerics.formats import PerBlock
from daq_lightning.report.figures import ExportReport

if TYPE_CHECKING:
    from daq_lightning.audit.verify import Stored

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_WEIGHT_FILES = frozenset(
    [".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".tmp", ".incomplete"]
)
SUFFIXES = ("_scale_inv", "_scale")


class UnknownError(Exception):
    """What a check builds on is unknown; another check says so."""


def _check_files(stored: Stored) -> Iterator[str]:
    files = sorted({entry.path.name for entry in stored.raw.entries.values()})
    index = read_index(stored.folder)
    if not index and files != [SINGLE]:
        yield f"{', '.join(files[:3])} without {INDEX}: readers expect the index, or one {SINGLE}"
    if index:
        total = sum(entry.nbytes for entry in stored.raw.entries.values())
        claimed = index["metadata"].get("total_size")
        if claimed != total:
            yield f"{INDEX} says total_size {claimed}, its tensors have {total} bytes"
    for file in files:
        metadata = read_metadata(stored.folder / file)
        if metadata.get("format") != "pt":
            expected = '{"format": "pt"}, which transformers needs'
            yield f"{file} has the header metadata {metadata}, expected {expected}"


def _check_leftovers(stored: Stored) -> Iterator[str]:
    used = {entry.path.name for entry in stored.raw.entries.values()}
    for path in sorted(stored.folder.iterdir()):
        if path.name not in used and (
            path.suffix in _WEIGHT_FILES or ".partial-" in path.name or path.name == ".lock"
        ):
            yield f"{path.name} does not belong to the checkpoint"


def _check_config(stored: Stored) -> Iterator[str]:
    config = stored.raw.config
    if not config and stored.manifest is not None and "config.json" not in stored.manifest.files:
        raise UnknownError("the exported module has none, so its own code has to read the codes and scales")
    if not config:
        yield "there is no config.json"
    elif not config.get("quantization_config"):
        yield "config.json has no quantization_config: readers would take the codes for weights"
    else:
        try:
            read_layout(config["quantization_config"])
        except ValueError as error:
            yield str(error).rstrip(".")
    if not stored.codes:
        yield "config.json speaks of FP8, but no tensor holds FP8 codes"
    levels = {"config.json": config} | {
        key: level for key, level in config.items() if isinstance(level, Mapping)
    }
    for where, level in levels.items():
        dtype = config_dtype({key: value for key, value in level.items() if key != "text_config"})
        if dtype not in (torch.bfloat16, torch.float16) and (dtype is not None or where == "config.json"):
            named = level.get("dtype") or level.get("torch_dtype")
            yield f"dtype of {where} is {named}, expected bfloat16 or float16"
    try:
        _ = stored.outline
    except UnknownError as error:
        if config:
            yield str(error.__cause__).rstrip(".")


def _check_scales(stored: Stored) -> Iterator[str]:
    for name, scales in stored.scales.items():
        entry, expected = stored.entry(name), stored.layout.scale_name(name)
        if entry.dtype != torch.float8_e4m3fn or len(entry.shape) != 2:
            yield f"{name} is {entry.dtype} {entry.shape}, expected a matrix of float8_e4m3fn"
        elif scales != [expected]:
            yield f"{name} has {' and '.join(scales) or 'no scale'}, expected exactly {expected}"
        else:
            scale, shape = stored.entry(expected), stored.layout.stored(entry)["scale"].shape
            if (scale.dtype, scale.shape) != (torch.float32, shape):
                yield f"{expected} is {scale.dtype} {scale.shape}, expected float32 {shape}"
    for name in stored.names:
        weight = next(
            (name.removesuffix(suffix) for suffix in SUFFIXES if name.endswith(".weight" + suffix)), None
        )
        if weight is not None:
            holds = stored.entry(weight).dtype if weight in stored.raw.entries else "nothing"
            yield f"{name} is the scale of nothing: {weight} holds {holds}"


def _check_scale_values(stored: Stored) -> Iterator[str]:
    for scale_name in (scale for scales in stored.scales.values() for scale in scales):
        scale = stored.raw[scale_name].float()
        wrong = int((~(scale.isfinite() & (scale > 0))).sum())
        if wrong:
            yield f"{scale_name} has {wrong} values that are not finite and > 0"
        elif stored.layout.scale_format == "ue8m0" and not powers_of_two(scale):
            yield f"{scale_name} is not all powers of two, which scale_fmt ue8m0 promises"
        elif stored.layout.scale_format == "bfloat16" and not bool((scale == scale.bfloat16().float()).all()):
            yield f"{scale_name} has values that bfloat16 cannot hold: transformers would round them"


def powers_of_two(scale: Tensor) -> bool:
    """Whether every scale is a power of two."""
    return bool((torch.frexp(scale.float()).mantissa == 0.5).all())


def _check_values(stored: Stored) -> Iterator[str]:
    for name in stored.names:
        dtype = stored.entry(name).dtype
        if dtype == torch.float8_e4m3fn:
            wrong = int(((stored.raw[name].view(torch.uint8) & 0x7F) == 0x7F).sum())
        elif dtype.is_floating_point and dtype not in FP8 and math.prod(stored.entry(name).shape):
            low, high = stored.raw[name].aminmax()
            wrong = 0 if bool(low.isfinite() & high.isfinite()) else int((~stored.raw[name].isfinite()).sum())
        else:
            wrong = 0
        if wrong:
            yield f"{name} has {wrong} NaN or Inf values"


def _check_sizes(stored: Stored) -> Iterator[str]:
    if isinstance(stored.layout.granularity, PerBlock):
        for name in stored.codes:
            if any(size % 128 for size in stored.entry(name).shape):
                yield f"{name} has the shape {stored.entry(name).shape}"


def _check_modules(stored: Stored) -> Iterator[str]:
    for name in stored.codes:
        role = stored.role(name)
        if role not in ("linear", "expert"):
            what = "not the weight of a Linear module" if role == "other" else f"of the kind {role!r}"
            yield f"{name} is in FP8, but {what}: readers keep it in high precision"


def _check_ignore(stored: Stored) -> Iterator[str]:
    on_disk = {key: name.removesuffix(".weight") for name, key in stored.keys.items()}
    quantized = {stored.keys[name] for name in stored.codes}
    for module in stored.outline.linear_modules:
        key = f"{module}.weight"
        if key not in quantized:
            for name in dict.fromkeys((on_disk.get(key, module), module)):
                if not stored.lists(name):
                    yield f"{name} is neither quantized nor listed: readers would look for its codes"
    for name in stored.names:
        module = name.removesuffix(".weight")
        if stored.role(name) not in ("linear", "expert"):
            continue
        listed = sorted(
            {alias for alias in (module, stored.keys[name].removesuffix(".weight")) if stored.lists(alias)}
        )
        if name in stored.codes and listed:
            yield f"{name} is quantized, and {listed[0]} is listed as not quantized"
        elif name not in stored.codes and stored.role(name) == "expert" and module not in listed:
            yield f"{module} is neither quantized nor listed"


def _check_fused(stored: Stored) -> Iterator[str]:
    codes = set(stored.codes)
    for group in FUSED:
        for first in (name for name in stored.names if name.endswith(f".{group[0]}.weight")):
            prefix = first.removesuffix(f"{group[0]}.weight")
            shards = [
                name for name in (f"{prefix}{leaf}.weight" for leaf in group) if name in stored.raw.entries
            ]
            if 0 < len(codes.intersection(shards)) < len(shards):
                yield f"of {', '.join(shards)} only {', '.join(sorted(codes.intersection(shards)))} in FP8"


def _check_ties(stored: Stored) -> Iterator[str]:
    names = {key: name for name, key in stored.keys.items()}
    for tied, source in stored.outline.ties.items():
        if tied in names and source in names and names[tied] != names[source]:
            mine, other = stored.raw[names[tied]], stored.raw[names[source]]
            if mine.dtype != other.dtype or mine.shape != other.shape or not bool((mine == other).all()):
                yield f"{names[tied]} differs from {names[source]}, with which config.json ties it"


def _check_complete(stored: Stored) -> Iterator[str]:
    outline, counts = stored.outline, Counter(stored.keys.values())
    part = {key: stored.entry(name) for name, key in stored.keys.items()}
    for key, shape in outline.parameters.items():
        if key in outline.ties or key in outline.copies or matches(outline.may_lack, key):
            continue
        if key not in part:
            yield f"{key} is missing"
        elif len(shape) == 3 and len(part[key].shape) == 2 and counts[key] % shape[0]:
            yield f"{key} has {counts[key]} parts for {shape[0]} experts"
    for name, key in stored.keys.items():
        scale = is_cache_scale(name) or name.endswith(tuple(".weight" + suffix for suffix in SUFFIXES))
        if key not in outline.tensors and not scale and not matches(outline.may_add, key):
            yield f"{name} is no tensor of {outline.model}"


def _check_report(stored: Stored) -> Iterator[str]:
    if not (stored.folder / REPORT).exists() and stored.manifest is None:
        return  # of another maker
    report, manifest = ExportReport.load(stored.folder), stored.manifest
    differing = sorted({tensor.name for tensor in report.tensors} ^ set(stored.codes))
    if differing:
        yield f"{REPORT} and the files differ in which tensors are quantized: {', '.join(differing[:3])}"
    config = stored.raw.config.get("quantization_config")
    if config and manifest is not None and manifest.quantization_config != config:
        yield f"{MANIFEST} has another quantization_config than config.json"


CheckFunction: TypeAlias = "Callable[[Stored], Iterator[str]]"
CHECKS: tuple[tuple[str, str, CheckFunction], ...] = (
    ("files", "Export again, or copy the folder again with all its files.", _check_files),
    (
        "nothing stale",
        "Remove these files: a reader may load them instead of the checkpoint.",
        _check_leftovers,
    ),
    ("config.json", "Restore the config.json of the export, or export again.", _check_config),
    ("one scale per weight", "Export again: a reader would use other scales, or none.", _check_scales),
    ("scale values", "Export again: these scales do not survive loading.", _check_scale_values),
    (
        "KV cache",
        "Export again: keys and values would be cached with scales that nobody chose.",
        check_kv_cache,
    ),
    ("finite values", "Export again from a checkpoint before the training run diverged.", _check_values),
    ("sizes fit the blocks", "Export with --scheme FP8_DYNAMIC, which has one scale per row.", _check_sizes),
    ("quantized modules", "Export again and keep them: --ignore NAME.", _check_modules),
    (
        "ignore list",
        "Correct the list in quantization_config: full names of all Linear modules not in FP8.",
        _check_ignore,
    ),
    (
        "fused projections",
        "Export again: quantize all of them, or name all of them with --ignore.",
        _check_fused,
    ),
    (
        "tied embeddings",
        "Remove the tied copy, or set tie_word_embeddings to false and export again.",
        _check_ties,
    ),
    ("complete", "Export again from a complete checkpoint.", _check_complete),
    ("report", "Export again: files and report are not of one export.", _check_report),
)
