"""A checkpoint folder as a lazy mapping from names to tensors.

An FP8 folder looks like the checkpoint that it stands for: `X.weight` is dequantized as transformers does it,
`dtype(float32(code) * float32(scale))`, and its scale is not listed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from daq_lightning.checkpoint.folder import RawCheckpoint, config_dtype
from daq_lightning.checkpoint.tensor_file import CheckpointError, DescribedTensors, TensorSpec
from daq_lightning.numerics.formats import Granularity, PerBlock, PerChannel, PerTensor
from daq_lightning.numerics.quantize import dequantize

if TYPE_CHECKING:
    from daq_lightning.checkpoint.buffers import Buffers

_SCALES = ("_scale_inv", "_scale")
_SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu)
_PACKED = (".weight_packed", ".qweight", ".weight_global_scale", ".weight_shape", "_proj_blocks")
_ACTIVATION_SCALES = ("input_scale", "output_scale", "weight_zero_point", "activation_scale")
_CACHE_SCALES = ("q_scale", "k_scale", "v_scale", "prob_output_scale", "kv_scale")
_FP8 = torch.float8_e4m3fn


class Checkpoint(DescribedTensors):
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
            name: TensorSpec(
                name=name, dtype=self.dtype if name in self._scales else entry.dtype, shape=entry.shape
            )
            for name, entry in self.raw.entries.items()
            if name not in hidden and not self._belongs_to_quantization(name)
        }

    @property
    def places(self) -> tuple[Path, ...]:
        """The folders or files that the tensors come from."""
        return (self.path,)

    @property
    def quantized(self) -> bool:
        """Whether any weight is stored in FP8."""
        return bool(self._scales)

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
        if name not in self._scales:
            return self.raw.read(name, buffers)
        codes, scale = self.raw.read(name, buffers), self.raw.read(self._scales[name], buffers)
        if scale.dtype == torch.float8_e8m0fnu:
            scale = scale.float()
        granularity = self._granularities[name]
        scale = scale.reshape(granularity.grid((codes.shape[0], codes.shape[1])))
        return dequantize(codes, scale, granularity, self.dtype)

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
                not isinstance(granularity, PerBlock)
                and tuple(size for size in scale if size != 1) == squeezed
            ):
                return granularity
        raise CheckpointError(
            f"{self.path}: the scale of {name} has shape {scale}, which fits a weight of shape {shape} under "
            f"none of {', '.join(map(str, candidates))}; the quantization_config is "
            f"{self.raw.quantization or 'missing'}."
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
        """Refuses weights quantized otherwise than by FP8 codes and scale: they would pass as plain ones."""
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
                f"{self.path}: {len(odd)} tensors belong to weights that are not FP8 (e4m3) codes with one "
                f"scale: {listed}. Its quantization_config is {self.raw.quantization or 'missing'}. Pass the "
                "checkpoint in high precision, or one in FP8."
            )

    def _belongs_to_quantization(self, name: str) -> bool:
        """Scales of activations and of the cache do not outlive the quantization of the weights."""
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
        raise CheckpointError(
            f"{path}: the quantization_config {quantization} cannot be followed: {error}."
        ) from error
