"""Linear layers of which a reader makes no quantized layer stay in full precision; readers are told so."""

from __future__ import annotations

import re

import pytest
import tiny_models
import torch
import transformers
from torch import nn
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from benchmarks.families.models import class_of, config_of, model_of
from daq_lightning import CheckpointError
from daq_lightning.export.plan import ExportPlan, plan_export
from daq_lightning.export.settings import ExportSettings
from daq_lightning.export.source import Source
from daq_lightning.model.architecture import Architecture
from daq_lightning.model.fusion import fused_groups, joined


def outline_of(family: str):
    with torch.device("meta"):
        return Architecture(model_of(family)).outline({})


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """The plan of a family's tiny model in a scheme; its folder is made once."""
    sources: dict[str, Source] = {}

    def plan(family: str, **settings) -> ExportPlan:
        if family not in sources:
            folder = tmp_path_factory.mktemp("model")
            model_of(family).to(torch.bfloat16).save_pretrained(folder)
            sources[family] = Source.from_folder(folder)
        source = sources[family]
        return plan_export(source.specs, source.outline, ExportSettings(**settings))

    return plan


@pytest.mark.parametrize(
    "family", ["DeepseekV32ForCausalLM", "DeepseekV4ForCausalLM", "HYV4ForCausalLM", "T5"]
)
def test_what_transformers_keeps_in_float32_is_not_quantized(family):
    """Its own FP8 quantizer and its own plan of dtypes are the oracle."""
    with torch.device("meta"):
        if family == "T5":
            sizes = {
                "d_model": 128,
                "d_kv": 64,
                "d_ff": 128,
                "num_layers": 1,
                "num_heads": 2,
                "vocab_size": 64,
            }
            model = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes))
        else:
            model = model_of(family)
    outline = Architecture(model).outline({})
    left_out = HfQuantizer.get_modules_to_not_convert(model, [], model._keep_in_fp32_modules)
    strict = model._get_dtype_plan(torch.bfloat16)
    seen = 0
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        in_float32 = not should_convert_module(name, left_out) or any(
            f".{key}." in f".{name}." for key in strict
        )
        seen += in_float32 and name != "lm_head"
        assert not (in_float32 and outline.role(f"{name}.weight", 2) in ("linear", "upcast")), name
    assert seen


@pytest.mark.parametrize("family", ["MambaForCausalLM", "FalconMambaForCausalLM"])
def test_mamba_1_is_refused_by_the_reader_that_takes_it_in_16_bit(planned, family):
    with pytest.raises(CheckpointError, match=rf"{family} has no Linear weight.*vLLM reads in 16 bit"):
        planned(family)


def test_mixers_of_jamba_stay_and_all_else_is_quantized(planned):
    plan = planned("JambaForCausalLM", scheme="FP8_DYNAMIC")
    reasons = {tensor.spec.name: tensor.reason for tensor in plan.tensors if ".mamba." in tensor.spec.name}
    assert {reason for name, reason in reasons.items() if "_proj.weight" in name} == {
        "kept: vLLM reads it in 16 bit"
    }
    assert any(".self_attn." in tensor.spec.name for tensor in plan.quantized)
    assert {"model.layers.0.mamba.in_proj", "model.layers.0.mamba.x_proj"} <= set(plan.ignore)


@pytest.mark.parametrize(("scheme", "quantized"), [("FP8_BLOCK", True), ("MXFP8", True), ("W4A16", False)])
def test_the_key_of_an_indexer_is_quantized_only_as_vllm_turns_it_back(planned, scheme, quantized):
    plan = planned("DeepseekV32ForCausalLM", scheme=scheme)
    of_indexer = {
        tensor.spec.name.rpartition("indexer.")[2]: tensor
        for tensor in plan.tensors
        if "indexer" in tensor.key
    }
    assert of_indexer["wk.weight"].quantize == quantized
    assert of_indexer["wq_b.weight"].quantize
    assert not of_indexer["weights_proj.weight"].quantize
    assert ("model.layers.0.self_attn.indexer.wk" in plan.ignore) == (not quantized)


def test_a_linear_layer_in_a_router_is_a_router():
    outline = outline_of("Gemma4ForCausalLM")
    assert outline.role("model.layers.0.router.proj.weight", 2) == "router"
    assert outline.role("model.layers.0.per_layer_projection.weight", 2) == "linear"


@pytest.mark.parametrize("family", ["GraniteMoeForCausalLM", "GptOssForCausalLM", "Llama4ForCausalLM"])
def test_experts_in_one_tensor_are_listed_as_vllm_asks_for_them(planned, family):
    """vLLM calls them `...experts`, and with compressed-tensors `...experts.0.PROJECTION`."""
    from compressed_tensors.utils.match import match_name

    block, channel = planned(family, scheme="FP8_BLOCK"), planned(family, scheme="FP8_DYNAMIC")
    (stack,) = {re.sub(r"layers\.\d+", "layers.0", name) for name in block.ignore if name.endswith("experts")}
    assert {stack, stack.replace("layers.0", "layers.1")} <= set(block.ignore)
    assert not any(name.startswith("re:") for name in block.ignore)
    for projection in ("gate_proj", "w1", "down_proj"):
        assert any(match_name(f"{stack}.0.{projection}", target) for target in channel.ignore)
        assert any(match_name(f"language_model.{stack}.0.{projection}", target) for target in channel.ignore)
    quantized = [tensor.key.removesuffix(".weight") for tensor in channel.quantized]
    assert not any(match_name(name, target) for name in quantized for target in channel.ignore)
    assert any("in one tensor" in note and "stay in 16 bit" in note for note in channel.notes)


@pytest.mark.parametrize(
    ("family", "one", "others"),
    [
        ("Qwen3_5ForCausalLM", "in_proj_z", ["in_proj_qkv"]),
        ("Qwen3_5ForCausalLM", "in_proj_a", ["in_proj_b"]),
        ("OlmoHybridForCausalLM", "g_proj", ["q_proj", "k_proj", "v_proj"]),
        ("KimiLinearForCausalLM", "f_a_proj", ["q_proj", "k_proj", "v_proj", "b_proj"]),
    ],
)
def test_what_vllm_joins_is_quantized_together(planned, family, one, others):
    with pytest.raises(
        CheckpointError, match=rf"{one}.*not, but servers fuse them|{others[0]}.*servers fuse them"
    ):
        planned(family, scheme="FP8_DYNAMIC", ignore=(rf"re:.*\.{one}",))
    plan = planned(family, scheme="FP8_DYNAMIC")
    groups = [
        group
        for group in fused_groups([tensor.spec.name for tensor in plan.quantized])
        if one in " ".join(group)
    ]
    assert {name.split(".")[-2] for name in groups[0]} == {one, *others}


def test_the_same_names_elsewhere_are_not_joined():
    assert joined("model.layers.0.mlp.g_proj") == ("g_proj",)
    assert "g_proj" not in joined("model.layers.0.self_attn.q_proj")


def test_experts_go_up_to_a_format_that_vllm_has_for_them(planned):
    rungs = [
        layout.scheme.name for layout in planned("MixtralForCausalLM", scheme="W4A16", budget="9 bits").rungs
    ]
    assert rungs == ["W4A16", "W4A16_G32", "FP8_DYNAMIC"]
    dense = [
        layout.scheme.name for layout in planned("LlamaForCausalLM", scheme="W4A16", budget="9 bits").rungs
    ]
    assert dense == ["W4A16", "W4A16_G32", "FP8A16"]
    (note,) = planned("MixtralForCausalLM", scheme="FP8A16").notes
    assert "vLLM refuses it" in note


def test_readers_that_do_not_load_a_class_are_named(planned):
    (note,) = [note for note in planned("Llama4ForCausalLM", scheme="W4A16").notes if "Llama 4" in note]
    assert note.startswith("transformers 5.23 does not load Llama 4")
    assert not any("does not load" in note for note in planned("Llama4ForCausalLM", scheme="FP8_BLOCK").notes)


def test_small_configurations_are_those_of_the_class():
    config = config_of(class_of("Qwen3VLForConditionalGeneration").config_class)
    assert config.text_config.num_hidden_layers == 2
    assert config.vision_config.depth == 1
    assert tiny_models.TEXT["vocab_size"] == config.text_config.vocab_size
