"""What an export has to know of a model, as plain data: names and roles of its tensors, no modules.

    model in memory, or of a config.json  ->  Outline  ->  plan, checks

Two name spaces meet here, those of the checkpoint and of memory: see `daq_lightning.model.architecture`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

Role: TypeAlias = Literal[
    "linear", "expert", "upcast", "stack", "router", "head", "outside", "float32", "plain", "conv1d", "other"
]
"""linear and expert weights can be quantized, upcast ones in FP8. stack: all experts of a layer in one
tensor. head: lm_head, classifiers. outside: Linear weights outside the language model (vision tower,
projector). float32, plain, upcast: of which readers make no quantized layer, see
`daq_lightning.model.served`. conv1d: GPT-2's transposed Linear."""
CacheKind: TypeAlias = Literal["full", "sliding", "latent", "state", "shared", "cross", "unknown"]
"""What a layer caches of each token, see `daq_lightning.model.attention`."""


@dataclass(frozen=True, kw_only=True)
class Outline:
    """The names of a model and what they stand for. All names but the keys of `keys` are names in memory.

    Attributes:
        model: Name of the model's class.
        is_transformers: Whether it is a model of transformers, whose names on disk may be others.
        parameters: Parameter -> shape, tied copies included.
        copies: Parameters that are another one under a second name.
        tensors: Everything in the state dict.
        modules: All modules.
        linear_modules: All Linear modules and routers, in the model's order.
        roles: Matrix -> what it is to the model; "other" is left out.
        ties: Tied copy -> the tensor that it shares.
        may_lack: Regular expressions of parameters that a checkpoint need not have.
        may_add: Regular expressions of tensors that a checkpoint may have besides.
        caches: Module that caches something for each token -> what.
        keys: Checkpoint name -> memory name, for the names that were asked for.
    """

    model: str
    is_transformers: bool
    parameters: Mapping[str, tuple[int, ...]]
    copies: tuple[str, ...]
    tensors: frozenset[str]
    modules: frozenset[str]
    linear_modules: tuple[str, ...]
    roles: Mapping[str, Role]
    ties: Mapping[str, str]
    may_lack: tuple[str, ...]
    may_add: tuple[str, ...]
    caches: Mapping[str, CacheKind]
    keys: Mapping[str, str]

    def role(self, key: str, ndim: int) -> Role:
        """The role of a tensor.

        Args:
            key: Memory name.
            ndim: Dimensions of the tensor in the checkpoint.
        """
        role = self.roles.get(key, "other")
        if role == "expert" and ndim == 3:
            return "stack"
        return role if ndim == 2 else "other"

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Parameters that a checkpoint of these memory names leaves at random values; tied ones are there."""
        if not self.is_transformers:
            return []
        present = set(keys)
        present |= {key for key, source in self.ties.items() if source in present}
        present |= {source for key, source in self.ties.items() if key in present}
        return [name for name in self.parameters if name not in present and not matches(self.may_lack, name)]


def matches(patterns: Iterable[str], name: str) -> bool:
    """Whether any of transformers' patterns is found in a name."""
    return any(re.search(pattern, name) for pattern in patterns)


def owner_of(key: str) -> str:
    """The module that holds a tensor."""
    return key.rpartition(".")[0]
