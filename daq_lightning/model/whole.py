"""A language model of a folder that is in memory whole, in float32: what cannot be walked by layers, and what
writes a text itself.

Sums are made part by part, each with a forward and backward of its own over the text, as a walk makes them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from daq_lightning.checkpoint.tensor_file import CheckpointError
from daq_lightning.model.from_folder import FolderModel
from daq_lightning.model.halves import Halves
from daq_lightning.model.observer import Layer, Observer, Sums
from daq_lightning.model.parts import in_parts
from daq_lightning.model.stack import check_predicts

if TYPE_CHECKING:
    from daq_lightning.checkpoint.reader import Checkpoint

_SUMS = 2 * 10**9  # bytes that are held at a time


def load_whole(files: Checkpoint, device: torch.device | str, why: str) -> Any:
    """The model of a folder with all its weights.

    Args:
        files: The folder, with or without an adapter.
        device: Where to.
        why: What it has to be whole for, for errors.

    Raises:
        CheckpointError: It needs more memory than there is, or cannot be built, or predicts no tokens.
    """
    device = torch.device(device)
    size = 4 * sum(math.prod(spec.shape) for spec in files.specs.values())
    there = _memory(device)
    if size > there:
        raise CheckpointError(
            f"{why}, {files.path} has to be in memory whole: {size / 1e9:.3g} GB in float32, of "
            f"{there / 1e9:.3g} GB on {device}. Calibrate on a larger device, or on a text (--calibrate "
            "FILE), which takes one layer at a time where a model is a stack of layers; or leave calibration "
            "out."
        )
    model: Any = FolderModel(files.path, len(files.raw)).load(files, torch.float32)
    check_predicts(model, str(files.path))
    return model.to(device).requires_grad_(False)


class WholeModel:
    """A model and a text that it reads.

    Args:
        model: In evaluation; none of its parameters requires a gradient.
        layers: The weights that are observed.
        windows: Tokens in pieces of two or more, each read by itself.
        where: What to call the model in errors.

    Attributes:
        parts: The weights whose sums are made together.
    """

    def __init__(
        self, model: Any, layers: Iterable[Layer], windows: Sequence[Sequence[int]], where: str
    ) -> None:
        self._model, self._windows, self._where = model, windows, where
        self._device = next(model.parameters()).device
        self.parts, _ = in_parts(list(layers), _SUMS)

    def go(self) -> float:
        """Reads the text once.

        Returns:
            The mean loss of a token.

        Raises:
            CheckpointError: The model is not causal.
            ValueError: Loss or gradients are NaN or Inf.
        """
        Halves(self._model, self._where).try_on(self._windows[0])
        total = 0.0
        for window in self._windows:
            loss, gradient = self._back(window)
            if not (math.isfinite(loss) and bool(gradient.isfinite().all())):
                raise ValueError(
                    f"Loss or gradients of {self._where} are NaN or Inf on the calibration text: the run has "
                    "diverged. Calibrate an earlier checkpoint, or leave calibration out."
                )
            total += loss
        return total / sum(len(window) - 1 for window in self._windows)

    def sums(self, part: int) -> Sums:
        """What the layers of a part are given, and the gradients at what they give."""
        sums = Sums()
        for window in self._windows:
            with Observer(self.parts[part], sums) as observer:
                self._back(window)
            if observer.error is not None:
                raise observer.error
        return sums

    def _back(self, window: Sequence[int]) -> tuple[float, Tensor]:
        """The loss of a window, summed over its tokens, and its gradient at their embeddings."""
        leaves: list[Tensor] = []

        def as_leaf(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            leaves.append(output.detach().requires_grad_())
            return leaves[-1]

        tokens_T = torch.tensor(window, dtype=torch.int64, device=self._device)
        hook = self._model.get_input_embeddings().register_forward_hook(as_leaf)
        try:
            with torch.enable_grad():
                logits_TV = self._model(input_ids=tokens_T[None], use_cache=False).logits[0, :-1].float()
                loss = nn.functional.cross_entropy(logits_TV, tokens_T[1:], reduction="sum")
                gradient = torch.autograd.grad(loss, leaves[0])[0]
        finally:
            hook.remove()
        return float(loss.detach()), gradient


def _memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
