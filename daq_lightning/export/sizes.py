"""What sizes and dtypes of weights say: whether they fit a scheme, and what is kept as what."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch

from daq_lightning.checkpoint.tensor_file import CheckpointError, TensorSpec
from daq_lightning.numerics.formats import PerBlock

if TYPE_CHECKING:
    from daq_lightning.checkpoint.layouts import Layout

_LISTED = 8
_PACKED_ROWS = 8  # of zero points in an int32


def check_sizes(layout: Layout, chosen: Sequence[TensorSpec]) -> None:
    """Raises CheckpointError for weights that do not consist of whole groups."""
    scheme, granularity = layout.scheme, layout.granularity
    if scheme.group is not None:
        odd = odd_sizes(chosen, 1, scheme.group)
        if odd:
            raise CheckpointError(
                f"{scheme.name} cuts rows into groups of {scheme.group}; {len(odd)} weights have rows of "
                f"another length: {_listed(odd)}. Use a scheme with one scale per row (scheme='FP8_DYNAMIC', "
                f"'W8A8'), {_smaller(scheme.group)}or keep these weights (ignore)."
            )
    elif isinstance(granularity, PerBlock):
        odd = odd_sizes(chosen, granularity.rows, granularity.cols)
        if odd:
            raise CheckpointError(
                f"{scheme.name} needs sizes that are multiples of {granularity.cols}; {len(odd)} weights "
                f"have others: {_listed(odd)}. Readers would compute garbage. Use scheme='FP8_DYNAMIC' (one "
                "scale per channel) or scheme='auto', or keep these weights (ignore)."
            )
    if scheme.asymmetric:
        odd = odd_sizes(chosen, _PACKED_ROWS, 1)
        if odd:
            raise CheckpointError(
                f"{scheme.name} packs the zero points of {_PACKED_ROWS} rows into one number; {len(odd)} "
                f"weights have a number of rows that is no multiple of it: {_listed(odd)}. vLLM would not "
                f"load them. Use scheme={scheme.name.replace('_ASYM', '')!r}, or keep these weights (ignore)."
            )


def _smaller(group: int) -> str:
    return "one of smaller groups (scheme='W4A16_G32': 32, 'NVFP4A16': 16), " if group > 32 else ""


def odd_sizes(specs: Iterable[TensorSpec], rows: int, cols: int) -> list[TensorSpec]:
    """The weights whose sizes are no multiples of these."""
    return [spec for spec in specs if spec.shape[0] % rows or spec.shape[1] % cols]


def _listed(specs: Sequence[TensorSpec]) -> str:
    shown = ", ".join(f"{spec.name} {spec.shape}" for spec in specs[:_LISTED])
    return shown + ", ..." * (len(specs) > _LISTED)


def kept_dtype(specs: Sequence[TensorSpec]) -> tuple[torch.dtype, bool]:
    """The dtype of most of the floating-point data, if servers take it, else bfloat16; and whether that is a
    cast.

    float32 masters are cast; a few float32 tensors of a 16-bit checkpoint are float32 on purpose.
    """
    sizes: dict[torch.dtype, int] = {}
    for spec in specs:
        if spec.dtype.is_floating_point:
            sizes[spec.dtype] = sizes.get(spec.dtype, 0) + spec.nbytes
    dominant = max(sizes, key=lambda dtype: sizes[dtype])
    servable = dominant in (torch.bfloat16, torch.float16)
    return (dominant, False) if servable else (torch.bfloat16, True)
