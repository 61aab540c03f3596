"""Sums that a run has collected, from the moment when they are complete until an export reads them.

    inputs:a|b|c   the inputs that the layers a, b and c were given
    outputs:a      the gradients at the output of a

They lie in memory or in a file, are added up over the ranks of a run, and are read one weight at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from daq_lightning.checkpoint.tensor_file import read_header
from daq_lightning.export.ranks import Agreement, Ranks
from daq_lightning.model.observer import Sums
from daq_lightning.numerics.rounding.statistics import Statistics

_INPUTS, _OUTPUTS = "inputs:", "outputs:"


class Collected(NamedTuple):
    """The sums of some layers.

    Attributes:
        tensors: Name of a sum -> float32 matrix.
        tokens: Name of a sum -> how many tokens it has.
        left_out: Name of a sum -> how many calls with NaN or Inf it has not.
    """

    tensors: Mapping[str, Tensor]
    tokens: dict[str, int]
    left_out: dict[str, int]

    @classmethod
    def of(cls, sums: Sums) -> Collected:
        """What an observer summed, by reference; its counts leave the device in one transfer."""
        named = {_INPUTS + "|".join(names): one for names, one in sums.inputs.items()}
        named |= {_OUTPUTS + name: one for name, one in sums.outputs.items()}
        if not named:
            return cls({}, {}, {})
        counts = torch.stack([torch.stack([one.tokens, one.left_out]) for one in named.values()]).tolist()
        return cls(
            tensors={name: one.total for name, one in named.items()},
            tokens={name: count for name, (count, _) in zip(named, counts, strict=True)},
            left_out={name: count for name, (_, count) in zip(named, counts, strict=True)},
        )

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
        for name in sorted(sizes):
            owner = owners[_layers_of(name)[0]]
            total = torch.zeros(sizes[name], sizes[name], dtype=torch.float32, device="cpu")
            with agreement.attempt():
                if name in self.tensors:  # else no token of this rank came there
                    total += self.tensors[name].cpu()
            ranks.add_up(total, owner)
            if owner == ranks.rank:
                mine[name] = total
        agreement.end()
        return Collected(
            tensors=mine,
            tokens={name: sum(tokens.get(name, 0) for tokens, _ in counts) for name in mine},
            left_out={name: sum(left.get(name, 0) for _, left in counts) for name in mine},
        )


class InFile(Mapping[str, Tensor]):
    """Tensors of a safetensors file, read when they are asked for; the last one is kept."""

    def __init__(self, path: Path) -> None:
        self._entries = read_header(path)
        self._last: tuple[str, Tensor] | None = None

    def __getitem__(self, name: str) -> Tensor:
        if self._last is None or self._last[0] != name:
            tensor = self._entries[name].read()
            if not name.startswith(_INPUTS):
                return tensor
            self._last = (name, tensor)
        return self._last[1]

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
                for layer in _layers_of(name):
                    self._of.setdefault(layer, (part, []))[1].append(name)

    def __getitem__(self, layer: str) -> Statistics:
        part, names = self._of[layer]
        inputs = [name for name in names if name.startswith(_INPUTS) and part.tokens[name]]
        outputs = [name for name in names if name.startswith(_OUTPUTS) and part.tokens[name]]
        return Statistics(
            inputs=_total(part, inputs),
            outputs=_total(part, outputs),
            tokens=sum(part.tokens[name] for name in outputs or inputs),
            source=self._source,
            left_out=sum(part.left_out[name] for name in names),
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._of)

    def __len__(self) -> int:
        return len(self._of)


def _layers_of(name: str) -> list[str]:
    return name.partition(":")[2].split("|")


def _total(part: Collected, names: list[str]) -> Tensor | None:
    """Of one sum, the tensor itself: layers with the same inputs have the same one."""
    if not names:
        return None
    first, *others = (part.tensors[name] for name in names)
    for other in others:
        first = first + other
    return first
