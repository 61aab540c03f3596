"""Streams of logits: the tokens that count, looked at piece by piece.

A batch of logits of a large vocabulary is large (4096 tokens of 150,000 entries are 1.2 GB in 16 bit), and
figures of a model want float64. So tokens are taken in pieces of a few million logits, and of each token only
a few numbers stay. Logits and log-probabilities are both welcome: a softmax turns both into the same.

Legend: T tokens that count, V entries of the vocabulary, D leading dimensions, F figures of a token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

IGNORED = -100
"""The target of a token that does not count, as in `torch.nn.functional.cross_entropy`."""
PIECE = 2**21
"""Logits of one model that are looked at at once: 16 MiB in float64, a dozen times for all that is made of
them."""

Figures = Callable[[list[Tensor], Tensor | None], list[Tensor]]
"""Makes of a piece's logits, one float64 (T, V) a model, and its targets (T,) numbers a token, each (T,)."""


@torch.no_grad()
def by_token(
    figures: Figures, models: Mapping[str, Tensor], target: Tensor | None, mask: Tensor | None
) -> list[Tensor]:
    """What `figures` says of every token that counts.

    Args:
        figures: Called for each piece.
        models: Name -> logits or log-probabilities of any floating dtype, all of one shape (..., V).
        target: The true token at each place, (...), or `IGNORED` where a token does not count; None where
            `figures` needs none.
        mask: (...), not 0 where a token counts; None for everywhere.

    Returns:
        As many tensors as `figures` returns, each of shape (T,).

    Raises:
        ValueError: Shapes do not fit, a target is no entry of the vocabulary, or logits of a token that
            counts are NaN or infinite.
    """
    shape = _one_shape(models, target, mask)
    if len(shape) == 1:  # a single token
        models = {name: logits[None] for name, logits in models.items()}
        target, mask = (None if given is None else given[None] for given in (target, mask))
    first = next(iter(models.values()))
    counts = torch.ones(first.shape[:-1], dtype=torch.bool, device=first.device)
    if mask is not None:
        counts = counts & (mask.to(first.device) != 0)
    if target is not None:
        target = target.to(first.device)
        counts = counts & (target != IGNORED)
    places_TD = counts.nonzero()
    if target is not None:
        _check_targets(target[tuple(places_TD.T)], shape[-1])

    pieces = [tuple(places.T) for places in places_TD.split(max(1, PIECE // shape[-1]))]
    found_FT, done = torch.empty(0, len(places_TD), dtype=torch.float64, device=first.device), 0
    for at in pieces:
        piece = [logits[at].double() for logits in models.values()]  # a copy of the piece, never of the whole
        columns = figures(piece, None if target is None else target[at])
        # a sum is finite if all its terms are, and takes a tenth of the time of isfinite
        columns += [logits.sum(-1).isfinite() for logits in piece]
        if not len(found_FT):
            found_FT = found_FT.new_empty(len(columns), len(places_TD))
        # written in place: small tensors left between large ones would keep an allocator from reusing memory
        found_FT[:, done : done + len(at[0])] = torch.stack([column.double() for column in columns])
        done += len(at[0])
    if not found_FT[-len(models) :].all():
        _refuse_not_finite(models, pieces, len(places_TD))
    return list(found_FT[: -len(models)])


def _one_shape(models: Mapping[str, Tensor], target: Tensor | None, mask: Tensor | None) -> torch.Size:
    shapes = {name: tuple(logits.shape) for name, logits in models.items()}
    names = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
    shape = next(iter(models.values())).shape
    if len(set(shapes.values())) > 1 or not len(shape) or not shape[-1]:
        raise ValueError(f"Expected logits of one shape (..., V) with V > 0 from all models, got {names}.")
    for name, given in (("target", target), ("mask", mask)):
        if given is not None and given.shape != shape[:-1]:
            raise ValueError(
                f"Expected a {name} of shape {tuple(shape[:-1])}, one a token of {names}, got "
                f"{tuple(given.shape)}; logits are not shifted here: logits[:, :-1] belong to target[:, 1:]."
            )
    return shape


def _check_targets(target_T: Tensor, entries: int) -> None:
    outside = (target_T < 0) | (target_T >= entries)
    if outside.any():
        raise ValueError(
            f"Expected targets from 0 to {entries - 1}, or {IGNORED} for tokens that do not count, got "
            f"{int(target_T[outside][0])} and others, {int(outside.sum())} in all."
        )


def _refuse_not_finite(models: Mapping[str, Tensor], pieces: list[tuple[Tensor, ...]], n: int) -> None:
    for name, logits in models.items():
        counts_T = torch.cat([(~logits[at].isfinite()).sum(-1) for at in pieces])
        tokens = counts_T.nonzero().flatten()
        if len(tokens):
            first = tuple(int(torch.cat(axis)[tokens[0]]) for axis in zip(*pieces, strict=True))
            raise ValueError(
                f"{name} has {int(counts_T.sum())} NaN or infinite values in {len(tokens)} of {n} tokens, "
                f"the first at index {first}; no figure can be made of them. Mask tokens that do not count, "
                "and cut off entries of the vocabulary that are never chosen."
            )
