"""Sums that a run has collected, from the moment when they are complete until an export reads them.

    inputs:a|b|c   the inputs that the layers a, b and c were given
    outputs:a      the gradients at the output of a
    joint:a        the sizes of both, a matrix of one number
    experts:...    the sum of one of these over all experts of a layer

An expert that few tokens reached takes that of all experts where it meets the rest of the model: for the
inputs of its first weights, and the gradients at the output of its last. What lies between is its own. Sums
lie in memory or in a file, are added up over the ranks of a run, and are read one weight at a time.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from daq_lightning.checkpoint.tensor_file import read_header
from daq_lightning.export.ranks import Agreement, Ranks
from daq_lightning.model.observer import Sums
from daq_lightning.numerics.rounding.statistics import Statistics
from daq_lightning.numerics.rounding.sums import KroneckerSum

_INPUTS, _OUTPUTS, _JOINT, _EXPERTS = "inputs:", "outputs:", "joint:", "experts:"
_LAST = ("down_proj", "w2")
FEW = 2
"""An expert has few tokens if they are less than the width of the model over this.

Measured on a small Qwen3-MoE (16 experts, width 128, one seed): loss of the codes over that of nearest, of
inputs of its own and of all experts: .57 and .05 with 4 tokens, .05 and .03 with 32, .026 and .026 with 64,
.014 and .020 with 128. Of gradients at the output: .52 and .10, .08 and .025, .020 and .012, .009 and .006.
Inputs of all experts in its last weight are worse than nearest with few tokens (1.8).
"""


class Collected(NamedTuple):
    """The sums of some layers.

    Attributes:
        tensors: Name of a sum -> float32 matrix.
        tokens: Name of a sum -> how many tokens it has.
        left_out: Name of a sum -> how many calls with NaN or Inf it has not.
        source: What they are of, in a word; "" for what most of a run are.
    """

    tensors: Mapping[str, Tensor]
    tokens: dict[str, int]
    left_out: dict[str, int]
    source: str = ""

    @classmethod
    def of(cls, sums: Sums) -> Collected:
        """What an observer summed, by reference; counts leave each device in one transfer."""
        named = {_INPUTS + "|".join(names): one for names, one in sums.inputs.items()}
        named |= {_OUTPUTS + name: one for name, one in sums.outputs.items()}
        if not named:
            return cls({}, {}, {})
        named |= {_JOINT + name: one for name, one in sums.joint.items()}
        counts = _counts(list(named.values()))
        tensors = {name: one.total for name, one in named.items()}
        tokens = {name: count for name, (count, _) in zip(named, counts, strict=True)}
        left_out = {name: count for name, (_, count) in zip(named, counts, strict=True)}
        of_experts: dict[str, list[str]] = {}
        for name in named:
            if (shared := _of_experts(name)) is not None:
                of_experts.setdefault(shared, []).append(name)
        for shared, names in of_experts.items():
            tensors[shared] = _total_of(tensors[name] for name in names)
            tokens[shared] = sum(tokens[name] for name in names)
            left_out[shared] = sum(left_out[name] for name in names)
        return cls(tensors, tokens, left_out)

    def summed(self, owners: Mapping[str, int], ranks: Ranks) -> Collected:
        """The sums over all ranks, each on the rank that exports its weights. A collective.

        Args:
            owners: Weight name -> that rank.
            ranks: All ranks of the run.
        """
        told = ranks.gather({name: len(self.tensors[name]) for name in self.tokens})
        sizes = {name: size for of_rank in told for name, size in of_rank.items()}
        counts = ranks.gather((self.tokens, self.left_out))
        mine: dict[str, Tensor] = {}
        agreement = Agreement(ranks)
        needed = ((one, owner) for one in sorted(sizes) for owner in _owners_of(one, owners))
        for name, owner in needed:
            total = torch.zeros(sizes[name], sizes[name], dtype=torch.float32, device="cpu")
            with agreement.attempt():
                if name in self.tensors:  # else no token of this rank came there
                    total += self.tensors[name].cpu()
            ranks.add_up(total, owner)
            if owner == ranks.rank:
                mine[name] = total
        agreement.end()
        return Collected(
            source=self.source,
            tensors=mine,
            tokens={name: sum(tokens.get(name, 0) for tokens, _ in counts) for name in mine},
            left_out={name: sum(left.get(name, 0) for _, left in counts) for name in mine},
        )


class InFile(Mapping[str, Tensor]):
    """Tensors of a safetensors file, read when they are asked for; the last inputs are kept."""

    def __init__(self, path: Path) -> None:
        self._entries = read_header(path)
        self._last: dict[str, tuple[str, Tensor]] = {}  # by kind

    def __getitem__(self, name: str) -> Tensor:
        kind = name.partition(":")[0]
        if kind not in self._last or self._last[kind][0] != name:
            tensor = self._entries[name].read()
            if name.startswith(_OUTPUTS):
                return tensor
            self._last[kind] = (name, tensor)
        return self._last[kind][1]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


class AllCollected(Mapping[str, Statistics]):
    """The statistics of all weights of which there are any, each put together when it is asked for.

    Args:
        parts: The sums.
        source: What they are of, in a word.
    """

    def __init__(self, parts: list[Collected], source: str) -> None:
        self._source = source
        self._of: dict[str, tuple[Collected, list[str]]] = {}  # layer -> its sums
        for part in parts:
            for name in part.tokens:
                for layer in [] if name.startswith(_EXPERTS) else _layers_of(name):
                    self._of.setdefault(layer, (part, []))[1].append(name)

    def __getitem__(self, layer: str) -> Statistics:
        part, every = self._of[layer]
        names = [name for name in every if not name.startswith(_JOINT)]
        inputs = [name for name in names if name.startswith(_INPUTS) and part.tokens[name]]
        outputs = [name for name in names if name.startswith(_OUTPUTS) and part.tokens[name]]
        shared = any(_shared(part, side) for side in (inputs, outputs))
        return Statistics(
            inputs=_total(part, inputs),
            outputs=_total(part, outputs),
            tokens=sum(part.tokens[name] for name in outputs or inputs),
            source=(part.source or self._source) + ", one side of all experts" * shared,
            left_out=sum(part.left_out[name] for name in names),
            joint=None if shared or names == every else float(part.tensors[_JOINT + layer]),
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._of)

    def __len__(self) -> int:
        return len(self._of)


def _layers_of(name: str) -> list[str]:
    return name.rpartition(":")[2].split("|")


def _of_experts(name: str) -> str | None:
    """The sum over all experts of a layer that can stand in for that of one; None if there is none.

    Example:
        >>> _of_experts("inputs:mlp.experts.3.gate_proj.weight|mlp.experts.3.up_proj.weight")
        'experts:inputs:mlp.experts.*.gate_proj.weight|mlp.experts.*.up_proj.weight'
        >>> _of_experts("inputs:mlp.experts.3.down_proj.weight")
    """
    last = name.removesuffix(".weight").endswith(_LAST)
    if ".experts." not in name or name.startswith(_JOINT) or name.startswith(_OUTPUTS) is not last:
        return None
    return _EXPERTS + re.sub(r"\.experts\.\d+\.", ".experts.*.", name)


def _owners_of(name: str, owners: Mapping[str, int]) -> list[int]:
    """The ranks that need a sum."""
    if not name.startswith(_EXPERTS):
        return [owners[_layers_of(name)[0]]]
    before, _, after = _layers_of(name)[0].partition("*")
    experts = re.compile(re.escape(before) + r"\d+" + re.escape(after))
    return sorted({owner for layer, owner in owners.items() if experts.fullmatch(layer)})


def _shared(part: Collected, names: list[str]) -> str | None:
    """The sum over all experts that stands in for some of one, of few tokens."""
    shared = _of_experts(names[0]) if names else None
    if shared is None or sum(part.tokens[name] for name in names) * FEW >= len(part.tensors[shared]):
        return None
    return shared


def _total(part: Collected, names: list[str]) -> Tensor | None:
    """Of one sum, the tensor itself: layers with the same inputs have the same one."""
    if not names:
        return None
    if (shared := _shared(part, names)) is not None:
        return part.tensors[shared]
    if len(names) == 1:
        return part.tensors[names[0]]
    return _total_of(part.tensors[name] for name in names)


def _counts(sums: Sequence[KroneckerSum]) -> list[list[int]]:
    """Tokens, and calls that were left out, of sums that may lie on several devices."""
    places: dict[torch.device, list[int]] = {}
    for place, one in enumerate(sums):
        places.setdefault(one.tokens.device, []).append(place)
    counts: dict[int, list[int]] = {}
    for of_device in places.values():
        both = [torch.stack([sums[place].tokens, sums[place].left_out]) for place in of_device]
        counts |= zip(of_device, torch.stack(both).tolist(), strict=True)
    return [counts[place] for place in range(len(sums))]


def _total_of(tensors: Iterable[Tensor]) -> Tensor:
    """A sum, in a tensor of its own; one is read at a time."""
    total: Tensor | None = None
    for tensor in tensors:
        total = tensor.clone() if total is None else total.add_(tensor.to(total.device))
    assert total is not None
    return total
