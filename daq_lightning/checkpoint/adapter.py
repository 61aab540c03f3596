"""A PEFT adapter folder as it lies on disk: LoRA and DoRA merged into the weights of a checkpoint one by one.

    base_model.model.X.lora_A.weight, .lora_B.weight      ->  X.weight + scaling * B @ A
    base_model.model.X.lora_B.bias                        ->  X.bias + scaling * bias
    base_model.model.X.lora_embedding_A, _B               ->  X.weight of an embedding
    base_model.model.X.lora_magnitude_vector              ->  DoRA
    base_model.model.X.weight                             ->  X.weight replaced (modules_to_save, biases)

scaling = alpha / rank, or alpha / sqrt(rank) for rsLoRA; alpha and rank from the first pattern of
adapter_config.json that fits the end of X, as PEFT chooses them.

A folder is foreign input: two files are read, `adapter_config.json` and `adapter_model.safetensors`, and
nothing is executed. Whatever would be merged wrongly is refused by name.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from daq_lightning.checkpoint.adapter_config import CONFIG, MERGE, PREFIX, WEIGHTS, is_number, read_config
from daq_lightning.checkpoint.folder import inside
from daq_lightning.checkpoint.patterns import BoundedMatcher
from daq_lightning.checkpoint.tensor_file import (
    CheckpointError,
    TensorEntry,
    read_header,
)
from daq_lightning.numerics.lora import LoraFactors, merge_lora, merge_lora_bias

_PARTS = (
    ".lora_A.weight",
    ".lora_B.weight",
    ".lora_B.bias",
    ".lora_embedding_A",
    ".lora_embedding_B",
    ".lora_magnitude_vector",
    ".lora_magnitude_vector.weight",
)


@dataclass(frozen=True, kw_only=True)
class _Layer:
    """The stored parts of one adapted layer, and how they are applied."""

    A: TensorEntry
    B: TensorEntry
    bias: TensorEntry | None
    magnitude: TensorEntry | None
    scaling: float
    transposed: bool

    @property
    def factors(self) -> LoraFactors:
        magnitude = None if self.magnitude is None else self.magnitude.read().flatten()
        return LoraFactors(A_RN=self.A.read(), B_MR=self.B.read(), scaling=self.scaling, magnitude=magnitude)


class AdapterFolder:
    """What an adapter folder makes of the weights of a checkpoint. Tensors are read when they are asked for.

    Args:
        path: A folder as PEFT's `save_pretrained` writes it.

    Attributes:
        config: adapter_config.json.
        names: The names of the weights that the adapter changes.

    Raises:
        CheckpointError: No adapter, a kind other than LoRA, or parts that do not fit together.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.config = read_config(self.path)
        self._matcher = BoundedMatcher(str(self.path / CONFIG))
        entries = {
            name.removeprefix(PREFIX): entry
            for name, entry in read_header(inside(self.path, WEIGHTS)).items()
        }
        self._replaced: dict[str, TensorEntry] = {}
        parts: dict[str, dict[str, TensorEntry]] = {}
        for name, entry in entries.items():
            part = next((part for part in _PARTS if name.endswith(part)), None)
            if part is not None:
                parts.setdefault(name.removesuffix(part), {})[part.removesuffix(".weight")] = entry
            elif ".lora_" in name or ".token_adapter." in name:
                raise CheckpointError(
                    f"{self.path / WEIGHTS} holds {name}, which is not part of LoRA or DoRA. {MERGE}"
                )
            else:
                # saved beside an adapter of the same layer, the frozen weight is called X.base_layer.weight
                self._replaced[name.replace(".base_layer.", ".")] = entry
        self._layers = {target: self._layer(target, found) for target, found in parts.items()}
        weights = [f"{target}.weight" for target in self._layers]
        biases = [f"{target}.bias" for target, layer in self._layers.items() if layer.bias is not None]
        self.names: tuple[str, ...] = tuple(dict.fromkeys([*weights, *biases, *self._replaced]))

    def merged(self, name: str, weight: Tensor) -> Tensor | None:
        """What the adapter makes of one tensor of the checkpoint.

        Args:
            name: Its name in the checkpoint.
            weight: The tensor, which is left as it is.

        Returns:
            The merged tensor in float32, or the stored one as it is where the adapter replaces it, on the
            device of `weight`; None where the adapter leaves it alone.

        Raises:
            CheckpointError: The adapter was trained on a tensor of another shape.
        """
        if name in self._replaced:
            entry = self._replaced[name]
            if entry.shape != tuple(weight.shape):
                raise CheckpointError(
                    f"{self.path / WEIGHTS} replaces {name} by a tensor of shape {entry.shape}, the "
                    f"checkpoint has {tuple(weight.shape)}: resize the base to the adapter's vocabulary, or "
                    "pass the base it was trained on."
                )
            weight = entry.read().to(weight.device)
        target, _, kind = name.rpartition(".")
        layer = self._layers.get(target)
        try:
            if layer is not None and kind == "weight":
                return merge_lora(weight, [layer.factors], transposed=layer.transposed)
            if layer is not None and layer.bias is not None and kind == "bias":
                return merge_lora_bias(weight, [(layer.bias.read(), layer.scaling)])
        except ValueError as error:
            raise CheckpointError(f"{self.path} cannot be merged into {name}. {error}") from error
        return weight if name in self._replaced else None

    def unused(self, names: Iterable[str]) -> tuple[str, ...]:
        """The names that the adapter changes and the checkpoint lacks: anything here means a wrong base.

        The second name of a tied weight is not counted where the adapter does the same to both
        (`ensure_weight_tying`).
        """
        present = set(names)
        missing = [name for name in self.names if name not in present]
        return tuple(
            name
            for name in missing
            if not any(self._same(name, other) for other in self.names if other != name)
        )

    def unties(self, tied: Sequence[Sequence[str]]) -> tuple[str, ...]:
        """The names of tied weights that the adapter pulls apart: they cannot be written as one tensor.

        Args:
            tied: Groups of names that are one tensor in the model, such as
                ``[("model.embed_tokens.weight", "lm_head.weight")]`` where config.json says
                `tie_word_embeddings`.
        """
        apart = []
        for group in tied:
            changed = [name for name in group if name in self.names]
            if changed and not all(name == group[0] or self._same(name, group[0]) for name in group):
                apart += changed
        return tuple(apart)

    def _same(self, name: str, other: str) -> bool:
        """Whether both names of a tied weight get the same: equal replacements, or LoRA on one and its
        transpose on the other, as PEFT keeps it for an embedding and the output layer."""
        replaced, replaced_other = self._replaced.get(name), self._replaced.get(other)
        if replaced is not None and replaced_other is not None and replaced.shape == replaced_other.shape:
            return replaced.read().equal(replaced_other.read())
        one, two = (
            self._layers.get(name.removesuffix(".weight")),
            self._layers.get(other.removesuffix(".weight")),
        )
        if one is None or two is None or one.magnitude is not None or two.magnitude is not None:
            return False
        if one.transposed == two.transposed or one.scaling != two.scaling:
            return False
        return one.A.read().equal(two.B.read().T) and one.B.read().equal(two.A.read().T)

    def _layer(self, target: str, found: dict[str, TensorEntry]) -> _Layer:
        embedding = ".lora_embedding_A" in found
        A = found.get(".lora_embedding_A" if embedding else ".lora_A")
        B = found.get(".lora_embedding_B" if embedding else ".lora_B")
        if A is None or B is None or len(A.shape) != 2 or len(B.shape) != 2 or A.shape[0] != B.shape[1]:
            raise CheckpointError(
                f"{self.path / WEIGHTS}: expected matrices lora_A (R, N) and lora_B (M, R) of {target}, got "
                f"{', '.join(f'{part[1:]} {entry.shape}' for part, entry in found.items())}. Convolutions "
                f"are not merged. {MERGE}"
            )
        rank = self._by_pattern("rank_pattern", target, self.config.get("r"))
        alpha = self._by_pattern("alpha_pattern", target, self.config.get("lora_alpha"))
        if rank != A.shape[0] or rank == 0 or not is_number(alpha):
            raise CheckpointError(
                f"{self.path}: {CONFIG} gives {target} the rank {rank!r} and lora_alpha {alpha!r}, {WEIGHTS} "
                f"has rank {A.shape[0]}: the two files are not of one adapter. Save it again."
            )
        magnitude = found.get(".lora_magnitude_vector")
        if (magnitude is not None) != bool(self.config.get("use_dora")):
            raise CheckpointError(
                f"{self.path}: {CONFIG} says use_dora={bool(self.config.get('use_dora'))}, but {WEIGHTS} has "
                f"{'a' if magnitude is not None else 'no'} magnitude of {target}. Save the adapter again."
            )
        return _Layer(
            A=A,
            B=B,
            bias=found.get(".lora_B.bias"),
            magnitude=magnitude,
            scaling=alpha / math.sqrt(rank) if self.config.get("use_rslora") else alpha / rank,
            transposed=embedding or bool(self.config.get("fan_in_fan_out")),
        )

    def _by_pattern(self, field: str, target: str, default: Any) -> Any:
        """The value of the first pattern that matches the end of a layer's name."""
        for pattern, value in (self.config.get(field) or {}).items():
            if self._matcher.matches(rf"(.*\.)?({pattern})$", target):
                return value
        return default


def read_adapter(folder: str | os.PathLike[str]) -> AdapterFolder:
    """Opens a PEFT adapter folder; see `AdapterFolder`."""
    return AdapterFolder(folder)
