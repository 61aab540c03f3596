"""Tiny random models of real architectures, saved as a base and, a little perturbed, as its fine-tuned
successor."""

import json

import pytest
import torch
import transformers
from packaging.version import Version

HIDDEN, INTERMEDIATE, VOCABULARY = 128, 256, 64
TEXT = {
    "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 128, "max_position_embeddings": 64,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip

DEQUANTIZES = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"),
    reason="transformers before 5.23 keeps scales of compressed-tensors and quantizes activations",
)


def llama(**changes):
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**(TEXT | changes)))


def qwen2(**changes):
    """Biases on q, k and v."""
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**(TEXT | changes)))


def qwen3(**changes):
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**(TEXT | changes)))


def mistral(**changes):
    return transformers.MistralForCausalLM(transformers.MistralConfig(**(TEXT | changes)))


def gemma3(**changes):
    """Tied embeddings, four norms in a layer."""
    config = transformers.Gemma3TextConfig(
        **(TEXT | {"query_pre_attn_scalar": 128, "sliding_window": 32} | changes)
    )
    return transformers.Gemma3ForCausalLM(config)


def phi3(**changes):
    """Projections fused on disk: qkv_proj, gate_up_proj."""
    return transformers.Phi3ForCausalLM(
        transformers.Phi3Config(
            **(TEXT | {"num_attention_heads": 1, "original_max_position_embeddings": 64} | changes)
        )
    )


def gpt2():
    """Conv1D: transposed Linear weights."""
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=HIDDEN,
            n_layer=1,
            n_head=2,
            n_positions=64,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def qwen3_moe(**changes):
    """Experts stacked in memory, one by one on disk."""
    config = transformers.Qwen3MoeConfig(
        **(TEXT | {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 128} | changes)
    )
    return transformers.Qwen3MoeForCausalLM(config)


def mixtral(**changes):
    """Experts stacked in memory; `block_sparse_moe.experts.0.w1` on disk, `mlp` in memory."""
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**(TEXT | {"num_local_experts": 2, "num_experts_per_tok": 1} | changes))
    )


def deepseek_v3():
    """MLA: the cache holds what keys and values are made of."""
    small = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16}
    config = transformers.DeepseekV3Config(
        **TEXT, **small, v_head_dim=16, n_routed_experts=2, moe_intermediate_size=32,
        first_k_dense_replace=2, num_experts_per_tok=1, n_group=1, topk_group=1,
    )  # fmt: skip
    return transformers.DeepseekV3ForCausalLM(config)


def qwen3_next():
    """Linear attention in the first layer, full attention in the second."""
    config = transformers.Qwen3NextConfig(
        **TEXT, layer_types=["linear_attention", "full_attention"], num_experts=2,
        num_experts_per_tok=1, moe_intermediate_size=32, shared_expert_intermediate_size=32,
        linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=16, linear_value_head_dim=16,
    )  # fmt: skip
    return transformers.Qwen3NextForCausalLM(config)


def llava():
    """Vision tower, projector and a Llama; other names on disk than in memory."""
    vision = transformers.CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    config = transformers.LlavaConfig(
        vision_config=vision,
        text_config=transformers.LlamaConfig(**TEXT),
        image_token_index=5,
        image_seq_length=4,
    )
    return transformers.LlavaForConditionalGeneration(config)


def qwen2_vl():
    """Vision tower beside the language model; `visual.` and `model.` on disk, `model.visual.` and so on in
    memory."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [16, 24, 24]}
    text = TEXT | {"num_attention_heads": 1, "rope_parameters": rope}
    config = transformers.Qwen2VLConfig(
        text_config=text,
        vision_config={"depth": 1, "embed_dim": 64, "hidden_size": 128, "num_heads": 2, "mlp_ratio": 2},
    )
    return transformers.Qwen2VLForConditionalGeneration(config)


def make_pair(folder, factory, *, dtype=torch.bfloat16, size=0.01, save=None, seed=0, **changes):
    """Saves `folder/base` and `folder/post` = base + size * std * noise; with tokenizer files. Returns both
    paths."""
    torch.manual_seed(seed)
    model = factory(**changes)
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms start at 0 and 1: make every tensor count
            parameter.add_(torch.randn_like(parameter) * 0.02)
    model = model.to(dtype)
    paths = folder / "base", folder / "post"
    for path in paths:
        model.save_pretrained(path, **(save or {}))
        (path / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 64}))
        (path / "chat_template.jinja").write_text("{{ messages }}")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.02 * size / 0.01)
    return paths
