"""Judges the model that an export makes a server serve, on a text, beside the model it was made from.

    base, post, export, one after the other:   tokens -> body -> hidden states, on disk
    all three heads together, a piece of tokens at a time:   hidden states -> logits -> sums

So one body is in memory at a time, and logits of a piece, never of the text. The export is built from the
very bytes that were written, dequantized as its readers do it, ``dtype(code * scale)``. Its quantized modules
see their input quantized as they do on a server, and its attentions their keys and values if it has scales
for them, unless weights alone are asked for. Base and post run in the dtype of post, the export in its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from daq_lightning.audit.served_model import ServedModel
from daq_lightning.checkpoint.folder import config_dtype
from daq_lightning.checkpoint.layouts import read_layouts
from daq_lightning.checkpoint.reader import Checkpoint
from daq_lightning.checkpoint.spill import Spill
from daq_lightning.checkpoint.tensor_file import CheckpointError
from daq_lightning.model.tokens import text_field
from daq_lightning.report.model_figures import model_metrics
from daq_lightning.report.recovery import figures_of_recovery, sum_of_losses

if TYPE_CHECKING:
    from torchmetrics import MetricCollection


_PIECE = 2**24
"""Logits of one model that are in memory at a time: 32 MiB in 16 bit."""
_LOGITS = {"base": "base_logits", "post": "reference_logits", "export": "logits"}
"""Model -> the name that the metrics have for its logits."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What was found.

    Attributes:
        figures: The figures of `model_metrics` and of `recovery`, by name, over all tokens; NaN where nothing
            counted.
        tokens: Tokens that were predicted.
        changed: Of these, tokens whose top training changed; None without a base.
        windows: Pieces of text that were read by themselves.
        scheme: Of the export.
        quantized_activations: Whether the export's modules saw their input quantized.
        kv_cache: Whether its keys and values were cached in FP8.
        dtype: What the export was dequantized to and ran in.
        reference_dtype: What post and base ran in.
        unseen: Modules with quantized weights whose input stayed as it was, though servers quantize it.
    """

    figures: Mapping[str, float]
    tokens: int
    changed: int | None
    windows: int
    scheme: str
    quantized_activations: bool
    kv_cache: bool
    dtype: str
    reference_dtype: str
    unseen: tuple[str, ...]


def evaluate(
    models: Mapping[str, Checkpoint],
    windows: Sequence[Sequence[int]],
    *,
    device: torch.device | str = "cpu",
    batch_size: int = 8,
    weights_only: bool = False,
    progress: bool = False,
) -> Evaluation:
    """Compares an export with what it was made from, on tokens.

    Args:
        models: The folders "export", "post" and, if update retention is wanted, "base".
        windows: Tokens in pieces of two or more, each read by itself; see `daq_lightning.model.tokens`.
        device: Where to compute.
        batch_size: Windows that go through a body at a time.
        weights_only: Leave activations in 16 bit, as no server of a scheme with quantized activations does.
        progress: Whether to show a progress bar.

    Raises:
        CheckpointError: A model cannot be built, or does not work as a causal language model.
        ValueError: Vocabularies of different sizes, or tokens that are in none.
    """
    _check_vocabularies(models, windows)
    layouts = read_layouts(models["export"].raw.quantization)
    quantized = any(one.scheme.quantized_activations for one in layouts.every) and not weights_only
    dtype, reference_dtype = _dtype_of(models["export"]), _dtype_of(models["post"])
    roles = [role for role in _LOGITS if role in models]
    count = sum(len(window) - 1 for window in windows)
    heads: dict[str, ServedModel] = {}
    with Spill() as spill, _Bar(progress, count * (len(roles) + 1)) as bar:
        for role in roles:
            bar.says(f"read by {role}")
            if role == "export":
                served = None if weights_only else layouts
                model = ServedModel(models[role], dtype, device, served)
            else:
                model = ServedModel(models[role], reference_dtype, device)
            model.try_on(windows[0])
            for rows_RH in _hidden_states(model, windows, batch_size):
                spill.append(role, rows_RH)
                bar.adds(len(rows_RH))
            model.drop_body()
            heads[role] = model
        metrics, base_loss = _compare(heads, spill, windows, bar)
    figures = {name: float(value) for name, value in metrics.compute().items()}
    figures |= figures_of_recovery(figures, base_loss)
    return Evaluation(
        figures=figures,
        tokens=count,
        changed=round(figures["top_changed"] * count) if "base" in models else None,
        windows=len(windows),
        scheme=layouts.scheme,
        quantized_activations=quantized,
        kv_cache=bool(heads["export"].cache),
        dtype=str(dtype).removeprefix("torch."),
        reference_dtype=str(reference_dtype).removeprefix("torch."),
        unseen=heads["export"].unseen,
    )


def _hidden_states(model: ServedModel, windows: Sequence[Sequence[int]], batch_size: int) -> Iterator[Tensor]:
    """The hidden states of all tokens but the last of each window, in order.

    Shorter windows are filled up behind their end, which their tokens do not see.
    """
    for start in range(0, len(windows), batch_size):
        batch = windows[start : start + batch_size]
        longest = max(map(len, batch))
        filled = [[*window[:-1], *[window[0]] * (longest - len(window))] for window in batch]
        hidden_BTH = model.hidden(torch.tensor(filled, dtype=torch.int64, device="cpu"))
        for window, hidden_TH in zip(batch, hidden_BTH, strict=True):
            yield hidden_TH[: len(window) - 1]


def _compare(
    heads: Mapping[str, ServedModel], spill: Spill, windows: Sequence[Sequence[int]], bar: _Bar
) -> tuple[MetricCollection, float | None]:
    """The metrics of all tokens that are predicted, a piece at a time, and the base's mean loss of them."""
    sizes = {role: head.vocabulary for role, head in heads.items()}
    if len(set(sizes.values())) > 1:
        raise _different_vocabularies(sizes)
    targets = [token for window in windows for token in window[1:]]
    target_R = torch.tensor(targets, dtype=torch.int64, device="cpu")
    metrics, step = model_metrics(base="base" in heads, sync=False), max(1, _PIECE // sizes["export"])
    bar.says("compared")
    losses = 0.0
    for start in range(0, len(target_R), step):
        stop = min(start + step, len(target_R))
        logits = {_LOGITS[role]: head.logits(spill.read(role, start, stop)) for role, head in heads.items()}
        if logits["logits"].device.type == "mps":  # which has no float64
            logits = {name: part.cpu() for name, part in logits.items()}
        metrics.to(logits["logits"].device)
        metrics.update(**logits, target=target_R[start:stop])
        losses += sum_of_losses(logits.get("base_logits"), target_R[start:stop])
        bar.adds(stop - start)
    return metrics, losses / len(target_R) if "base" in heads else None


def _check_vocabularies(models: Mapping[str, Checkpoint], windows: Sequence[Sequence[int]]) -> None:
    """What config.json says is checked before anything is computed."""
    named = {role: text_field(files.config, "vocab_size") for role, files in models.items()}
    sizes = {role: size for role, size in named.items() if isinstance(size, int)}
    if len(set(sizes.values())) > 1:
        raise _different_vocabularies(sizes)
    largest = max(map(max, windows))
    if sizes and largest >= min(sizes.values()):
        raise ValueError(
            f"The tokenizer makes token {largest}, but the models have {min(sizes.values())} tokens: pass "
            "the folder of their own tokenizer as --tokenizer."
        )


def _different_vocabularies(sizes: Mapping[str, int]) -> ValueError:
    listed = ", ".join(f"{role} {size}" for role, size in sizes.items())
    return ValueError(
        f"The models have vocabularies of different sizes ({listed}), so their predictions cannot be "
        "compared. Leave --base out, or pass one whose embeddings were resized like those of the fine-tuned "
        "model."
    )


def _dtype_of(files: Checkpoint) -> torch.dtype:
    """What a model is loaded in: the dtype of its config.json, else of its first floating tensor."""
    named = config_dtype(files.config)
    floating = (spec.dtype for spec in files.specs.values() if spec.dtype.is_floating_point)
    found = named or next(floating, None)
    if found is None:
        raise CheckpointError(f"{files.path} has no tensor of floating point numbers.")
    return found


class _Bar:
    """Tokens that are done, on a terminal."""

    def __init__(self, shown: bool, total: int) -> None:
        self._bar: Any = None
        if shown:
            from tqdm import tqdm

            self._bar = tqdm(total=total, unit=" tokens", desc="Evaluate", dynamic_ncols=True)

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def says(self, what: str) -> None:
        if self._bar is not None:
            self._bar.set_description(f"Evaluate: {what}")

    def adds(self, tokens: int) -> None:
        if self._bar is not None:
            self._bar.update(tokens)
