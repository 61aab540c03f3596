"""Keys and values that servers cache in FP8: what config.json says of it, and the names of the scales.

    config.json                 quantization_config.kv_cache_scheme
    X.k_scale, X.v_scale        float32 (1,), X an attention layer, such as model.layers.0.self_attn

Both are needed. vLLM 0.32 turns the FP8 cache on where the scheme is there, and takes 1.0 for scales that are
not; transformers 5.23 then leaves them at whatever the memory held, and the model answers NaN. Only the
compressed-tensors container has such a field: vLLM's `Fp8Config` does not read it, and transformers' loader
of the fp8 container drops the scales.

Source: compressed-tensors 0.20 `QuantizationConfig`, `initialize_attn_qparams`; vLLM
`maybe_remap_kv_scale_name`, `BaseKVCacheMethod`, `Attention`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

KVCache: TypeAlias = Literal["fp8", "fp8-calibrated"]
"""FP8 (E4M3) with scales of 1.0, or with scales that were found on data."""

KV_CACHE_SCHEME: Mapping[str, Any] = {
    "num_bits": 8,
    "type": "float",
    "strategy": "tensor",
    "dynamic": False,
    "symmetric": True,
}
"""One scale for the keys of a layer and one for its values, fixed: all that vLLM reads."""

_SCALES = ("k_scale", "v_scale")


def scale_names(module: str) -> tuple[str, str]:
    """The names of the two scales of an attention layer: of keys, of values.

    Example:
        >>> scale_names("model.layers.0.self_attn")
        ('model.layers.0.self_attn.k_scale', 'model.layers.0.self_attn.v_scale')
    """
    return (f"{module}.{_SCALES[0]}", f"{module}.{_SCALES[1]}")


def is_cache_scale(name: str) -> bool:
    """Whether a tensor has the name of such a scale."""
    return name.rpartition(".")[2] in _SCALES
