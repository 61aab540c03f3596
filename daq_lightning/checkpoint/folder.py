"""A folder of safetensors files: which files belong to it, and their tensors as they are stored.

Only headers are read when a folder is opened; a tensor is read when it is asked for and belongs to nobody
else. A folder is foreign input: only safetensors files inside it are read, nothing is executed, and an index
that contradicts the files is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from daq_lightning.checkpoint.tensor_file import CheckpointError, TensorEntry, read_header

if TYPE_CHECKING:
    from daq_lightning.checkpoint.buffers import Buffers

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MANIFEST = "daq_manifest.json"
REPORT = "daq_report.json"
PAGE = "daq_report.html"
CARD = "README.md"
RECIPE = "recipe.yaml"
_MOST_JSON = 1 << 30  # bytes; a report of 70,000 weights, as the largest models have, takes a tenth
_DEEPEST = 100  # levels


class RawCheckpoint(Mapping[str, Tensor]):
    """The tensors of a safetensors folder (or single file) exactly as they are stored.

    Args:
        path: A folder with `model.safetensors`, an index, or any safetensors files; or one such file.

    Raises:
        CheckpointError: No such path, no safetensors in it, or an index that does not fit the files.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).expanduser()
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
                    raise CheckpointError(
                        f"{name} is in both {self.entries[name].path} and {file}: keep one."
                    )
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
        return self.read(name)

    def read(self, name: str, buffers: Buffers | None = None) -> Tensor:
        """One tensor as it is stored; see `TensorEntry.read`."""
        return self.entries[name].read(buffers)

    def __contains__(self, name: object) -> bool:
        return name in self.entries  # Mapping would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; empty if there is no such file.

    Raises:
        CheckpointError: The file is not a JSON object, is deeper or larger than any of a model, or is a link
            out of its folder.
    """
    if not path.is_file():
        return {}
    if path.is_symlink():
        inside(path.parent, path.name)
    try:
        if path.stat().st_size > _MOST_JSON:
            raise ValueError(f"it has {path.stat().st_size} bytes")
        content = json.loads(path.read_text("utf-8"))
        if _depth(content) > _DEEPEST:
            raise ValueError(f"it is nested deeper than {_DEEPEST} levels")
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}.") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} should hold a JSON object, got {type(content).__name__}.")
    return content


def _depth(content: Any) -> int:
    """How deep lists and objects are nested; whoever follows them recursively needs as many frames."""
    depth, level = 0, [content]
    while level and depth <= _DEEPEST:
        depth += 1
        parts = (
            part.values() if isinstance(part, dict) else part
            for part in level
            if isinstance(part, (dict, list))
        )
        level = [value for part in parts for value in part if isinstance(value, (dict, list))]
    return depth


def read_card(folder: Path) -> str:
    """The model card of a folder; empty if there is none. Bytes that are no UTF-8 come back as surrogates,
    which `CheckpointWriter.add_text` writes as they were.

    Raises:
        CheckpointError: It is a link out of the folder, or cannot be read.
    """
    if not (folder / CARD).is_file():
        return ""
    path = inside(folder, CARD)
    try:
        return path.read_bytes().decode("utf-8", "surrogateescape")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error


def replace_json(path: Path, content: Any) -> None:
    """Writes a JSON file so that a reader sees the old or the new one, never a part."""
    part = path.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps(content), "utf-8")
    part.replace(path)


def sha256_of(file: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(file, "rb") as content:
        while piece := content.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def read_index(folder: Path) -> dict[str, Any]:
    """The index of a folder: `weight_map` from tensor names to files, and `metadata`; empty if there is none.

    Raises:
        CheckpointError: It is of another shape, or names something else than safetensors files of the folder.
    """
    path = folder / INDEX
    if not path.exists():
        return {}
    index = read_json(path)
    weight_map, metadata = index.get("weight_map"), index.get("metadata") or {}
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(file, str) for file in weight_map.values())
    ):
        raise CheckpointError(f"{path} has no weight_map from names to files.")
    if not isinstance(metadata, dict):
        raise CheckpointError(f"{path} should have metadata in a JSON object, got {type(metadata).__name__}.")
    for file in sorted(set(weight_map.values())):
        if Path(file).name != file or Path(file).suffix != ".safetensors" or "\0" in file:
            raise CheckpointError(
                f"{path} names the file {file!r}: expected the plain name of a safetensors file in this "
                "folder."
            )
    return {"weight_map": weight_map, "metadata": metadata}


def config_dtype(config: Mapping[str, Any]) -> torch.dtype | None:
    """The dtype that a config.json names (`dtype`, formerly `torch_dtype`, also of a text model inside)."""
    inner = config.get("text_config")
    levels = [config, inner] if isinstance(inner, Mapping) else [config]
    named = [level[key] for level in levels for key in ("dtype", "torch_dtype") if level.get(key)]
    known = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    return known.get(str(named[0]).removeprefix("torch.")) if named else None


def companion_files(folder: Path) -> list[Path]:
    """The files beside the weights: tokenizer, chat template, generation config, the model's own code."""
    suffixes = {".json", ".txt", ".model", ".jinja", ".py", ".tiktoken", ".spm"}
    skipped = {
        "config.json",
        MANIFEST,
        REPORT,
        "adapter_config.json",
        "trainer_state.json",
        "hf_quant_config.json",
    }
    files = [file for pattern in ("*", "chat_templates/*") for file in sorted(folder.glob(pattern))]
    kept = [file for file in files if file.suffix in suffixes and not file.name.endswith(".index.json")]
    return [
        inside(folder, str(file.relative_to(folder)))
        for file in kept
        if file.name not in skipped and file.is_file()
    ]


def _weight_files(path: Path) -> list[Path]:
    """The safetensors files that make up a checkpoint."""
    if path.is_file():
        if path.suffix != ".safetensors":
            raise CheckpointError(
                f"{path} is not a safetensors file. Pickle files (.bin, .pt) can run code when opened and "
                "are never read: save the checkpoint with safe_serialization."
            )
        return [path]
    index = read_index(path)
    if index:
        return [inside(path, file) for file in sorted(set(index["weight_map"].values()))]
    if (path / SINGLE).exists():
        return [inside(path, SINGLE)]
    files = sorted(file.name for file in path.glob("*.safetensors"))
    if not files:
        pickles = sorted(file.name for file in path.iterdir() if file.suffix in (".bin", ".pt", ".pth"))
        hint = (
            f" It has {', '.join(pickles[:3])}: pickle files can run code when opened and are never read; "
            "save the checkpoint with safe_serialization."
            if pickles
            else ""
        )
        raise CheckpointError(
            f"{path} has no safetensors files: expected {SINGLE} or shards with {INDEX}.{hint}"
        )
    return [inside(path, file) for file in files]


def inside(folder: Path, file: str) -> Path:
    """The path of a file, if it lies in the folder (or is a link of a Hugging Face cache).

    Raises:
        CheckpointError: It is not there, or is a link out of the folder.
    """
    path, root = folder / file, folder.resolve()
    if not path.is_file():
        raise CheckpointError(f"{path} is missing, though the index of the folder names it.")
    allowed = [root]
    if root.parent.name == "snapshots":  # the hub's cache links snapshots/<commit>/* to blobs/*
        allowed.append(root.parent.parent / "blobs")
    if not any(path.resolve().is_relative_to(place) for place in allowed):
        raise CheckpointError(
            f"{path} is a link out of its folder (to {path.resolve()}): copy the file itself there."
        )
    return path


def _check_index(folder: Path, entries: Mapping[str, TensorEntry]) -> None:
    weight_map = read_index(folder)["weight_map"]
    wrong = [
        name for name, file in weight_map.items() if name not in entries or entries[name].path.name != file
    ]
    unlisted = [name for name in entries if name not in weight_map]
    if wrong or unlisted:
        raise CheckpointError(
            f"{folder / INDEX} does not fit its files: {len(wrong)} tensors are not in the file it names "
            f"({', '.join(wrong[:3]) or '-'}), {len(unlisted)} are not listed "
            f"({', '.join(unlisted[:3]) or '-'})."
        )
