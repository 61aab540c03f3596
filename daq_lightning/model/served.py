"""Linear weights that a reader keeps in full precision whatever a checkpoint says.

| role | what | otherwise |
| --- | --- | --- |
| float32 | what a class of transformers lists to be kept in float32 | it makes no FP8 layer of it |
| plain | what vLLM makes without a quantization method | it takes codes for weights |
| upcast | the same, but vLLM turns FP8 back when it loads it | it takes other codes for weights |

What vLLM does so is a list: Mamba 1 has no quantized layers there; of the indexer of sparse attention both
projections of the hidden state are one matrix in 16 bit, the first of which may come in FP8.

Sources: transformers 5.23 `HfQuantizer.get_modules_to_not_convert`, `_keep_in_fp32_modules_strict`; vLLM 0.33
`MambaMixer`, `deepseek_v2.Indexer`, `qwen4_exp.hyperconnection` (read).
"""

from __future__ import annotations

import re
from typing import Literal

from torch import nn

_PLAIN = (
    (r"(Falcon|Jamba)?MambaMixer", r".*"),
    (r".*Indexer", r"weights_proj"),
    (r".*GatedResidual", r".*"),
)
"""Class of a module -> names of its Linear layers that vLLM makes without a quantization method."""
_UPCAST = ((r".*Indexer", r"wk"),)


def kept_by_readers(
    model: nn.Module, name: str, parent: nn.Module | None
) -> Literal["float32", "plain", "upcast"] | None:
    """Which reader keeps a Linear layer of a transformers model in full precision; None if none does.

    Args:
        model: Of which the layer is.
        name: Of the layer, in memory.
        parent: The module that holds it.
    """
    if _in_float32(model, name):
        return "float32"
    owner, leaf = type(parent).__name__, name.rpartition(".")[2]
    if _is_one_of(_PLAIN, owner, leaf):
        return "plain"
    return "upcast" if _is_one_of(_UPCAST, owner, leaf) else None


def _is_one_of(patterns: tuple[tuple[str, str], ...], owner: str, leaf: str) -> bool:
    return any(re.fullmatch(kind, owner) and re.fullmatch(name, leaf) for kind, name in patterns)


def _in_float32(model: nn.Module, name: str) -> bool:
    from transformers.quantizers.quantizers_utils import should_convert_module

    usual: list[str] = sorted(getattr(model, "_keep_in_fp32_modules", None) or ())
    strict = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    parts = f".{name}."
    return not should_convert_module(name, usual) or any(f".{pattern}." in parts for pattern in strict)
