"""A language model as a plain stack of decoder layers, each of which is called by itself.

    tokens -> enter -> hidden states -> layer 0 -> ... -> layer L - 1 -> loss

No family's code is known here. What a layer is given beside hidden states, its mask and positions, is what
the model's own forward gives to a stand-in; the logits are those of its own forward whose last stand-in
returns the hidden states. That a model is such a stack is tried: each layer must be given what the one before
returned, with all else the same whatever that was.

Legend: B texts, T tokens of each, R tokens one after another, H entries of a hidden state, V of the
vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from daq_lightning.checkpoint.tensor_file import CheckpointError

_PIECE = 2**24
"""Logits that are in memory at a time: 64 MiB in float32, and as much again for each step of their loss."""


class NotAStackError(ValueError):
    """A model that cannot be called layer by layer; the message ends a sentence that says so."""


class Call(NamedTuple):
    """What a layer is given beside hidden states."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    by_name: bool  # whether hidden states come as a keyword


class Stack:
    """The layers of a model, and what is before and behind them.

    Args:
        model: A causal language model of transformers in evaluation.
        layers: Its layers, in order.
        device: Where it computes.
    """

    def __init__(self, model: nn.Module, layers: Sequence[nn.Module], device: torch.device) -> None:
        self._model: Any = model
        self._layers, self._device = layers, device
        self._in_tuple = False

    @torch.no_grad()
    def enter(self, tokens_BT: Tensor) -> tuple[Tensor, list[Call]]:
        """What the first layer is given, shape (B, T, H), and what each is given beside."""
        given: list[Tensor] = []
        calls: list[Call] = []

        def act(index: int, hidden: Tensor, call: Call) -> Tensor:
            given.append(hidden)
            calls.append(call)
            return hidden

        self._body_of(tokens_BT, act)
        return given[0], calls

    def apply(self, index: int, hidden_BTH: Tensor, call: Call) -> Tensor:
        """What a layer makes of hidden states."""
        layer = self._layers[index]
        if call.by_name:
            output = layer(*call.args, hidden_states=hidden_BTH, **call.kwargs)
        else:
            output = layer(hidden_BTH, *call.args, **call.kwargs)
        return output[0] if isinstance(output, tuple) else output

    def loss(self, hidden_RH: Tensor, target_R: Tensor) -> tuple[float, Tensor]:
        """The sum over tokens of their cross entropy, and its gradient (R, H).

        Args:
            hidden_RH: What the last layer made of tokens.
            target_R: The token behind each, int64.
        """
        gradients, total = [], 0.0
        step = max(1, _PIECE // self._model.get_output_embeddings().weight.shape[0])
        for hidden, target in zip(hidden_RH.split(step), target_R.split(step), strict=True):
            with torch.enable_grad():
                leaf = hidden.to(self._device).detach().requires_grad_()
                logits_RV = self._logits(leaf).float()
                loss = nn.functional.cross_entropy(logits_RV, target.to(self._device), reduction="sum")
                gradients += torch.autograd.grad(loss, leaf)
            total += float(loss.detach())
        return total, torch.cat(gradients)

    def check(self, tokens_BT: Tensor) -> None:
        """Tries on a few tokens whether the layers are a stack.

        Raises:
            NotAStackError: They are not, and why.
        """
        reason = ""
        for self._in_tuple in (False, True):
            try:
                self._try_on(tokens_BT)
                return
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # whatever a foreign class trips over when it gets no tensor
                reason = reason or str(error)
        raise NotAStackError(reason)

    @torch.no_grad()
    def _try_on(self, tokens_BT: Tensor) -> None:
        one, two = (_Probe(self._device, seed) for seed in (0, 1))
        made = [self._body_of(tokens_BT, probe.act).last_hidden_state for probe in (one, two)]
        if len(one.calls) != len(self._layers):
            raise NotAStackError(f"its forward calls {len(one.calls)} of {len(self._layers)} layers")
        if torch.equal(*made):
            raise NotAStackError("its head is not given what its last layer returns")
        if not all(map(_are_equal, one.calls, two.calls)):
            raise NotAStackError("what its layers are given besides depends on hidden states")
        hidden_RH = one.returned[-1][0]
        if not torch.equal(self._logits(hidden_RH, token=0), self._logits(hidden_RH, token=1)):
            raise NotAStackError("its logits are made of more than hidden states")

    def _logits(self, hidden_RH: Tensor, token: int = 0) -> Tensor:
        """The logits (R, V) of what the last layer made, whatever the tokens were."""

        def act(index: int, hidden: Tensor, call: Call) -> Tensor:
            return hidden_RH[None] if index == len(self._layers) - 1 else hidden

        tokens = torch.full((1, len(hidden_RH)), token, dtype=torch.int64, device=self._device)
        with self._standing_in(act):
            return self._model(input_ids=tokens, use_cache=False).logits[0]

    def _body_of(self, tokens_BT: Tensor, act: Callable[[int, Tensor, Call], Tensor]) -> Any:
        body = getattr(self._model, self._model.base_model_prefix)
        with self._standing_in(act):
            return body(input_ids=tokens_BT.to(self._device), use_cache=False)

    @contextlib.contextmanager
    def _standing_in(self, act: Callable[[int, Tensor, Call], Tensor]) -> Iterator[None]:
        """Layers that do something else than they do."""

        def stand_in(index: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                by_name = "hidden_states" in kwargs
                hidden = kwargs.pop("hidden_states") if by_name else args[0]
                result = act(index, hidden, Call(args if by_name else args[1:], kwargs, by_name))
                return (result,) if self._in_tuple else result

            return forward

        for index, layer in enumerate(self._layers):
            vars(layer)["forward"] = stand_in(index)
        try:
            yield
        finally:
            for layer in self._layers:
                del vars(layer)["forward"]


def check_predicts(model: Any, where: str) -> None:
    """Raises CheckpointError for a model without a head for tokens, or with an encoder before it."""
    if model.config.is_encoder_decoder or model.get_output_embeddings() is None:
        raise CheckpointError(
            f"{where}: {type(model).__name__} has no head that predicts the next token from those "
            "before it, which calibration needs: leave it out, or pass a causal language model."
        )


class _Probe:
    """Layers that return random numbers, and look at what they are given."""

    def __init__(self, device: torch.device, seed: int) -> None:
        self._device, self._generator = device, torch.Generator().manual_seed(seed)
        self.returned: list[Tensor] = []
        self.calls: list[Call] = []

    def act(self, index: int, hidden: Tensor, call: Call) -> Tensor:
        if index != len(self.returned) or (index and hidden is not self.returned[-1]):
            raise NotAStackError(f"layer {index} is not given what the layer before it returned")
        self.calls.append(call)
        random = torch.randn(hidden.shape, generator=self._generator, dtype=torch.float32, device="cpu")
        self.returned.append(random.to(self._device))
        return self.returned[-1]


def _are_equal(one: Call, two: Call) -> bool:
    leaves = [tree_leaves([call.args, dict(call.kwargs)]) for call in (one, two)]
    return len(leaves[0]) == len(leaves[1]) and all(
        torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a is b or a == b
        for a, b in zip(*leaves, strict=True)
    )
