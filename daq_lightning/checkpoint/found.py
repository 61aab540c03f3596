"""Which tensors of a folder belong together to one quantized weight, by their names and dtypes.

    X.weight_packed, or X.weight in FP8 or int8 beside a scale       the codes of X.weight
    X.weight_scale, X.weight_scale_inv                               its scale
    X.weight_zero_point, _global_scale, _shape, _g_idx               what else there may be

Nothing is judged here: a weight may have two scales, or none.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from daq_lightning.checkpoint.layouts.parts import CODES, GLOBAL_SCALE, SCALE, SHAPE, ZERO
from daq_lightning.checkpoint.tensor_file import TensorSpec

PACKED = "_packed"
ORDER = "order"
"""The part that says in which order columns were quantized (actorder)."""
SUFFIXES: Mapping[str, str] = {
    "_scale_inv": SCALE,
    "_scale": SCALE,
    "_zero_point": ZERO,
    "_global_scale": GLOBAL_SCALE,
    "_shape": SHAPE,
    "_g_idx": ORDER,
}
"""What is added to the name of a weight -> the part."""
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_PER_ELEMENT: Mapping[torch.dtype, int] = {torch.int32: 8, torch.uint8: 2}
"""dtype of packed codes -> how many of four bits an element holds."""


def found_weights(entries: Mapping[str, TensorSpec]) -> dict[str, dict[str, list[str]]]:
    """Weight name -> part -> the names of its tensors, in the order of the folder.

    Example:
        >>> specs = [TensorSpec(name=name, dtype=torch.int32, shape=()) for name in ("a.weight_packed", "b")]
        >>> found_weights({spec.name: spec for spec in specs})
        {'a.weight': {'codes': ['a.weight_packed']}}
    """
    packed = {name.removesuffix(PACKED): name for name in entries if name.endswith(f".weight{PACKED}")}
    codes = {}
    for name, entry in entries.items():
        if name in packed.values():
            codes[name.removesuffix(PACKED)] = name
        elif _is_plain(name, entry, entries) and _owner(name) not in packed:
            codes[name] = name
    found = {}
    for weight, name in codes.items():
        parts: dict[str, list[str]] = {CODES: [name]}
        for suffix, part in SUFFIXES.items():
            if weight + suffix in entries and weight + suffix not in codes:
                parts.setdefault(part, []).append(weight + suffix)
        found[weight] = parts
    return found


def shape_of(weight: str, codes: TensorSpec) -> tuple[int, ...]:
    """The shape of a weight, from its codes; a row fills its last element of packed ones.

    Example:
        >>> shape_of("a.weight", TensorSpec(name="a.weight_packed", dtype=torch.int32, shape=(2, 16)))
        (2, 128)
    """
    if codes.name == weight or not codes.shape:
        return codes.shape
    return (*codes.shape[:-1], codes.shape[-1] * _PER_ELEMENT.get(codes.dtype, 1))


def _is_plain(name: str, entry: TensorSpec, entries: Mapping[str, TensorSpec]) -> bool:
    """Whether a tensor holds codes as they are."""
    if entry.dtype == torch.int8:
        return name.endswith(".weight") and f"{name}_scale" in entries
    return entry.dtype in FP8


def _owner(name: str) -> str | None:
    """The weight that a tensor would be a part of, by its name."""
    return next((name.removesuffix(suffix) for suffix in SUFFIXES if name.endswith(suffix)), None)
