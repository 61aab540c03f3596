"""The fingerprint depends on every bit, the dtype and the shape, and on nothing else."""

import pytest
import torch

from daq_lightning.checkpoint import fingerprint as module
from daq_lightning.checkpoint.fingerprint import combine, fingerprint
from daq_lightning.numerics.backends import fold


@pytest.mark.parametrize("size", [1, 7, 8, 9, 4096, 8 * 65536, 8 * 65536 + 13])
def test_all_paths_give_the_same(size, monkeypatch):
    data = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(size))
    monkeypatch.setattr(module, "_rows", module._rows_in_numpy)
    expected = fingerprint(data)
    monkeypatch.setattr(module, "_rows", module._rows_on_device)
    assert fingerprint(data) == expected
    monkeypatch.setattr(
        module, "_rows", lambda words: fold.fold_words(words, module._odd_numbers(words.device))
    )
    assert fingerprint(data) == expected


def test_every_single_bit_counts():
    seen = {fingerprint(torch.zeros(40, dtype=torch.uint8))}
    for position in range(40):
        for bit in range(8):
            data = torch.zeros(40, dtype=torch.uint8)
            data[position] = 1 << bit
            seen.add(fingerprint(data))
    assert len(seen) == 1 + 40 * 8


def test_two_flipped_signs_do_not_cancel():
    weight = torch.ones(64, dtype=torch.bfloat16)
    seen = set()
    for first in range(3, 64, 4):  # the upper ends of the words
        for second in range(first + 4, 64, 4):
            flipped = weight.clone()
            flipped[[first, second]] *= -1
            seen.add(fingerprint(flipped))
    assert len(seen) == 16 * 15 // 2
    assert fingerprint(weight) not in seen


def test_dtype_shape_and_values_count_but_not_layout_or_place():
    values = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    assert fingerprint(values) != fingerprint(values.reshape(10, 6))
    assert fingerprint(values) != fingerprint(values.view(torch.int32))
    assert fingerprint(values.T) == fingerprint(values.T.contiguous())
    padded = torch.cat([torch.zeros(1), values.flatten()])[1:].reshape(
        6, 10
    )  # begins in the middle of a word
    assert fingerprint(padded) == fingerprint(values)
    assert fingerprint(torch.empty(0)) != fingerprint(torch.empty(0, 3))


def test_the_combination_depends_on_names_and_values_not_on_order():
    prints = {"a": fingerprint(torch.zeros(1)), "b": fingerprint(torch.ones(1))}
    assert combine(prints) == combine(dict(reversed(prints.items())))
    assert combine(prints) != combine({"a": prints["b"], "b": prints["a"]})
