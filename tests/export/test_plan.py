"""What is quantized, what is kept and what the readers are told: decided from names, shapes and roles
alone."""

import pytest
import tiny_models
import torch
import transformers

from daq_lightning.checkpoint.layouts import make_layout
from daq_lightning.checkpoint.manifest import KEPT
from daq_lightning.checkpoint.tensor_file import CheckpointError, TensorSpec
from daq_lightning.export.plan import plan_export
from daq_lightning.export.settings import ExportSettings
from daq_lightning.export.source import Source
from daq_lightning.model.architecture import Architecture
from daq_lightning.numerics.formats import PerBlock, PerChannel


def plan(factory=tiny_models.llama, *, dtype=torch.bfloat16, extra=(), drop=(), arguments=None, **changes):
    """The plan of a model on the meta device: there is no weight that could be read."""
    with torch.device("meta"):
        model = factory(**changes).to(dtype)
    architecture = Architecture(model)
    tensors = model.state_dict(keep_vars=True)
    outlines = {key: tensor.detach() for key, tensor in tensors.items()}
    saved = architecture.saved(outlines, {key: id(tensor) for key, tensor in tensors.items()})
    names = {name: key for name, (key, _) in saved.items()}
    specs = [
        TensorSpec(name=name, dtype=part.dtype, shape=tuple(part.shape)) for name, (_, part) in saved.items()
    ]
    specs = [*(spec for spec in specs if spec.name not in drop), *extra]
    keys = {spec.name: names.get(spec.name, spec.name) for spec in specs}
    return plan_export(specs, architecture.outline(keys), ExportSettings(**(arguments or {})))


def names(planned):
    return {tensor.spec.name for tensor in planned.quantized}


def layer(index, *leaves):
    return {f"model.layers.{index}.{leaf}_proj.weight" for leaf in leaves}


ATTENTION = ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o")
ALL = (*ATTENTION, "mlp.gate", "mlp.up", "mlp.down")


def test_every_tensor_has_a_place_and_a_reason():
    planned = plan()
    assert names(planned) == layer(0, *ALL) | layer(1, *ALL)
    assert all(tensor.reason for tensor in planned.tensors)
    reasons = {tensor.spec.name: tensor.reason for tensor in planned.tensors}
    assert reasons["lm_head.weight"] == "kept: output head"
    assert reasons["model.embed_tokens.weight"] == "kept: not a Linear weight"
    stored = {spec.name: spec for spec in planned.stored}
    weight = "model.layers.0.mlp.up_proj.weight"
    assert (stored[weight].dtype, stored[weight].shape) == (torch.float8_e4m3fn, (256, 128))
    scale = stored[weight + "_scale_inv"]
    assert (scale.dtype, scale.shape) == (torch.float32, (2, 1))
    assert planned.ignore == ("lm_head",)
    assert planned.dtype == torch.bfloat16
    assert planned.notes == ()


def test_the_table_shows_every_tensor_the_sizes_and_the_notes():
    planned = plan(intermediate_size=192)
    lines = planned.table().splitlines()
    assert len(lines) == len(planned.tensors) + 2
    for tensor, line in zip(planned.tensors, lines, strict=False):
        assert line.startswith(tensor.spec.name + " ")
        assert "x".join(map(str, tensor.spec.shape)) in line
        assert line.endswith(tensor.reason)
        assert ("e4m3" in line) == tensor.quantize
    before = sum(tensor.spec.nbytes for tensor in planned.tensors) / 1e3
    after = sum(spec.nbytes for spec in planned.stored) / 1e3
    assert (
        f"14 of {len(planned.tensors)} tensors in FP8 (E4M3), {before:.3g} kB -> {after:.3g} kB" in lines[-2]
    )
    assert lines[-1].startswith("note: FP8_DYNAMIC instead of FP8_BLOCK")


@pytest.mark.parametrize("size", [192, 320, 100])
def test_one_odd_size_sends_the_whole_model_to_channels_with_a_note(size):
    planned = plan(intermediate_size=size)
    assert planned.layout == make_layout("FP8_DYNAMIC")
    assert {tensor.reason for tensor in planned.quantized} == {"FP8_DYNAMIC"}
    assert all(
        scale.shape == (codes.shape[0], 1) for codes, scale in (t.stored.values() for t in planned.quantized)
    )
    [note] = planned.notes
    assert "6 weights have sizes that are not multiples of 128" in note
    assert f"model.layers.0.mlp.gate_proj.weight ({size}, 128)" in note


@pytest.mark.parametrize("size", [192, 320])
@pytest.mark.parametrize("container", [None, "compressed-tensors"])
def test_blocks_that_readers_would_get_wrong_are_refused_by_name(size, container):
    with pytest.raises(CheckpointError) as caught:
        plan(intermediate_size=size, arguments={"scheme": "FP8_BLOCK", "container": container})
    message = str(caught.value)
    for name in layer(0, "mlp.gate", "mlp.up", "mlp.down") | layer(1, "mlp.gate", "mlp.up", "mlp.down"):
        assert name in message
    assert f"({size}, 128)" in message
    assert "scheme='FP8_DYNAMIC'" in message


def test_an_odd_size_that_is_ignored_does_not_count():
    planned = plan(intermediate_size=192, arguments={"ignore": [r"re:.*\.mlp\..*"]})
    assert planned.layout == make_layout("FP8_BLOCK")
    assert names(planned) == layer(0, *ATTENTION) | layer(1, *ATTENTION)
    assert set(planned.ignore) == {"lm_head"} | {
        name.removesuffix(".weight") for i in range(2) for name in layer(i, "mlp.gate", "mlp.up", "mlp.down")
    }


@pytest.mark.parametrize("pattern", ["model.layers.1.mlp.down_proj", "model.layers.1.mlp.down_proj.weight"])
def test_an_exact_name_is_ignored_and_listed(pattern):
    planned = plan(arguments={"ignore": [pattern]})
    assert names(planned) == layer(0, *ALL) | layer(1, *ALL[:-1])
    assert set(planned.ignore) == {"lm_head", "model.layers.1.mlp.down_proj"}
    reasons = {tensor.spec.name: tensor.reason for tensor in planned.tensors}
    assert reasons["model.layers.1.mlp.down_proj.weight"] == "kept: ignored by pattern"


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("down_proj", "matches no module"),  # short names never match in the readers either
        ("re:down_proj", "matches no module"),
        ("model.layers.7.mlp.down_proj", "matches no module"),
        ("model.layers.0", "matches no module"),
        ("re:(", "not a regular expression"),
        ("", "matches no module"),
    ],
)
def test_an_ignore_pattern_that_does_nothing_is_an_error(pattern, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        plan(arguments={"ignore": [pattern]})
    assert repr(pattern) in str(caught.value)


@pytest.mark.parametrize("leaf", ["self_attn.q", "self_attn.k", "self_attn.v", "mlp.gate", "mlp.up"])
def test_a_projection_that_servers_fuse_is_not_ignored_alone(leaf):
    with pytest.raises(
        CheckpointError, match="servers fuse them into one matrix: ignore all of them or none"
    ):
        plan(arguments={"ignore": [f"model.layers.0.{leaf}_proj"]})


def test_all_of_a_fused_projection_may_be_ignored():
    planned = plan(arguments={"ignore": [r"re:.*\.0\.self_attn\.[qkv]_proj"]})
    assert names(planned) == layer(0, "self_attn.o", "mlp.gate", "mlp.up", "mlp.down") | layer(1, *ALL)


def test_the_fused_experts_of_mixtral_are_known_by_their_names():
    with pytest.raises(CheckpointError, match=r"w1.weight would be quantized and .*w3.weight not"):
        plan(tiny_models.mixtral, arguments={"ignore": ["model.layers.0.block_sparse_moe.experts.0.w3"]})


def test_nothing_to_quantize_is_an_error():
    with pytest.raises(CheckpointError, match="LlamaForCausalLM has no Linear weight to quantize"):
        plan(arguments={"ignore": [r"re:.*_proj"]})
    architecture = Architecture(torch.nn.Embedding(4, 4))
    specs = [TensorSpec(name="weight", dtype=torch.float32, shape=(4, 4))]
    with pytest.raises(
        CheckpointError, match="Embedding has no Linear weight to quantize among its 1 tensors"
    ):
        plan_export(specs, architecture.outline({"weight": "weight"}), ExportSettings())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scheme": "FP8"}, "Unknown scheme 'FP8': expected one of auto, FP8_BLOCK"),
        ({"scheme": "fp8_block"}, "Unknown scheme"),
        ({"scheme": "FP8_DYNAMIC", "container": "fp8"}, "no fp8 container"),
        ({"scheme": "FP8_BLOCK", "container": "gguf"}, "Unknown container"),
        ({"scheme": "FP8_BLOCK", "scale_format": "bfloat16"}, "would be rounded on load"),
        ({"scheme": "FP8_DYNAMIC", "scale_format": "float32"}, "would be rounded on load"),
        ({"scheme": "FP8_BLOCK", "scale_format": "float8"}, "would be rounded on load"),
    ],
)
def test_what_no_reader_loads_is_not_offered(arguments, message):
    with pytest.raises(ValueError, match=message):
        plan(arguments=arguments)


def test_a_tied_head_is_listed_although_it_has_no_tensor():
    planned = plan(tiny_models.gemma3)
    assert "lm_head.weight" not in {tensor.spec.name for tensor in planned.tensors}
    assert planned.ignore == ("lm_head",)


def test_experts_are_quantized_one_by_one_and_routers_kept():
    planned = plan(tiny_models.qwen3_moe)
    roles = {tensor.spec.name: tensor.role for tensor in planned.tensors}
    assert roles["model.layers.0.mlp.experts.1.down_proj.weight"] == "expert"
    assert roles["model.layers.0.mlp.gate.weight"] == "router"
    assert len([tensor for tensor in planned.quantized if tensor.role == "expert"]) == 2 * 2 * 3
    assert all(len(tensor.spec.shape) == 2 for tensor in planned.quantized)


def test_channels_for_a_mixture_of_experts_come_with_a_warning():
    [note] = plan(tiny_models.qwen3_moe, arguments={"scheme": "FP8_DYNAMIC"}).notes
    assert "vLLM on a CPU" in note


def test_a_matrix_that_the_model_does_not_know_is_kept_and_listed():
    extra = [TensorSpec(name="model.layers.2.eh_proj.weight", dtype=torch.bfloat16, shape=(128, 256))]
    planned = plan(extra=extra)
    assert "model.layers.2.eh_proj.weight" not in names(planned)
    assert set(planned.ignore) == {"lm_head", "model.layers.2.eh_proj"}


@pytest.mark.parametrize(
    ("dtype", "kept"), [("bfloat16", "bfloat16"), ("float16", "float16"), ("float32", "bfloat16")]
)
def test_kept_tensors_have_the_dtype_of_the_model_or_bfloat16(dtype, kept):
    planned = plan(dtype=getattr(torch, dtype))
    assert planned.dtype == getattr(torch, kept)
    assert {tensor.stored[KEPT].dtype for tensor in planned.tensors if not tensor.quantize} == {planned.dtype}


def test_integer_tensors_are_kept_as_they_are():
    extra = [TensorSpec(name="model.counts", dtype=torch.int64, shape=(4, 4))]
    planned = plan(extra=extra, dtype=torch.float32)
    assert planned.stored[-1].dtype == torch.int64


@pytest.mark.parametrize(
    ("scheme", "granularity"),
    [("FP8_BLOCK", PerBlock(128, 128)), ("FP8_DYNAMIC", PerChannel()), ("FP8A16", PerChannel())],
)
def test_the_layouts_are_those_that_compressed_tensors_and_transformers_parse(scheme, granularity):
    from compressed_tensors.quantization import QuantizationConfig

    for container in ("fp8", "compressed-tensors")[scheme != "FP8_BLOCK" :]:
        layout = make_layout(scheme, container=container)
        assert layout.granularity == granularity
        config = layout.quantization_config(["lm_head"])
        if container == "fp8":
            parsed = transformers.FineGrainedFP8Config.from_dict(dict(config))
            assert tuple(parsed.weight_block_size) == (128, 128)
            assert parsed.modules_to_not_convert == ["lm_head"]
            continue
        group = QuantizationConfig.model_validate(config).config_groups["group_0"]
        assert group.weights.strategy == ("block" if scheme == "FP8_BLOCK" else "channel")
        assert group.weights.num_bits == 8
        assert (group.input_activations is None) == (scheme == "FP8A16")
        if group.input_activations is not None:
            assert group.input_activations.dynamic is True
            assert group.input_activations.strategy == ("group" if scheme == "FP8_BLOCK" else "token")


def test_a_plan_reads_no_weight(tmp_path):
    _, post = tiny_models.make_pair(tmp_path, tiny_models.llama)
    source = Source.from_folder(post)
    (post / "model.safetensors").unlink()
    assert len(plan_export(source.specs, source.outline, ExportSettings()).quantized) == 14
