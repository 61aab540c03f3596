"""The files of an FP8 folder as they are stored, and what follows from them: all that the rules look at."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

from daq_lightning.audit.rules import FP8, SUFFIXES, UnknownError
from daq_lightning.checkpoint.folder import MANIFEST, RawCheckpoint
from daq_lightning.checkpoint.layouts import Layout, listed_modules, read_layout
from daq_lightning.checkpoint.manifest import Manifest
from daq_lightning.checkpoint.patterns import BoundedMatcher
from daq_lightning.checkpoint.tensor_file import CheckpointError, TensorEntry
from daq_lightning.model.from_folder import FolderModel
from daq_lightning.model.outline import Outline, Role


class Stored:
    """The files of a folder and what follows from them."""

    def __init__(self, raw: RawCheckpoint) -> None:
        self.raw, self.folder = raw, raw.path
        self.codes = [name for name, entry in raw.entries.items() if entry.dtype in FP8]
        self.scales = {
            name: [name + suffix for suffix in SUFFIXES if name + suffix in raw.entries]
            for name in self.codes
        }
        hidden = {scale for scales in self.scales.values() for scale in scales}
        self.names = [name for name in raw.entries if name not in hidden]

    def entry(self, name: str) -> TensorEntry:
        return self.raw.entries[name]

    @cached_property
    def layout(self) -> Layout:
        try:
            return read_layout(self.raw.quantization)
        except ValueError as error:
            raise UnknownError("the layout is unknown") from error

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
        return self.outline.role(self.keys[name], len(self.entry(name).shape))

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
        patterns = () if self.layout.container == "fp8" else sorted(self.listed)
        return [name[3:] for name in patterns if name.startswith("re:")]

    @cached_property
    def _matcher(self) -> BoundedMatcher:
        return BoundedMatcher("quantization_config")

    def lists(self, module: str) -> bool:
        """Whether config.json names a module as not quantized, as the strictest reader understands it."""
        return module in self.listed or any(
            self._matcher.matches(pattern, module) for pattern in self._patterns
        )
