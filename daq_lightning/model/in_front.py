"""What enters the caches of attention layers: seen, or rounded to FP8 as servers do it.

    with watched(modules) as seen: model(...)
    seen.peaks()                                     {name of a layer: (absmax of keys, of values)}

    with rounded(modules, scales): model(...)        attends to what a server would have cached

An attention of transformers gives a key, after the rotary embedding, and a value to `update` of its cache,
which answers with all of the context. For as long as a block lasts, something stands in front of the cache
that acts and passes on; where a model runs without a cache, it answers with what it was given, as is done
where there is none.

Source: transformers 5.23 `Cache.update`.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from daq_lightning.model.attention import CACHES
from daq_lightning.numerics.kv_cache import cached

Act: TypeAlias = Callable[[str, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Name of a layer, its keys and values (B, H, T, D) -> what is cached of them."""


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

    def look(name: str, keys_BHTD: Tensor, values_BHTD: Tensor) -> tuple[Tensor, Tensor]:
        seen.add(name, keys_BHTD, values_BHTD)
        return keys_BHTD, values_BHTD

    with _in_front(modules, look):
        yield seen


@contextlib.contextmanager
def rounded(modules: Mapping[str, nn.Module], scales: Mapping[str, tuple[float, float]]) -> Iterator[None]:
    """Lets layers attend to keys and values that were cached in FP8; for use without gradients.

    Args:
        modules: Name -> attention layer, of the kinds "full" and "sliding".
        scales: Name -> the scales of its keys and its values.

    Raises:
        ValueError: As for `watched`.
    """

    def act(name: str, keys_BHTD: Tensor, values_BHTD: Tensor) -> tuple[Tensor, Tensor]:
        return cached(keys_BHTD, scales[name][0]), cached(values_BHTD, scales[name][1])

    with _in_front(modules, act):
        yield


@contextlib.contextmanager
def _in_front(modules: Mapping[str, nn.Module], act: Act) -> Iterator[None]:
    with contextlib.ExitStack() as undo:
        for name, module in modules.items():
            names = list(inspect.signature(module.forward).parameters)
            given = next(other for other in CACHES if other in names)
            hook = functools.partial(_before, functools.partial(act, name), name, given, names.index(given))
            undo.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


def _before(
    act: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    name: str,
    given: str,
    place: int,
    _: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if place < len(args):
        return (*args[:place], _InFront(args[place], act, name), *args[place + 1 :]), kwargs
    return args, kwargs | {given: _InFront(kwargs.get(given), act, name)}


class _InFront:
    """Stands for the cache of a layer during one forward; everything but `update` is the cache's own."""

    def __init__(self, cache: Any, act: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], name: str) -> None:
        self._cache, self._act, self._name = cache, act, name

    def update(self, keys: Any, values: Any, *args: Any, **kwargs: Any) -> Any:
        if not (isinstance(keys, Tensor) and isinstance(values, Tensor) and keys.ndim == values.ndim == 4):
            raise _cannot_see(self._name, "it caches other things than keys and values (B, H, T, D)")
        keys, values = self._act(keys, values)
        return (keys, values) if self._cache is None else self._cache.update(keys, values, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if self._cache is None:
            raise _cannot_see(self._name, f"it asks its cache for {name!r}, and runs without one")
        return getattr(self._cache, name)


def _cannot_see(name: str, why: str) -> ValueError:
    return ValueError(
        f"{name}: what this layer caches cannot be seen, for {why}. Use kv_cache='fp8', whose scales are 1."
    )
