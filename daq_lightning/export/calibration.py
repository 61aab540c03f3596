"""The curvature of a model that no run was observed for: from a text, or from one that it writes itself.

    FILE.txt, FILE.jsonl    the first tokens of it, in windows
    "self"                  sequences sampled from the model, the same each time

A forward and a backward of the language model's loss give every layer the sums that hooks give in a run. They
are made when the export comes to a layer.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch

from daq_lightning.checkpoint.folder import sha256_of
from daq_lightning.checkpoint.reader import Checkpoint
from daq_lightning.checkpoint.spill import Spill
from daq_lightning.checkpoint.text_file import read_documents
from daq_lightning.export.collected import AllCollected, Collected
from daq_lightning.export.progress import telling
from daq_lightning.model.architecture import Architecture
from daq_lightning.model.fusion import shared_input
from daq_lightning.model.layers import Named, linear_layers
from daq_lightning.model.observer import Layer, Sums
from daq_lightning.model.own_text import sample_text
from daq_lightning.model.stack import NotAStackError
from daq_lightning.model.streamed import StreamedModel
from daq_lightning.model.tokens import load_tokenizer, most_tokens, text_field, windows_of
from daq_lightning.model.walk import Walk
from daq_lightning.model.whole import WholeModel, load_whole
from daq_lightning.numerics.rounding.statistics import Curvature, Statistics

if TYPE_CHECKING:
    from daq_lightning.export.settings import ExportSettings
    from daq_lightning.export.source import Source

CONTEXT = 512
"""Tokens of a window, or as many as the model takes."""
WINDOWS = 32
"""Windows of a text, if all are full, and sequences that a model writes."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A text for a model.

    Attributes:
        files: The fine-tuned model.
        text: The file; None for a text that the model writes.
        sha256: Of the file.
        context: Tokens of a window, at most.
        windows: Tokens of the file, in windows.
    """

    SELF: ClassVar[str] = "self"
    files: Checkpoint
    text: Path | None
    sha256: str
    context: int
    windows: Sequence[Sequence[int]] = field(repr=False)

    @classmethod
    def of(
        cls,
        choice: str | os.PathLike[str],
        source: Source,
        settings: ExportSettings,
        sha256: str | None = None,
    ) -> Calibration:
        """Reads a text and checks that it fits the model.

        Args:
            choice: A .txt or .jsonl file, or "self".
            source: The fine-tuned model.
            settings: Of the export.
            sha256: What the file must be; None takes any.

        Raises:
            ValueError: Codes are not rounded along a curvature, the model is no folder, or the text is not
                there, of another encoding, too short, another one, or of other tokens than the model's.
        """
        if not settings.by_curvature:
            raise ValueError(
                f"calibrate={str(choice)!r} is what codes are rounded along with rounding='curvature', got "
                f"rounding={settings.rounding!r}: use both, or none."
            )
        files = source.weights
        if not (isinstance(files, Checkpoint) and files.path.is_dir()):
            raise ValueError(
                f"calibrate={str(choice)!r} needs the folder of the fine-tuned model, with its config.json: "
                "pass that as the weights, not a mapping."
            )
        context = min(CONTEXT, most_tokens(files.config) or CONTEXT)
        if str(choice) == cls.SELF:
            if sha256 is not None:
                raise ValueError("--calibrate-sha256 is that of a file, but calibrate='self' has none.")
            return cls(files=files, text=None, sha256="", context=context, windows=())
        text = Path(choice)
        documents = read_documents(text)
        found = sha256_of(text)
        if sha256 is not None and sha256 != found:
            raise ValueError(
                f"{text} has changed: its SHA-256 is {found}, expected {sha256}. Pass the text that the "
                "export was made with, or leave --calibrate-sha256 out."
            )
        tokenizer = load_tokenizer(
            files.places[::-1], "copy its tokenizer there, or let the model write a text (calibrate='self')"
        )
        windows = windows_of(documents, tokenizer, context, WINDOWS * context)
        _check_windows(windows, context, files, text)
        return cls(files=files, text=text, sha256=found, context=context, windows=windows)

    @property
    def source(self) -> str:
        """In words, for a report."""
        if self.text is None:
            return f"self: {WINDOWS} sequences"
        return f"text: {sum(map(len, self.windows)):,} tokens of {self.text.name}"

    def described(self) -> dict[str, Any]:
        """What decides about the curvature, for the manifest."""
        return {
            "text": self.SELF if self.text is None else self.text.name,
            "sha256": self.sha256,
            "windows": len(self.windows) or WINDOWS,
            "context": self.context,
        }

    @contextlib.contextmanager
    def curvature(
        self, names: Iterable[str], device: str | torch.device | None = None, progress: bool = False
    ) -> Iterator[Curvature]:
        """The curvature of some weights, until the end of the block.

        Args:
            names: Their checkpoint names.
            device: Where to compute; None is the CPU.
            progress: Whether to show how far it is.

        Raises:
            CheckpointError: The model is not a causal language model, or too large.
            ValueError: Loss, hidden states or gradients are NaN or Inf.
        """
        device, names = torch.device("cpu" if device is None else device), list(names)
        windows = self.windows or self._own_text(device, progress)
        with Spill() as spill, telling("Calibrate", progress) as tell:
            try:
                streamed = StreamedModel(self.files, device)
                model = Walk(streamed, _layers(streamed, self.files, names), windows, spill, tell)
                loss = model.go()
            except NotAStackError as error:
                _announce(
                    f"Calibrate: the model is loaded whole, not layer by layer: {error}.", logging.WARNING
                )
                whole = load_whole(self.files, device, f"Since {error}")
                named = _Named(Architecture(whole), self.files)
                model = WholeModel(whole, _layers(named, self.files, names), windows, str(self.files.path))
                loss = model.go()
            if progress:
                _announce(f"Calibrate: {self.source}, {loss:.4g} nats a token")
            yield Calibrated(model, self.source)

    def _own_text(self, device: torch.device, progress: bool) -> list[list[int]]:
        model = load_whole(self.files, device, "To write a text")
        with telling("Calibrate: the model writes", progress) as tell:
            return sample_text(model, count=WINDOWS, length=self.context, tell=tell)


class Observed(Protocol):
    """A model that has read a text."""

    @property
    def parts(self) -> list[list[Layer]]: ...

    def sums(self, part: int) -> Sums: ...


class Calibrated(Mapping[str, Statistics]):
    """The statistics of weights, made for all of a part when the first of them is asked for.

    Args:
        model: What observes them.
        source: In words.
    """

    def __init__(self, model: Observed, source: str) -> None:
        self._model, self._source = model, source
        self._part = {layer.name: number for number, part in enumerate(model.parts) for layer in part}
        self._made: tuple[int, AllCollected] | None = None

    def __getitem__(self, name: str) -> Statistics:
        part = self._part[name]
        if self._made is None or self._made[0] != part:
            self._made = None  # lets go of those of the part before
            collected = Collected.of(self._model.sums(part))
            self._made = (part, AllCollected([collected], self._source))
        return self._made[1][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._part)

    def __len__(self) -> int:
        return len(self._part)


class _Named:
    def __init__(self, architecture: Architecture, files: Checkpoint) -> None:
        self.architecture = architecture
        self.keys: Mapping[str, str] = architecture.keys_of(files)


def _layers(model: Named, files: Checkpoint, names: Iterable[str]) -> list[Layer]:
    modules = linear_layers(model, names)
    return [
        Layer(name=name, group=shared_input(name), shape=files.specs[name].shape, modules=users)
        for name, users in modules.items()
    ]


def _check_windows(windows: Sequence[Sequence[int]], context: int, files: Checkpoint, text: Path) -> None:
    tokens, largest = sum(map(len, windows)), max(map(max, windows))
    if tokens < context:
        raise ValueError(
            f"{text} has {tokens} tokens, expected {context} or more (one window; {WINDOWS} are taken if "
            "there are as many): pass more text, or let the model write it (calibrate='self')."
        )
    size = text_field(files.config, "vocab_size")
    if isinstance(size, int) and largest >= size:
        raise ValueError(
            f"The tokenizer makes token {largest} of {text}, but the model has {size} tokens: put the "
            f"model's own tokenizer into {files.path}."
        )


def _announce(text: str, level: int = logging.INFO) -> None:
    logger = logging.getLogger("daq_lightning")
    if logger.hasHandlers():
        logger.log(level, text)
    else:
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()
