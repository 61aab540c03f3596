"""Every rounding is the one that `ml_dtypes` and a scalar definition in exact arithmetic do."""

import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import torch

from daq_lightning.numerics.encode import encode
from daq_lightning.numerics.formats import SMALLEST_SCALE, PerBlock, PerChannel, PerTensor
from daq_lightning.numerics.formats.fp8 import FP8_E4M3
from daq_lightning.numerics.quantize import absmax_scale, dequantize, quantize
from daq_lightning.numerics.scales import round_scale

SMALLEST_NORMAL = np.float32(2.0**-126)


def every_bfloat16():
    """All finite values of the 2^16, -0 and subnormals included."""
    values = np.arange(1 << 16, dtype=np.uint16).view(ml_dtypes.bfloat16)
    return values[np.isfinite(values.astype(np.float32))]


def sweep_of_scales():
    """Float32 scales over the whole range: powers of two, their neighbours, random ones, the smallest
    allowed."""
    random = np.random.default_rng(0)
    powers = np.float32(2.0) ** np.array([-126, -125, -100, -64, -20, -9, -8, -1, 0, 1, 8, 30, 64, 100, 119])
    odd = np.array([1 / 3, 0.7, 1.1, 3e-3, 5.25e-5, 1e-30, 1e30, 448.0, 1 / 448], np.float32)
    around = np.nextafter(np.float32(1), np.array([0, 2], np.float32))
    spread = np.exp2(random.uniform(-40, 40, 8)).astype(np.float32)
    return np.concatenate([powers, odd, around, spread]).astype(np.float32)


def e4m3_scalar(value):
    """Nearest E4M3 value of a finite number, ties to even, in exact arithmetic; saturates at 448."""
    magnitude = min(abs(Fraction(value)), Fraction(448))
    if magnitude == 0:
        return math.copysign(0.0, value)
    exponent = max(math.frexp(float(magnitude))[1] - 1, -6)
    step = Fraction(2) ** (exponent - 3)
    return math.copysign(
        float(round(magnitude / step) * step), value
    )  # round() of a Fraction is half to even


def e4m3_codes(scaled):
    """The bytes that `ml_dtypes` makes of float32 values."""
    return np.clip(scaled, np.float32(-448), np.float32(448)).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)


def torch_bfloat16(values):
    return torch.from_numpy(values.view(np.int16).copy()).view(torch.bfloat16)


def as_bytes(codes):
    return codes.view(torch.uint8).numpy()


def test_the_scalar_definition_ml_dtypes_and_encode_agree_on_every_bfloat16():
    values = every_bfloat16()
    in_range = values.astype(np.float32)
    scalar = np.array([e4m3_scalar(float(value)) for value in in_range], np.float32)
    outside = e4m3_codes(in_range).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    ours = encode(torch_bfloat16(values).float(), FP8_E4M3)
    assert np.array_equal(outside, scalar)
    assert np.array_equal(as_bytes(ours), e4m3_codes(in_range))  # the signs of zeros too


def test_quantize_is_right_for_every_bfloat16_and_every_scale():
    values, scales = every_bfloat16(), sweep_of_scales()
    with np.errstate(over="ignore"):
        scaled = values.astype(np.float32)[None] * (np.float32(1) / scales)[:, None]
    weight = torch_bfloat16(values)[None].expand(len(scales), -1)
    codes = quantize(weight, torch.from_numpy(scales)[:, None], PerChannel())
    assert codes.dtype == torch.float8_e4m3fn
    assert np.array_equal(as_bytes(codes), e4m3_codes(scaled))
    assert not codes.float().isnan().any()


@pytest.mark.parametrize(
    ("dtype", "outside"),
    [(torch.float32, np.float32), (torch.bfloat16, ml_dtypes.bfloat16), (torch.float16, np.float16)],
    ids=["float32", "bfloat16", "float16"],
)
def test_dequantize_is_right_for_every_code_and_every_scale(dtype, outside):
    codes = np.arange(256, dtype=np.uint8)
    codes = codes[(codes & 0x7F) != 0x7F]  # without the two NaN
    scales = sweep_of_scales()
    product = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32)[None] * scales[:, None]
    with np.errstate(over="ignore"):
        expected = product.astype(outside).astype(np.float32)
    stored = torch.from_numpy(codes).view(torch.float8_e4m3fn)[None].expand(len(scales), -1)
    ours = dequantize(stored, torch.from_numpy(scales)[:, None], PerChannel(), dtype)
    assert ours.dtype == dtype
    assert np.array_equal(ours.float().numpy(), expected)


def test_every_code_survives_dequantize_and_quantize_under_powers_of_two():
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 0x7F) != 0x7F].view(torch.float8_e4m3fn)[None]
    for exponent in (-100, -9, 0, 7, 100):
        scale = torch.tensor([[2.0**exponent]])
        again = quantize(dequantize(codes, scale, PerTensor()), scale, PerTensor())
        assert np.array_equal(as_bytes(again), as_bytes(codes))


def test_saturates_instead_of_making_nan():
    values = torch.tensor([[448.0, 463.9, 464.0, 465.0, 1e4, 3.4e38, -464.0, -1e30]])
    codes = quantize(values, torch.ones(1, 1), PerTensor()).float()
    assert codes.tolist() == [[448.0] * 6 + [-448.0] * 2]


def test_keeps_subnormals_and_rounds_half_of_the_smallest_to_zero():
    step = FP8_E4M3.min_normal / 2**FP8_E4M3.mantissa_bits
    assert step == 2.0**-9 == float(ml_dtypes.finfo(ml_dtypes.float8_e4m3fn).smallest_subnormal)
    values = torch.tensor([[step, 3 * step, 7 * step, step / 2, step * 0.51, 1.5 * step, 2.5 * step]])
    codes = quantize(values, torch.ones(1, 1), PerTensor()).float()
    assert codes.tolist() == [[step, 3 * step, 7 * step, 0.0, step, 2 * step, 2 * step]]


def test_midpoints_go_to_the_even_code_and_their_neighbours_to_the_nearer():
    grid = np.arange(0x7F, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    middle = (grid[:-1] + grid[1:]) / 2  # exact in float32
    below, above = np.nextafter(middle, np.float32(0)), np.nextafter(middle, np.float32(1e9))
    even = np.where(np.arange(len(middle)) % 2 == 0, grid[:-1], grid[1:])
    for values, expected in ((middle, even), (below, grid[:-1]), (above, grid[1:])):
        for sign in (1, -1):
            codes = quantize(torch.from_numpy(sign * values)[None], torch.ones(1, 1), PerTensor())
            assert np.array_equal(codes.float().numpy()[0], sign * expected)
            assert np.array_equal(as_bytes(codes)[0], e4m3_codes(sign * values))


def test_float32_weights_and_near_midpoints_under_odd_scales_get_the_right_code():
    random = np.random.default_rng(1)
    scales = sweep_of_scales()
    grid = np.arange(0x7F, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    middle = (grid[:-1] + grid[1:]) / 2
    noise = random.standard_normal((len(scales), 4000)).astype(np.float32) * 100
    nudged = middle[None] * (1 + random.integers(-3, 4, (len(scales), len(middle))) * np.float32(2.0**-23))
    scaled = np.concatenate([noise, nudged.astype(np.float32)], 1)
    weight = scaled * scales[:, None]
    expected = e4m3_codes(weight * (np.float32(1) / scales)[:, None])
    codes = quantize(torch.from_numpy(weight), torch.from_numpy(scales)[:, None], PerChannel())
    assert np.array_equal(as_bytes(codes), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (5, 9), (9, 5), (64, 96)], ids=str)
def test_absmax_scale_matches_numpy_on_every_granularity(shape, dtype):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    magnitude = np.abs(weight.float().numpy())
    rows, cols = 4, 3
    blocks = [
        [magnitude[top : top + rows, left : left + cols].max() for left in range(0, shape[1], cols)]
        for top in range(0, shape[0], rows)
    ]
    expected = {
        PerTensor(): magnitude.max(keepdims=True),
        PerChannel(): magnitude.max(1, keepdims=True),
        PerBlock(rows, cols): np.array(blocks),
    }
    for granularity, largest in expected.items():
        scale = absmax_scale(weight, granularity)
        assert scale.dtype == torch.float32
        assert np.array_equal(scale.numpy(), largest.astype(np.float32) / np.float32(448))
        assert scale.shape == granularity.grid(shape)


def test_the_largest_weight_of_a_group_gets_the_largest_code():
    weight = torch.randn(300, 40, generator=torch.Generator().manual_seed(3))
    codes = quantize(weight, absmax_scale(weight, PerChannel()), PerChannel()).float()
    assert torch.equal(codes.abs().amax(1), torch.full((300,), 448.0))


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(), PerBlock(2, 2)], ids=str)
@pytest.mark.parametrize("scale_format", ["float32", "bfloat16", "ue8m0"])
def test_a_group_of_zeros_gets_scale_one_and_codes_zero(granularity, scale_format):
    weight = torch.zeros(3, 3)
    scale = absmax_scale(weight, granularity, scale_format=scale_format)
    assert torch.equal(scale, torch.ones(granularity.grid((3, 3))))
    assert quantize(weight, scale, granularity).float().count_nonzero() == 0


@pytest.mark.parametrize("scale_format", ["float32", "bfloat16", "ue8m0"])
def test_weights_near_the_smallest_numbers_stay_finite(scale_format):
    weight = torch.tensor([[1e-38, -3e-39, 1.4e-45, 0.0]])
    scale = absmax_scale(weight, PerTensor(), scale_format=scale_format)
    assert float(scale) == SMALLEST_SCALE == float(SMALLEST_NORMAL)
    values = weight.numpy() * (np.float32(1) / SMALLEST_NORMAL)
    codes = quantize(weight, scale, PerTensor())
    assert np.array_equal(as_bytes(codes), e4m3_codes(values))
    back = dequantize(codes, scale, PerTensor())
    assert (back - weight).abs().max() <= 2.0**-126 / 16  # half a step below 1


def test_bfloat16_scales_are_rounded_as_ml_dtypes_rounds():
    random = np.random.default_rng(4)
    scales = np.exp2(random.uniform(-120, 120, 20000)).astype(np.float32)
    ties = np.array([1 + 2.0**-8, 1 + 3 * 2.0**-8], np.float32)
    scales = np.concatenate([scales, ties, sweep_of_scales()])
    ours = round_scale(torch.from_numpy(scales), "bfloat16").numpy()
    assert np.array_equal(ours, scales.astype(ml_dtypes.bfloat16).astype(np.float32))


def test_ue8m0_scales_are_the_next_power_of_two_that_the_format_holds():
    random = np.random.default_rng(5)
    powers = np.float32(2.0) ** np.arange(-126, 127)
    scales = np.exp2(random.uniform(-126, 126, 20000)).astype(np.float32)
    scales = np.concatenate(
        [scales, powers, np.nextafter(powers, np.float32(np.inf)), powers[1:] - powers[1:] / 2**24]
    )
    ours = round_scale(torch.from_numpy(scales), "ue8m0").numpy()
    held = ours.astype(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    assert np.array_equal(held, ours)
    assert (ours >= scales).all()
    assert (ours / 2 < scales).all()
    assert np.array_equal(round_scale(torch.from_numpy(powers), "ue8m0").numpy(), powers)


def test_float32_scales_change_only_below_the_smallest_normal_number():
    scales = torch.tensor([1e-45, 1e-39, 2.0**-126, 0.1, 3e38])
    assert round_scale(scales, "float32").tolist() == [2.0**-126] * 3 + scales[3:].tolist()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("scale_format", ["float32", "bfloat16", "ue8m0"])
def test_nan_and_inf_show_in_the_scale_of_their_group_only(bad, scale_format):
    weight = torch.ones(4, 4)
    weight[2, 1] = bad
    scale = absmax_scale(weight, PerChannel(), scale_format=scale_format)
    assert scale.isfinite()[:, 0].tolist() == [True, True, False, True]


def test_an_empty_weight_has_empty_codes():
    for shape in ((0, 4), (4, 0)):
        weight = torch.zeros(shape)
        for granularity in (PerTensor(), PerChannel(), PerBlock(2, 2)):
            scale = absmax_scale(weight, granularity)
            assert scale.shape == granularity.grid(shape)
            assert quantize(weight, scale, granularity).shape == shape


def test_bands_of_rows_do_not_show_in_the_result():
    weight = torch.randn(700, 800, generator=torch.Generator().manual_seed(6))  # several bands of rows
    granularity = PerBlock(96, 130)
    scale = absmax_scale(weight, granularity)
    codes = quantize(weight, scale, granularity)
    for rows in (slice(0, 96), slice(288, 384), slice(672, 700)):
        part = slice(rows.start // 96, rows.start // 96 + 1)
        assert torch.equal(scale[part], absmax_scale(weight[rows], granularity))
        assert np.array_equal(
            as_bytes(codes[rows]), as_bytes(quantize(weight[rows], scale[part], granularity))
        )
        assert torch.equal(
            dequantize(codes, scale, granularity)[rows], dequantize(codes[rows], scale[part], granularity)
        )


def test_a_scale_of_another_shape_is_refused_with_both_shapes():
    with pytest.raises(ValueError, match=r"needs a scale of shape \(2, 1\), got \(1, 1\)"):
        quantize(torch.ones(3, 2), torch.ones(1, 1), PerBlock(2, 2))
    with pytest.raises(ValueError, match=r"needs a scale of shape \(3, 1\), got \(3,\)"):
        dequantize(torch.ones(3, 2).to(torch.float8_e4m3fn), torch.ones(3), PerChannel())
