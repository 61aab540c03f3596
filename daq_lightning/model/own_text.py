"""Text that a language model writes itself, at temperature 1, the same each time.

Each sequence begins with the token that begins a text, or with a random one where the model names none, and
goes on behind an end of text as texts do that are packed for training. Random numbers are drawn on the CPU,
one for each token, and looked up in the sum of probabilities in float64.

Legend: B sequences, T tokens of each, V entries of the vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from daq_lightning.model.attention import CACHES


@torch.no_grad()
def sample_text(
    model: Any,
    *,
    count: int,
    length: int,
    seed: int = 0,
    tell: Callable[[float], None] = lambda share: None,
) -> list[list[int]]:
    """Sequences of tokens, sampled from a model.

    Args:
        model: A causal language model of transformers, in evaluation.
        count: How many.
        length: Tokens of each, 2 or more.
        seed: Of the random numbers; the global state is left alone.
        tell: Called after each token with the share that is done.

    Raises:
        ValueError: Logits are NaN or Inf.
    """
    generator = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    vocabulary = model.get_input_embeddings().weight.shape[0]
    begin = model.config.get_text_config().bos_token_id
    if isinstance(begin, int) and 0 <= begin < vocabulary:
        tokens_BT = torch.full((count, 1), begin, dtype=torch.int64, device="cpu")
    else:
        tokens_BT = torch.randint(
            vocabulary, (count, 1), generator=generator, dtype=torch.int64, device="cpu"
        )
    parameters = inspect.signature(model.forward).parameters
    name = next((name for name in CACHES if name in parameters), CACHES[0])  # a wrapper passes it on
    cache = None
    for position in range(1, length):
        given = tokens_BT if cache is None else tokens_BT[:, -1:]
        output = model(input_ids=given.to(device), use_cache=True, **{name: cache})
        cache = getattr(output, name, None)
        sampled_B1 = _sampled(output.logits[:, -1].cpu(), generator)
        tokens_BT = torch.cat([tokens_BT, sampled_B1], 1)
        tell((position + 1) / length)
    return tokens_BT.tolist()


def _sampled(logits_BV: Tensor, generator: torch.Generator) -> Tensor:
    if not bool(logits_BV.isfinite().all()):
        raise ValueError(
            "The model predicts NaN or Inf, so it can write no text: the run has diverged. Calibrate an "
            "earlier checkpoint, or leave calibration out."
        )
    sums_BV = logits_BV.double().softmax(-1).cumsum(-1)
    drawn_B1 = torch.rand(len(sums_BV), 1, generator=generator, dtype=torch.float64, device="cpu")
    found_B1 = torch.searchsorted(sums_BV, drawn_B1 * sums_BV[:, -1:], right=True)
    return found_B1.clamp_(max=sums_BV.shape[1] - 1)
