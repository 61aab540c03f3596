"""Tiny random models of the families of decoders that transformers ships and vLLM serves.

    model_of("DeepseekV3ForCausalLM") -> a model of two layers, with sizes that blocks of 128 fit if the
                                         family's own do

A configuration is its class's own default with small numbers in the places of large ones (`SMALL`), and with
what one family wants beside (`FAMILIES`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import transformers

SMALL: Mapping[str, Any] = {
    "vocab_size": 64, "hidden_size": 128, "intermediate_size": 128, "ffn_hidden_size": 128, "ffn_dim": 128,
    "num_hidden_layers": 2, "num_layers": 2, "n_layer": 2, "n_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "num_kv_heads": 2, "n_head": 2, "head_dim": 64,
    "max_position_embeddings": 64, "n_positions": 64, "model_max_length": 64, "sliding_window": 8,
    "n_embd": 128, "word_embed_proj_dim": 128,
    "num_experts": 2, "num_local_experts": 2, "n_routed_experts": 2, "moe_num_experts": 2,
    "num_experts_per_tok": 1, "num_experts_per_token": 1, "moe_topk": 1, "moe_k": 1, "top_k_experts": 1,
    "n_shared_experts": 1, "num_shared_experts": 1, "moe_num_shared_experts": 1,
    "moe_intermediate_size": 128, "expert_ffn_hidden_size": 128, "shared_expert_intermediate_size": 128,
    "shared_intermediate_size": 128, "moe_shared_expert_intermediate_size": 128,
    "first_k_dense_replace": 1, "num_dense_layers": 1, "moe_layer_start_index": 1, "moe_layer_end_index": 1,
    "n_group": 1, "topk_group": 1, "num_expert_group": 1,
    "q_lora_rank": 128, "kv_lora_rank": 128, "o_lora_rank": 128, "o_groups": 1,
    "qk_nope_head_dim": 64, "qk_rope_head_dim": 128, "v_head_dim": 64, "qk_head_dim": 192,
    "index_n_heads": 2, "index_head_dim": 128, "index_topk": 8,
    "linear_num_key_heads": 128, "linear_num_value_heads": 128, "linear_key_head_dim": 2,
    "linear_value_head_dim": 2, "linear_num_heads": 2, "linear_head_dim": 64,
    "mamba_n_heads": 128, "mamba_d_head": 2, "mamba_n_groups": 1, "mamba_d_state": 64, "mamba_expand": 2,
    "mamba_d_ssm": 256, "mamba_chunk_size": 8,
    "depth": 1, "num_heads": 2, "embed_dim": 128, "image_size": 16, "patch_size": 8, "out_hidden_size": 128,
    "fullatt_block_indexes": [0], "deepstack_visual_indexes": [0], "num_position_embeddings": 16,
    "projector_input_dim": 128, "projector_output_dim": 128, "vision_output_dim": 128,
    "projector_hidden_size": 128, "alignment_intermediate_size": 128, "position_embedding_size": 16,
    "mamba_num_heads": 128, "mamba_head_dim": 2, "ssm_state_size": 64, "n_groups": 1,
    "image_token_id": 3, "image_token_index": 3, "video_token_id": 4, "video_token_index": 4,
    "vision_start_token_id": 5, "vision_end_token_id": 6, "audio_token_id": 7, "boi_token_id": 5,
    "eoi_token_id": 6, "boa_token_id": 5, "eoa_token_id": 6,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def config_of(kind: type, **changes: Any) -> Any:
    """The small configuration of a class, and of the towers in it.

    Args:
        kind: A configuration class.
        changes: Other values; of a part, a mapping under its name (`text_config`).
    """
    default = kind()
    known = default.to_dict()
    small = {name: value for name, value in SMALL.items() if name in known}
    for name in getattr(default, "sub_configs", ()):
        part = getattr(default, name, None)
        if part is not None or name in changes:
            inner = default.sub_configs[name] if part is None else type(part)
            small[name] = config_of(inner, **changes.pop(name, {}))
    return kind(**(small | changes))


def _names(text: str) -> list[str]:
    return text.split()


_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_MROPE = {"rope_parameters": _ROPE | {"mrope_section": [8, 12, 12]}}
_MROPE_HALF = {"rope_parameters": _ROPE | {"mrope_section": [4, 6, 6], "partial_rotary_factor": 0.5}}
_SLIDING = {"layer_types": ["sliding_attention", "full_attention"]}
_HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
CHANGES: Mapping[str, Mapping[str, Any]] = {
    "AXK1ForCausalLM": {"head_dim": 128},
    "DeepseekV3ForCausalLM": {"head_dim": 128},
    "LongcatFlashForCausalLM": {"head_dim": 128, "moe_topk": 2, "zero_expert_num": 2},
    "Mistral4ForCausalLM": {
        "head_dim": 128, "rope_parameters": _ROPE | {
            "llama_4_scaling_beta": 0.1, "max_position_embeddings": 64,
            "original_max_position_embeddings": 64,
        },
    },
    "DeepseekV4ForCausalLM": {"head_dim": 128, "qk_rope_head_dim": 64, "partial_rotary_factor": 0.5},
    "Gemma3nForCausalLM": {
        "num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"],
        "hidden_size_per_layer_input": 128, "vocab_size_per_layer_input": 64, "laurel_rank": 128,
        "activation_sparsity_pattern": [0.0, 0.0], "intermediate_size": [128, 128],
    },
    "Gemma4ForCausalLM": {
        "hidden_size_per_layer_input": 128, "vocab_size_per_layer_input": 64, "enable_moe_block": True,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "Qwen3NextForCausalLM": _HYBRID,
    "Qwen4ExpForCausalLM": _HYBRID | {
        "indexer_n_heads": 1, "indexer_kv_heads": 1, "indexer_head_dim": 64, "indexer_budget": 8,
        "indexer_compress_ratio": 4,
    },
    "Qwen3_5ForCausalLM": _HYBRID,
    "Qwen3_5MoeForCausalLM": _HYBRID,
    "MiMoV2FlashForCausalLM": _SLIDING | {"num_attention_heads": 4},
    "KimiLinearForCausalLM": _HYBRID | {"linear_head_dim": 128},
    "GraniteMoeHybridForCausalLM": {"layer_types": ["mamba", "attention"]},
    "BambaForCausalLM": {"attn_layer_indices": [1]},
    "JambaForCausalLM": {
        "attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_offset": 1, "mamba_dt_rank": 8,
    },
    "Lfm2ForCausalLM": {"layer_types": ["conv", "full_attention"]},
    "Lfm2MoeForCausalLM": {"layer_types": ["conv", "full_attention"]},
    "Mamba2ForCausalLM": {"num_heads": 128, "head_dim": 2, "state_size": 64},
    "Zamba2ForCausalLM": {"layers_block_type": ["mamba", "hybrid"]},
    "Qwen2VLForConditionalGeneration": {"text_config": _MROPE},
    "Qwen2_5_VLForConditionalGeneration": {"text_config": _MROPE},
    "Glm4vMoeForConditionalGeneration": {"text_config": _MROPE_HALF},
    "Qwen3_5ForConditionalGeneration": {"text_config": _HYBRID},
    "Qwen3_5MoeForConditionalGeneration": {"text_config": _HYBRID},
    "Gemma4ForConditionalGeneration": {
        "text_config": {
            "hidden_size_per_layer_input": 128, "vocab_size_per_layer_input": 64,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        "vision_config": {"position_embedding_size": 16},
    },
}  # fmt: skip

OWN = _names("""
    AfmoeForCausalLM ApertusForCausalLM AXK1ForCausalLM BloomForCausalLM CohereForCausalLM Cohere2ForCausalLM
    Cohere2MoeForCausalLM DeepseekV2ForCausalLM DeepseekV3ForCausalLM DeepseekV32ForCausalLM
    DeepseekV4ForCausalLM Ernie4_5ForCausalLM Ernie4_5_MoeForCausalLM Exaone4ForCausalLM ExaoneMoeForCausalLM
    FalconForCausalLM FalconH1ForCausalLM FalconMambaForCausalLM FlintForCausalLM GemmaForCausalLM
    Gemma2ForCausalLM Gemma3ForCausalLM Gemma3nForCausalLM Gemma4ForCausalLM Glm4ForCausalLM
    Glm4MoeForCausalLM Glm4MoeLiteForCausalLM GlmMoeDsaForCausalLM GptOssForCausalLM GPT2LMHeadModel
    GPTJForCausalLM GraniteForCausalLM GraniteMoeForCausalLM GraniteMoeHybridForCausalLM
    GraniteMoeSharedForCausalLM GraniteMoeSWAForCausalLM GraniteSWAForCausalLM HyperCLOVAXForCausalLM
    HYV3ForCausalLM HYV4ForCausalLM InklingForCausalLM JambaForCausalLM KimiLinearForCausalLM
    LagunaForCausalLM Lfm2ForCausalLM Lfm2MoeForCausalLM LlamaForCausalLM Llama4ForCausalLM
    LongcatFlashForCausalLM MambaForCausalLM Mamba2ForCausalLM MiMoV2FlashForCausalLM MiniCPM3ForCausalLM
    MiniMaxM2ForCausalLM Ministral3ForCausalLM MistralForCausalLM MixtralForCausalLM NemotronForCausalLM
    NemotronHForCausalLM OlmoHybridForCausalLM OlmoeForCausalLM OPTForCausalLM Phi3ForCausalLM
    Qwen2ForCausalLM Qwen2MoeForCausalLM Qwen3ForCausalLM Qwen3MoeForCausalLM Qwen3NextForCausalLM
    Qwen3_5ForCausalLM Qwen3_5MoeForCausalLM Qwen4ExpForCausalLM StableLmForCausalLM Zamba2ForCausalLM
    Cohere2VisionForConditionalGeneration Exaone4_5_ForConditionalGeneration Gemma3ForConditionalGeneration
    Gemma4ForConditionalGeneration Glm4vForConditionalGeneration Glm4vMoeForConditionalGeneration
    Idefics3ForConditionalGeneration InternVLForConditionalGeneration Lfm2VlForConditionalGeneration
    Llama4ForConditionalGeneration LlavaForConditionalGeneration LlavaNextForConditionalGeneration
    LlavaOnevisionForConditionalGeneration Mistral3ForConditionalGeneration PaliGemmaForConditionalGeneration
    Qwen2VLForConditionalGeneration Qwen2_5_VLForConditionalGeneration Qwen3VLForConditionalGeneration
    Qwen3VLMoeForConditionalGeneration Qwen3_5ForConditionalGeneration Qwen3_5MoeForConditionalGeneration
    SmolVLMForConditionalGeneration
""")
"""Classes that vLLM 0.33 has code of its own for, by its `registry.py`."""
BACKEND = _names("""
    ArceeForCausalLM CwmForCausalLM FlexOlmoForCausalLM GlmForCausalLM GPTBigCodeForCausalLM
    GPTNeoXForCausalLM HunYuanDenseV1ForCausalLM HunYuanMoEV1ForCausalLM Jais2ForCausalLM
    Kolibri1ForCausalLM MellumForCausalLM OlmoForCausalLM Olmo2ForCausalLM Olmo3ForCausalLM PhiForCausalLM
    SeedOssForCausalLM SmolLM3ForCausalLM Starcoder2ForCausalLM VaultGemmaForCausalLM
""")
"""Those that it lists for its transformers backend."""
OTHERS = {
    "BambaForCausalLM": "up to 0.23", "Dots1ForCausalLM": "up to 0.23", "MiniMaxForCausalLM": "up to 0.23",
    "Mistral4ForCausalLM": "not listed", "PhimoeForCausalLM": "not listed",
}  # fmt: skip
"""Those that it lists no more, or not under the name that transformers writes."""

_LAYER = {
    f"{part}.weight": shape
    for part, shape in {
        "input_layernorm": (128,), "post_attention_layernorm": (128,), "self_attn.o_proj": (128, 128),
        "mlp.gate_proj": (128, 128), "mlp.up_proj": (128, 128), "mlp.down_proj": (128, 128),
    }.items()
}  # fmt: skip
_DRAFT = {"enorm.weight": (128,), "hnorm.weight": (128,), "eh_proj.weight": (128, 256)}
MTP: Mapping[str, tuple[str, Mapping[str, tuple[int, ...]]]] = {
    "DeepseekV3ForCausalLM, MTP layer": ("model.layers.61.", _LAYER | _DRAFT),
    "Glm4MoeForCausalLM, MTP layer": ("model.layers.46.", _LAYER | _DRAFT),
    "Qwen3NextForCausalLM, MTP layer": (
        "mtp.", {"fc.weight": (128, 256)} | {f"layers.0.{name}": shape for name, shape in _LAYER.items()}
    ),
    "Qwen3_5ForCausalLM, MTP layer": (
        "mtp.", {"fc.weight": (128, 256)} | {f"layers.0.{name}": shape for name, shape in _LAYER.items()}
    ),
}  # fmt: skip
"""A family with layers for speculation, which transformers does not build: prefix, and tensors."""

FAMILIES = sorted([*OWN, *BACKEND, *OTHERS, *MTP], key=str.lower)


def class_of(family: str) -> Any:
    """The class of transformers that a family is named by."""
    return getattr(transformers, family.partition(",")[0])


def served_by(family: str) -> str:
    """What vLLM 0.33 has for a family."""
    name = family.partition(",")[0]
    if name in OTHERS:
        return OTHERS[name]
    return "own code" if name in OWN else "backend"


def model_of(family: str) -> Any:
    """A tiny random model of a family, always the same."""
    kind = class_of(family)
    torch.manual_seed(0)
    return kind(config_of(kind.config_class, **CHANGES.get(kind.__name__, {})))


def beside(family: str) -> dict[str, torch.Tensor]:
    """Tensors that the files of a family hold beside those of its class."""
    prefix, shapes = MTP.get(family, ("", {}))
    generator = torch.Generator().manual_seed(1)
    return {
        prefix + name: torch.randn(shape, generator=generator).mul(0.02).bfloat16()
        for name, shape in shapes.items()
    }
