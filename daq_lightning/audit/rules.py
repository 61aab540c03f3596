"""The rules that readers of a quantized folder rely on, one function each; those of single tensors are in
`tensor_rules`.

A rule looks at the files as they are stored and yields what is wrong, one line per problem. `CHECKS` lists
them with what to do about it.

Sources: the readers, as listed in `daq_lightning.checkpoint.layouts`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, TypeAlias

import torch

from daq_lightning.audit.kv_rules import check_kv_cache
from daq_lightning.audit.tensor_rules import (
    check_packing,
    check_parts,
    check_scale_values,
    check_sizes,
    check_values,
)
from daq_lightning.checkpoint.folder import INDEX, MANIFEST, REPORT, SINGLE, config_dtype, read_index
from daq_lightning.checkpoint.found import SUFFIXES
from daq_lightning.checkpoint.kv_cache import is_cache_scale
from daq_lightning.checkpoint.layouts import read_layouts
from daq_lightning.checkpoint.layouts.parts import GLOBAL_SCALE
from daq_lightning.checkpoint.tensor_file import read_metadata
from daq_lightning.model.fusion import joined
from daq_lightning.model.outline import matches
from daq_lightning.report.figures import ExportReport

if TYPE_CHECKING:
    from daq_lightning.audit.verify import Stored

_WEIGHT_FILES = frozenset(
    [".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".tmp", ".incomplete"]
)


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
            read_layouts(config["quantization_config"])
        except ValueError as error:
            yield str(error).rstrip(".")
    if not stored.codes:
        yield "config.json speaks of quantized weights, but no tensor holds codes"
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


def _check_modules(stored: Stored) -> Iterator[str]:
    for name in stored.codes:
        role = stored.role(name)
        if role not in ("linear", "expert", "upcast"):
            what = "not the weight of a Linear module" if role == "other" else f"of the kind {role!r}"
            yield f"{name} is quantized, but {what}: readers keep it in high precision"


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
    codes, present = set(stored.codes), set(stored.names)
    for name in stored.names:
        module = name.removesuffix(".weight")
        prefix, dot, leaf = module.rpartition(".")
        shards = [f"{prefix}{dot}{sibling}.weight" for sibling in joined(module)]
        if leaf != joined(module)[0] or len(shards) == 1:
            continue
        shards = [shard for shard in shards if shard in present]
        if 0 < len(codes.intersection(shards)) < len(shards):
            quantized = ", ".join(sorted(codes.intersection(shards)))
            yield f"of {', '.join(shards)} only {quantized} quantized"
        yield from _different_globals(stored, [shard for shard in shards if shard in codes])


def _different_globals(stored: Stored, shards: list[str]) -> Iterator[str]:
    """Of global scales servers take one for all weights that they fuse."""
    names = [name for shard in shards for name in stored.found[shard].get(GLOBAL_SCALE, ())]
    values = {name: stored.raw[name].flatten().tolist() for name in names}
    if len({tuple(value) for value in values.values()}) > 1:
        yield f"{', '.join(values)} differ: servers use one of them for all these weights"


def _check_ties(stored: Stored) -> Iterator[str]:
    names = {key: name for name, key in stored.keys.items()}
    for tied, source in stored.outline.ties.items():
        if tied in names and source in names and names[tied] != names[source]:
            mine, other = stored.raw[names[tied]], stored.raw[names[source]]
            if mine.dtype != other.dtype or mine.shape != other.shape or not bool((mine == other).all()):
                yield f"{names[tied]} differs from {names[source]}, with which config.json ties it"


def _check_complete(stored: Stored) -> Iterator[str]:
    outline, counts = stored.outline, Counter(stored.keys.values())
    part = {key: stored.shape(name) for name, key in stored.keys.items()}
    for key, shape in outline.parameters.items():
        if key in outline.ties or key in outline.copies or matches(outline.may_lack, key):
            continue
        if key not in part:
            yield f"{key} is missing"
        elif len(shape) == 3 and len(part[key]) == 2 and counts[key] % shape[0]:
            yield f"{key} has {counts[key]} parts for {shape[0]} experts"
    for name, key in stored.keys.items():
        orphan = is_cache_scale(name) or name.endswith(tuple(".weight" + suffix for suffix in SUFFIXES))
        if key not in outline.tensors and not orphan and not matches(outline.may_add, key):
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
    ("one scale per weight", "Export again: a reader would use other scales, or none.", check_parts),
    ("scale values", "Export again: these scales do not survive loading.", check_scale_values),
    (
        "KV cache",
        "Export again: keys and values would be cached with scales that nobody chose.",
        check_kv_cache,
    ),
    ("finite values", "Export again from a checkpoint before the training run diverged.", check_values),
    ("packed codes", "Export again: readers unpack other codes than were meant.", check_packing),
    ("sizes fit the blocks", "Export with --scheme FP8_DYNAMIC, which has one scale per row.", check_sizes),
    ("quantized modules", "Export again and keep them: --ignore NAME.", _check_modules),
    (
        "ignore list",
        "Correct the list in quantization_config: full names of all Linear modules not quantized.",
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
