"""What is quantized: a fine-tuned model beside its base, with the text to judge it on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

BaseKind: TypeAlias = Literal["fp8", "fp8-small", "bf16", "lora"]
"""What a fine-tuning began with: a base that is itself FP8 (minilm also at a third of the learning rate), one
in bfloat16, and one in bfloat16 with a LoRA adapter that is merged afterwards."""


class Batch(NamedTuple):
    """Inputs of a model by name, and its targets: (...), -100 where a place counts nowhere."""

    inputs: Mapping[str, Tensor]
    targets: Tensor


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A fine-tuned model.

    Attributes:
        model: "toy" or "minilm".
        base_kind: What it was trained from.
        seed: Of weights, data order and adapters.
        network: Gives `logits` for inputs; its weights are whatever was put in last.
        post: All weights by name, after training: bfloat16, merged adapters float32.
        base: The same before training.
        quantized: The names of those that are quantized.
        texts: Held out, by name: "style" (what training taught) and "other".
        training: The batches of the last steps.
        whole_run: Those of all steps.
        own_text: Writes batches by sampling from the model; None where it cannot.
    """

    model: str
    base_kind: BaseKind
    seed: int
    network: nn.Module
    post: Mapping[str, Tensor]
    base: Mapping[str, Tensor]
    quantized: tuple[str, ...]
    texts: Mapping[str, list[Batch]]
    training: list[Batch]
    whole_run: list[Batch]
    own_text: Callable[[], list[Batch]] | None = None
    _logits: dict[str, Tensor] = field(default_factory=dict)

    def put(self, weights: Mapping[str, Tensor]) -> None:
        """Puts weights into the network: those that are quantized by name, the others as training left
        them."""
        self.network.load_state_dict(
            {name: tensor.float() for name, tensor in {**self.post, **weights}.items()}
        )

    def logits(self, text: str) -> Tensor:
        """(T, V) of the weights that were put in last, on one of the texts."""
        with torch.no_grad():
            parts = [self.network(**batch.inputs).logits for batch in self.texts[text]]
        return torch.cat([part.flatten(0, -2) for part in parts])

    def known_logits(self, of: Literal["post", "base"], text: str) -> Tensor:
        """Those of the unquantized model, or of its base; computed once."""
        key = f"{of} {text}"
        if key not in self._logits:
            self.put(self.post if of == "post" else self.base)
            self._logits[key] = self.logits(text)
        return self._logits[key]

    def targets(self, text: str) -> Tensor:
        """(T,)."""
        return torch.cat([batch.targets.flatten() for batch in self.texts[text]])
