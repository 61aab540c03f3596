"""The input of a quantized Linear as servers see it, against compressed-tensors and NumPy."""

import ml_dtypes
import numpy as np
import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import forward_quantize
from compressed_tensors.quantization.quant_config import QuantizationStatus

from daq_lightning.numerics.activations import quantized_input
from daq_lightning.numerics.formats.fp8 import FP8_E4M3
from daq_lightning.numerics.formats.int8 import INT8


def of_compressed_tensors(x, group, kind_of_code="float", **more):
    kind = {"strategy": "token"} if group is None else {"strategy": "group", "group_size": group}
    args = QuantizationArgs(num_bits=8, type=kind_of_code, symmetric=True, dynamic=True, **kind, **more)
    module = torch.nn.Identity()
    module.quantization_status = QuantizationStatus.INITIALIZED
    return forward_quantize(module, x, "input", args)


def of_numpy(x, group, floor):
    rows = []
    for row in x.numpy().reshape(-1, x.shape[-1]):
        parts = []
        for start in range(0, len(row), group):
            part = row[start : start + group]
            scale = np.float32(max(np.abs(part).max(), np.float32(floor))) / np.float32(448)
            codes = (part / scale).clip(-448, 448).astype(ml_dtypes.float8_e4m3fn)
            parts.append(codes.astype(np.float32) * scale)
        rows.append(np.concatenate(parts))
    return torch.from_numpy(np.stack(rows)).reshape(x.shape)


def activations(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    return x * torch.exp(2 * torch.randn(shape[:-1], generator=generator))[..., None]


@pytest.mark.parametrize("group", [None, 128, 32])
def test_the_same_to_the_bit_as_compressed_tensors(group):
    x = activations(3, 65, 256)
    assert torch.equal(quantized_input(x, group), of_compressed_tensors(x, group))


@pytest.mark.parametrize("group", [128, 100, 7, 1000, 1])
def test_a_ragged_group_has_a_scale_of_its_own(group):
    x = activations(5, 9, 300)
    assert torch.equal(quantized_input(x, group), of_numpy(x, group, 1e-10))


def test_the_scale_of_a_token_has_the_floor_of_vllm():
    x = activations(4, 8, 64) * 1e-4
    assert torch.equal(quantized_input(x), of_numpy(x, 64, 1 / 512))
    assert not torch.equal(quantized_input(x), of_numpy(x, 64, 1e-10))


@pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 1e6])
def test_int8_of_a_token_is_what_vllm_says(size):
    x = activations(3, 20, 70) * size
    x[0, 0] = 0
    absmax = np.abs(x.numpy()).max(-1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        codes = np.rint(x.numpy() * (np.float32(127) / absmax)).clip(-128, 127)
    expected = np.where(absmax == 0, 0, codes * (absmax / np.float32(127)))
    assert torch.equal(quantized_input(x, None, INT8), torch.from_numpy(expected))
    assert float(np.abs(codes[absmax[..., 0] > 0]).max()) == 127


def test_int8_is_a_half_of_255th_from_compressed_tensors():
    x = activations(3, 65, 256)
    theirs = of_compressed_tensors(x, None, "int")
    step = x.abs().amax(-1, keepdim=True) / 127
    assert bool(((quantized_input(x, None, INT8) - theirs).abs() <= 1.01 * step).all())


def test_mxfp8_has_the_smallest_power_of_two_that_does_not_saturate():
    x = activations(4, 9, 96)
    x[0, 0, :32], x[0, 0, 32] = 448, 0
    x[1] *= 1e-20
    expected = torch.empty_like(x)
    for part, out in zip(x.reshape(-1, 32).numpy(), expected.view(-1, 32).numpy(), strict=True):
        exponent = -126
        while np.abs(part).max() > 448 * 2.0**exponent:
            exponent += 1
        scale = np.float32(2.0**exponent)
        out[:] = (part / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale
    assert torch.equal(quantized_input(x, 32, FP8_E4M3, "ue8m0"), expected)
    assert bool((quantized_input(x, 32, FP8_E4M3, "ue8m0") != quantized_input(x, 32)).any())


def test_mxfp8_is_the_same_to_the_bit_as_compressed_tensors():
    x = activations(3, 65, 256)
    expected = of_compressed_tensors(x, 32, scale_dtype=torch.uint8)
    assert torch.equal(quantized_input(x, 32, FP8_E4M3, "ue8m0"), expected)


@pytest.mark.parametrize(
    ("fmt", "scale_format"), [(INT8, "float32"), (FP8_E4M3, "ue8m0")], ids=["int8", "mx"]
)
def test_zeros_nothing_and_what_is_not_finite_in_the_other_formats(fmt, scale_format):
    x = torch.ones(4, 8)
    x[0, 1], x[1, 5], x[2] = torch.nan, -torch.inf, 0
    seen = quantized_input(x, 8, fmt, scale_format)
    assert seen.isnan().all(1).tolist() == [True, True, False, False]
    assert not seen[2].any()
    assert quantized_input(torch.ones(0, 6), 8, fmt, scale_format).shape == (0, 6)
    with pytest.raises(ValueError, match="scale_format='e4m3'"):
        quantized_input(x, 8, fmt, "e4m3")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("group", [None, 128])
def test_computed_in_float32_and_returned_in_the_dtype_given(dtype, group):
    x = activations(2, 8, 200).to(dtype)
    seen = quantized_input(x, group)
    assert seen.dtype == dtype
    assert torch.equal(seen, quantized_input(x.float(), group).to(dtype))


@pytest.mark.parametrize("group", [None, 4])
def test_zeros_stay_zeros_and_empty_stays_empty(group):
    assert torch.equal(quantized_input(torch.zeros(2, 6), group), torch.zeros(2, 6))
    for shape in [(0, 6), (2, 0)]:
        assert quantized_input(torch.ones(shape), group).shape == shape


def test_what_is_not_finite_shows_in_its_own_group_only():
    x = torch.ones(2, 8)
    x[0, 1], x[1, 5] = torch.nan, torch.inf
    seen = quantized_input(x, 4)
    assert seen.isnan().tolist() == [[True] * 4 + [False] * 4, [False] * 4 + [True] * 4]


def test_the_input_is_left_alone_and_a_group_of_nothing_refused():
    x = activations(2, 8)
    before = x.clone()
    quantized_input(x, 4)
    assert torch.equal(x, before)
    with pytest.raises(ValueError, match="group=0"):
        quantized_input(x, 0)
