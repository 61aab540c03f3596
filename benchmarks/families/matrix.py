"""One family through one scheme: quantized, verified, loaded, and its logits held against a plain model.

    tiny base and successor -> export_checkpoint -> verify_checkpoint
                            -> from_pretrained with the config.json that was written
                            -> from_pretrained of a folder with the weights that codes and scales stand for
    both models: the same parameters, the same logits

The plain folder has the tensors that `load_checkpoint` reads, in bfloat16, and a config.json without
quantization.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
import transformers
from torch import Tensor, nn

from benchmarks.families.models import beside, model_of
from daq_lightning import (
    CheckpointError,
    ExportReport,
    ScaleSearch,
    export_checkpoint,
    load_checkpoint,
)
from daq_lightning.audit.verify import verify_checkpoint
from daq_lightning.export.source import Source

KEPT = {"router": "router", "head": "head", "outside": "*towers*", "stack": "*experts*", "conv1d": "*Conv1D*"}
QUICK = ScaleSearch(metric="cosine", n_coarse=3, n_fine=0)


class Row(NamedTuple):
    family: str
    quantized: Sequence[str]
    kept: Sequence[str]
    outcomes: Mapping[str, Outcome]


class Outcome(NamedTuple):
    state: (
        str  # "pass", "noted", "vllm" (transformers does not load it, as the export says), "refused", "fails"
    )
    words: str = ""
    report: ExportReport | None = None


def row_of(family: str, schemes: Sequence[str], folder: Path) -> Row:
    """What becomes of a family."""
    pair = make_pair(model_of(family), folder, beside(family))
    outcomes = {scheme: through(pair, scheme, folder / scheme) for scheme in schemes}
    quantized, kept = _names(pair[1])
    return Row(family, quantized, kept, outcomes)


def _names(folder: Path) -> tuple[list[str], list[str]]:
    """The last parts of the names of what FP8 quantizes, and of what it keeps."""
    source = Source.from_folder(folder)
    outline, quantized, kept = source.outline, set(), set()
    for spec in source.specs:
        key = outline.keys[spec.name]
        role = outline.role(key, len(spec.shape))
        parts = [part for part in spec.name.removesuffix(".weight").split(".") if not part.isdigit()]
        leaf = parts[-1]
        if role in ("linear", "expert", "upcast"):
            quantized.add(leaf)
        elif role in KEPT:
            kept.add(KEPT[role])
        elif role in ("float32", "plain"):
            kept.add(leaf)
        elif key not in outline.tensors:
            kept.add("*MTP*")
    return sorted(quantized), sorted(kept)


def make_pair(model: nn.Module, folder: Path, beside: Mapping[str, Tensor]) -> tuple[Path, Path]:
    """Saves a model as `folder/base` and, a little perturbed, as `folder/post`, with tensors beside it."""
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms start at 0 and 1: make every tensor count
            parameter.add_(torch.randn_like(parameter) * 0.02)
    model = model.to(torch.bfloat16)
    strict = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    for name, parameter in model.named_parameters():  # as transformers loads it, and saves it then
        if any(f".{pattern}." in f".{name}." for pattern in strict):
            parameter.data = parameter.data.float()
    paths = folder / "base", folder / "post"
    for path in paths:
        model.save_pretrained(path)
        if beside:
            file = path / "model.safetensors"
            safetensors.torch.save_file(
                safetensors.torch.load_file(file) | dict(beside), file, {"format": "pt"}
            )
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.002)
    return paths


def through(pair: tuple[Path, Path], scheme: str, out: Path) -> Outcome:
    """What becomes of a model in a scheme."""
    base, post = pair
    try:
        report = export_checkpoint(post, base, out, scheme=scheme, search=QUICK)
    except CheckpointError as error:
        return Outcome("refused", str(error))
    problems = verify_checkpoint(out)
    if problems:
        return Outcome("fails", f"verify: {problems[0]}", report)
    plain, _ = load(write_plain(out, out.parent / f"{out.name}-plain"))
    try:
        loaded, missing = load(out, dequantize=True)
    except Exception as error:
        return _not_loaded(report, _first_line(error))
    if missing:
        return _not_loaded(report, f"other tensors: {missing[0]}")
    notes = []
    try:
        if not bool(logits(loaded).isfinite().all()):
            return Outcome("fails", "logits that are no numbers", report)
    except RuntimeError as error:
        notes.append(f"in bfloat16 transformers stops: {error}")
    loaded, plain = loaded.float(), plain.float()
    codes, rounded = {tensor.name for tensor in report.tensors}, 0
    mine, expected = loaded.state_dict(), plain.state_dict()
    if mine.keys() != expected.keys():
        return Outcome("fails", f"other tensors: {sorted(mine.keys() ^ expected.keys())[0]}", report)
    for name, tensor in mine.items():
        if not torch.equal(tensor, expected[name]):
            if name in codes or not torch.equal(tensor, expected[name].bfloat16().float()):
                return Outcome("fails", f"other weights than were meant: {name}", report)
            rounded += 1
    if rounded:
        notes.append(f"transformers rounds {rounded} tensors to bfloat16 that it keeps in float32 elsewhere")
        loaded.load_state_dict(expected)
    if not torch.equal(logits(loaded), logits(plain)):
        return Outcome("fails", "other logits", report)
    return Outcome("noted" if notes else "pass", "; ".join(notes), report)


def _not_loaded(report: ExportReport, why: str) -> Outcome:
    """Of an export that transformers does not load: as it is said in the report, or not."""
    told = [note for note in report.notes if re.match(r"transformers [\d.]+ does not load", note)]
    return Outcome("vllm", told[0], report) if told else Outcome("fails", f"transformers: {why}", report)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def write_plain(folder: Path, target: Path) -> Path:
    """A folder in high precision with the weights that an export stands for."""
    target.mkdir()
    tensors = {name: tensor.contiguous() for name, tensor in load_checkpoint(folder).items()}
    safetensors.torch.save_file(tensors, target / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (target / "config.json").write_text(json.dumps(config))
    return target


def load(folder: Path, *, dequantize: bool = False) -> tuple[Any, list[str]]:
    """The model of a folder, as transformers loads it, and the tensors that it or the folder has not."""
    config = json.loads((folder / "config.json").read_text())
    arguments: dict[str, Any] = {}
    if config.get("quantization_config", {}).get("quant_method") == "compressed-tensors" and dequantize:
        arguments["quantization_config"] = transformers.CompressedTensorsConfig(dequantize=True)
    kind = getattr(transformers, config["architectures"][0])
    model, info = kind.from_pretrained(folder, output_loading_info=True, **arguments)
    return model.eval(), sorted(str(name) for names in info.values() for name in names)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    """The logits of two short texts."""
    return model(input_ids=torch.arange(8, 24).reshape(2, 8), use_cache=False).logits
