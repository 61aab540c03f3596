"""Sums of v^T v are those of NumPy in float64, whatever part of them is computed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from daq_lightning.numerics.rounding.sums import KroneckerSum, used_tokens


@pytest.mark.parametrize("size", [5, 128, 300])
def test_a_sum_of_several_blocks_is_that_of_numpy(size):
    rng, one = np.random.default_rng(0), KroneckerSum(size, torch.device("cpu"))
    expected = np.zeros((size, size))
    for dtype, factor in ((torch.float32, 1.0), (torch.bfloat16, 1.0), (torch.float32, 1 / 256)):
        values = torch.from_numpy(rng.normal(size=(40, size))).to(dtype)
        used = torch.from_numpy(rng.random(40) < 0.7)
        one.add(values, used, factor)
        kept = values.double().numpy()[used.numpy()] * factor
        expected += kept.T @ kept
        total = one.total  # read in between, as exports before the end do
        np.testing.assert_allclose(total.numpy(), expected, rtol=1e-4, atol=1e-4)
        assert not bool(one.left_out)
    assert int(one.tokens) > 3 * 20


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
def test_a_call_that_is_not_finite_adds_nothing(wrong):
    one, values = KroneckerSum(3, torch.device("cpu")), torch.ones(4, 3)
    values[2, 1] = wrong
    used = torch.tensor([True, True, False, True])  # even of a token that says nothing
    one.add(values, used)
    assert (int(one.tokens), int(one.left_out), float(one.total.sum())) == (0, 1, 0.0)
    assert not used_tokens(values).any()
    assert used_tokens(torch.tensor([[0.0, 0.0], [0.0, -1e-30]])).tolist() == [False, True]
