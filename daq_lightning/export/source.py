"""What is exported: tensors under checkpoint names, and all that is known about their model.

A source is made from a Hugging Face folder, from tensors in a mapping, or (by the callback) from a model in
training.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from daq_lightning.checkpoint.adapter import AdapterFolder, read_adapter
from daq_lightning.checkpoint.folder import companion_files
from daq_lightning.checkpoint.reader import Checkpoint
from daq_lightning.checkpoint.tensor_file import CheckpointError, LazyTensors, TensorSpec, spec_in
from daq_lightning.model.architecture import Architecture
from daq_lightning.model.from_folder import FolderModel
from daq_lightning.model.outline import Outline

if TYPE_CHECKING:
    from daq_lightning.checkpoint.buffers import Buffers


@dataclass(frozen=True, kw_only=True)
class Source:
    """The fine-tuned model, wherever it is.

    Attributes:
        weights: Checkpoint name -> tensor, may be lazy.
        specs: The same names with dtypes and shapes, in file order.
        outline: What is known of their model, with the memory names of these names.
        keys_of: Memory names of other checkpoint names, such as those of a base.
        config: Content of config.json, or None for a model that has none.
        copy_files: Puts tokenizer, generation config and the like into a folder.
        low_rank: Whether the update is that of adapters, whose few directions say nothing of the others.
    """

    weights: Mapping[str, Tensor]
    specs: tuple[TensorSpec, ...]
    outline: Outline
    keys_of: Callable[[Iterable[str]], Mapping[str, str]]
    config: Mapping[str, Any] | None
    copy_files: Callable[[Path], None]
    low_rank: bool = False

    @classmethod
    def of(
        cls,
        weights: str | os.PathLike[str] | Mapping[str, Tensor],
        adapter: str | os.PathLike[str] | None = None,
    ) -> Source:
        """The source that a model folder, an open one, or a mapping is.

        Raises:
            CheckpointError: An adapter for weights that are not a folder.
        """
        if not isinstance(weights, Mapping):
            return cls.from_folder(weights, adapter)
        if isinstance(weights, Checkpoint) and weights.path.is_dir():
            return cls.from_checkpoint(weights, adapter)
        if adapter is not None:
            raise CheckpointError(
                f"adapter={str(adapter)!r} is merged into the model folder it was trained on: pass that "
                "folder as the weights, not a mapping."
            )
        return cls.from_mapping(weights)

    @classmethod
    def from_folder(
        cls, path: str | os.PathLike[str], adapter: str | os.PathLike[str] | None = None
    ) -> Source:
        """The source that a Hugging Face model folder is.

        Args:
            path: The folder.
            adapter: Folder of a LoRA adapter (PEFT) that was trained on it, to be merged in, one weight at a
                time.
        """
        return cls.from_checkpoint(Checkpoint(path), adapter)

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint, adapter: str | os.PathLike[str] | None = None) -> Source:
        """The source that an open model folder is; see `from_folder`."""
        model = FolderModel(checkpoint.path, len(checkpoint.raw))
        outline = model.outline(checkpoint)
        _check_complete(checkpoint, outline)
        specs = tuple(
            spec for name, spec in checkpoint.specs.items() if not _is_tied_copy(name, checkpoint, outline)
        )
        weights = checkpoint
        if adapter is not None:
            tied = [(name, copy) for copy, name in outline.ties.items()]
            weights = AdaptedCheckpoint(checkpoint.path, read_adapter(adapter), tied, checkpoint.dtype)
        return cls(
            weights=weights,
            specs=specs,
            outline=outline,
            keys_of=lambda names: model.outline(names).keys,
            config=checkpoint.config,
            copy_files=lambda folder: _copy_companions(checkpoint.path, folder),
            low_rank=adapter is not None,
        )

    @classmethod
    def from_mapping(cls, weights: Mapping[str, Tensor], model: nn.Module | None = None) -> Source:
        """The source that tensors under checkpoint names are.

        Args:
            weights: Checkpoint name -> tensor; see `described` for lazy ones.
            model: Says what the tensors are (may be on the meta device). None takes every matrix named
                `*.weight` for a Linear weight, unless its name speaks of an embedding, norm, router or head.
        """
        weights = described(weights)
        specs = tuple(spec_in(weights, name) for name in weights)
        architecture = Architecture(_guess_modules(specs) if model is None else model)
        return cls(
            weights=weights,
            specs=specs,
            outline=architecture.outline(architecture.keys_of(weights)),
            keys_of=architecture.keys_of,
            config=None,
            copy_files=lambda folder: None,
        )


class AdaptedCheckpoint(Checkpoint):
    """A folder seen through a LoRA adapter: each weight is merged in float32 at the moment it is read.

    Nothing is written and nothing is kept: merging a whole model into bfloat16 first would round a tenth of a
    typical update away before the search sees it. Names, dtypes and shapes are those of the folder.

    Args:
        path: The folder that the adapter was trained on.
        adapter: The adapter.
        tied: Groups of names that are one tensor in the model.
        dtype: Of dequantized weights; see `Checkpoint`.

    Raises:
        CheckpointError: As for `Checkpoint`, or the adapter changes a tensor that the folder lacks, or one of
            two that are tied.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        adapter: AdapterFolder,
        tied: Sequence[Sequence[str]] = (),
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(path, dtype)
        self._adapter = adapter
        unused = sorted(adapter.unused(self.specs))
        if unused:
            more = f" and {len(unused) - 3} more" if len(unused) > 3 else ""
            raise CheckpointError(
                f"The adapter changes {', '.join(unused[:3])}{more}, which {self.path} does not have: pass "
                "the model that the adapter was trained on."
            )
        apart = sorted(adapter.unties(tied))
        if apart:
            raise CheckpointError(
                f"The adapter changes {', '.join(apart)}, which config.json ties to a weight that it does "
                "not change in the same way: the two can no longer be one tensor. Merge it with PEFT into a "
                "model with tie_word_embeddings=False, save that, and pass it as the fine-tuned model."
            )

    @property
    def places(self) -> tuple[Path, ...]:
        """The folder, and that of the adapter."""
        return (self.path, self._adapter.path)

    def read(self, name: str, buffers: Buffers | None = None) -> Tensor:
        """One tensor with the adapter merged in, in float32; as it is where the adapter leaves it alone."""
        weight = super().read(name, buffers)
        merged = self._adapter.merged(name, weight)
        return weight if merged is None else merged


def described(weights: Mapping[str, Tensor], names: Iterable[str] | None = None) -> Mapping[str, Tensor]:
    """Tensors whose dtypes and shapes are known without reading them again.

    `LazyTensors` (a folder, a model in training) say what they hold, and a dict holds it; both come back as
    they are. Any other mapping may compute its tensors, so each is read once, here, and held until the export
    ends.

    Args:
        weights: Name -> tensor.
        names: The tensors that are needed; None takes all.
    """
    if isinstance(weights, (dict, LazyTensors)):
        return weights
    if names is None:
        return dict(weights)
    held = {}
    for name in names:
        with contextlib.suppress(KeyError):  # `name in weights` might read the tensor
            held[name] = weights[name]
    return held


def _check_complete(checkpoint: Checkpoint, outline: Outline) -> None:
    missing = outline.missing(outline.keys.values())
    if missing:
        more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
        raise CheckpointError(
            f"{checkpoint.path} lacks {', '.join(missing[:4])}{more}, which the model of its config.json "
            "has: the folder is incomplete. Copy or save it again."
        )
    for name, spec in checkpoint.specs.items():
        expected = outline.parameters.get(name)
        if outline.keys[name] == name and expected is not None and expected != spec.shape:
            raise CheckpointError(
                f"{checkpoint.path}: {name} has shape {spec.shape}, by config.json it should have "
                f"{expected}. Files and config.json are of different models."
            )


def _is_tied_copy(name: str, checkpoint: Checkpoint, outline: Outline) -> bool:
    """Whether this is a second copy of a tied tensor, which no export writes."""
    target = outline.ties.get(outline.keys[name])
    original = next((other for other, key in outline.keys.items() if key == target), None) if target else None
    if original is None or original == name:
        return False
    if not torch.equal(checkpoint[name], checkpoint[original]):
        raise CheckpointError(
            f"{checkpoint.path}: by config.json {name} is tied to {original}, but the files hold different "
            "values, of which servers would use only one. Set tie_word_embeddings to false in config.json "
            "or save the model again."
        )
    return True


def _copy_companions(source: Path, folder: Path) -> None:
    for file in companion_files(source):
        target = folder / file.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)


def _guess_modules(specs: Iterable[TensorSpec]) -> nn.Module:
    """A skeleton whose Linear modules are the matrices that look like Linear weights by name."""
    root = nn.Module()
    for spec in specs:
        path, _, parameter = spec.name.rpartition(".")
        words = path.lower()
        kept = any(word in words for word in ("embed", "norm", "router", "wte", "wpe")) or words.endswith(
            (".gate", "shared_expert_gate")
        )
        if parameter != "weight" or len(spec.shape) != 2 or kept or not path:
            continue
        parent, (*parents, leaf) = root, path.split(".")
        for part in parents:  # not add_module, which refuses names such as "type"
            parent = parent._modules.setdefault(part, nn.Module()) or root
        with torch.device("meta"):
            linear = nn.Linear(spec.shape[1], spec.shape[0], bias=False)
        if leaf in parent._modules:
            linear._modules.update(parent._modules[leaf]._modules)  # type: ignore[union-attr]
        parent._modules[leaf] = linear
    return root
