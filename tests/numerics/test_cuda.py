"""The CUDA kernels agree with the reference, in Triton's interpreter or on a device; and what Triton makes of
them, for three GPUs that need not be there, keeps to the figures of numerics/backends/README.md."""

import itertools
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_backends import SHAPES_AND_GRIDS, assert_same, candidates, pair
from test_search_cache import pair as mixed_pair
from toy_format import E5M2

triton = pytest.importorskip("triton", reason="triton is not installed")

from compiled_kernels import CONVERSION, DTYPES, KERNELS, TARGETS, VARIANTS, compiled, variants

from daq_lightning.numerics import backends
from daq_lightning.numerics.backends import cuda, cuda_sums, reference
from daq_lightning.numerics.formats import PerBlock, PerChannel, PerTensor
from daq_lightning.numerics.formats.fp4 import FP4_E2M1
from daq_lightning.numerics.formats.fp8 import FP8_E4M3
from daq_lightning.numerics.formats.int4 import INT4
from daq_lightning.numerics.formats.int8 import INT8
from daq_lightning.numerics.objectives import METRICS, score
from daq_lightning.numerics.quantize import absmax_scale, quantize
from daq_lightning.numerics.scales import round_scale
from daq_lightning.numerics.search.search import search_scale
from daq_lightning.numerics.search.settings import ScaleSearch
from daq_lightning.numerics.search.stages import Task

PAGE = Path(backends.__file__).with_name("README.md").read_text()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
compiles = pytest.mark.skipif(INTERPRETED, reason="an interpreted kernel cannot be compiled")
# a kernel that is interpreted runs on a CPU: test_in_the_interpreter starts this file so
DEVICES = ["cpu"] if INTERPRETED else [pytest.param("cuda", marks=pytest.mark.gpu)]
devices = pytest.mark.parametrize("device", DEVICES)
SEARCHES = {
    "paper": ScaleSearch,
    "narrow": lambda metric: ScaleSearch(metric=metric, alpha_min=0.9, alpha_max=1.11, n_coarse=4, n_fine=7),
    "dense": lambda metric: ScaleSearch.dense(17, metric=metric),
}
CASES = {  # shape, dtypes of weight and base, granularity, search, scale format, reader, format
    "ragged block": ((20, 140), "bfloat16", "bfloat16", PerBlock(), "paper", "float32", None, FP8_E4M3),
    "two tiles": ((3, 2500), "float32", "bfloat16", PerChannel(), "narrow", "bfloat16", "bfloat16", FP8_E4M3),
    "small blocks": ((7, 33), "float16", "float32", PerBlock(4, 30), "dense", "ue8m0", "float16", FP8_E4M3),
    "tensor": ((9, 130), "float32", "float32", PerTensor(), "paper", "float32", "float16", FP8_E4M3),
    "other format": ((9, 130), "bfloat16", "bfloat16", PerChannel(), "paper", "float32", None, E5M2),
    "int8": ((9, 130), "bfloat16", "bfloat16", PerChannel(), "paper", "bfloat16", None, INT8),
    "int4": ((3, 75), "bfloat16", "bfloat16", PerBlock(1, 32), "narrow", "bfloat16", "bfloat16", INT4),
    "nvfp4": ((3, 75), "bfloat16", "bfloat16", PerBlock(1, 16), "paper", "e4m3", "bfloat16", FP4_E2M1),
    "mxfp4": ((3, 75), "bfloat16", "bfloat16", PerBlock(1, 32), "dense", "ue8m0", None, FP4_E2M1),
}


@pytest.mark.slow
@compiles
def test_in_the_interpreter():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", __file__, "-m", "not gpu", "-rs"],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert "passed" in done.stdout


@devices
@pytest.mark.parametrize(("shape", "granularity"), [*SHAPES_AND_GRIDS, ((2, 33_000), PerChannel())])
def test_sums_are_those_of_the_reference(shape, granularity, device):
    for dtype, reader, fmt in (
        (torch.bfloat16, None, FP8_E4M3),
        (torch.float32, torch.bfloat16, FP8_E4M3),
        (torch.float16, torch.float16, E5M2),
    ):
        weight, base = pair(shape, dtype, device=device)
        scale_GK = candidates(weight, granularity, 2)
        arguments = (weight, base, scale_GK, granularity, fmt, reader)
        assert_same(cuda.delta_stats(*arguments), reference.delta_stats(*arguments))


@devices
def test_sums_whose_products_leave_float32(device):
    for magnitude in (1e-30, 1e20):
        weight, base = pair((3, 20), torch.float32, magnitude, device=device)
        arguments = (weight, base, candidates(weight, PerChannel(), 2), PerChannel(), FP8_E4M3)
        assert_same(cuda.delta_stats(*arguments), reference.delta_stats(*arguments))


@devices
def test_a_reader_in_float16_overflows_to_infinity(device):
    large = torch.tensor([[65519.0, 1.0], [65520.0, 1.0], [2.0e6, 1.0]], device=device)
    arguments = (large, torch.zeros_like(large), large[:, :1] / 256, PerChannel(), FP8_E4M3, torch.float16)
    assert cuda.delta_stats(*arguments).delta_q_sq.isinf().flatten().tolist() == [False, True, True]


@devices
def test_codes_are_those_of_quantize_for_every_bfloat16(device):
    """The scales of a search that tries only alpha = 1, on all magnitudes that fit."""
    values = torch.arange(1 << 15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    values = values[(values >= 2.0**-30) & (values < 2.0**30)]
    weight = torch.cat([values, -values]).reshape(-1, 1920).to(device)
    for fmt in (FP8_E4M3, E5M2, FP4_E2M1, INT8, INT4):
        result = search_scale(weight, weight * 1.5, PerChannel(), ScaleSearch.absmax(), fmt=fmt, backend=cuda)
        expected = quantize(weight, result.scale, PerChannel(), fmt)
        assert torch.equal(result.codes.view(torch.uint8), expected.view(torch.uint8))


@devices
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_search_finds_what_the_reference_finds(case, metric, device, monkeypatch):
    shape, dtype, base_dtype, granularity, search, scale_format, reader, fmt = case
    monkeypatch.setattr(cuda, "search_in_steps", None)
    weight, base = mixed_pair(shape, getattr(torch, dtype), getattr(torch, base_dtype))
    weight, base, search = weight.to(device), base.to(device), SEARCHES[search](metric=metric)
    reader = None if reader is None else getattr(torch, reader)
    options = {"scale_format": scale_format, "fmt": fmt, "reader_dtype": reader}
    found, expected = (
        search_scale(weight, base, granularity, search, **options, backend=backend)
        for backend in (cuda, reference)
    )
    # what it says of the scale that it found
    plain = absmax_scale(weight, granularity, scale_format=scale_format, fmt=fmt)
    alpha_scale = (plain.double() * found.alpha).float()
    assert torch.equal(found.scale, round_scale(alpha_scale, scale_format, found.global_scale))
    codes = quantize(weight, found.scale, granularity, fmt)
    assert torch.equal(found.codes.view(torch.uint8), codes.view(torch.uint8))
    for scale, mine, seen in (
        (found.scale, found.stats, None),
        (plain, found.absmax_stats, None),
        (found.scale, found.dequantized_stats, reader),
    ):
        if mine is not None:
            theirs = reference.delta_stats(weight, base, scale.reshape(-1, 1), granularity, fmt, seen)
            assert_same(mine, theirs.map(lambda field: field[:, 0]))
    # and the scale itself: another one only where both are as good
    other = (found.alpha != expected.alpha).flatten()
    mine, theirs = score(found.stats, metric), score(expected.stats, metric)
    absolute = {"sign": 0, "mse": 0, "cosine": 1e-6, "hybrid": 1e-7}[metric]  # a hybrid's are differences
    assert torch.allclose(mine[other], theirs[other], rtol=1e-5, atol=absolute)
    assert int(other.sum()) <= (0 if metric == "sign" else len(other) // 4)
    assert bool((mine >= score(found.absmax_stats, metric)).all())


@devices
def test_of_equal_candidates_the_nearest_to_one_wins_and_of_two_the_larger(device):
    weight, base = (x.to(device) for x in mixed_pair((4, 32), seed=1))
    even = ScaleSearch(metric="sign", alpha_min=0.8, alpha_max=1.2, n_coarse=4, n_fine=0)
    found, expected = (
        search_scale(weight, base, PerBlock(2, 4), even, backend=backend) for backend in (cuda, reference)
    )
    assert torch.equal(found.alpha, expected.alpha)


@devices
@pytest.mark.parametrize("metric", METRICS)
def test_no_evidence_no_move(metric, device):
    """Not for a group that did not change, nor for one of zeros, whose base may be what it will."""
    base = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)).to(device)
    weight = base + 0.01 * base.sin()
    weight[0], weight[1] = base[0], 0
    weight[2], base[2] = 0, 0
    result = search_scale(weight, base, PerChannel(), ScaleSearch(metric=metric), backend=cuda)
    assert result.alpha[:3].flatten().tolist() == [1, 1, 1]
    assert result.scale[1:3].flatten().tolist() == [1, 1]
    assert not result.codes[1:3].view(torch.uint8).any()


@devices
def test_what_one_kernel_cannot_search_goes_in_steps(device, monkeypatch):
    def fits(shape, search):
        empty = torch.empty(shape, device=device)
        return cuda.fits_cache(
            Task(
                weight=empty,
                base=empty,
                granularity=PerChannel(),
                search=search,
                format=FP8_E4M3,
                scale_format="float32",
            )
        )

    layer = ScaleSearch(alpha_scope="layer")
    assert fits((2, 1 << 15), ScaleSearch())
    assert not fits((2, (1 << 15) + 1), ScaleSearch())
    assert not fits((2, 50), layer)
    assert fits((2, 50), ScaleSearch.dense(127))
    assert not fits((2, 50), ScaleSearch.dense(128))
    steps, ran = cuda.search_in_steps, []
    monkeypatch.setattr(cuda, "search_in_steps", lambda *arguments: ran.append(1) or steps(*arguments))
    weight, base = mixed_pair((4, 50), torch.float32)
    for magnitude, search in (
        (1e-30, ScaleSearch()),
        (1e18, ScaleSearch()),
        (1.0, ScaleSearch(alpha_scope="layer")),
    ):
        arguments = ((weight * magnitude).to(device), (base * magnitude).to(device), PerChannel(), search)
        found, expected = (search_scale(*arguments, backend=backend) for backend in (cuda, reference))
        assert torch.equal(found.alpha, expected.alpha)
        assert_same(found.stats, expected.stats)
    assert len(ran) == 3
    for place in (weight, base):
        before, place[1, 3] = place[1, 3].item(), float("nan")
        with pytest.raises(ValueError, match="1 NaN"):
            search_scale(weight.to(device), base.to(device), PerChannel(), backend=cuda)
        place[1, 3] = before


@pytest.mark.gpu
@pytest.mark.parametrize("granularity", [PerBlock(), PerChannel()], ids=str)
def test_one_kernel_is_faster_than_steps(granularity, monkeypatch):
    """Prints weights/s with -s; the figures belong into numerics/backends/README.md."""
    base = (torch.randn(4096, 4096, device="cuda") * 0.02).bfloat16()
    weight = (base.float() + torch.randn_like(base, dtype=torch.float32) * 2e-4).bfloat16()

    def rate():
        best = float("inf")
        for _ in range(5):
            torch.cuda.synchronize()
            start = time.perf_counter()
            search_scale(weight, base, granularity)
            torch.cuda.synchronize()
            best = min(best, time.perf_counter() - start)
        return weight.numel() / best

    kernel = rate()
    monkeypatch.setattr(cuda, "fits_cache", lambda task: False)
    steps = rate()
    print(f"{granularity}: {kernel / 1e6:.0f} M weights/s in one kernel, {steps / 1e6:.0f} in steps")
    assert kernel > steps


def figures():
    """(kernel, target, dtype) -> registers, bytes of stack, conversion: the rows of the page's table."""
    rows = re.findall(r"^\| `(\w+_kernel)` \| sm_(\d+) \| (\w+) \| (\d+) \| (\d+) \| (.+) \|$", PAGE, re.M)
    return {
        (name, int(target), dtype): (int(registers), int(stack), conversion)
        for name, target, dtype, registers, stack, conversion in rows
    }


def check(name, target, dtype, variant):
    program = compiled(name, target, dtype, variant)
    registers, stack, conversion = figures()[name, target, dtype]
    assert stack == program.stack == 0, "registers are spilled"
    assert program.registers <= cuda_sums.LAUNCH["maxnreg"]
    if f"Triton {triton.__version__}" in PAGE:  # another ptxas deals them out differently
        assert program.registers <= registers
    assert (CONVERSION in program.ptx) == (conversion.strip("`") == CONVERSION) == (target >= 89)
    # subnormal numbers are kept, products not fused into sums, and divisions rounded correctly
    for other in (".ftz", "fma.", "div.full", "div.approx", "rcp.approx", "sqrt.approx"):
        assert other not in program.ptx, other


@compiles
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", KERNELS)
def test_compiled_without_spills_and_with_the_conversion_of_the_device(name, target, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    check(name, target, "bfloat16", VARIANTS[0])


@pytest.mark.slow
@compiles
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", KERNELS)
def test_every_variant_is_compiled_without_spills(name, target, dtype, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for variant in variants(name):
        check(name, target, dtype, variant)


def test_the_page_has_a_row_for_every_kernel_target_and_dtype():
    assert set(figures()) == set(itertools.product(KERNELS, TARGETS, DTYPES))
