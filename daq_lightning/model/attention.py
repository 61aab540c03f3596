"""The layers of a model that cache something for each token, and what enters their caches.

| kind | what a token leaves there | its class |
| --- | --- | --- |
| full, sliding | its key, after the rotary embedding, and its value | `k_proj` and `v_proj`, or `qkv_proj` |
| latent | what keys and values are made of (MLA) | `kv_b_proj`, `kv_a_proj_with_mqa` |
| state | no key and no value: linear attention, Mamba | no such projections |
| shared | nothing: it reads the cache of another layer | `is_kv_shared_layer` |
| cross | nothing: its keys are of an encoder or an image | encoder-decoders, `...Cross...` |
| unknown | keys and values, in a way that readers of k_scale and v_scale do not know | `c_attn`, ... |

    with watched(modules) as seen: model(...)
    seen.peaks()       {"model.layers.0.self_attn": (absmax of keys, of values)}

An attention of transformers gives keys and values to `past_key_values.update`, which answers with all of the
context. While they are watched, something stands in front of the cache that looks and passes on; where a
model runs without a cache, it answers with what it was given, which is what there would be without. No value
of the model changes.

Source: transformers 5.23 `Cache.update`; compressed-tensors 0.20 `is_cached_attention_module`, which decides
where transformers has such scales.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from daq_lightning.model.outline import CacheKind

_CACHES = ("past_key_values", "past_key_value")
_STATES = ("cache_params",)
_LATENT = {"kv_b_proj", "kv_a_proj_with_mqa", "kv_a_proj"}


def cache_kinds(modules: Mapping[str, nn.Module], *, encoder_decoder: bool = False) -> dict[str, CacheKind]:
    """The modules that cache something, in their order, and what.

    Args:
        modules: Name -> module; of nested ones that take a cache, only the inner ones hold one.
        encoder_decoder: Whether some of the attentions may look at an encoder.
    """
    found = {name: kind for name, module in modules.items() if (kind := _kind_of(module)) is not None}
    inner = {
        name: kind
        for name, kind in found.items()
        if _has_projections(modules[name]) or not any(other.startswith(f"{name}.") for other in found)
    }
    return {name: "cross" for name in inner} if encoder_decoder else inner


def _kind_of(module: nn.Module) -> CacheKind | None:
    parameters = inspect.signature(module.forward).parameters
    if not any(name in parameters for name in (*_CACHES, *_STATES)) or not hasattr(module, "layer_idx"):
        return None
    called = type(module).__name__.lower()
    if _LATENT & set(module._modules):
        return "latent"
    layer_type = _layer_type(module)
    if not any(name in parameters for name in _CACHES) or not _is_attention(module):
        return "state"
    if "cross" in called or getattr(module, "is_cross_attention", False):
        return "cross"
    if getattr(module, "is_kv_shared_layer", False):
        return "shared"
    # readers would take linear attention of these names for one with keys and values
    if "linear" in layer_type or not _has_projections(module) or "attention" not in called:
        return "unknown"
    window = getattr(module, "sliding_window", None)
    sliding = layer_type in ("sliding_attention", "chunked_attention") or isinstance(window, int)
    return "sliding" if sliding else "full"


def _is_attention(module: nn.Module) -> bool:
    return "attention" in type(module).__name__.lower() or _has_projections(module)


def _has_projections(module: nn.Module) -> bool:
    return {"k_proj", "v_proj"} <= set(module._modules) or "qkv_proj" in module._modules


def _layer_type(module: nn.Module) -> str:
    """What the config says of a layer, or ""."""
    types = getattr(getattr(module, "config", None), "layer_types", None) or ()
    index: Any = module.layer_idx
    return str(types[index]) if isinstance(index, int) and index < len(types) else ""


class Seen:
    """The largest keys and values that layers cached; on their device until they are asked for.

    Attributes:
        tokens: Name of a layer -> tokens that entered its cache.
    """

    def __init__(self) -> None:
        self._largest: dict[str, Tensor] = {}
        self.tokens: dict[str, int] = {}

    @torch.no_grad()
    def add(self, name: str, keys_BHTD: Tensor, values_BHTD: Tensor) -> None:
        """Takes note of what enters the cache of a layer."""
        if not keys_BHTD.numel() or not values_BHTD.numel():
            return
        both = torch.stack([part.detach().abs().amax().float() for part in (keys_BHTD, values_BHTD)])
        known = self._largest.get(name)
        self._largest[name] = both if known is None else torch.maximum(known, both.to(known.device))
        self.tokens[name] = self.tokens.get(name, 0) + keys_BHTD.shape[0] * keys_BHTD.shape[-2]

    def peaks(self) -> dict[str, tuple[float, float]]:
        """Name of a layer -> the largest absolute value of its keys, and of its values; NaN of a NaN."""
        return {name: (both.tolist()[0], both.tolist()[1]) for name, both in self._largest.items()}


@contextlib.contextmanager
def watched(modules: Mapping[str, nn.Module]) -> Iterator[Seen]:
    """Sees what enters the caches of some layers, for as long as a block lasts.

    Args:
        modules: Name -> attention layer, of the kinds "full" and "sliding".

    Raises:
        ValueError: In a forward: a layer asks its cache for something while there is none, or gives it other
            things than keys and values.
    """
    seen = Seen()
    with contextlib.ExitStack() as undo:
        for name, module in modules.items():
            names = list(inspect.signature(module.forward).parameters)
            given = next(other for other in _CACHES if other in names)
            hook = functools.partial(_before, seen, name, given, names.index(given))
            undo.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield seen


def _before(
    seen: Seen, name: str, given: str, place: int, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if place < len(args):
        return (*args[:place], _InFront(args[place], seen, name), *args[place + 1 :]), kwargs
    return args, kwargs | {given: _InFront(kwargs.get(given), seen, name)}


class _InFront:
    """Stands for the cache of a layer during one forward; everything but `update` is the cache's own."""

    def __init__(self, cache: Any, seen: Seen, name: str) -> None:
        self._cache, self._seen, self._name = cache, seen, name

    def update(self, keys: Any, values: Any, *args: Any, **kwargs: Any) -> Any:
        if not (isinstance(keys, Tensor) and isinstance(values, Tensor) and keys.ndim == values.ndim == 4):
            raise _cannot_see(self._name, "it caches other things than keys and values (B, H, T, D)")
        self._seen.add(self._name, keys, values)
        return (keys, values) if self._cache is None else self._cache.update(keys, values, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if self._cache is None:
            raise _cannot_see(self._name, f"it asks its cache for {name!r}, and runs without one")
        return getattr(self._cache, name)


def _cannot_see(name: str, why: str) -> ValueError:
    return ValueError(
        f"{name}: what this layer caches cannot be seen, for {why}. Use kv_cache='fp8', whose scales are 1."
    )
