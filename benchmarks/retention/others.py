"""Rows of llm-compressor beside ours, where it is installed: FP8 blocks, weights only, the same toy model.

    AbsMax        its QuantizationModifier: no data
    SmoothQuant   SmoothQuantModifier, strength 0.5, before it
    AWQ           AWQModifier before it

AWQ runs where there is an accelerator. It and SmoothQuant look at the batches of the last training steps.
They move scales between layers, so that the weights no longer stand beside those of the base: figures of the
update in the weights are left out.
"""

from __future__ import annotations

import importlib.util
import tempfile
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from benchmarks.retention.in_memory import total
from benchmarks.retention.measure import figures_of_model, figures_of_weights
from benchmarks.retention.settings import Setting
from benchmarks.retention.subjects import Subject
from recipes.finetune_and_export import new_model

KINDS = ("AbsMax", "SmoothQuant", "AWQ")
"""Its modifiers."""
_INSTALLED = importlib.util.find_spec("llmcompressor") is not None


def about() -> str:
    """Whether there are such rows."""
    return f"llm-compressor is {'' if _INSTALLED else 'not '}installed: its rows are " + (
        "measured as well" if _INSTALLED else "left out"
    )


def settings(model: str, base_kind: str) -> list[Setting]:
    """Those of a subject."""
    asked = _INSTALLED and model == "toy" and base_kind != "lora"
    kinds = KINDS if torch.accelerator.is_available() else KINDS[:2]
    return [Setting(kind=kind) for kind in kinds] if asked else []


def measured(subject: Subject, setting: Setting) -> dict[str, float]:
    """All figures of a row."""
    weights = _compressed(subject, setting.kind)
    unmoved = setting.kind == "AbsMax"
    figures = figures_of_weights(total(subject, weights)) if unmoved else {}
    return figures | figures_of_model(subject, weights, setting)


def _compressed(subject: Subject, kind: str) -> dict[str, Tensor]:
    """The weights that its model computes with, by name."""
    from compressed_tensors.quantization import forward_quantize  # type: ignore[import-not-found]
    from llmcompressor import oneshot  # type: ignore[import-not-found]
    from llmcompressor.modifiers.quantization import QuantizationModifier  # type: ignore[import-not-found]
    from llmcompressor.modifiers.transform.awq import AWQModifier  # type: ignore[import-not-found]
    from llmcompressor.modifiers.transform.smoothquant import (  # type: ignore[import-not-found]
        SmoothQuantModifier,
    )

    model: Any = new_model()
    model.load_state_dict({name: tensor.float() for name, tensor in subject.post.items()})
    blocks = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]}
    recipe: list[Any] = [
        QuantizationModifier(
            config_groups={"all": {"targets": ["Linear"], "weights": blocks}}, ignore=["lm_head"]
        )
    ]
    if kind == "SmoothQuant":
        recipe.insert(0, SmoothQuantModifier(smoothing_strength=0.5))
    if kind == "AWQ":
        recipe.insert(0, AWQModifier())
    batches: Any = [
        {**batch.inputs, "attention_mask": torch.ones_like(batch.inputs["input_ids"])}
        for batch in subject.training
    ]
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)  # it asks for the folder that a model came from
        model = AutoModelForCausalLM.from_pretrained(folder).float().eval()
        oneshot(
            model=model,
            processor=PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"?": 0}, unk_token="?"))),
            dataset=None if kind == "AbsMax" else DataLoader(batches, batch_size=None),
            recipe=recipe,
            log_dir=folder,
        )
    weights = {name: tensor for name, tensor in model.state_dict().items() if name in subject.post}
    for name in subject.quantized:
        layer = model.get_submodule(name.removesuffix(".weight"))
        weights[name] = forward_quantize(layer, layer.weight, "weight", layer.quantization_scheme.weights)
    return {name: tensor.detach() for name, tensor in weights.items()}
