"""Holds an exported folder against what its readers need.

Servers believe a checkpoint: a Linear module that is neither quantized nor listed, a scale of another shape
or a stale weight file loads "successfully" and computes garbage. Every such rule is one check here, run on
the files as they are stored, one tensor at a time:

    verify_checkpoint(folder) -> problems, empty when all is well

The rules themselves are in `daq_lightning.audit.rules`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from daq_lightning.audit.rules import CHECKS, UnknownError
from daq_lightning.checkpoint.folder import INDEX, MANIFEST, RawCheckpoint
from daq_lightning.checkpoint.found import found_weights, shape_of
from daq_lightning.checkpoint.layouts import Layout, Layouts, listed_modules, read_layouts
from daq_lightning.checkpoint.layouts.parts import CODES
from daq_lightning.checkpoint.manifest import Manifest
from daq_lightning.checkpoint.patterns import BoundedMatcher
from daq_lightning.checkpoint.tensor_file import CheckpointError, TensorEntry
from daq_lightning.model.from_folder import FolderModel
from daq_lightning.model.outline import Outline, Role

_SHOWN = 5  # problems per check in the text


@dataclass(frozen=True, kw_only=True)
class Check:
    """The outcome of one check.

    Attributes:
        name: What was checked.
        problems: What is wrong, one line each; empty when all is well.
        remedy: What to do about it.
        skipped: Why it could not be run, else "".
    """

    name: str
    problems: tuple[str, ...] = ()
    remedy: str = ""
    skipped: str = ""


class Stored:
    """The files of a folder and what follows from them."""

    def __init__(self, raw: RawCheckpoint) -> None:
        self.raw, self.folder = raw, raw.path
        self.found = found_weights(raw.entries)
        self.codes = list(self.found)
        weight_of = {parts[CODES][0]: weight for weight, parts in self.found.items()}
        hidden = {name for parts in self.found.values() for names in parts.values() for name in names}
        self.names = [
            weight_of.get(name, name) for name in raw.entries if name in weight_of or name not in hidden
        ]

    def entry(self, name: str) -> TensorEntry:
        """The tensor of a name; of a quantized weight, its codes."""
        return self.raw.entries[self.found[name][CODES][0] if name in self.found else name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the weight, however its codes are packed."""
        return shape_of(name, self.entry(name)) if name in self.found else self.entry(name).shape

    @cached_property
    def layouts(self) -> Layouts:
        try:
            return read_layouts(self.raw.quantization)
        except ValueError as error:
            raise UnknownError("the layout is unknown") from error

    def layout(self, name: str) -> Layout | None:
        """Of a quantized weight, by the config groups; None if none is for it."""
        modules = (name, self.keys[name]) if len(self.layouts.groups) > 1 else (name,)
        return self.layouts.of(*(module.removesuffix(".weight") for module in modules))

    @cached_property
    def outline(self) -> Outline:
        try:
            return FolderModel(self.folder, len(self.raw)).outline(self.names)
        except CheckpointError as error:
            raise UnknownError("the architecture is unknown") from error

    @property
    def keys(self) -> Mapping[str, str]:
        return self.outline.keys

    def role(self, name: str) -> Role:
        return self.outline.role(self.keys[name], len(self.shape(name)))

    @cached_property
    def manifest(self) -> Manifest | None:
        """None where the folder is not an export by this package."""
        return Manifest.load(self.folder) if (self.folder / MANIFEST).is_file() else None

    @cached_property
    def listed(self) -> frozenset[str]:
        """What config.json names as not quantized."""
        return frozenset(listed_modules(self.raw.quantization))

    @cached_property
    def _patterns(self) -> list[str]:
        patterns = () if self.layouts.every[0].container == "fp8" else sorted(self.listed)
        return [name[3:] for name in patterns if name.startswith("re:")]

    @cached_property
    def _matcher(self) -> BoundedMatcher:
        return BoundedMatcher("quantization_config")

    def lists(self, module: str) -> bool:
        """Whether config.json names a module as not quantized, as the strictest reader understands it."""
        return module in self.listed or any(
            self._matcher.matches(pattern, module) for pattern in self._patterns
        )


def verify_checkpoint(folder: str | os.PathLike[str]) -> list[str]:
    """The problems that readers of a quantized folder would have; see `run_checks`."""
    return [f"{check.name}: {problem}" for check in run_checks(folder) for problem in check.problems]


def run_checks(folder: str | os.PathLike[str]) -> list[Check]:
    """Runs every check on a quantized checkpoint folder. Reads all tensors once, one at a time.

    Raises:
        CheckpointError: Not a folder, no safetensors in it, or nothing in it is quantized.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a folder: expected an exported checkpoint.")
    if not any(path.glob("*.safetensors")) and not (path / INDEX).exists():
        raise CheckpointError(f"{path} has no safetensors files: expected an exported checkpoint.")
    try:
        stored = Stored(RawCheckpoint(path))
    except CheckpointError as error:
        return [Check(name="files", problems=(str(error),), remedy="Copy the folder again, or export again.")]
    if not stored.codes and not stored.raw.quantization:
        raise CheckpointError(
            f"{path} holds no quantized weights: make a quantized checkpoint with `daq-lightning quantize`."
        )
    results = []
    for name, remedy, check in CHECKS:
        try:
            results.append(Check(name=name, problems=tuple(check(stored)), remedy=remedy))
        except UnknownError as error:
            results.append(Check(name=name, skipped=str(error)))
        except CheckpointError as error:  # of a file that belongs to the checkpoint
            results.append(Check(name=name, problems=(str(error).rstrip("."),), remedy=remedy))
    return results


def checklist(checks: Sequence[Check]) -> str:
    """The outcome as text: a line per check, what is wrong below it, and what to do."""
    lines = []
    for check in checks:
        state = "skipped" if check.skipped else "FAILED" if check.problems else "ok"
        lines.append(f"{state:8}{check.name}" + (f" ({check.skipped})" if check.skipped else ""))
        shown = check.problems[:_SHOWN]
        lines += [f"          {problem}" for problem in shown]
        if len(check.problems) > len(shown):
            lines.append(f"          and {len(check.problems) - len(shown)} more")
        if check.problems:
            lines.append(f"          -> {check.remedy}")
    failed = sum(bool(check.problems) for check in checks)
    return "\n".join([*lines, f"{failed} of {len(checks)} checks failed" if failed else "all is well"])
