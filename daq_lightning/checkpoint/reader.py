"""A checkpoint folder as a lazy mapping from names to tensors.

A quantized folder looks like the checkpoint that it stands for: `X.weight` is dequantized as transformers
does it, `dtype((float32(code) - zero) * float32(scale))`, and what it is stored as is not listed. So are
folders that bitsandbytes made for QLoRA, in four bits.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from daq_lightning.checkpoint.bitsandbytes import FourBitWeight, four_bit_weights
from daq_lightning.checkpoint.folder import RawCheckpoint, config_dtype
from daq_lightning.checkpoint.found import found_weights
from daq_lightning.checkpoint.layouts.parts import CODES, Unpacked
from daq_lightning.checkpoint.stored_weight import Recognizer, StoredWeight
from daq_lightning.checkpoint.tensor_file import CheckpointError, DescribedTensors, TensorSpec
from daq_lightning.numerics.formats import Granularity
from daq_lightning.numerics.quantize import dequantize

if TYPE_CHECKING:
    from daq_lightning.checkpoint.buffers import Buffers

_PACKED = (".weight_packed", ".qweight", ".weight_global_scale", ".weight_shape", "_proj_blocks")
_ACTIVATION_SCALES = (
    "input_scale",
    "input_global_scale",
    "output_scale",
    "weight_zero_point",
    "activation_scale",
)
_CACHE_SCALES = ("q_scale", "k_scale", "v_scale", "prob_output_scale", "kv_scale")


class Checkpoint(DescribedTensors):
    """A checkpoint folder in high precision: quantized weights are dequantized, one tensor at a time.

    Args:
        path: As for `RawCheckpoint`.
        dtype: Of dequantized weights; None takes the `dtype` of config.json, else bfloat16.

    Attributes:
        raw: The tensors as stored.
        specs: Name, dtype and shape of every tensor, without reading any.

    Raises:
        CheckpointError: As for `RawCheckpoint`, or codes without a scale of a known shape.
    """

    def __init__(self, path: str | os.PathLike[str], dtype: torch.dtype | None = None) -> None:
        self.raw = RawCheckpoint(path)
        self.path, self.config = self.raw.path, self.raw.config
        self.dtype = dtype or config_dtype(self.config) or torch.bfloat16
        recognizer = Recognizer(self.raw.entries, self.raw.quantization, self.path)
        self._weights = {
            name: recognizer.weight(name, found) for name, found in found_weights(self.raw.entries).items()
        }
        self._four_bit = four_bit_weights(self.raw.entries, self.raw.read)
        every = [*self._weights.values(), *self._four_bit.values()]
        hidden = {part for weight in every for part in weight.parts.values()}
        self._check_foreign(hidden)
        by_codes: dict[str, StoredWeight | FourBitWeight] = {
            **{weight.parts[CODES]: weight for weight in self._weights.values()},
            **self._four_bit,
        }
        self.specs = {}
        for name, entry in self.raw.entries.items():
            if name in by_codes:
                weight = by_codes[name]
                self.specs[weight.name] = TensorSpec(name=weight.name, dtype=self.dtype, shape=weight.shape)
            elif name not in hidden and not self._belongs_to_quantization(name):
                self.specs[name] = TensorSpec(name=name, dtype=entry.dtype, shape=entry.shape)

    @property
    def places(self) -> tuple[Path, ...]:
        """The folders or files that the tensors come from."""
        return (self.path,)

    @property
    def quantized(self) -> bool:
        """Whether any weight is stored as codes."""
        return bool(self._weights or self._four_bit)

    def __getitem__(self, name: str) -> Tensor:
        return self.read(name)

    def read(self, name: str, buffers: Buffers | None = None) -> Tensor:
        """One tensor in high precision.

        Args:
            name: Its name.
            buffers: Where the memory of what is read comes from; None takes new memory.
        """
        if name not in self.specs:
            raise KeyError(name)
        if name in self._four_bit:
            return self._four_bit[name].dequantize(lambda part: self.raw.read(part, buffers), self.dtype)
        if name not in self._weights:
            return self.raw.read(name, buffers)
        unpacked = self.unpacked(name, buffers)
        return dequantize(unpacked.codes, unpacked.scale, self.granularity(name), self.dtype, unpacked.zero)

    def unpacked(self, name: str, buffers: Buffers | None = None) -> Unpacked:
        """Codes, scale and zero points of a quantized weight.

        Args:
            name: Of the weight.
            buffers: Where the memory of what is read comes from; None takes new memory.

        Raises:
            CheckpointError: What is stored beside the codes contradicts them.
        """
        return self._weights[name].unpack(lambda part: self.raw.read(part, buffers))

    def granularity(self, name: str) -> Granularity:
        """Which elements of a quantized weight share a scale."""
        return self._weights[name].granularity

    def stored(self, name: str) -> StoredWeight | None:
        """How a weight is quantized; None if it is not, or by bitsandbytes."""
        return self._weights.get(name)

    def _check_foreign(self, known: set[str]) -> None:
        """Refuses weights quantized otherwise than by codes and scale: they would pass as plain ones."""
        odd = [
            name
            for name, entry in self.raw.entries.items()
            if name not in known
            and (
                name.endswith(_PACKED)
                or name.endswith((".weight_scale", ".weight_scale_inv"))
                or (entry.dtype.itemsize == 1 and entry.dtype != torch.bool
                    and name.endswith((".weight", "_proj")))
            )
        ]  # fmt: skip
        if odd:
            listed = ", ".join(
                f"{name} ({str(self.raw.entries[name].dtype).removeprefix('torch.')})" for name in odd[:4]
            )
            raise CheckpointError(
                f"{self.path}: {len(odd)} tensors belong to weights that are not FP8 (e4m3) codes with one "
                f"scale, nor packed as compressed-tensors or bitsandbytes (4 bit) do it: {listed}. Its "
                f"quantization_config is {self.raw.quantization or 'missing'}. Pass the checkpoint in high "
                "precision, or one in a format of `daq-lightning quantize --help`."
            )

    def _belongs_to_quantization(self, name: str) -> bool:
        """Scales of activations and of the cache do not outlive the quantization of the weights."""
        owner, _, leaf = name.rpartition(".")
        if leaf in _ACTIVATION_SCALES:
            return f"{owner}.weight" in self._weights
        return bool(self._weights) and leaf in _CACHE_SCALES


def load_checkpoint(path: str | os.PathLike[str], dtype: torch.dtype | None = None) -> Checkpoint:
    """Opens a checkpoint folder, quantized or not, as a lazy mapping from names to tensors.

    Args:
        path: A folder (or file) of safetensors.
        dtype: Of dequantized weights; None takes the `dtype` of config.json, else bfloat16.

    Returns:
        `Checkpoint`; tensors are read when asked for.

    Raises:
        CheckpointError: The path does not exist, has no safetensors, or its files contradict each other.
    """
    return Checkpoint(path, dtype)
