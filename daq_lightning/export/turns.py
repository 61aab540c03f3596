"""Weights read by several ranks, each its share: one after the other, all ranks in step.

    shares(names, ranks)       which rank reads which
    in_turn(weights, shares)   (name, tensor) of this rank's share

For what is done to single weights outside of an export: fingerprints, snapshots, comparisons.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest

from torch import Tensor

from daq_lightning.checkpoint.tensor_file import LazyTensors
from daq_lightning.export.ranks import Agreement, Ranks


def shares(names: Sequence[str], ranks: Ranks) -> list[list[str]]:
    """The names that each rank reads: every `ranks.size`-th."""
    return [list(names[rank :: ranks.size]) for rank in range(ranks.size)]


def in_turn(
    weights: Mapping[str, Tensor], parts: Sequence[Sequence[str]], ranks: Ranks, agreement: Agreement
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of this rank, in order; a collective that ends on all ranks when one fails.

    Args:
        weights: Where they are; sharded ones are read by all ranks together.
        parts: The names of each rank.
        ranks: Who reads.
        agreement: Of the ranks. What is done with a tensor is done in `agreement.attempt()`.
    """
    for turn in zip_longest(*parts):
        mine = None
        for owner, name in enumerate(turn):
            if name is not None:
                with agreement.attempt():
                    tensor = read_on(weights, name, owner, ranks)
                    mine = mine if tensor is None else (name, tensor)
        if mine is not None and not agreement.failed:
            yield mine
        agreement.settle()
    agreement.end()


def read_on(weights: Mapping[str, Tensor], name: str, owner: int, ranks: Ranks) -> Tensor | None:
    """A tensor on one rank, None on the others; a collective if it is sharded."""
    if isinstance(weights, LazyTensors) and weights.collective:
        return weights.on(name, owner)
    return weights[name] if owner == ranks.rank else None
