"""Weights that a module computes from other tensors, as its forward does: weight norm, spectral norm,
pruning, ...

    q_proj.parametrizations.weight.original0, .original1  ->  q_proj.weight   (torch.nn.utils.parametrize)
    q_proj.weight_g, q_proj.weight_v                      ->  q_proj.weight   (hooks of older torch: also
    _orig, _mask)

A checkpoint of the model holds `q_proj.weight`, and readers know no other name. It is computed as in
evaluation, on a copy of the module that shares its tensors: the module itself may change its buffers when it
computes (spectral norm iterates in training), and training must not notice an export.

Sources: torch `nn.utils.parametrize`, `nn.utils.weight_norm`, `nn.utils.spectral_norm`, `nn.utils.prune`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm


@dataclass(frozen=True, kw_only=True)
class ComputedWeight:
    """A tensor that a module computes.

    Attributes:
        name: What it is called in a checkpoint.
        parts: What the `state_dict` holds instead.
        module: The module that computes it.
        path: Name of that module.
        compute: Gives the tensor, called with a copy of that module.
    """

    name: str
    parts: tuple[str, ...]
    module: nn.Module
    path: str
    compute: Callable[[Any], Tensor]

    def value(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The tensor for these values of its parts."""
        # a parametrization may draw random numbers, and those of the training have to stay what they were
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            return self.compute(_copy(self.module, self.path, tensors)).detach()


def find_computed(root: nn.Module) -> dict[str, ComputedWeight]:
    """The computed tensors of a module and all inside it, by name."""
    found = {}
    for path, module in root.named_modules(remove_duplicate=False):
        if "parametrizations" not in path.split("."):
            found |= {
                computed.name: computed for computed in (*_parametrized(path, module), *_hooked(path, module))
            }
    return found


class ComputedTensors(Mapping[str, Tensor]):
    """The tensors of a `state_dict`, with computed ones in the place of their parts.

    Args:
        tensors: The `state_dict`, of the module or a saved one; may lack tensors.
        computed: See `find_computed`.
    """

    def __init__(self, tensors: Mapping[str, Tensor], computed: Mapping[str, ComputedWeight]) -> None:
        self._tensors = tensors
        self._computed = {
            name: weight for name, weight in computed.items() if all(part in tensors for part in weight.parts)
        }
        whole = {part: weight.name for weight in self._computed.values() for part in weight.parts}
        self._names = dict.fromkeys(whole.get(name, name) for name in tensors)

    def __getitem__(self, name: str) -> Tensor:
        computed = self._computed.get(name)
        return self._tensors[name] if computed is None else computed.value(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _parametrized(path: str, module: nn.Module) -> Iterator[ComputedWeight]:
    if not parametrize.is_parametrized(module):
        return
    for key, parametrizations in module.parametrizations.items():  # type: ignore[operator, union-attr]
        inside = _join(path, f"parametrizations.{key}")
        yield ComputedWeight(
            name=_join(path, key),
            parts=tuple(f"{inside}.{part}" for part in parametrizations.state_dict()),
            module=parametrizations,
            path=inside,
            compute=lambda copy: copy(),
        )


def _hooked(path: str, module: nn.Module) -> Iterator[ComputedWeight]:
    for hook in module._forward_pre_hooks.values():
        compute: Callable[[Any], Tensor]
        if isinstance(hook, WeightNorm):
            key, parts, compute = hook.name, ("_g", "_v"), hook.compute_weight
        elif isinstance(hook, SpectralNorm):
            key, parts, compute = hook.name, ("_orig", "_u", "_v"), _without_iteration(hook)
        elif isinstance(hook, BasePruningMethod):
            key, parts, compute = str(hook._tensor_name), ("_orig", "_mask"), hook.apply_mask
        else:
            continue
        yield ComputedWeight(
            name=_join(path, key),
            parts=tuple(_join(path, key + part) for part in parts),
            module=module,
            path=path,
            compute=compute,
        )


def _without_iteration(hook: SpectralNorm) -> Callable[[Any], Tensor]:
    return lambda module: hook.compute_weight(module, do_power_iteration=False)


def _copy(module: nn.Module, path: str, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A module like this one, in evaluation, that holds other parameters and owns its buffers."""
    copy = module.__new__(type(module))
    vars(copy).update(vars(module))
    names = {key: _join(path, key) for key in (*module._parameters, *module._buffers)}
    parameters = {key: tensors.get(names[key], own) for key, own in module._parameters.items()}
    buffers = {key: tensors.get(names[key], own) for key, own in module._buffers.items()}
    children = {
        key: None if child is None else _copy(child, _join(path, key), tensors)
        for key, child in module._modules.items()
    }
    vars(copy).update(
        training=False,
        _parameters=parameters,
        _buffers={key: None if buffer is None else buffer.clone() for key, buffer in buffers.items()},
        _modules=children,
    )
    return copy


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key
