"""All backends give the same sums: counts bit for bit, float sums to 2e-6, and their codes are
`quantize`'s."""

import os
import subprocess
import sys
import threading
import warnings

import ml_dtypes
import numpy as np
import pytest
import torch

from daq_lightning.numerics import backends
from daq_lightning.numerics.backends import cpu, delta_stats, library, reference
from daq_lightning.numerics.formats import PerBlock, PerChannel, PerTensor
from daq_lightning.numerics.formats.fp8 import FP8_E4M3
from daq_lightning.numerics.objectives import DeltaStats
from daq_lightning.numerics.quantize import absmax, absmax_scale, dequantize, quantize

RTOL = 2e-6
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
BACKENDS = [cpu, reference]
SHAPES_AND_GRIDS = [
    ((1, 1), PerBlock(128, 128)),
    ((1, 300), PerChannel()),
    ((130, 260), PerBlock(128, 128)),
    ((7, 5000), PerChannel()),
    ((70, 90), PerTensor()),
    ((10, 12), PerBlock(3, 5)),
]


def pair(shape, dtype=torch.bfloat16, magnitude=1.0, seed=0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    base = (torch.randn(shape, generator=generator) * 0.02 * magnitude).to(dtype)
    step = torch.randn(shape, generator=generator) * 2e-4 * magnitude
    step[torch.rand(shape, generator=generator) < 0.3] = 0
    return (base.float() + step).to(dtype).to(device), base.to(device)


def candidates(weight, granularity, count=5, seed=1):
    scale_G = absmax_scale(weight, granularity).flatten()
    factor = torch.rand(len(scale_G), count, generator=torch.Generator().manual_seed(seed)) * 2 + 0.25
    return (scale_G[:, None] * factor.to(scale_G.device)).clamp(min=2.0**-126)


def assert_same(stats: DeltaStats, expected: DeltaStats):
    for name, mine, theirs in zip(DeltaStats._fields, stats, expected, strict=True):
        assert mine.dtype == theirs.dtype, name
        assert mine.shape == theirs.shape, name
        if mine.dtype == torch.int64:
            assert torch.equal(mine, theirs), name
        else:
            size = (expected.delta_sq * expected.delta_q_sq).sqrt() if name == "dot" else theirs
            assert bool(((mine - theirs).abs() <= RTOL * size).all()), name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("shape", "granularity"), SHAPES_AND_GRIDS)
def test_agrees_with_the_reference(shape, granularity, device):
    for dtypes in (
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.float32),
    ):
        weight, base = pair(shape, device=device)
        weight = weight.to(dtypes[0])
        scale_GK = candidates(weight, granularity)
        # half of the base lies where the second candidate puts the weight: those changes are lost under it
        scale = scale_GK[:, 1].reshape(granularity.grid(shape))
        lost = dequantize(quantize(weight, scale, granularity), scale, granularity)
        base = torch.where(torch.arange(shape[1], device=device) % 2 == 0, lost, base.float()).to(dtypes[1])
        assert_same(
            delta_stats(weight, base, scale_GK, granularity),
            reference.delta_stats(weight, base, scale_GK, granularity, FP8_E4M3),
        )


@pytest.mark.parametrize("magnitude", [1e-30, 1e-16, 1e20, 1e30])
def test_magnitudes_whose_squares_do_not_fit_float32(magnitude):
    weight, base = pair((40, 60), torch.float32, magnitude)
    granularity = PerBlock(32, 32)
    scale_GK = candidates(weight, granularity)
    expected = reference.delta_stats(weight, base, scale_GK, granularity, FP8_E4M3)
    assert_same(cpu.delta_stats(weight, base, scale_GK, granularity, FP8_E4M3), expected)
    assert bool((expected.delta_q_sq > 0).all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_updates_beyond_float32_show_as_infinite_sums(backend):
    weight, base = torch.full((2, 40), 3e38), torch.full((2, 40), -3e38)
    stats = backend.delta_stats(weight, base, absmax_scale(weight, PerChannel()), PerChannel(), FP8_E4M3)
    assert bool(stats.delta_sq.isinf().all())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [1.0, 0.37, 3.0 * 2**-9])
def test_scores_the_codes_of_quantize_for_every_bfloat16(scale, backend):
    """Where the base is what `quantize` makes of the weight, delta_q is 0 in every element or a code
    differs."""
    values = torch.arange(1 << 15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    values = values[(values >= 2.0**-40) & (values < 2.0**40)]
    weight = torch.cat([values, -values]).reshape(-1, 256)
    scale_M1 = torch.full((len(weight), 1), scale)
    base = dequantize(quantize(weight, scale_M1, PerChannel()), scale_M1, PerChannel())
    stats = backend.delta_stats(weight, base, scale_M1, PerChannel(), FP8_E4M3).total()
    assert float(stats.delta_q_sq) == 0
    assert int(stats.lost) + int(stats.sign_equal) == weight.numel()


@pytest.mark.parametrize("backend", BACKENDS)
def test_scores_the_codes_of_quantize_for_random_float32(backend):
    generator = torch.Generator().manual_seed(0)
    exponent = torch.randint(-14, 10, (128, 2048), generator=generator)
    weight = torch.ldexp(torch.rand(128, 2048, generator=generator) - 0.5, exponent)
    scale_M1 = torch.rand(128, 1, generator=generator) + 0.5
    base = dequantize(quantize(weight, scale_M1, PerChannel()), scale_M1, PerChannel())
    stats = backend.delta_stats(weight, base, scale_M1, PerChannel(), FP8_E4M3).total()
    assert float(stats.delta_q_sq) == 0


def test_native_codes_are_those_of_ml_dtypes_for_every_half():
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.bfloat16, torch.float16):
        values = every.view(dtype)
        values = values[values.isfinite()].reshape(-1, 1)
        scale = 2.0 ** torch.randint(-20, 20, (len(values), 1), generator=torch.Generator().manual_seed(0))
        codes = cpu.quantize(values, scale, PerChannel(), FP8_E4M3)
        scaled = (values.double() / scale).clamp(-448, 448).numpy()
        expected = scaled.astype(np.float32).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
        assert np.array_equal(codes.view(torch.uint8).numpy(), expected)


@pytest.mark.parametrize(("shape", "granularity"), SHAPES_AND_GRIDS)
def test_native_absmax_and_codes_are_those_of_torch(shape, granularity):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        weight, _ = pair(shape, dtype)
        scale = absmax_scale(weight, granularity)
        assert torch.equal(cpu.absmax(weight, granularity), absmax(weight, granularity))
        for stretch in (1.0, 0.7, 300.0):
            codes = cpu.quantize(weight, scale * stretch, granularity, FP8_E4M3)
            expected = quantize(weight, scale * stretch, granularity)
            assert torch.equal(codes.view(torch.uint8), expected.view(torch.uint8))


def test_native_absmax_shows_nan_and_infinity():
    weight = torch.zeros(2, 3000)
    weight[0, 2999], weight[1, 0] = float("nan"), float("-inf")
    largest = cpu.absmax(weight, PerChannel()).flatten()
    assert bool(largest[0].isnan())
    assert bool(largest[1].isinf())


def test_native_does_not_depend_on_the_number_of_threads():
    weight, base = pair((300, 500))
    scale_GK = candidates(weight, PerBlock(128, 128))
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(cpu.delta_stats(weight, base, scale_GK, PerBlock(128, 128), FP8_E4M3))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs(backend):
    weight, base = pair((300, 200))
    for cut in (lambda x: x.t(), lambda x: x[10:90, 7:77], lambda x: x[::3, ::2]):
        part, base_part = cut(weight), cut(base)
        scale_GK = candidates(part, PerChannel())
        assert_same(
            backend.delta_stats(part, base_part, scale_GK, PerChannel(), FP8_E4M3),
            reference.delta_stats(
                part.contiguous(), base_part.contiguous(), scale_GK, PerChannel(), FP8_E4M3
            ),
        )


def test_offsets_beyond_32_bits():
    """Two rows of a tensor of 2^31 elements; the pages between them are never touched."""
    far = 1 << 31
    try:
        storage = torch.empty(far + 256, dtype=torch.bfloat16)
    except RuntimeError:
        pytest.skip("no address space for 4 GiB")
    weight, base = pair((2, 256))
    view = storage.as_strided((2, 256), (far, 1))
    view.copy_(weight)
    scale_GK = candidates(weight, PerChannel())
    assert_same(
        cpu.delta_stats(view, base, scale_GK, PerChannel(), FP8_E4M3),
        reference.delta_stats(weight, base, scale_GK, PerChannel(), FP8_E4M3),
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_leaves_the_process_as_it_was(backend):
    """Random state, thread count, and the arithmetic of subnormal numbers; also when called from another
    thread."""
    weight, base = pair((50, 60))
    scale_GK = candidates(weight, PerChannel())
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    results = []
    worker = threading.Thread(
        target=lambda: results.append(backend.delta_stats(weight, base, scale_GK, PerChannel(), FP8_E4M3))
    )
    worker.start()
    worker.join()
    assert_same(results[0], reference.delta_stats(weight, base, scale_GK, PerChannel(), FP8_E4M3))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    assert float(torch.tensor([2.0**-126]) / 2) == 2.0**-127


def test_without_a_compiler_a_search_warns_once_and_uses_the_reference(monkeypatch, tmp_path):
    weight, base = pair((2, 2))
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # where nothing was built before
    monkeypatch.setattr(library, "_find", library._find.__wrapped__)
    monkeypatch.setattr(cpu, "_entry_point", cpu._entry_point.__wrapped__)
    backends._choose.cache_clear()
    try:
        with pytest.warns(
            UserWarning, match="reference implementation: No C\\+\\+ compiler.*no-such-compiler"
        ):
            stats = delta_stats(weight, base, torch.ones(2, 1), PerChannel())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            delta_stats(weight, base, torch.ones(2, 1), PerChannel())
        assert_same(stats, reference.delta_stats(weight, base, torch.ones(2, 1), PerChannel(), FP8_E4M3))
        with pytest.raises(library.LibraryMissingError, match="set CXX"):
            cpu.delta_stats(weight, base, torch.ones(2, 1), PerChannel(), FP8_E4M3)
    finally:
        backends._choose.cache_clear()


@pytest.mark.slow
@pytest.mark.parametrize("call", ["search_scale", "search_batch", "delta_stats", "export"])
def test_the_warning_of_the_slow_reference_points_at_the_line_of_the_user(tmp_path, call):
    lines = {
        "search_scale": "search_scale(weight, weight, PerChannel())",
        "search_batch": "search_batch([weight] * 2, [weight] * 2, PerChannel(), names=['a', 'b'])",
        "delta_stats": "delta_stats(weight, weight, torch.ones(8, 1), PerChannel())",
        "export": f"export_checkpoint(*[{{'a.weight': weight}}] * 2, {str(tmp_path / 'out')!r})",
    }
    script = tmp_path / "user.py"
    script.write_text(
        "import torch\nfrom daq_lightning import PerChannel, export_checkpoint, search_scale\n"
        "from daq_lightning.numerics.search.search import search_batch\n"
        "from daq_lightning.numerics.backends import delta_stats\n"
        f"weight = torch.ones(8, 8)\n{lines[call]}\n"
    )
    # where nothing was built before
    environment = os.environ | {"CXX": "no-such-compiler", "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"{script}:6: UserWarning: The scale search uses its slow reference" in done.stderr


def test_triton_is_imported_only_when_used():
    code = "import sys, daq_lightning.numerics.search.search; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
