"""A 64-bit fingerprint of a tensor's bytes, computed where the tensor lies.

    word_i = 8 bytes as an integer, its upper half folded onto the lower: w ^ (w >> 32)
    row    = sum_i word_i * odd_i     mod 2^64, over rows of 65,536 words
    result = the same over the rows, mixed with dtype and shape

A sum of products with fixed odd numbers (multilinear hashing) finds every change of a single word. The fold
keeps changes in the upper bits alone (two flipped signs, say) from cancelling: any accidental change goes
unseen with a chance of about 2^-32 at worst, 2^-64 for most. It guards against the wrong file and the flipped
bit, not against somebody who constructs a collision.

Source: D. Lemire and O. Kaser, "Strongly universal string hashing is fast", 2014 (multilinear hashing).
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from daq_lightning.checkpoint.flat_bytes import flat_bytes
from daq_lightning.numerics.backends import fold, library

_ROW = 1 << 16
_STEP = 8  # rows that are multiplied at a time on a device


def fingerprint(tensor: Tensor) -> str:
    """16 hexadecimal digits that depend on every byte, the dtype and the shape of a tensor, and on nothing
    else.

    Args:
        tensor: Any dtype, shape and device.

    Example:
        >>> fingerprint(torch.zeros(3)) == fingerprint(torch.zeros(3)) != fingerprint(torch.zeros(4))
        True
    """
    data = flat_bytes(tensor)
    if data.storage_offset() % 8 or data.data_ptr() % 8:  # a slice that does not begin at a whole word
        data = data.clone()
    aligned = data.numel() // 8 * 8
    rows = [_rows(data[:aligned].view(torch.int64))]
    if aligned < data.numel():
        tail = torch.zeros(8, dtype=torch.uint8, device=data.device)
        tail[: data.numel() - aligned] = data[aligned:]
        rows.append(_rows(tail.view(torch.int64)))
    sums = torch.cat(rows)
    while sums.numel() > 1:
        sums = _rows(sums)
    total = int(sums) if sums.numel() else 0
    for part in (*tensor.shape, *str(tensor.dtype).encode(), tensor.ndim):
        total = _mix(total ^ part)
    return f"{total:016x}"


def combine(fingerprints: dict[str, str]) -> str:
    """One fingerprint of many: depends on every name and value, not on their order."""
    total = 0
    for name, value in sorted(fingerprints.items()):
        for part in (*name.encode(), int(value, 16)):
            total = _mix(total ^ part)
    return f"{total:016x}"


def _rows(words: Tensor) -> Tensor:
    """One sum for each row of words; the last row may be shorter."""
    if words.is_cuda:
        return _rows_on_device(words)
    return (
        fold.fold_words(words, _odd_numbers(words.device))
        if library.why_not() is None
        else _rows_in_numpy(words)
    )


def _rows_on_device(words: Tensor) -> Tensor:
    odd = _odd_numbers(words.device)
    whole = words.numel() // _ROW * _ROW
    table = words[:whole].view(-1, _ROW)
    parts = [_products(table[i : i + _STEP], odd).sum(1) for i in range(0, table.shape[0], _STEP)]
    if whole < words.numel():
        rest = words[whole:]
        parts.append(_products(rest, odd[: rest.numel()]).sum(0, keepdim=True))
    return torch.cat(parts) if parts else words.new_empty(0)


def _products(words: Tensor, odd: Tensor) -> Tensor:
    upper = words >> 32  # arithmetic: the mask takes the copies of the sign away
    return upper.bitwise_and_(0xFFFFFFFF).bitwise_xor_(words).mul_(odd)


def _rows_in_numpy(words: Tensor) -> Tensor:
    """The same without a compiler; in the calling thread alone, beside a search that has the other cores."""
    values, odd = words.numpy().view("uint64"), _odd_numbers(words.device).numpy().view("uint64")
    sums = torch.empty(-(-words.numel() // _ROW), dtype=torch.int64, device="cpu")
    scratch = torch.empty(_ROW, dtype=torch.int64, device="cpu").numpy().view("uint64")
    for row in range(sums.numel()):
        part = values[row * _ROW : (row + 1) * _ROW]
        folded = scratch[: part.size]
        folded[:] = part
        folded >>= 32
        folded ^= part
        folded *= odd[: part.size]
        sums[row] = int(folded.sum().view("int64"))
    return sums


@cache
def _odd_numbers(device: torch.device) -> Tensor:
    """65,536 fixed odd 64-bit numbers: the outputs of splitmix64."""
    state = torch.arange(1, _ROW + 1, dtype=torch.int64, device="cpu") * -0x61C8864680B583EB
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        state = (state ^ ((state >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return ((state ^ ((state >> 31) & ((1 << 33) - 1))) | 1).to(device)


def _mix(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & (2**64 - 1)
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & (2**64 - 1)
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & (2**64 - 1)
    return value ^ (value >> 31)
