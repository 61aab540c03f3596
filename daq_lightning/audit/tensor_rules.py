"""The rules of single tensors: their parts, scales, codes and sizes, as the layout of the folder has them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from daq_lightning.checkpoint.found import FP8, SUFFIXES
from daq_lightning.checkpoint.layouts.int32 import unpack_rows
from daq_lightning.checkpoint.layouts.parts import CODES, GLOBAL_SCALE, SCALE, SHAPE, ZERO
from daq_lightning.checkpoint.layouts.scales import ExponentScales, NumberScales
from daq_lightning.checkpoint.tensor_file import TensorSpec
from daq_lightning.numerics.formats import PerBlock

if TYPE_CHECKING:
    from daq_lightning.audit.verify import Stored


def check_parts(stored: Stored) -> Iterator[str]:
    """A weight has exactly the tensors of its layout, in their dtypes and shapes."""
    numbers = _other_numbers(stored)
    for name, found in stored.found.items():
        shape = stored.shape(name)
        layout = stored.layout(name)
        if layout is None:
            yield f"{name} is quantized, but no config group is for it: readers would not look for its codes"
            continue
        expected = layout.stored(TensorSpec(name=name, dtype=torch.float32, shape=(*shape, 1, 1)[:2]))
        codes, wanted = stored.entry(name), expected[CODES]
        if codes.dtype != wanted.dtype or codes.name != wanted.name or len(codes.shape) != 2:
            needed = f"{wanted.name}, a matrix of {wanted.dtype}"
            yield f"{codes.name} is {codes.dtype} {codes.shape}, expected {needed}"
            continue
        others = [other for part, names in found.items() if part != CODES for other in names]
        if sorted(others) != sorted(spec.name for part, spec in expected.items() if part != CODES):
            needed = ", ".join(spec.name for part, spec in expected.items() if part != CODES)
            yield f"{name} has {' and '.join(others) or 'no scale'}, expected exactly {needed}"
            continue
        for part, spec in expected.items():
            entry = stored.raw.entries[spec.name]
            number = part == SCALE and isinstance(layout.scales, NumberScales)
            same = entry.dtype == spec.dtype or (number and entry.dtype in numbers)
            if not same or entry.shape != spec.shape:
                yield f"{spec.name} is {entry.dtype} {entry.shape}, expected {spec.dtype} {spec.shape}"
    for name in stored.names:
        suffix = next((suffix for suffix in SUFFIXES if name.endswith(".weight" + suffix)), None)
        if suffix is not None:
            weight = name.removesuffix(suffix)
            holds = stored.entry(weight).dtype if weight in stored.names else "nothing"
            what = "scale" if SUFFIXES[suffix] in (SCALE, GLOBAL_SCALE) else SUFFIXES[suffix]
            yield f"{name} is the {what} of nothing: {weight} holds {holds}"


def _other_numbers(stored: Stored) -> frozenset[torch.dtype]:
    """The dtype in which another maker has written all scales, where readers of the container cast them."""
    names: list[str] = []
    for weight, parts in stored.found.items():
        layout = stored.layout(weight)
        if layout is not None and isinstance(layout.scales, NumberScales) and layout.container != "fp8":
            names += parts.get(SCALE, ())
    found = {stored.raw.entries[name].dtype for name in names}
    return frozenset(found & {torch.float32, torch.bfloat16, torch.float16} if len(found) == 1 else ())


def check_scale_values(stored: Stored) -> Iterator[str]:
    """Scales are finite, > 0, and numbers that their readers keep."""
    for weight, found in stored.found.items():
        layout = stored.layout(weight)
        if layout is None:
            continue  # another check says so
        exponents = isinstance(layout.scales, ExponentScales)
        for name in (*found.get(SCALE, ()), *found.get(GLOBAL_SCALE, ())):
            stored_scale = stored.raw[name]
            if exponents:  # 255 is NaN
                wrong = int((stored_scale == 255).sum()) if stored_scale.dtype == torch.uint8 else 0
                if wrong:
                    yield f"{name} has {wrong} exponents of 255, which stand for NaN"
                continue
            scale = stored_scale.float()
            wrong = int((~(scale.isfinite() & (scale > 0))).sum())
            if wrong:
                yield f"{name} has {wrong} values that are not finite and > 0"
            elif layout.scale_format == "ue8m0" and not powers_of_two(scale):
                yield f"{name} is not all powers of two, which scale_fmt ue8m0 promises"
            elif layout.scale_format == "bfloat16" and not torch.equal(scale, scale.bfloat16().float()):
                yield f"{name} has values that bfloat16 cannot hold: transformers would round them"


def powers_of_two(scale: Tensor) -> bool:
    """Whether every scale is a power of two."""
    return bool((torch.frexp(scale.float()).mantissa == 0.5).all())


def check_values(stored: Stored) -> Iterator[str]:
    """There is no NaN and no Inf."""
    for name in stored.names:
        entry = stored.entry(name)
        if entry.dtype == torch.float8_e4m3fn:
            wrong = int(((stored.raw[entry.name].view(torch.uint8) & 0x7F) == 0x7F).sum())
        elif entry.dtype.is_floating_point and entry.dtype not in FP8 and math.prod(entry.shape):
            low, high = stored.raw[name].aminmax()
            wrong = 0 if bool(low.isfinite() & high.isfinite()) else int((~stored.raw[name].isfinite()).sum())
        else:
            wrong = 0
        if wrong:
            yield f"{name} has {wrong} NaN or Inf values"


def check_packing(stored: Stored) -> Iterator[str]:
    """The shape that is stored is that of the weight, and bits that hold no zero point are 0."""
    for name, found in stored.found.items():
        shape = stored.shape(name)
        for part in found.get(SHAPE, ()):
            said = tuple(stored.raw[part].flatten().tolist())
            if said != shape:
                yield f"{part} is {said}, but the codes of {name} are of a weight of shape {shape}"
        for part in found.get(ZERO, ()):
            packed = stored.raw[part]
            if packed.dtype != torch.int32 or packed.ndim != 2:
                continue  # another check says so
            filling = unpack_rows(packed.T, packed.shape[0] * 8)[:, shape[0] :]
            if bool((filling != -8).any()):
                yield f"{part} has bits behind the last of {shape[0]} rows"


def check_sizes(stored: Stored) -> Iterator[str]:
    """Sizes are multiples of those of a block."""
    for name in stored.codes:
        layout, shape = stored.layout(name), stored.shape(name)
        granularity = None if layout is None else layout.granularity
        if isinstance(granularity, PerBlock) and any(
            size % block for size, block in zip(shape, (granularity.rows, granularity.cols), strict=False)
        ):
            yield f"{name} has the shape {shape}, with scales for {granularity.rows} x {granularity.cols}"
