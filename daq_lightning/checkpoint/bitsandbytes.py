"""Weights of four bits as bitsandbytes stores them (NF4 and FP4, for QLoRA): read, never written.

    X.weight                              uint8: two codes a byte, the first in the upper four bits; the same
                                          bytes under another dtype where weights were sharded in training
    X.weight.quant_map                    float32 (16): what a code stands for
    X.weight.absmax                       float32, one per block of the flattened weight; or uint8, nested:
    X.weight.nested_absmax, .nested_quant_map                       absmax = map[code] * nested + offset
    X.weight.quant_state.bitsandbytes__nf4                          JSON as bytes: shape, blocksize, offset

    weight = quant_map[code] * absmax     in float32

Source: bitsandbytes 0.50, `QuantState` and `dequantize_4bit`; arXiv 2305.14314 (QLoRA), section 3.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from daq_lightning.checkpoint.flat_bytes import flat_bytes
from daq_lightning.checkpoint.tensor_file import CheckpointError, TensorSpec

_STATE = ".quant_state.bitsandbytes__"
_KINDS = ("nf4", "fp4")
_BAND = 1 << 20  # codes that are looked up at a time
_CODES, _MAP, _ABSMAX, _NESTED, _NESTED_MAP = "", "quant_map", "absmax", "nested_absmax", "nested_quant_map"

Read = Callable[[str], Tensor]


@dataclass(frozen=True, kw_only=True)
class FourBitWeight:
    """A weight that bitsandbytes quantized.

    Attributes:
        name: Of the weight.
        shape: (M, N).
        parts: Part -> the name of its tensor, that of the JSON included.
        block: Codes that share an absmax.
        nested_block: Absmaxes that share one of theirs; None where they are numbers themselves.
        offset: What is added to nested absmaxes.
    """

    name: str
    shape: tuple[int, int]
    parts: Mapping[str, str]
    block: int
    nested_block: int | None
    offset: float

    def dequantize(self, read: Read, dtype: torch.dtype) -> Tensor:
        """The weight, each product rounded once.

        Args:
            read: Gives the tensor of a name.
            dtype: Of the result.
        """
        packed = flat_bytes(read(self.parts[_CODES]))
        values = read(self.parts[_MAP]).float().flatten()
        absmax, count = self._absmax(read), math.prod(self.shape)
        weight = torch.empty(count, dtype=dtype, device=packed.device)
        step = max(1, _BAND // self.block) * self.block
        for start in range(0, count, step):
            stop = min(start + step, count)
            bytes_ = packed[start // 2 : -(-stop // 2)]
            codes = torch.stack((bytes_ >> 4, bytes_ & 0xF), -1).flatten()[: stop - start]
            scale = absmax[start // self.block :].repeat_interleave(self.block)[: stop - start]
            weight[start:stop] = values[codes.int()] * scale
        return weight.reshape(self.shape)

    def _absmax(self, read: Read) -> Tensor:
        stored = read(self.parts[_ABSMAX]).flatten()
        if self.nested_block is None:
            return stored.float()
        values = read(self.parts[_NESTED_MAP]).float().flatten()
        nested = read(self.parts[_NESTED]).float().flatten()
        scale = nested.repeat_interleave(self.nested_block)[: len(stored)]
        return values[stored.int()] * scale + self.offset


def four_bit_weights(entries: Mapping[str, TensorSpec], read: Read) -> dict[str, FourBitWeight]:
    """The weights of a folder that bitsandbytes quantized, by name. Reads their JSON, a few bytes each.

    Args:
        entries: The tensors of the folder.
        read: Gives the tensor of a name.

    Raises:
        CheckpointError: One lacks a part, or its parts contradict each other.
    """
    states: dict[str, list[str]] = {}
    for name in entries:
        if _STATE in name:
            states.setdefault(name.rpartition(_STATE)[0], []).append(name)
    return {weight: _weight(weight, found, entries, read) for weight, found in states.items()}


def _weight(name: str, states: list[str], entries: Mapping[str, TensorSpec], read: Read) -> FourBitWeight:
    def check(holds: bool, what: str) -> None:
        if not holds:
            raise CheckpointError(
                f"{name} was quantized by bitsandbytes, but {what}. Copy or download the folder again, or "
                "pass the checkpoint in high precision."
            )

    check(len(states) == 1, f"it has {len(states)} states")
    state = states[0]
    check(state.rpartition("__")[2] in _KINDS, f"{state} is none of {', '.join(_KINDS)}")
    said = _json(read(state)) if entries[state].dtype == torch.uint8 else {}
    shape: Any = said.get("shape")
    block: Any = said.get("blocksize")
    sized = isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and n > 0 for n in shape)
    check(sized and _is_size(block), f"{state} does not hold its shape and block size")
    nested = "nested_blocksize" in said
    check(not nested or _is_size(said["nested_blocksize"]), f"{state} holds no size of nested blocks")
    offset = said.get("nested_offset", 0.0)
    check(type(offset) in (int, float) and abs(offset) < 1e30, f"{state} holds no offset")
    count = math.prod(shape)
    blocks = -(-count // block)
    wanted: dict[str, tuple[torch.dtype, int]] = {
        _CODES: (torch.uint8, -(-count // 2)),
        _MAP: (torch.float32, 16),
        _ABSMAX: (torch.uint8 if nested else torch.float32, blocks),
    }
    if nested:
        wanted[_NESTED] = (torch.float32, -(-blocks // said["nested_blocksize"]))
        wanted[_NESTED_MAP] = (torch.float32, 256)
    parts = {part: f"{name}.{part}" if part else name for part in wanted}
    for part, (dtype, size) in wanted.items():
        entry = entries.get(parts[part])
        fits = entry is not None and (entry.dtype, math.prod(entry.shape)) == (dtype, size)
        if part == _CODES and entry is not None:
            fits = entry.nbytes == size
        check(fits, f"{parts[part]} does not hold {size} numbers of {str(dtype).removeprefix('torch.')}")
    return FourBitWeight(
        name=name,
        shape=(shape[0], shape[1]),
        parts={**parts, "state": state},
        block=block,
        nested_block=said["nested_blocksize"] if nested else None,
        offset=float(offset),
    )


def _is_size(value: Any) -> bool:
    """Whether this is a number of codes in a block: even, so that none begins within a byte."""
    return type(value) is int and value > 0 and value % 2 == 0


def _json(content: Tensor) -> dict[str, Any]:
    try:
        said = json.loads(bytes(content.flatten().tolist()))
    except (ValueError, RecursionError):
        return {}
    return said if isinstance(said, dict) else {}
