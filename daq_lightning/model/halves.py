"""A language model in two halves: the body makes hidden states of tokens, the head makes logits of these.

    tokens  -> body ->  hidden states  -> head ->  logits

Hidden states are hundreds of times smaller than logits, so they can be kept while the body gives way to that
of the next model. The head is no list of known layers: it is the model's own forward, with a stand-in for its
body that returns what the body once returned. Scaled and capped logits are so those of the family's own code.

What that takes is tried, not assumed: on a few tokens, both ways must give the same, and a token must not see
those after it.

Legend: B texts, T tokens of each, R tokens one after another, H entries of a hidden state, V of the
vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from daq_lightning.checkpoint.tensor_file import CheckpointError

_TRIED = 8  # tokens
_TOLERANCE = 1e-2  # of the two ways, relative: equal but for the kernels that a size chooses


class Halves:
    """Body and head of a causal language model of transformers.

    Args:
        model: The model, with weights, on its device.
        where: What to call it in errors, such as its folder.

    Raises:
        CheckpointError: It has no body.
    """

    def __init__(self, model: nn.Module, where: str) -> None:
        self.model, self._where = model, where
        self._name: str = getattr(model, "base_model_prefix", "")
        body = getattr(model, self._name, None) if self._name else None
        if not isinstance(body, nn.Module) or body is model:
            raise self._unfit("it has no body that makes hidden states")
        self._body: nn.Module | None = body
        self._device = next(model.parameters()).device
        self._kind: Any = None

    @torch.no_grad()
    def hidden(self, tokens_BT: Tensor) -> Tensor:
        """The hidden states (B, T, H) of tokens, each from those before it in its text."""
        assert self._body is not None, "the body is gone"
        output = self._body(input_ids=tokens_BT.to(self._device), use_cache=False)
        self._kind = type(output)
        return output.last_hidden_state

    @torch.no_grad()
    def logits(self, hidden_RH: Tensor) -> Tensor:
        """The logits (R, V) of hidden states."""
        hidden = hidden_RH.to(self._device)[None]
        stand_in = _StandIn(self._kind(last_hidden_state=hidden))
        setattr(self.model, self._name, stand_in)
        try:
            tokens = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=self._device)
            return self.model(input_ids=tokens, use_cache=False).logits[0]
        finally:
            stand_in.output = None
            if self._body is not None:
                setattr(self.model, self._name, self._body)

    def drop_body(self) -> None:
        """Lets go of the body and its memory; `logits` still works."""
        setattr(self.model, self._name, _StandIn(None))
        self._body = None

    @torch.no_grad()
    def try_on(self, tokens: Sequence[int]) -> int:
        """Tries both halves against the whole, on the first of some tokens (two or more).

        Returns:
            Entries of the logits.

        Raises:
            CheckpointError: The model is not causal, or its logits are not made of the body's hidden states
                alone.
        """
        tokens = list(tokens[:_TRIED])
        size = self.model.get_input_embeddings().weight.shape[0]  # type: ignore[operator, union-attr]
        other = [*tokens[:-1], (tokens[-1] + 1) % size]
        both = [torch.tensor([ids], dtype=torch.int64, device=self._device) for ids in (tokens, other)]
        try:
            hidden, hidden_of_other = (self.hidden(ids)[0] for ids in both)
            again = self.logits(hidden)
            whole = self.model(input_ids=both[0], use_cache=False).logits[0]
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a foreign class trips over
            raise self._unfit(f"{type(error).__name__}: {error}") from error
        if again.shape != whole.shape or not _close(again, whole):
            raise self._unfit("its logits are made of more than the hidden states of its body")
        if not _close(hidden[:-1], hidden_of_other[:-1]):
            raise self._unfit("its tokens see those after them, so it predicts no next token")
        return whole.shape[-1]

    def _unfit(self, why: str) -> CheckpointError:
        return CheckpointError(
            f"{self._where}: {type(self.model).__name__} cannot be evaluated as a causal language model: "
            f"{why}."
        )


class _StandIn(nn.Module):
    """Answers as the body did."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def forward(self, *_: Any, **__: Any) -> Any:
        return self.output


def _close(one: Tensor, two: Tensor) -> bool:
    one, two = one.float(), two.float()
    return bool((one - two).norm() <= _TOLERANCE * two.norm())
