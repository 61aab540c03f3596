"""The sums for a reader that dequantizes to 16 bit are exact: numpy says the same of every group."""

import ml_dtypes
import numpy as np
import pytest
import torch

from daq_lightning.numerics.backends import cpu, reference
from daq_lightning.numerics.formats import PerBlock, PerChannel, PerTensor
from daq_lightning.numerics.formats.fp8 import FP8_E4M3
from daq_lightning.numerics.objectives import DeltaStats
from daq_lightning.numerics.quantize import absmax_scale, quantize
from daq_lightning.numerics.search.search import search_batch, search_scale
from daq_lightning.numerics.search.settings import ScaleSearch

RTOL = 2e-6
BACKENDS = [cpu, reference]
READERS = {torch.bfloat16: ml_dtypes.bfloat16, torch.float16: np.float16}
READER = pytest.mark.parametrize("reader", READERS, ids=str)
BACKEND = pytest.mark.parametrize("backend", BACKENDS, ids=lambda module: module.__name__.rpartition(".")[2])
CASES = [
    ((40, 90), PerChannel()),
    ((40, 90), PerBlock(16, 32)),
    ((40, 90), PerBlock(128, 128)),
    ((40, 90), PerTensor()),
    ((150, 300), PerTensor()),  # more than a group that is searched in the cache
    ((3, 40_000), PerChannel()),
    ((1, 1), PerBlock(128, 128)),
]
CASE = pytest.mark.parametrize(("shape", "granularity"), CASES, ids=str)


def pair(shape, dtype=torch.bfloat16, seed=0):
    """Updates as small as the last bits of the base, rows of zeros, and rows without an update."""
    generator = torch.Generator().manual_seed(seed)
    base = (0.02 * torch.randn(shape, generator=generator)).to(dtype)
    weight = (base.float() * (1 + 0.01 * torch.randn(shape, generator=generator))).to(dtype)
    if shape[0] > 30:
        weight[:16, :40], base[:16, :40] = 0, 0
        weight[20:24] = base[20:24]
    return weight, base


def oracle(weight, base, codes, scale, granularity, reader):
    """The definition, group by group, in float64; fields of shape (G,)."""
    code = codes.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    rows, cols = granularity.cell(tuple(weight.shape))
    fields = []
    for row, col in np.ndindex(*scale.shape):
        cell = slice(row * rows, (row + 1) * rows), slice(col * cols, (col + 1) * cols)
        with np.errstate(over="ignore"):
            seen = (code[cell] * scale.numpy()[row, col]).astype(READERS[reader]).astype(np.float64)
        w, b = weight[cell].double().numpy(), base[cell].double().numpy()
        sign, sign_q, delta, delta_q = np.sign(w - b), np.sign(seen - b), w - b, seen - b
        changed = sign != 0
        counts = (
            w.size, changed.sum(), (sign == sign_q).sum(), (changed & (sign == sign_q)).sum(),
            (changed & (sign == -sign_q)).sum(), (changed & (sign_q == 0)).sum(),
        )  # fmt: skip
        totals = (delta * delta_q).sum(), (delta**2).sum(), (delta_q**2).sum(), ((seen - w) ** 2).sum()
        fields.append((*counts, *totals))
    return DeltaStats(*map(torch.tensor, zip(*map(np.array, fields), strict=True)))


def assert_same(stats, expected):
    size = dict(expected._asdict(), dot=(expected.delta_sq * expected.delta_q_sq).sqrt())
    for name, mine, theirs in zip(DeltaStats._fields, stats, expected, strict=True):
        assert mine.shape == theirs.shape, name
        if mine.dtype == torch.int64:
            assert torch.equal(mine, theirs.long()), name
        else:
            assert bool(((mine - theirs).abs() <= RTOL * size[name]).all()), name


@READER
@BACKEND
@CASE
@pytest.mark.parametrize("scope", ["group", "layer"])
def test_the_sums_of_a_search_are_those_of_numpy(shape, granularity, scope, backend, reader):
    weight, base = pair(shape)
    search = ScaleSearch(n_coarse=3, n_fine=2, alpha_scope=scope)
    result = search_scale(weight, base, granularity, search, backend=backend, reader_dtype=reader)
    assert result.dequantized_stats is not None
    expected = oracle(weight, base, result.codes, result.scale, granularity, reader)
    assert_same(result.dequantized_stats, expected)
    assert int(result.dequantized_stats.n.sum()) == weight.numel()


@READER
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_kernel_agrees_with_the_reference(dtype, reader):
    for shape, granularity in CASES:
        weight, base = pair(shape, dtype, seed=1)
        scale_GK = absmax_scale(weight, granularity).flatten()[:, None] * torch.tensor([1.0, 0.7, 1.3])
        one = cpu.delta_stats(weight, base, scale_GK, granularity, FP8_E4M3, reader)
        two = reference.delta_stats(weight, base, scale_GK, granularity, FP8_E4M3, reader)
        assert_same(one, two)
        plain = cpu.delta_stats(weight, base, scale_GK, granularity, FP8_E4M3)
        assert torch.equal(one.n_changed, plain.n_changed)
        assert shape == (1, 1) or not torch.equal(one.delta_q_sq, plain.delta_q_sq)


@READER
@BACKEND
def test_every_product_of_code_and_scale_is_rounded_as_torch_rounds_it(reader, backend):
    """Where the base is what torch makes of code and scale, delta_q is 0 in every element."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(torch.float8_e4m3fn).float()
    codes = codes[codes.isfinite()]
    largest = {torch.bfloat16: 110.0, torch.float16: 20.0}[reader]
    exponent = torch.rand(4000, 1, generator=generator) * (126 + largest) - 126
    around_subnormals = torch.rand(2000, 1, generator=generator) * 20 - 34  # of float16
    scale = torch.cat([2**exponent, 2**around_subnormals]).clamp(min=2.0**-126)
    weight = codes * scale
    seen = (quantize(weight, scale, PerChannel()).float() * scale).to(reader).float()
    finite = seen.isfinite()
    assert bool(finite.all()) == (reader is torch.bfloat16)
    weight, base = torch.where(finite, weight, 0), torch.where(finite, seen, 0)
    stats = backend.delta_stats(weight, base, scale, PerChannel(), FP8_E4M3, reader).total()
    assert float(stats.delta_q_sq) == 0
    assert int(stats.lost) == int(stats.n_changed) == int((weight != base).sum()) > 0


@BACKEND
@pytest.mark.parametrize(("reader", "fits", "beyond"), [(torch.float16, 65519.0, 65520.0)])
def test_what_is_beyond_float16_is_infinite_to_its_reader(backend, reader, fits, beyond):
    weight, base = torch.tensor([[fits, 1.0], [beyond, 1.0], [1e38, 1.0]]), torch.zeros(3, 2)
    scale = weight[:, :1] / 256  # a power of two as code: code * scale is the weight itself
    assert (scale * 256)[:2].flatten().tolist() == [fits, beyond]
    stats = backend.delta_stats(weight, base, scale, PerChannel(), FP8_E4M3, reader)
    assert stats.delta_q_sq.isinf().flatten().tolist() == [False, True, True]
    assert stats.preserved.flatten().tolist() == [2, 2, 1]  # in the last row 1 is lost


def test_a_batch_has_the_sums_of_single_searches():
    pairs = [pair((32, 64), seed=seed) for seed in (0, 1, 2)]
    weights, bases = zip(*pairs, strict=True)
    for granularity in (PerChannel(), PerBlock(16, 16), PerTensor()):
        batch = search_batch(weights, bases, granularity, names=["a", "b", "c"], reader_dtype=torch.float16)
        for (weight, base), result in zip(pairs, batch, strict=True):
            single = search_scale(weight, base, granularity, reader_dtype=torch.float16)
            assert result.dequantized_stats is not None
            assert single.dequantized_stats is not None
            for one, two in zip(result.dequantized_stats, single.dequantized_stats, strict=True):
                assert torch.equal(one, two)


@BACKEND
def test_nobody_who_does_not_ask_pays_for_it(backend):
    weight, base = pair((40, 90))
    asked = search_scale(weight, base, PerChannel(), backend=backend, reader_dtype=torch.bfloat16)
    plain = search_scale(weight, base, PerChannel(), backend=backend)
    assert plain.dequantized_stats is None
    assert torch.equal(plain.scale, asked.scale)
    assert torch.equal(plain.codes.view(torch.uint8), asked.codes.view(torch.uint8))
    assert_same(plain.stats, asked.stats)
    with pytest.raises(ValueError, match=r"reader_dtype.*torch.bfloat16, torch.float16 or None.*float64"):
        search_scale(weight, base, PerChannel(), backend=backend, reader_dtype=torch.float64)
