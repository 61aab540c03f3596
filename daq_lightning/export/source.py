"""What is exported: tensors under checkpoint names, and all that is known about their model.

A source is made from a Hugging Face folder, from tensors in a mapping, or (by the callback) from a model in training.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from daq_lightning.checkpoint.folder import companion_files
from daq_lightning.checkpoint.reader import Checkpoint
from daq_lightning.checkpoint.tensor_file import CheckpointError, TensorSpec
from daq_lightning.model.architecture import Architecture


@dataclass(frozen=True, kw_only=True)
class Source:
    """The fine-tuned model, wherever it is.

    Attributes:
        weights: Checkpoint name -> tensor, may be lazy.
        specs: The same names with dtypes and shapes, in file order.
        keys: Checkpoint name -> memory name.
        architecture: The model's modules.
        config: Content of config.json, or None for a model that has none.
        copy_files: Puts tokenizer, generation config and the like into a folder.
    """

    weights: Mapping[str, Tensor]
    specs: tuple[TensorSpec, ...]
    keys: Mapping[str, str]
    architecture: Architecture
    config: Mapping[str, Any] | None
    copy_files: Callable[[Path], None]

    @classmethod
    def from_folder(cls, path: str | os.PathLike[str]) -> Source:
        """The source that a Hugging Face model folder is."""
        checkpoint = Checkpoint(path)
        architecture = Architecture.from_folder(checkpoint.path, len(checkpoint.raw))
        keys = architecture.keys_of(checkpoint)
        _check_complete(checkpoint, architecture, keys)
        return cls(
            weights=checkpoint,
            specs=tuple(
                spec
                for name, spec in checkpoint.specs.items()
                if not _is_tied_copy(name, checkpoint, architecture, keys)
            ),
            keys=keys,
            architecture=architecture,
            config=checkpoint.config,
            copy_files=lambda folder: _copy_companions(checkpoint.path, folder),
        )

    @classmethod
    def from_mapping(cls, weights: Mapping[str, Tensor], model: nn.Module | None = None) -> Source:
        """The source that tensors under checkpoint names are.

        Args:
            weights: Checkpoint name -> tensor.
            model: Says what the tensors are (may be on the meta device). None takes every matrix named `*.weight`
                for a Linear weight, unless its name speaks of an embedding, norm, router or head.
        """
        architecture = Architecture(_guess_modules(weights) if model is None else model)
        specs = tuple(
            TensorSpec(name=name, dtype=tensor.dtype, shape=tuple(tensor.shape)) for name, tensor in weights.items()
        )
        return cls(
            weights=weights,
            specs=specs,
            keys=architecture.keys_of(weights),
            architecture=architecture,
            config=None,
            copy_files=lambda folder: None,
        )


def _check_complete(checkpoint: Checkpoint, architecture: Architecture, keys: Mapping[str, str]) -> None:
    missing = architecture.missing(keys.values())
    if missing:
        more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
        raise CheckpointError(
            f"{checkpoint.path} lacks {', '.join(missing[:4])}{more}, which the model of its config.json has: the "
            "folder is incomplete. Copy or save it again."
        )
    parameters = dict(architecture.model.named_parameters(remove_duplicate=False))
    for name, spec in checkpoint.specs.items():
        expected = parameters.get(keys[name])
        if keys[name] == name and expected is not None and tuple(expected.shape) != spec.shape:
            raise CheckpointError(
                f"{checkpoint.path}: {name} has shape {spec.shape}, by config.json it should have "
                f"{tuple(expected.shape)}. Files and config.json are of different models."
            )


def _is_tied_copy(name: str, checkpoint: Checkpoint, architecture: Architecture, keys: Mapping[str, str]) -> bool:
    """Whether this is a second copy of a tied tensor, which no export writes."""
    target = architecture.tied_to(keys[name])
    original = next((other for other, key in keys.items() if key == target), None) if target else None
    if original is None or original == name:
        return False
    if not torch.equal(checkpoint[name], checkpoint[original]):
        raise CheckpointError(
            f"{checkpoint.path}: by config.json {name} is tied to {original}, but the files hold different values, of "
            "which servers would use only one. Set tie_word_embeddings to false in config.json or save the model again."
        )
    return True


def _copy_companions(source: Path, folder: Path) -> None:
    for file in companion_files(source):
        target = folder / file.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)


def _guess_modules(weights: Mapping[str, Tensor]) -> nn.Module:
    """A skeleton whose Linear modules are the matrices that look like Linear weights by name."""
    root = nn.Module()
    for name, tensor in weights.items():
        path, _, parameter = name.rpartition(".")
        words = path.lower()
        kept = any(word in words for word in ("embed", "norm", "router", "wte", "wpe")) or words.endswith(
            (".gate", "shared_expert_gate")
        )
        if parameter != "weight" or tensor.ndim != 2 or kept or not path:
            continue
        parent, (*parents, leaf) = root, path.split(".")
        for part in parents:  # not add_module, which refuses names such as "type"
            parent = parent._modules.setdefault(part, nn.Module()) or root
        with torch.device("meta"):
            linear = nn.Linear(tensor.shape[1], tensor.shape[0], bias=False)
        if leaf in parent._modules:
            linear._modules.update(parent._modules[leaf]._modules)  # type: ignore[union-attr]
        parent._modules[leaf] = linear
    return root
