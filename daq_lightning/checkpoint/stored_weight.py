"""One quantized weight of any maker's folder: how it is packed, which elements share a scale, and its values.

    weight = (code - zero) * scale

Dtypes and shapes of its tensors say what it is; config.json only where they leave it open. So a folder with
several config groups reads like any other.

Legend: M out, N in, G groups of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from daq_lightning.checkpoint.found import ORDER, shape_of
from daq_lightning.checkpoint.hints import Hints
from daq_lightning.checkpoint.layouts.fp4 import PackedFp4
from daq_lightning.checkpoint.layouts.int32 import PackedIntegers
from daq_lightning.checkpoint.layouts.parts import (
    CODES,
    GLOBAL_SCALE,
    SCALE,
    SHAPE,
    ZERO,
    Codes,
    PlainCodes,
    Scales,
    Unpacked,
)
from daq_lightning.checkpoint.layouts.scales import E4M3Scales, ExponentScales, NumberScales
from daq_lightning.checkpoint.tensor_file import CheckpointError, TensorSpec
from daq_lightning.numerics.formats import Granularity, PerBlock, PerChannel, PerTensor

_NUMBERS = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu)


@dataclass(frozen=True, kw_only=True)
class StoredWeight:
    """A quantized weight in a folder.

    Attributes:
        name: `X.weight`, whatever its tensors are called.
        shape: (M, N).
        parts: Part -> the name of its tensor.
        granularity: Which elements share a scale.
        codes: How codes are packed.
        scales: How scales are stored.
    """

    name: str
    shape: tuple[int, int]
    parts: Mapping[str, str]
    granularity: Granularity
    codes: Codes
    scales: Scales

    def unpack(self, read: Callable[[str], Tensor]) -> Unpacked:
        """Codes, scale and zero points.

        Args:
            read: Gives the tensor of a name.

        Raises:
            CheckpointError: What is stored beside the codes contradicts them.
        """
        parts = {part: read(name) for part, name in self.parts.items()}
        try:
            codes_MN, zero = self.codes.unpack(parts, self.shape)
        except ValueError as error:
            raise CheckpointError(
                f"{self.name} is packed otherwise than its shape says: {error}. Copy or download it again."
            ) from error
        grid = self.granularity.grid(self.shape)
        return Unpacked(codes_MN, self.scales.unpack(parts).reshape(grid), zero)


class Recognizer:
    """Says what the quantized weights of a folder are.

    Args:
        entries: Its tensors.
        quantization: Its `quantization_config`.
        path: Of the folder, for messages.

    Raises:
        CheckpointError: The `quantization_config` cannot be followed.
    """

    def __init__(
        self, entries: Mapping[str, TensorSpec], quantization: Mapping[str, Any], path: Path
    ) -> None:
        self._entries, self._quantization, self._path = entries, quantization, path
        self._hints = Hints.of(quantization, path)

    def weight(self, name: str, found: Mapping[str, Sequence[str]]) -> StoredWeight:
        """A weight from its tensors, as `found_weights` found them.

        Raises:
            CheckpointError: They are not those of one of the known formats.
        """
        parts = {part: names[0] for part, names in found.items()}
        codes = self._entries[parts[CODES]]
        scales = found.get(SCALE, ())
        if codes.dtype == torch.float8_e5m2:
            self._refuse(f"{name} is {_word(codes.dtype)}, expected float8_e4m3fn")
        if len(scales) != 1 or len(codes.shape) != 2:
            self._refuse(
                f"{codes.name} of shape {codes.shape} holds codes of a quantized weight and has "
                f"{len(scales)} scales; expected a matrix and exactly one of {name}_scale_inv, {name}_scale"
            )
        if ORDER in parts:
            self._refuse(f"{parts[ORDER]} says that columns were quantized in another order (actorder=group)")
        shape = shape_of(name, codes)
        shape_MN = (shape[0], shape[1])
        if codes.name == name:
            return self._plain(name, parts, shape_MN)
        if codes.dtype == torch.int32:
            return self._integers(name, parts, shape_MN)
        if codes.dtype == torch.uint8:
            return self._fp4(name, parts, shape_MN)
        self._refuse(f"{codes.name} is {_word(codes.dtype)}, expected int32 or uint8")

    def _plain(self, name: str, parts: Mapping[str, str], shape: tuple[int, int]) -> StoredWeight:
        """FP8 or int8 codes in the place of the weight."""
        codes, scale = self._entries[parts[CODES]], self._entries[parts[SCALE]]
        if codes.dtype == torch.int8 and ZERO in parts:
            self._refuse(f"{parts[ZERO]}: weights with a zero point, other than integers of 4 bits")
        exponents = scale.dtype == torch.uint8 and bool(self._hints.groups)
        if not exponents:
            self._check_number(scale)
        by_row = exponents or (self._hints.groups and self._hints.block is None and len(scale.shape) == 2
                               and scale.shape[1] > 1)  # fmt: skip
        granularity = self._along_rows(name, shape, scale) if by_row else self._by_shape(name, shape, scale)
        return StoredWeight(
            name=name,
            shape=shape,
            parts={part: parts[part] for part in (CODES, SCALE)},
            granularity=granularity,
            codes=PlainCodes(codes.dtype),
            scales=ExponentScales() if exponents else NumberScales(scale.dtype),
        )

    def _integers(self, name: str, parts: Mapping[str, str], shape: tuple[int, int]) -> StoredWeight:
        """Integers of four bits in int32."""
        codes, scale = self._entries[parts[CODES]], self._entries[parts[SCALE]]
        if self._hints.bits and 4 not in self._hints.bits:
            self._refuse(f"{codes.name} holds codes of {sorted(self._hints.bits)} bits, expected 4")
        self._check_number(scale)
        granularity = self._along_rows(name, shape, scale)
        packed = PackedIntegers(asymmetric=ZERO in parts or self._hints.zero_points)
        self._check_parts(name, parts, packed, shape, granularity)
        return StoredWeight(
            name=name,
            shape=shape,
            parts={part: parts[part] for part in (CODES, SCALE, SHAPE, ZERO) if part in parts},
            granularity=granularity,
            codes=packed,
            scales=NumberScales(scale.dtype),
        )

    def _fp4(self, name: str, parts: Mapping[str, str], shape: tuple[int, int]) -> StoredWeight:
        """E2M1 in bytes, with scales in E4M3 or exponents."""
        scale = self._entries[parts[SCALE]]
        scales = E4M3Scales() if GLOBAL_SCALE in parts else ExponentScales()
        granularity = self._along_rows(name, shape, scale)
        self._check_parts(name, parts, scales, shape, granularity)
        return StoredWeight(
            name=name,
            shape=shape,
            parts={part: parts[part] for part in (CODES, SCALE, GLOBAL_SCALE) if part in parts},
            granularity=granularity,
            codes=PackedFp4(),
            scales=scales,
        )

    def _check_parts(
        self,
        name: str,
        parts: Mapping[str, str],
        kind: PackedIntegers | E4M3Scales | ExponentScales,
        shape: tuple[int, int],
        granularity: Granularity,
    ) -> None:
        """Refuses a weight that lacks a part, or has it in another dtype or shape."""
        grid = granularity.grid(shape)
        expected = kind.parts(shape, grid) if isinstance(kind, PackedIntegers) else kind.parts(grid)
        for part, stored in expected.items():
            entry = self._entries.get(parts.get(part, ""))
            if entry is None:
                self._refuse(f"{name} has no {name}{stored.suffix}, which its codes need")
            if (entry.dtype, entry.shape) != (stored.dtype, stored.shape):
                self._refuse(
                    f"{entry.name} is {_word(entry.dtype)} {entry.shape}, expected {_word(stored.dtype)} "
                    f"{stored.shape} for a weight of shape {shape}"
                )

    def _check_number(self, scale: TensorSpec) -> None:
        if scale.dtype not in _NUMBERS:
            self._refuse(
                f"{scale.name} is {_word(scale.dtype)}, expected a scale in one of "
                f"{', '.join(map(_word, _NUMBERS))}"
            )

    def _by_shape(self, name: str, shape: tuple[int, int], scale: TensorSpec) -> Granularity:
        """Blocks if config.json describes them, else a channel or the whole weight."""
        candidates: list[Granularity] = (
            [PerChannel(), PerTensor()] if self._hints.block is None else [self._hints.block]
        )
        for granularity in candidates:
            squeezed = tuple(size for size in granularity.grid(shape) if size != 1)
            if scale.shape == granularity.grid(shape) or (
                not isinstance(granularity, PerBlock)
                and tuple(size for size in scale.shape if size != 1) == squeezed
            ):
                return granularity
        self._refuse(
            f"the scale of {name} has shape {scale.shape}, which fits a weight of shape {shape} under "
            f"none of {', '.join(map(str, candidates))}"
        )

    def _along_rows(self, name: str, shape: tuple[int, int], scale: TensorSpec) -> Granularity:
        """Groups of a row, as many as there are scales."""
        rows, cols = shape
        groups = scale.shape[1] if len(scale.shape) == 2 else 0
        if scale.shape[:1] != (rows,) or groups < 1 or cols % groups:
            self._refuse(
                f"the scale of {name} has shape {scale.shape}, which does not cut the rows of a weight of "
                f"shape {shape} into even groups"
            )
        known = self._hints.groups
        if known and cols // groups not in {*known, cols}:
            self._refuse(
                f"the scale of {name} has shape {scale.shape}, which is one for {cols // groups} weights of "
                f"a row, expected one for {' or '.join(map(str, sorted(known)))}"
            )
        return PerChannel() if groups == 1 and cols not in known else PerBlock(1, cols // groups)

    def _refuse(self, what: str) -> NoReturn:
        raise CheckpointError(
            f"{self._path}: {what}. Its quantization_config is {self._quantization or 'missing'}. Pass the "
            "checkpoint in high precision, or copy it again if it is damaged."
        )


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
