"""Which small pieces of a model stand for all of it, and their values before training and now.

Pieces are whole groups of the format (a block, or some rows), so that their scales are those that the whole
weight would get. They are spread over kinds of projections and over depth:

    piece i   kind i mod kinds, of that kind the layer at i / pieces of the depth, a place by the golden ratio

The choice depends on names and shapes alone. A place that no rank holds whole gives way to the nearest one
that some rank does: as long as shards are cut between groups, any number of ranks has the same sample.
"""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from daq_lightning.numerics.formats import Granularity
from daq_lightning.numerics.tiling import Box

if TYPE_CHECKING:
    from daq_lightning.model.pieces import LivePieces

PIECES = 16
"""How many, at most: 16 blocks are 2^18 weights, 0.5 MB of a 16-bit base."""

_ELEMENTS, _WIDTH = 1 << 14, 128  # of a piece: of one block of 128 x 128
_GOLDEN = (5**0.5 - 1) / 2


class Piece(NamedTuple):
    """One piece.

    Attributes:
        name: The weight.
        box: Its place there.
        holders: The ranks that hold it whole.
    """

    name: str
    box: Box
    holders: tuple[int, ...]


def choose_pieces(
    shapes: Mapping[str, tuple[int, int]],
    boxes: Sequence[Mapping[str, Box]],
    granularity: Granularity,
    count: int = PIECES,
) -> list[Piece]:
    """Pieces of some weights, no two the same.

    Args:
        shapes: Name -> (M, N), in the order of the layers.
        boxes: Of each rank: name -> what it holds of the weight; names of which it holds nothing are missing.
        granularity: Of the format.
        count: How many, at most.

    Example:
        >>> from daq_lightning.numerics.formats import PerBlock
        >>> choose_pieces({"w": (256, 128)}, [{"w": Box(0, 128, 0, 128)}], PerBlock(128, 128), 4)
        [Piece(name='w', box=Box(top=0, bottom=128, left=0, right=128), holders=(0,))]
    """
    kinds: dict[str, list[str]] = defaultdict(list)
    for name in shapes:
        kinds[re.sub(r"\d+", "*", name)].append(name)
    of_kind = list(kinds.values())
    found: dict[tuple[str, Box], Piece] = {}
    for i in range(count if shapes else 0):
        names = of_kind[i % len(of_kind)]
        name = names[i * len(names) // count]
        cell = piece_size(shapes[name], granularity)
        grid = (shapes[name][0] // cell[0], shapes[name][1] // cell[1])
        place = int((i + 1) * _GOLDEN % 1 * grid[0] * grid[1])
        held = [(rank, box) for rank, mine in enumerate(boxes) if (box := mine.get(name)) is not None]
        piece = _nearest(name, divmod(place, max(1, grid[1])), cell, held)
        if piece is not None:
            found.setdefault((piece.name, piece.box), piece)
    return list(found.values())


def piece_size(shape_MN: tuple[int, int], granularity: Granularity) -> tuple[int, int]:
    """Rows and columns of a piece: whole groups, at least one, of about 2^14 elements.

    Example:
        >>> from daq_lightning.numerics.formats import PerBlock, PerChannel
        >>> piece_size((4096, 1024), PerBlock(128, 128)), piece_size((4096, 1024), PerChannel())
        ((128, 128), (16, 1024))
    """
    rows, columns = granularity.cell(shape_MN)
    columns *= max(1, min(_WIDTH, shape_MN[1]) // columns)
    rows *= max(1, min(_ELEMENTS // columns, shape_MN[0]) // rows)
    return rows, columns


def _nearest(
    name: str, place: tuple[int, int], cell: tuple[int, int], held: Sequence[tuple[int, Box]]
) -> Piece | None:
    """The piece at a place of the grid of cells, or the nearest that is whole on a rank; None without any."""
    rows, columns = cell
    best: tuple[int, Box] | None = None
    holders: list[int] = []
    for rank, box in held:
        first, last = -(-box.top // rows), box.bottom // rows - 1
        left, right = -(-box.left // columns), box.right // columns - 1
        if last < first or right < left:
            continue
        i, j = min(max(place[0], first), last), min(max(place[1], left), right)
        found = Box(i * rows, (i + 1) * rows, j * columns, (j + 1) * columns)
        distance = abs(i - place[0]) + abs(j - place[1])
        if best is None or distance < best[0]:
            best, holders = (distance, found), []
        if found == best[1]:
            holders.append(rank)
    return None if best is None else Piece(name, best[1], tuple(holders))


class Pair(NamedTuple):
    """Pieces of one kind below each other.

    Attributes:
        weight: As training has them now.
        base: As they were before it.
    """

    weight: Tensor
    base: Tensor


@dataclass(frozen=True, kw_only=True)
class Sample:
    """The pieces of a model on this rank, with their values before training.

    Attributes:
        live: Reads the pieces.
        pieces: All of them, and whether this rank measures it.
        device: Where they are measured.
        bases: The base of each that it measures.
    """

    live: LivePieces
    pieces: Sequence[tuple[Piece, bool]]
    device: torch.device
    bases: Sequence[Tensor] = ()

    def since(self, bases: Iterable[Tensor]) -> Sample:
        """The same pieces, with other values before training; they are copied to the device."""
        copies = [base.to(self.device, copy=True) for base in bases]
        return dataclasses.replace(self, bases=copies)

    def since_now(self) -> Sample:
        """The same pieces, whose values before training are those of now; a collective if `live.read` is."""
        read = (self.live.read(piece.name, piece.box if mine else None) for piece, mine in self.pieces)
        return self.since(weight for weight in read if weight is not None)

    def since_base(self, base: Mapping[str, Tensor], names: Mapping[str, str]) -> Sample:
        """The same pieces, with the values that they have in a base, which is read one weight at a time.

        Args:
            base: Of an export.
            names: Name of the weight -> its name in the base.
        """
        own = (piece for piece, mine in self.pieces if mine)
        return self.since(
            base[names[piece.name]][piece.box.top : piece.box.bottom, piece.box.left : piece.box.right]
            for piece in own
        )

    def since_frozen(self) -> Sample:
        """The same pieces, with the values under the adapters."""
        return self.since(self.live.frozen(piece.name, piece.box) for piece, mine in self.pieces if mine)

    def read(self) -> list[Pair]:
        """The pieces now, those of one shape and dtype together; a collective if `live.read` is one."""
        bases = iter(self.bases)
        together: dict[object, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for piece, mine in self.pieces:
            weight = self.live.read(piece.name, piece.box if mine else None)
            if weight is not None:
                base = next(bases)
                together[weight.shape, weight.dtype, base.dtype].append((weight, base))
        return [
            Pair(
                weight=torch.cat([weight for weight, _ in pairs]).to(self.device),
                base=torch.cat([base for _, base in pairs]),
            )
            for pairs in together.values()
        ]
