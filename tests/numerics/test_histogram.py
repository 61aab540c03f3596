"""Quantiles from bins are those of NumPy within the stated width, for any split of the stream."""

import math

import numpy as np
import pytest
import torch

from daq_lightning.numerics.histogram import BINS, histogram, quantile

FRACTIONS = (0.0, 0.001, 0.25, 0.5, 0.9, 0.99, 0.999, 1.0)


@pytest.mark.parametrize("size", [1, 2, 3, 10, 1001, 20000])
@pytest.mark.parametrize("spread", [0.1, 2.0, 4.0])
def test_quantiles_are_numpys_within_a_thousandth(size, spread):
    values = torch.from_numpy(np.random.default_rng(size).lognormal(-7, spread, size))
    counts = histogram(values)
    assert (counts.dtype, counts.shape, int(counts.sum())) == (torch.int64, (BINS,), size)
    for fraction in FRACTIONS:
        found = float(quantile(counts, fraction, values.max()))
        assert found == pytest.approx(np.quantile(values.numpy(), fraction), rel=1 / 1024, abs=2**-40)
        assert found <= float(values.max())


def test_the_bins_of_parts_add_up_to_those_of_the_whole():
    values = torch.from_numpy(np.random.default_rng(0).lognormal(-7, 4, 5000))
    assert torch.equal(histogram(values[:77]) + histogram(values[77:]), histogram(values))


def test_every_edge_falls_into_its_own_bin():
    # an edge opens a bin, and the float64 just below it still belongs to the bin before
    edges = 2.0 ** torch.arange(-40, 16, dtype=torch.float64)[:, None] * (
        1 + torch.arange(512, dtype=torch.float64) / 512
    )
    below = torch.nextafter(edges.flatten(), torch.zeros(1, dtype=torch.float64))
    assert torch.equal(histogram(edges.flatten())[1:], torch.ones(BINS - 1, dtype=torch.int64))
    assert torch.equal(histogram(below)[:-1], torch.ones(BINS - 1, dtype=torch.int64))


def test_zero_tiny_and_huge_values_have_a_place():
    values = torch.tensor([0.0, 1e-300, 2.0**-41, 1e30], dtype=torch.float64)
    counts = histogram(values)
    assert (int(counts[0]), int(counts[-1])) == (3, 1)
    assert float(quantile(counts, 0.5, values.max())) == 0.0
    assert math.isnan(quantile(histogram(values[:0]), 0.5, torch.zeros((), dtype=torch.float64)))
