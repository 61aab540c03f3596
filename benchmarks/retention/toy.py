"""The demo's model: a byte LM of 2 M weights, base English, fine-tuned In Title Case.

The base is trained once; seeds differ in the text of the fine-tuning, its order, and the adapters.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor

from benchmarks.retention.subjects import BaseKind, Batch, Subject
from daq_lightning import ScaleSearch, export_checkpoint, load_checkpoint
from recipes.finetune_and_export import (
    BATCH,
    CONTEXT,
    in_title_case,
    new_model,
    standard_library_text,
    train,
    windows,
)

BASE_SEED = 0
LAST_STEPS = 16  # whose batches give statistics
LEARNING_RATE = {"fp8": 3e-5, "bf16": 3e-5, "lora": 6e-4}


def make_toy(folder: Path, base_kind: BaseKind, seed: int, quick: bool) -> Subject:
    """Trains what is not in the folder yet."""
    base_steps, tune_steps, style, other = (16, 12, 8, 4) if quick else (450, 75, 48, 24)
    passages = standard_library_text()
    seen, unseen = "".join(passages[400:]), "".join(passages[:400])
    base = make_base(folder, base_kind, windows(seen, base_steps * BATCH, BASE_SEED))
    data = windows(in_title_case(seen), tune_steps * BATCH, seed + 1)
    training = _batches(data, BATCH)
    post = folder / f"toy-{base_kind}-{seed}"
    if not post.exists():
        _fine_tune(load_checkpoint(base), base_kind, seed, data).save_pretrained(post)
    network = new_model().eval()
    before, after = (dict(load_checkpoint(path).items()) for path in (base, post))
    return Subject(
        model="toy",
        base_kind=base_kind,
        seed=seed,
        network=network,
        post=after,
        base=before,
        quantized=tuple(name for name in after if name.endswith("_proj.weight")),
        texts={
            "style": _batches(windows(in_title_case(unseen), style, seed=1)),
            "other": _batches(windows(unseen, other, seed=1)),
        },
        training=training[-4 if quick else -LAST_STEPS :],
        whole_run=training,
        own_text=lambda: _written_by(network, seed, 1 if quick else LAST_STEPS),
    )


def make_base(folder: Path, base_kind: BaseKind, data: Tensor) -> Path:
    """The base, trained where it is not in the folder yet; for "fp8" it is an FP8 checkpoint itself."""
    plain, fp8 = folder / "toy-base", folder / "toy-base-fp8"
    if not plain.exists():
        torch.manual_seed(BASE_SEED)
        model = new_model()
        train(model, data, 3e-3, [])
        model.bfloat16().save_pretrained(plain)
    if base_kind != "fp8":
        return plain
    if not fp8.exists():
        export_checkpoint(plain, plain, fp8, scheme="FP8_BLOCK", search=ScaleSearch.absmax())
    return fp8


def _fine_tune(base: Mapping[str, Tensor], base_kind: BaseKind, seed: int, data: Tensor) -> Any:
    """In float32; a merged adapter stays so, since bfloat16 would round much of it away."""
    torch.manual_seed(seed + 1)
    model: Any = new_model()
    model.load_state_dict({name: tensor.float() for name, tensor in base.items()})
    if base_kind != "lora":
        train(model, data, LEARNING_RATE[base_kind], [])
        return model.bfloat16()
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    train(adapted, data, LEARNING_RATE[base_kind], [])  # type: ignore[arg-type]
    return adapted.merge_and_unload()


def _batches(tokens: Tensor, size: int = 16) -> list[Batch]:
    return [Batch({"input_ids": part[:, :-1]}, part[:, 1:]) for part in tokens.split(size)]


def _written_by(network: Any, seed: int, batches: int) -> list[Batch]:
    """Text that the model writes from two line breaks on."""
    torch.manual_seed(seed)
    prompt = torch.tensor([list(b"\n\n")] * (batches * BATCH))
    tokens = network.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=CONTEXT - 1,
        do_sample=True,
        top_k=0,
        pad_token_id=0,
    )
    return _batches(tokens, BATCH)
