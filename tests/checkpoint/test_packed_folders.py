"""Folders in every format open as the weights that compressed-tensors reads from them; damaged ones are
refused, by name."""

import json

import pytest
import safetensors.torch
import test_layouts
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig
from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

from daq_lightning import CheckpointError, load_checkpoint
from daq_lightning.numerics.formats import PerBlock, PerChannel

GROUP = {
    "W8A8": PerChannel(),
    "W4A16": PerBlock(1, 128),
    "W4A16_ASYM": PerBlock(1, 128),
    "NVFP4A16": PerBlock(1, 16),
    "MXFP4A16": PerBlock(1, 32),
    "MXFP8": PerBlock(1, 32),
}


def packed_folder(folder, name, change=lambda tensors, config: None):
    """A folder with one weight of a scheme, one kept tensor, and what `change` makes of them."""
    layout, codes, scale, extra = test_layouts.made(name)
    names = layout.names("a.weight")
    tensors = {names[part]: tensor for part, tensor in layout.pack(codes, scale, **extra).items()}
    tensors["norm.weight"] = torch.ones(8).bfloat16()
    config = {"dtype": "bfloat16", "quantization_config": layout.quantization_config([])}
    change(tensors, config["quantization_config"])
    folder.mkdir(exist_ok=True)
    safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", GROUP)
def test_a_folder_reads_as_compressed_tensors_reads_it(tmp_path, name):
    folder = packed_folder(tmp_path, name)
    checkpoint = load_checkpoint(folder)
    assert set(checkpoint) == {"a.weight", "norm.weight"}
    assert checkpoint.specs["a.weight"].shape == test_layouts.SHAPE
    assert checkpoint.granularity("a.weight") == GROUP[name]
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    read = QuantizationConfig.model_validate(config)
    state = safetensors.torch.load_file(folder / "model.safetensors")
    state = {key.removeprefix("a."): tensor for key, tensor in state.items() if key.startswith("a.")}
    compressor = BaseCompressor.get_value_from_registry(read.format)
    expected = compressor.decompress(state, read.config_groups["group_0"])["weight"].bfloat16()
    assert torch.equal(checkpoint["a.weight"], expected)
    assert checkpoint["a.weight"].dtype == checkpoint.specs["a.weight"].dtype == torch.bfloat16
    assert load_checkpoint(folder, torch.float32)["a.weight"].dtype == torch.float32


def test_formats_may_be_mixed_in_one_folder(tmp_path):
    """Several config groups, as for mixed precision: each weight is what its own tensors say."""
    tensors, groups, meant = {}, {}, {}
    for name in GROUP:
        layout, codes, scale, extra = test_layouts.made(name)
        packed = layout.pack(codes, scale, **extra)
        names = layout.names(f"{name}.weight")
        tensors |= {names[part]: tensor for part, tensor in packed.items()}
        groups[name] = layout.quantization_config([])["config_groups"]["group_0"]
        zero = test_layouts.expanded(extra["zero"]).float() if "zero" in extra else 0.0
        meant[f"{name}.weight"] = ((codes.float() - zero) * test_layouts.expanded(scale)).bfloat16()
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    config = {"quant_method": "compressed-tensors", "format": "mixed-precision", "config_groups": groups}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    checkpoint = load_checkpoint(tmp_path)
    assert set(checkpoint) == set(meant)
    for name, weight in meant.items():
        assert torch.equal(checkpoint[name], weight), name


def without(name):
    return lambda tensors, config: tensors.pop(name)


def changed(name, function):
    return lambda tensors, config: tensors.update({name: function(tensors[name]).contiguous()})


def actorder(tensors, config):
    tensors["a.weight_g_idx"] = torch.zeros(256, dtype=torch.int32)


def eight_bits(tensors, config):
    config["config_groups"]["group_0"]["weights"]["num_bits"] = 8


def asymmetric_int8(tensors, config):
    tensors["a.weight_zero_point"] = torch.zeros(24, 1, dtype=torch.int8)


DAMAGED = {
    "no scale": ("W4A16", without("a.weight_scale"), "has 0 scales"),
    "no shape": ("W4A16", without("a.weight_shape"), r"no a\.weight_shape"),
    "no codes": ("W4A16", without("a.weight_packed"), r"weight_shape"),
    "no zero points": ("W4A16_ASYM", without("a.weight_zero_point"), r"no a\.weight_zero_point"),
    "cut off": ("W4A16", changed("a.weight_packed", lambda t: t[:, :31]), "one for 124 weights"),
    "fewer rows": ("W4A16", changed("a.weight_packed", lambda t: t[:16]), "even groups"),
    "scales the wrong way": ("W4A16", changed("a.weight_scale", lambda t: t.T), "even groups"),
    "flat scales": ("NVFP4A16", changed("a.weight_scale", lambda t: t.flatten()), "even groups"),
    "zero points not packed": (
        "W4A16_ASYM",
        changed("a.weight_zero_point", lambda t: t.repeat_interleave(8, 0)),
        r"expected int32 \(3, 2\)",
    ),
    "codes in int64": ("W4A16", changed("a.weight_packed", lambda t: t.long()), "expected int32 or uint8"),
    "scales as bytes": ("W4A16", changed("a.weight_scale", lambda t: t.to(torch.uint8)), "uint8"),
    "numbers for exponents": ("MXFP4A16", changed("a.weight_scale", lambda t: t.float()), "expected uint8"),
    "no global scale": ("NVFP4A16", without("a.weight_global_scale"), "expected uint8"),
    "global scale per row": (
        "NVFP4A16",
        changed("a.weight_global_scale", lambda t: t.repeat(24)),
        r"expected float32 \(1,\)",
    ),
    "other order": ("W4A16", actorder, "actorder"),
    "eight bits": ("W4A16", eight_bits, "bits, expected 4"),
    "asymmetric int8": ("W8A8", asymmetric_int8, "zero point"),
    "int8 and no scale": ("W8A8", without("a.weight_scale"), "int8"),
    "exponents of half a group": ("MXFP8", changed("a.weight_scale", lambda t: t[:, :5]), "even groups"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_folder_is_refused_when_it_is_opened(tmp_path, case):
    name, change, message = DAMAGED[case]
    packed_folder(tmp_path, name, change)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path)


def test_a_stored_shape_that_contradicts_the_codes_is_found_when_they_are_read(tmp_path):
    packed_folder(tmp_path, "W4A16", changed("a.weight_shape", lambda t: t + 8))
    checkpoint = load_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"a\.weight is packed otherwise.*\(32, 264\)"):
        checkpoint["a.weight"]


FOREIGN = {
    "W4A16, groups of 32": ("W4A16", {"group_size": 32}),
    "W4A16, a scale a row": ("W4A16", {"group_size": None, "strategy": "channel"}),
    "W4A16, asymmetric": ("W4A16_ASYM", {}),
    "W4A16, asymmetric groups of 64": ("W4A16_ASYM", {"group_size": 64}),
    "W8A8": ("W8A8", {}),
    "NVFP4": ("NVFP4A16", {}),
    "MXFP4": ("MXFP4A16", {}),
    "MXFP8": ("MXFP8", {}),
}


@pytest.mark.parametrize("rows", [24, 20])
@pytest.mark.parametrize("case", FOREIGN)
def test_what_compressed_tensors_compresses_is_read_as_it_decompresses_it(tmp_path, case, rows):
    """Scales, zero points and global scales of its own choice, and rows that fill no int32."""
    name, changes = FOREIGN[case]
    preset = preset_name_to_scheme(name, ["Linear"])
    args = QuantizationArgs(**(preset.weights.model_dump(exclude={"observer"}) | changes))
    scheme = preset.model_copy(update={"weights": args})
    weight = torch.randn(rows, 256, generator=torch.Generator().manual_seed(0)) + 0.3
    group = args.group_size or 256
    groups = weight.unflatten(1, (-1, group))
    factor = generate_gparam(weight.amin(), weight.amax()) if args.strategy == "tensor_group" else None
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args, global_scale=factor)
    state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
    if name not in ("NVFP4A16", "MXFP4A16", "MXFP8"):
        state["weight_scale"] = scale.bfloat16()
    if factor is not None:
        state["weight_global_scale"] = factor
    form = infer_module_format(torch.nn.Linear, scheme)
    compressor = BaseCompressor.get_value_from_registry(form.value)
    compressed = compressor.compress(state, scheme)
    tensors = {f"a.{part}": tensor.contiguous() for part, tensor in compressed.items()}
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    config = QuantizationConfig(config_groups={"group_0": scheme}, format=form.value)
    config = {"dtype": "bfloat16", "quantization_config": json.loads(config.model_dump_json())}
    (tmp_path / "config.json").write_text(json.dumps(config))
    expected = compressor.decompress(compressed, scheme)["weight"].bfloat16()
    checkpoint = load_checkpoint(tmp_path)
    assert list(checkpoint) == ["a.weight"]
    assert torch.equal(checkpoint["a.weight"], expected)
    assert (expected.float() - weight).abs().mean() < 0.15
