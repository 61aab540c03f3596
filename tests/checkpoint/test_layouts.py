"""Packed tensors are those of compressed-tensors, bit for bit, and come back as the codes and scales that
they were made from."""

import json
import re

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8, unpack_fp4_from_uint8
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme

from daq_lightning.checkpoint.families import FAMILIES
from daq_lightning.checkpoint.layouts import make_layout, read_layout, read_layouts
from daq_lightning.checkpoint.layouts.fp4 import pack_pairs, unpack_pairs
from daq_lightning.checkpoint.layouts.int32 import pack_rows, unpack_rows
from daq_lightning.checkpoint.layouts.scales import of_exponents
from daq_lightning.checkpoint.schemes import SCHEMES, choose_scheme
from daq_lightning.checkpoint.tensor_file import CheckpointError, TensorSpec
from daq_lightning.numerics.quantize import dequantize

SHAPE = (24, 256)
NAMES = {
    "W8A8": {"weight", "weight_scale"},
    "W4A16": {"weight_packed", "weight_scale", "weight_shape"},
    "W4A16_ASYM": {"weight_packed", "weight_scale", "weight_shape", "weight_zero_point"},
    "W4A16_G32": {"weight_packed", "weight_scale", "weight_shape"},
    "W4A16_ASYM_G32": {"weight_packed", "weight_scale", "weight_shape", "weight_zero_point"},
    "NVFP4A16": {"weight_packed", "weight_scale", "weight_global_scale"},
    "MXFP4A16": {"weight_packed", "weight_scale"},
    "MXFP8": {"weight", "weight_scale"},
}
FORMATS = {
    "W8A8": "int-quantized",
    "W4A16": "pack-quantized",
    "W4A16_ASYM": "pack-quantized",
    "W4A16_G32": "pack-quantized",
    "W4A16_ASYM_G32": "pack-quantized",
    "NVFP4A16": "nvfp4-pack-quantized",
    "MXFP4A16": "mxfp4-pack-quantized",
    "MXFP8": "mxfp8-quantized",
}
EVERY = pytest.mark.parametrize("name", NAMES)


def bits(tensor):
    return tensor if tensor.dtype in (torch.int8, torch.int32, torch.int64) else tensor.view(torch.uint8)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def all_codes(scheme, shape=SHAPE, seed=0):
    """Every code of a format many times over, in a random order."""
    if scheme.format.dtype == torch.int8:
        low, high = int(scheme.format.lowest), int(scheme.format.max)
        values = torch.arange(low, high + 1, dtype=torch.int8)
    elif scheme.format.bits == 4:
        values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6]).repeat(2)
        values[8:].neg_()
        values = values.to(scheme.format.dtype)
    else:
        values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
        values = values[values.float().isfinite()]
    count = shape[0] * shape[1]
    order = torch.cat(
        [
            torch.arange(len(values)),
            torch.randint(len(values), (count - len(values),), generator=generator(seed)),
        ]
    )
    return (
        bits(values)[order[torch.randperm(count, generator=generator(seed + 1))]]
        .view(values.dtype)
        .reshape(shape)
    )


def made(name, seed=0, shape=SHAPE):
    """A layout, and codes, scales and what else there is of a weight."""
    layout = make_layout(name)
    grid = layout.granularity.grid(shape)
    scale = torch.rand(grid, generator=generator(seed)) * 2.0 ** torch.randint(
        -12, 3, grid, generator=generator(seed + 2)
    )
    extra = {}
    if layout.scale_format == "ue8m0":
        scale = 2.0 ** torch.randint(-30, 12, grid, generator=generator(seed)).float()
    elif layout.scale_format == "e4m3":
        factor = torch.tensor([2.0**9])
        scale = all_codes(SCHEMES["MXFP8"], grid, seed).float().abs().clamp(min=2.0**-9) / factor
        extra["global_scale"] = factor
    else:
        scale = (scale + 1e-6).bfloat16().float()
    if layout.scheme.asymmetric:
        extra["zero"] = torch.randint(-8, 8, grid, generator=generator(seed), dtype=torch.int8)
    return layout, all_codes(layout.scheme, shape, seed), scale, extra


def expanded(tensor, shape=SHAPE):
    return tensor.repeat_interleave(shape[0] // tensor.shape[0], 0).repeat_interleave(
        shape[1] // tensor.shape[1], 1
    )


@EVERY
def test_a_weight_comes_back_from_its_tensors(name):
    layout, codes, scale, extra = made(name)
    packed = layout.pack(codes, scale, **extra)
    stored = layout.stored(TensorSpec(name="m.weight", dtype=torch.bfloat16, shape=SHAPE))
    assert {spec.name for spec in stored.values()} == {f"m.{local}" for local in NAMES[name]}
    for part, spec in stored.items():
        assert (packed[part].dtype, tuple(packed[part].shape)) == (spec.dtype, spec.shape), part
        assert packed[part].is_contiguous()
    found = layout.unpack(packed, SHAPE)
    assert found.codes.dtype == codes.dtype
    assert torch.equal(bits(found.codes), bits(codes))
    assert torch.equal(found.scale, scale)
    assert (found.zero is None) == ("zero" not in extra)
    assert found.zero is None or torch.equal(found.zero, extra["zero"])


@EVERY
@pytest.mark.parametrize("seed", [0, 1])
def test_decompression_by_compressed_tensors_gives_code_times_scale(name, seed):
    layout, codes, scale, extra = made(name, seed)
    packed = layout.pack(codes, scale, **extra)
    names = layout.names("weight")
    compressor = BaseCompressor.get_value_from_registry(FORMATS[name])
    scheme = QuantizationConfig.model_validate(layout.quantization_config([])).config_groups["group_0"]
    state = {names[part]: tensor for part, tensor in packed.items()}
    assert set(state) == set(compressor.compression_param_names(scheme))
    read = compressor.decompress(state, scheme)["weight"].bfloat16()
    zero = expanded(extra["zero"]).float() if "zero" in extra else 0.0
    meant = ((codes.float() - zero) * expanded(scale)).bfloat16()
    assert torch.equal(read, meant)
    found = layout.unpack(packed, SHAPE)
    ours = dequantize(found.codes, found.scale, layout.granularity, torch.bfloat16, found.zero)
    assert torch.equal(ours, meant)


@EVERY
def test_the_config_says_what_the_preset_of_that_name_says(name):
    layout = make_layout(name)
    config = json.loads(json.dumps(layout.quantization_config(["lm_head"])))
    read = QuantizationConfig.model_validate(config)
    group = read.config_groups["group_0"]
    preset = preset_name_to_scheme(name.removesuffix("_G32"), ["Linear"])
    if name.endswith("_G32"):  # there is no preset of that name
        preset.weights.group_size = 32
    assert group.weights == preset.weights
    assert group.input_activations == preset.input_activations
    assert group.output_activations is None
    assert read.format == group.format == FORMATS[name]
    assert (read.quantization_status.value, read.ignore) == ("compressed", ["lm_head"])
    assert read_layout(config) == layout
    # and as pydantic writes it, which leaves fields out or null
    assert read_layout(json.loads(read.model_dump_json())) == layout


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (8, 8), (5, 40), (2, 129), (16, 1)])
def test_integers_are_packed_as_compressed_tensors_does_it(shape):
    codes = torch.randint(-8, 8, shape, generator=generator(0), dtype=torch.int8)
    assert torch.equal(pack_rows(codes), pack_to_int32(codes, 4))
    assert torch.equal(pack_rows(codes.T).T.contiguous(), pack_to_int32(codes, 4, packed_dim=0))
    assert torch.equal(unpack_rows(pack_rows(codes), shape[1]), codes)
    assert torch.equal(unpack_rows(pack_to_int32(codes, 4, packed_dim=0).T, shape[0]).T, codes)
    assert torch.equal(unpack_from_int32(pack_rows(codes), 4, shape), codes)


def test_fp4_is_packed_as_compressed_tensors_does_it():
    packed = torch.arange(256, dtype=torch.uint8).reshape(16, 16)
    values = unpack_pairs(packed)
    assert torch.equal(values.bfloat16(), unpack_fp4_from_uint8(packed, 16, 32))
    assert torch.equal(pack_pairs(values), packed)  # -0 too
    assert torch.equal(pack_fp4_to_uint8(values.bfloat16()), packed)


def test_exponents_are_those_of_e8m0():
    stored = torch.arange(256, dtype=torch.uint8)
    expected = stored.view(torch.float8_e8m0fnu).float()
    assert torch.equal(of_exponents(stored).nan_to_num(nan=-1.0), expected.nan_to_num(nan=-1.0))


@pytest.mark.parametrize(
    ("name", "scale", "extra"),
    [
        ("W4A16", 1.001, {}),
        ("W8A8", 1.001, {}),
        ("MXFP8", 0.75, {}),
        ("MXFP4A16", 3.0, {}),
        ("NVFP4A16", 1.1, {"global_scale": torch.tensor([4.0])}),
        ("NVFP4A16", 300.0, {"global_scale": torch.tensor([2.0])}),  # more than E4M3 holds
    ],
)
def test_a_scale_that_the_file_cannot_hold_is_refused(name, scale, extra):
    layout, codes, scales, _ = made(name)
    with pytest.raises(ValueError, match="scales are none that"):
        layout.pack(codes, torch.full_like(scales, scale), **extra)


def test_a_stored_shape_that_contradicts_the_codes_is_refused():
    layout, codes, scale, extra = made("W4A16")
    packed = layout.pack(codes, scale, **extra) | {"shape": torch.tensor([24, 264])}
    with pytest.raises(ValueError, match="stored shape"):
        layout.unpack(packed, SHAPE)


@pytest.mark.parametrize("name", ["MXFP8", "NVFP4A16", "MXFP4A16"])
def test_formats_whose_scales_are_fixed_take_no_other(name):
    kept = choose_scheme(name)[2]
    assert choose_scheme(name, scale_format=kept)[2] == kept
    for other in {"float32", "bfloat16", "ue8m0", "e4m3"} - {kept}:
        with pytest.raises(ValueError, match=f"stores its scales as {kept}"):
            choose_scheme(name, scale_format=other)
    with pytest.raises(ValueError, match="has no fp8 container"):
        choose_scheme(name, "fp8")


def test_every_scheme_has_a_family():
    assert list(FAMILIES) == list(SCHEMES)
    words = {"e4m3": "FP8", "int8": "INT8", "int4": "INT4", "e2m1": "FP4"}
    assert {name: words[scheme.code] for name, scheme in SCHEMES.items()} == FAMILIES


@pytest.mark.parametrize("method", [None, 3, "gptq", [], {}])
def test_a_method_that_is_none_of_the_containers_is_an_error_with_its_value(method):
    with pytest.raises(CheckpointError, match=re.escape(f"got {method!r}")):
        read_layouts({"quant_method": method})
