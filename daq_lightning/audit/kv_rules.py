"""The rule on the scales of an FP8 cache of keys and values, see `daq_lightning.checkpoint.kv_cache`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from daq_lightning.checkpoint.kv_cache import KV_CACHE_SCHEME, is_cache_scale, scale_names
from daq_lightning.model.outline import owner_of

if TYPE_CHECKING:
    from daq_lightning.audit.verify import Stored

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_kv_cache(stored: Stored) -> Iterator[str]:
    """Each layer that caches keys and values has both scales, or none has any; all are finite and > 0."""
    scheme = stored.raw.quantization.get("kv_cache_scheme")
    scales = [name for name in stored.names if is_cache_scale(name)]
    if scheme is None and not scales:
        return
    if scheme is not None:
        given = scheme if isinstance(scheme, dict) else {"": scheme}
        odd = {key: given.get(key) for key, value in KV_CACHE_SCHEME.items() if given.get(key) != value}
        if odd:
            yield f"kv_cache_scheme has {odd}, expected {dict(KV_CACHE_SCHEME)}"
        caches = stored.outline.caches
        keys = {stored.keys[name] for name in scales}
        for module in (name for name, kind in caches.items() if kind in ("full", "sliding")):
            missing = [name for name in scale_names(module) if name not in keys]
            if missing:
                yield f"{' and '.join(missing)} missing, though kv_cache_scheme is there"
        for name in scales:
            if owner_of(stored.keys[name]) not in caches:
                yield f"{name} is the scale of nothing: no layer of this name caches keys and values"
    for module in dict.fromkeys(map(owner_of, scales)):
        missing = [name for name in scale_names(module) if name not in stored.raw.entries]
        if missing and scheme is None:
            yield f"{module} has one of two scales: {missing[0]} is missing"
    for name in scales:
        yield from _check_scale(stored, name)


def _check_scale(stored: Stored, name: str) -> Iterator[str]:
    entry = stored.entry(name)
    if entry.dtype not in _DTYPES or entry.shape not in ((), (1,)):
        yield f"{name} is {entry.dtype} {entry.shape}, expected one float32 number"
        return
    value = stored.raw[name].float()
    if not bool(value.isfinite() & (value > 0)):
        yield f"{name} is {value.item()}, expected a finite number > 0"
    elif not bool(value == value.bfloat16().float()):
        yield f"{name} is {value.item()}, which bfloat16 cannot hold: transformers would round it"
