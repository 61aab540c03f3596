"""Forward and backward of a language model over a text, one layer in memory at a time.

    forward     hidden states at the input of every layer are kept in a file
    loss        cross entropy of each next token; its gradient at the last hidden state
    backward    layer by layer: forward again, gradient at the output in, gradient at the input kept in a file

From hidden states at its input and gradients at its output a layer's sums are made whenever they are asked
for, so that those of one layer are in memory, and none wait anywhere. A layer is read three times and
computed forward three times, backward twice. All of it is float32, whatever the weights are stored as.

The loss of a text is a sum over tokens: the last token of a window predicts nothing, and windows are filled
up behind their end. Such tokens have no gradient and are left out of sums, as in training.

Legend: B texts, T tokens of each, R tokens one after another, H entries of a hidden state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from daq_lightning.checkpoint.spill import Spill
from daq_lightning.checkpoint.tensor_file import CheckpointError
from daq_lightning.model.observer import Layer, Observer, Sums
from daq_lightning.model.stack import Call
from daq_lightning.numerics.backends.heap import return_freed_memory

if TYPE_CHECKING:
    from daq_lightning.model.streamed import StreamedModel

_TOKENS = 2048
"""Of a batch, at most, unless a window alone has more."""
_TRIED = 8
_TOLERANCE = 1e-2  # of two forwards with other batches, relative


class TextBatch(NamedTuple):
    """Windows that go through a model together.

    Attributes:
        tokens: int64, shape (B, T); shorter windows are filled up behind their end, which their tokens do
            not see.
        windows: Their tokens.
    """

    tokens: Tensor
    windows: tuple[Sequence[int], ...]


def batches_of(windows: Iterable[Sequence[int]], tokens: int = _TOKENS) -> list[TextBatch]:
    """Windows in batches, in order.

    Example:
        >>> [batch.tokens.tolist() for batch in batches_of([[1, 2, 3], [4, 5], [6, 7]], tokens=6)]
        [[[1, 2, 3], [4, 5, 4]], [[6, 7]]]
    """
    parts: list[list[Sequence[int]]] = []
    for window in windows:
        longest = max(map(len, [window, *parts[-1]])) if parts else 0
        if not parts or longest * (len(parts[-1]) + 1) > tokens:
            parts.append([])
        parts[-1].append(window)
    return [TextBatch(_filled(part), tuple(part)) for part in parts]


class Walk:
    """A model's way through a text.

    Args:
        model: The model.
        layers: The weights that are observed.
        windows: Tokens in pieces of two or more, each read by itself.
        spill: Where hidden states and gradients go.
        tell: Called after each step with the share that is done.
    """

    def __init__(
        self,
        model: StreamedModel,
        layers: Iterable[Layer],
        windows: Sequence[Sequence[int]],
        spill: Spill,
        tell: Callable[[float], None] = lambda share: None,
    ) -> None:
        self._model, self._spill, self._tell = model, spill, tell
        self._batches = batches_of(windows)
        self._calls: list[list[Call]] = []  # of each batch
        self._layers: list[list[Layer]] = [[] for _ in range(model.depth)]
        for layer in layers:
            index = model.layer_of(layer.name)
            if index is not None:
                self._layers[index].append(layer)

    @property
    def parts(self) -> list[list[Layer]]:
        """The weights whose sums are made together: those of a layer."""
        return self._layers

    def go(self) -> float:
        """Walks forward and back.

        Returns:
            The mean loss of a token.

        Raises:
            NotAStackError: The model cannot be walked by layers.
            CheckpointError: Its tokens see those after them, or a tensor cannot be read.
            ValueError: Hidden states, loss or gradients are NaN or Inf.
        """
        tokens = list(self._batches[0].windows[0][:_TRIED])
        other = [*tokens[:-1], tokens[0] if tokens[-1] != tokens[0] else (tokens[0] + 1) % 2]
        trial_BTH, calls = self._enter(torch.tensor([tokens, other], dtype=torch.int64, device="cpu"))
        for index in range(self._model.depth):
            with self._model.layer(index), torch.no_grad():
                trial_BTH = self._model.stack.apply(index, trial_BTH, calls[index])
                self._forward(index)
            self._done(1 + index)
        one, two = trial_BTH[:, : len(tokens) - 1]
        if not (one - two).norm() <= _TOLERANCE * one.norm():
            raise CheckpointError(
                "The model's tokens see those after them, so it predicts no next token and cannot be "
                "calibrated: leave calibration out, or pass a causal language model."
            )
        loss = self._loss()
        for index in reversed(range(1, self._model.depth)):
            with self._model.layer(index):
                self._backward(index)
            self._done(2 * self._model.depth - index)
        return loss

    def sums(self, part: int) -> Sums:
        """What the layers of a part are given, and the gradients at what they give."""
        sums = Sums()
        if self._layers[part]:
            with self._model.layer(part):
                for number in range(len(self._batches)):
                    with Observer(self._layers[part], sums) as observer:
                        self._back(part, number)
                    if observer.error is not None:
                        raise observer.error
        return_freed_memory()
        return sums

    def _enter(self, trial_BT: Tensor) -> tuple[Tensor, list[Call]]:
        """What the first layer is given of the text, in the file, and of a few tokens more."""
        with self._model.outside():
            self._model.stack.check(trial_BT)
            for batch in self._batches:
                hidden_BTH, calls = self._model.stack.enter(batch.tokens)
                self._calls.append(calls)
                self._spill.append("hidden-0", hidden_BTH.flatten(0, 1))
            return self._model.stack.enter(trial_BT)

    def _forward(self, index: int) -> None:
        for number in range(len(self._batches)):
            hidden_BTH = self._read(f"hidden-{index}", number).to(self._model.device)
            output_BTH = self._model.stack.apply(index, hidden_BTH, self._calls[number][index])
            _check_finite(output_BTH, f"Hidden states behind layer {index}")
            self._spill.append(f"hidden-{index + 1}", output_BTH.flatten(0, 1))

    def _loss(self) -> float:
        """The gradient at what the last layer gave, in the file, and the mean loss."""
        depth, total = self._model.depth, 0.0
        with self._model.outside():
            for number, batch in enumerate(self._batches):
                hidden_BTH = self._read(f"hidden-{depth}", number)
                gradient_BTH = torch.zeros_like(hidden_BTH)
                for text, window in enumerate(batch.windows):
                    target_R = torch.tensor(window[1:], dtype=torch.int64, device="cpu")
                    loss, gradient_RH = self._model.stack.loss(hidden_BTH[text, : len(target_R)], target_R)
                    gradient_BTH[text, : len(target_R)] = gradient_RH.cpu()
                    total += loss
                _check_finite(gradient_BTH, "Gradients of the loss")
                self._spill.append(f"gradient-{depth}", gradient_BTH.flatten(0, 1))
        mean = total / sum(len(window) - 1 for batch in self._batches for window in batch.windows)
        if not math.isfinite(mean):
            raise ValueError(f"The loss of the calibration text is {mean}: {_DIVERGED}")
        return mean

    def _backward(self, index: int) -> None:
        for number in range(len(self._batches)):
            gradient_BTH = self._back(index, number)
            _check_finite(gradient_BTH, f"Gradients before layer {index}")
            self._spill.append(f"gradient-{index}", gradient_BTH.flatten(0, 1))

    def _back(self, index: int, number: int) -> Tensor:
        """The gradient at the input of a layer, from that at its output."""
        gradient_BTH = self._read(f"gradient-{index + 1}", number).to(self._model.device)
        with torch.enable_grad():
            hidden_BTH = self._read(f"hidden-{index}", number).to(self._model.device).requires_grad_()
            output_BTH = self._model.stack.apply(index, hidden_BTH, self._calls[number][index])
            (gradient,) = torch.autograd.grad(output_BTH, hidden_BTH, gradient_BTH)
        return gradient

    def _read(self, name: str, number: int) -> Tensor:
        start = sum(batch.tokens.numel() for batch in self._batches[:number])
        tokens_BT = self._batches[number].tokens
        return self._spill.read(name, start, start + tokens_BT.numel()).unflatten(0, tokens_BT.shape)

    def _done(self, steps: int) -> None:
        return_freed_memory()
        self._tell(steps / (2 * self._model.depth - 1))


_DIVERGED = (
    "the run has diverged, or values are too large for float32. Calibrate an earlier checkpoint, or leave "
    "calibration out."
)


def _filled(windows: Sequence[Sequence[int]]) -> Tensor:
    longest = max(map(len, windows))
    rows = [[*window, *[window[0]] * (longest - len(window))] for window in windows]
    return torch.tensor(rows, dtype=torch.int64, device="cpu")


def _check_finite(tensor: Tensor, what: str) -> None:
    if not bool(tensor.isfinite().all()):
        raise ValueError(f"{what} are NaN or Inf on the calibration text: {_DIVERGED}")
