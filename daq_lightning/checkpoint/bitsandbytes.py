"""Folders in bitsandbytes' four bits, NF4 or FP4, as QLoRA trains on them.

    X.weight                                two codes in a byte, the first in the upper four bits
    X.weight.quant_map                      the sixteen values of a code, float32
    X.weight.absmax                         one scale for `blocksize` neighbours, whatever row they are of
    X.weight.quant_state.bitsandbytes__nf4  JSON in bytes: shape, blocksize, dtype (.._fp4 likewise)

    weight = quant_map[code] * absmax

Scales may be quantized themselves (double quantization): `absmax` then holds codes of eight bits, of the
values in `X.weight.nested_quant_map`, with scales of their own in `X.weight.nested_absmax`:

    absmax = nested_quant_map[code] * nested_absmax + nested_offset

Legend: M out, N in, P elements, B blocks.

Sources: arXiv 2305.14314 (QLoRA), section 3; bitsandbytes 0.50, `QuantState.as_dict`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from daq_lightning.checkpoint.tensor_file import CheckpointError, TensorEntry, TensorSpec

_STATES = (".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4")
_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_LONGEST = 1 << 12  # bytes of the JSON


@dataclass(frozen=True, kw_only=True)
class FourBitWeight:
    """A weight of such a folder.

    Attributes:
        name: `X.weight`.
        shape: (M, N), or whatever else it was.
        parts: Part -> the name of its tensor; "codes" of the codes.
        blocksize: Neighbours that share a scale.
        nested: Blocks that share the scale of their scales, and the offset; None where scales are numbers.
    """

    name: str
    shape: tuple[int, ...]
    parts: Mapping[str, str]
    blocksize: int
    nested: tuple[int, float] | None

    def dequantized(self, read: Callable[[str], Tensor], dtype: torch.dtype) -> Tensor:
        """The weight, as bitsandbytes dequantizes it.

        Args:
            read: Gives the tensor of a name.
            dtype: Of the result; products are taken in float32.
        """
        part = {name: read(stored) for name, stored in self.parts.items() if name != "state"}
        bytes_ = part["codes"].contiguous().view(torch.uint8).flatten()
        codes_P = torch.stack((bytes_ >> 4, bytes_ & 0xF), -1).flatten()[: math.prod(self.shape)]
        absmax_B = part["absmax"].flatten()
        if self.nested is not None:
            size, offset = self.nested
            own_B = part["nested_absmax"].float().flatten().repeat_interleave(size)[: len(absmax_B)]
            absmax_B = part["nested_quant_map"].float()[absmax_B.int()] * own_B + offset
        scale_P = absmax_B.float().repeat_interleave(self.blocksize)[: len(codes_P)]
        return (part["quant_map"].float()[codes_P.int()] * scale_P).to(dtype).reshape(self.shape)


def four_bit_weights(entries: Mapping[str, TensorEntry], path: Path) -> dict[str, FourBitWeight]:
    """The weights of a folder that bitsandbytes quantized, by name. Reads a few hundred bytes of each.

    Args:
        entries: The tensors of the folder.
        path: Of the folder, for messages.

    Raises:
        CheckpointError: Parts that are missing or contradict each other.
    """
    found = {}
    for state in entries:
        suffix = next((suffix for suffix in _STATES if state.endswith(suffix)), None)
        if suffix is not None:
            name = state.removesuffix(suffix)
            found[name] = _weight(name, state, entries, path)
    return found


def _weight(name: str, state: str, entries: Mapping[str, TensorEntry], path: Path) -> FourBitWeight:
    try:
        said = _json(entries[state])
        shape, blocksize = tuple(said["shape"]), said["blocksize"]
        nested = (said["nested_blocksize"], float(said["nested_offset"])) if "nested_offset" in said else None
        sizes = (*shape, blocksize, *([] if nested is None else nested[:1]))
        if not all(type(size) is int and 0 < size < 1 << 40 for size in sizes):
            raise ValueError(f"sizes {sizes}")
        blocks = -(-math.prod(shape) // blocksize)
        counts = {"absmax": blocks, "quant_map": 16}
        if nested is not None:
            counts |= {"nested_absmax": -(-blocks // nested[0]), "nested_quant_map": 256}
        parts = {"codes": name} | {part: f"{name}.{part}" for part in _PARTS if part in counts}
        _check(entries, parts, counts, -(-math.prod(shape) // 2), nested is not None)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: {name} is no weight as bitsandbytes saves them in four bits: {error}. Copy or download "
            "the folder again."
        ) from error
    parts["state"] = state
    return FourBitWeight(name=name, shape=shape, parts=parts, blocksize=blocksize, nested=nested)


def _json(state: TensorEntry) -> dict[str, Any]:
    if state.dtype != torch.uint8 or not state.nbytes <= _LONGEST:
        raise ValueError(f"{state.name} is {state.dtype} {state.shape}, expected JSON in bytes")
    said = json.loads(bytes(state.read().flatten().tolist()))
    if not isinstance(said, dict):
        raise ValueError(f"{state.name} holds no JSON object")
    return said


def _check(
    entries: Mapping[str, TensorSpec],
    parts: Mapping[str, str],
    counts: Mapping[str, int],
    size: int,
    nested: bool,
) -> None:
    """Raises ValueError for parts of another size or kind."""
    for part, stored in parts.items():
        if stored not in entries:
            raise ValueError(f"{stored} is missing")
        entry = entries[stored]
        if part == "codes" and entry.nbytes != size:
            raise ValueError(f"{stored} has {entry.nbytes} bytes of codes, expected {size}")
        if part != "codes" and math.prod(entry.shape) != counts[part]:
            raise ValueError(f"{stored} has {math.prod(entry.shape)} values, expected {counts[part]}")
        coded = part == "absmax" and nested
        if part != "codes" and entry.dtype != (torch.uint8 if coded else torch.float32):
            raise ValueError(f"{stored} is {entry.dtype}")
