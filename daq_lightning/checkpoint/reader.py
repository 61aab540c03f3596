"""A checkpoint folder as a lazy mapping from names to tensors.

Only headers are read when a folder is opened; a tensor is read when it is asked for and belongs to nobody else. An
FP8 folder looks like the checkpoint that it stands for: `X.weight` is dequantized as transformers does it,
`dtype(float32(code) * float32(scale))`, and its scale is not listed.

A folder is foreign input: only safetensors files inside it are read, nothing is executed, and an index that
contradicts the files is refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from daq_lightning.checkpoint.tensor_file import CheckpointError, TensorEntry, TensorSpec, read_header
from daq_lightning.numerics.formats import Granularity, PerBlock, PerChannel, PerTensor
from daq_lightning.numerics.quantize import dequantize

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MANIFEST = "daq_manifest.json"
REPORT = "daq_report.json"
_SCALES = ("_scale_inv", "_scale")
_SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu)
_PACKED = (".weight_packed", ".qweight", ".weight_global_scale", ".weight_shape", "_proj_blocks")
_ACTIVATION_SCALES = ("input_scale", "output_scale", "weight_zero_point", "activation_scale")
_CACHE_SCALES = ("q_scale", "k_scale", "v_scale", "prob_output_scale", "kv_scale")
_FP8 = torch.float8_e4m3fn


class RawCheckpoint(Mapping[str, Tensor]):
    """The tensors of a safetensors folder (or single file) exactly as they are stored.

    Args:
        path: A folder with `model.safetensors`, an index, or any safetensors files; or one such file.

    Raises:
        CheckpointError: No such path, no safetensors in it, or an index that does not fit the files.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.exists():
            raise CheckpointError(
                f"{self.path} does not exist: expected a folder with safetensors files (or one such file)."
            )
        if not self.path.is_dir() and not self.path.is_file():
            raise CheckpointError(f"{self.path} is neither a folder nor a file.")
        self.entries: dict[str, TensorEntry] = {}
        for file in _weight_files(self.path):
            for name, entry in read_header(file).items():
                if name in self.entries:
                    raise CheckpointError(f"{name} is in both {self.entries[name].path} and {file}: keep one.")
                self.entries[name] = entry
        if self.path.is_dir() and (self.path / INDEX).exists():
            _check_index(self.path, self.entries)
        self.config = read_json(self.path / "config.json") if self.path.is_dir() else {}
        manifest = read_json(self.path / MANIFEST) if self.path.is_dir() else {}
        self.quantization: dict[str, Any] = (
            self.config.get("quantization_config") or manifest.get("quantization_config") or {}
        )
        if not isinstance(self.quantization, dict):
            raise CheckpointError(f"{self.path}: the quantization_config is not a JSON object.")

    def __getitem__(self, name: str) -> Tensor:
        return self.entries[name].read()

    def __contains__(self, name: object) -> bool:
        return name in self.entries  # Mapping would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


class Checkpoint(Mapping[str, Tensor]):
    """A checkpoint folder in high precision: FP8 weights are dequantized, one tensor at a time.

    Args:
        path: As for `RawCheckpoint`.
        dtype: Of dequantized weights; None takes the `dtype` of config.json, else bfloat16.

    Attributes:
        raw: The tensors as stored.
        specs: Name, dtype and shape of every tensor, without reading any.

    Raises:
        CheckpointError: As for `RawCheckpoint`, or FP8 codes without a scale of a known shape.
    """

    def __init__(self, path: str | os.PathLike[str], dtype: torch.dtype | None = None) -> None:
        self.raw = RawCheckpoint(path)
        self.path, self.config = self.raw.path, self.raw.config
        self.dtype = dtype or config_dtype(self.config) or torch.bfloat16
        self._block = _block_size(self.raw.quantization, self.path)
        codes = [name for name, entry in self.raw.entries.items() if entry.dtype == _FP8]
        self._scales = {name: self._scale_of(name) for name in codes}
        self._granularities = {name: self._granularity_of(name) for name in codes}
        hidden = set(self._scales.values())
        self._check_foreign(hidden)
        self.specs = {
            name: TensorSpec(name=name, dtype=self.dtype if name in self._scales else entry.dtype, shape=entry.shape)
            for name, entry in self.raw.entries.items()
            if name not in hidden and not self._belongs_to_quantization(name)
        }

    @property
    def quantized(self) -> bool:
        """Whether any weight is stored in FP8."""
        return bool(self._scales)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.specs:
            raise KeyError(name)
        if name not in self._scales:
            return self.raw[name]
        codes, scale = self.raw[name], self.raw[self._scales[name]]
        if scale.dtype == torch.float8_e8m0fnu:
            scale = scale.float()
        granularity = self._granularities[name]
        scale = scale.reshape(granularity.grid((codes.shape[0], codes.shape[1])))
        return dequantize(codes, scale, granularity, self.dtype)

    def __contains__(self, name: object) -> bool:
        return name in self.specs

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)

    def granularity(self, name: str) -> Granularity:
        """Which elements of an FP8 weight share a scale."""
        return self._granularities[name]

    def _granularity_of(self, name: str) -> Granularity:
        """From the shape of the scale and config.json."""
        shape, scale = self.raw.entries[name].shape, self.raw.entries[self._scales[name]].shape
        shape_MN = (shape[0], shape[1])
        candidates: list[Granularity] = [PerChannel(), PerTensor()] if self._block is None else [self._block]
        for granularity in candidates:
            squeezed = tuple(size for size in granularity.grid(shape_MN) if size != 1)
            if scale == granularity.grid(shape_MN) or (
                not isinstance(granularity, PerBlock) and tuple(size for size in scale if size != 1) == squeezed
            ):
                return granularity
        raise CheckpointError(
            f"{self.path}: the scale of {name} has shape {scale}, which fits a weight of shape {shape} under none of "
            f"{', '.join(map(str, candidates))}; the quantization_config is {self.raw.quantization or 'missing'}."
        )

    def _scale_of(self, name: str) -> str:
        found = [name + suffix for suffix in _SCALES if name + suffix in self.raw.entries]
        if len(found) != 1 or len(self.raw.entries[name].shape) != 2:
            raise CheckpointError(
                f"{self.path}: {name} of shape {self.raw.entries[name].shape} holds FP8 codes and has "
                f"{len(found)} scales; expected a matrix and exactly one of "
                f"{', '.join(name + suffix for suffix in _SCALES)}."
            )
        dtype = self.raw.entries[found[0]].dtype
        if dtype not in _SCALE_DTYPES:
            raise CheckpointError(
                f"{self.path}: {found[0]} is {str(dtype).removeprefix('torch.')}, expected a scale in one of "
                f"{', '.join(str(known).removeprefix('torch.') for known in _SCALE_DTYPES)}."
            )
        return found[0]

    def _check_foreign(self, scales: set[str]) -> None:
        """Refuses weights that are quantized in another way than FP8 codes and scale: they would pass as plain ones."""
        odd = [
            name
            for name, entry in self.raw.entries.items()
            if name.endswith(_PACKED)
            or (name.endswith((".weight_scale", ".weight_scale_inv")) and name not in scales)
            or (entry.dtype.itemsize == 1 and entry.dtype not in (_FP8, torch.bool) and name not in scales
                and name.endswith((".weight", "_proj")))
        ]  # fmt: skip
        if odd:
            listed = ", ".join(
                f"{name} ({str(self.raw.entries[name].dtype).removeprefix('torch.')})" for name in odd[:4]
            )
            raise CheckpointError(
                f"{self.path}: {len(odd)} tensors belong to weights that are not FP8 (e4m3) codes with one scale: "
                f"{listed}. Its quantization_config is {self.raw.quantization or 'missing'}. Pass the checkpoint in "
                "high precision, or one in FP8."
            )

    def _belongs_to_quantization(self, name: str) -> bool:
        """Scales of activations and of the cache say nothing of the weights and do not outlive their quantization."""
        owner, _, leaf = name.rpartition(".")
        if leaf in _ACTIVATION_SCALES:
            return f"{owner}.weight" in self._scales
        return bool(self._scales) and leaf in _CACHE_SCALES


def load_checkpoint(path: str | os.PathLike[str], dtype: torch.dtype | None = None) -> Checkpoint:
    """Opens a checkpoint folder, FP8 or not, as a lazy mapping from names to tensors.

    Args:
        path: A folder (or file) of safetensors.
        dtype: Of dequantized weights; None takes the `dtype` of config.json, else bfloat16.

    Returns:
        `Checkpoint`; tensors are read when asked for.

    Raises:
        CheckpointError: The path does not exist, has no safetensors, or its files contradict each other.
    """
    return Checkpoint(path, dtype)


def config_dtype(config: Mapping[str, Any]) -> torch.dtype | None:
    """The dtype that a config.json names (`dtype`, formerly `torch_dtype`, also of a text model inside)."""
    inner = config.get("text_config")
    levels = [config, inner] if isinstance(inner, Mapping) else [config]
    named = [level[key] for level in levels for key in ("dtype", "torch_dtype") if level.get(key)]
    known = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    return known.get(str(named[0]).removeprefix("torch.")) if named else None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; empty if there is no such file.

    Raises:
        CheckpointError: The file is not a JSON object.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} should hold a JSON object, got {type(content).__name__}.")
    return content


def companion_files(folder: Path) -> list[Path]:
    """The files beside the weights that belong to a model: tokenizer, chat template, generation config, own code."""
    suffixes = {".json", ".txt", ".model", ".jinja", ".py", ".tiktoken", ".spm"}
    skipped = {"config.json", MANIFEST, REPORT, "adapter_config.json", "trainer_state.json", "hf_quant_config.json"}
    files = [file for pattern in ("*", "chat_templates/*") for file in sorted(folder.glob(pattern))]
    kept = [file for file in files if file.suffix in suffixes and not file.name.endswith(".index.json")]
    return [
        _inside(folder, str(file.relative_to(folder))) for file in kept if file.name not in skipped and file.is_file()
    ]


def _weight_files(path: Path) -> list[Path]:
    """The safetensors files that make up a checkpoint."""
    if path.is_file():
        if path.suffix != ".safetensors":
            raise CheckpointError(
                f"{path} is not a safetensors file. Pickle files (.bin, .pt) can run code when opened and are never "
                "read: save the checkpoint with safe_serialization."
            )
        return [path]
    if (path / INDEX).exists():
        weight_map = read_json(path / INDEX).get("weight_map")
        if (
            not isinstance(weight_map, dict)
            or not weight_map
            or not all(isinstance(file, str) for file in weight_map.values())
        ):
            raise CheckpointError(f"{path / INDEX} has no weight_map from names to files.")
        return [_shard(path, file) for file in sorted(set(weight_map.values()))]
    if (path / SINGLE).exists():
        return [_inside(path, SINGLE)]
    files = sorted(file.name for file in path.glob("*.safetensors"))
    if not files:
        pickles = sorted(file.name for file in path.iterdir() if file.suffix in (".bin", ".pt", ".pth"))
        hint = (
            f" It has {', '.join(pickles[:3])}: pickle files can run code when opened and are never read; "
            "save the checkpoint with safe_serialization."
            if pickles
            else ""
        )
        raise CheckpointError(f"{path} has no safetensors files: expected {SINGLE} or shards with {INDEX}.{hint}")
    return [_inside(path, file) for file in files]


def _shard(folder: Path, file: str) -> Path:
    if Path(file).name != file or Path(file).suffix != ".safetensors":
        raise CheckpointError(
            f"{folder / INDEX} names the file {file!r}: expected the plain name of a safetensors file in this folder."
        )
    return _inside(folder, file)


def _inside(folder: Path, file: str) -> Path:
    """The path of a file, if it lies in the folder (or is a link of a Hugging Face cache)."""
    path, root = folder / file, folder.resolve()
    if not path.is_file():
        raise CheckpointError(f"{path} is missing, though the index of the folder names it.")
    allowed = [root]
    if root.parent.name == "snapshots":  # the hub's cache links snapshots/<commit>/* to blobs/*
        allowed.append(root.parent.parent / "blobs")
    if not any(path.resolve().is_relative_to(place) for place in allowed):
        raise CheckpointError(f"{path} is a link out of its folder (to {path.resolve()}): copy the file itself there.")
    return path


def _check_index(folder: Path, entries: Mapping[str, TensorEntry]) -> None:
    weight_map = read_json(folder / INDEX)["weight_map"]
    wrong = [name for name, file in weight_map.items() if name not in entries or entries[name].path.name != file]
    unlisted = [name for name in entries if name not in weight_map]
    if wrong or unlisted:
        raise CheckpointError(
            f"{folder / INDEX} does not fit its files: {len(wrong)} tensors are not in the file it names "
            f"({', '.join(wrong[:3]) or '-'}), {len(unlisted)} are not listed ({', '.join(unlisted[:3]) or '-'})."
        )


def _block_size(quantization: Mapping[str, Any], path: Path) -> PerBlock | None:
    """The size of the blocks that share a scale; None if no block layout is described."""
    try:
        sizes = [quantization["weight_block_size"]] if quantization.get("weight_block_size") else []
        for group in (quantization.get("config_groups") or {}).values():
            weights = group.get("weights") or {}
            if weights.get("strategy") == "block":
                sizes.append(weights["block_structure"])
            if weights.get("symmetric") is False:
                raise ValueError("weights with a zero point")
        if len({tuple(size) for size in sizes}) > 1:
            raise ValueError("blocks of several sizes")
        return PerBlock(*map(int, sizes[0])) if sizes else None
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: the quantization_config {quantization} cannot be followed: {error}.") from error
