"""Several layouts in one checkpoint: which module has which, as the readers of compressed-tensors find it.

    a full name          before
    re:PATTERN           matched from the start of the name, before
    Linear               whatever is left

One layout alone is that of every module, whatever its targets say.

Source: compressed-tensors 0.20, `match_targets`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from daq_lightning.checkpoint.patterns import BoundedMatcher

if TYPE_CHECKING:
    from daq_lightning.checkpoint.layouts.layout import Layout

_CLASS = "Linear"


@dataclass(frozen=True, kw_only=True)
class Layouts:
    """The layouts of a checkpoint.

    Attributes:
        groups: Each with the modules it is for; those of one alone do not matter.
    """

    groups: tuple[tuple[Layout, tuple[str, ...]], ...]

    @property
    def every(self) -> list[Layout]:
        """Each layout once, in order."""
        return [layout for layout, _ in self.groups]

    @property
    def scheme(self) -> str:
        """The names of the schemes, as reports give them."""
        return " + ".join(dict.fromkeys(layout.scheme.name for layout in self.every))

    def of(self, *modules: str) -> Layout | None:
        """The layout of a module; None if no group is for it.

        Args:
            modules: Its full name, and others that readers may know it by.

        Raises:
            CheckpointError: Patterns that are none, or that take too long.
        """
        if len(self.groups) == 1:
            return self.groups[0][0]
        for module in modules:
            if module in self._by_name:
                return self._by_name[module]
        for pattern, layout in self._patterns:
            if any(self._matcher.matches(pattern, module) for module in modules):
                return layout
        return self._by_name.get(_CLASS)

    def quantization_config(self, ignore: Sequence[str]) -> dict[str, Any]:
        """The `quantization_config` of config.json; see `Layout.quantization_config`."""
        first = self.groups[0][0]
        if len(self.groups) == 1:
            return first.quantization_config(ignore)
        return first.config_of_groups([(layout.scheme, targets) for layout, targets in self.groups], ignore)

    @cached_property
    def _by_name(self) -> dict[str, Layout]:
        found: dict[str, Layout] = {}
        for layout, targets in self.groups:
            for target in targets:
                found.setdefault(target, layout)
        return found

    @cached_property
    def _patterns(self) -> list[tuple[str, Layout]]:
        return [(name[3:], layout) for name, layout in self._by_name.items() if name.startswith("re:")]

    @cached_property
    def _matcher(self) -> BoundedMatcher:
        return BoundedMatcher("quantization_config")
