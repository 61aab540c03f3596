"""The layers of a model that cache something for each token, and what.

| kind | what a token leaves there | its class |
| --- | --- | --- |
| full, sliding | its key, after the rotary embedding, and its value | `k_proj` and `v_proj`, or `qkv_proj` |
| latent | what keys and values are made of (MLA) | `kv_b_proj`, `kv_a_proj_with_mqa` |
| state | no key and no value: linear attention, Mamba | no such projections |
| shared | nothing: it reads the cache of another layer | `is_kv_shared_layer` |
| cross | nothing: its keys are of an encoder or an image | encoder-decoders, `...Cross...` |
| unknown | keys and values, in a way that readers of k_scale and v_scale do not know | `c_attn`, ... |

Source: compressed-tensors 0.20 `is_cached_attention_module`, which decides where transformers has the scales
of a cache; transformers 5.23 and 5.24, the attentions of their models.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from daq_lightning.model.outline import CacheKind

CACHES = ("past_key_values", "past_key_value", "cache")
"""What an attention calls the cache that it is given; "cache" from transformers 5.24 on."""
_OTHERS = ("cache_params", "layer_past")
_LATENT = {"kv_b_proj", "kv_a_proj_with_mqa", "kv_a_proj"}


def cache_kinds(modules: Mapping[str, nn.Module], *, encoder_decoder: bool = False) -> dict[str, CacheKind]:
    """The modules that cache something, in their order, and what.

    Args:
        modules: Name -> module; of nested ones that take a cache, only the inner ones hold one.
        encoder_decoder: Whether some of the attentions may look at an encoder.
    """
    found: dict[str, CacheKind] = {}
    for name, module in modules.items():
        kind = _kind_of(module)
        if kind is not None:
            found[name] = kind
    inner: dict[str, CacheKind] = {}
    for name in found:
        nested = any(other.startswith(f"{name}.") for other in found)
        if _has_projections(modules[name]) or not nested:
            inner[name] = "cross" if encoder_decoder else found[name]
    return inner


def _kind_of(module: nn.Module) -> CacheKind | None:
    if not (hasattr(module, "layer_idx") or _is_attention(module)):
        return None
    parameters = inspect.signature(module.forward).parameters
    if not any(name in parameters for name in (*CACHES, *_OTHERS)):
        return None
    called = type(module).__name__.lower()
    if _LATENT & set(module._modules):
        return "latent"
    layer_type = _layer_type(module)
    if "layer_past" in parameters:
        return "unknown"
    if not any(name in parameters for name in CACHES) or not _is_attention(module):
        return "state"
    if "cross" in called or getattr(module, "is_cross_attention", False):
        return "cross"
    if getattr(module, "is_kv_shared_layer", False):
        return "shared"
    # readers would take linear attention of these names for one with keys and values
    if "linear" in layer_type or not _has_projections(module) or "attention" not in called:
        return "unknown"
    return "sliding" if _looks_back_over_a_window(module, layer_type) else "full"


def _looks_back_over_a_window(module: nn.Module, layer_type: str) -> bool:
    if layer_type:
        return layer_type in ("sliding_attention", "chunked_attention")
    config = getattr(module, "config", None)
    window = getattr(module, "sliding_window", getattr(config, "sliding_window", None))
    return isinstance(window, int)


def _is_attention(module: nn.Module) -> bool:
    return "attention" in type(module).__name__.lower() or _has_projections(module)


def _has_projections(module: nn.Module) -> bool:
    return {"k_proj", "v_proj"} <= set(module._modules) or "qkv_proj" in module._modules


def _layer_type(module: nn.Module) -> str:
    """What the config says of a layer, or ""."""
    types = getattr(getattr(module, "config", None), "layer_types", None) or ()
    index: Any = getattr(module, "layer_idx", None)
    return str(types[index]) if isinstance(index, int) and index < len(types) else ""
