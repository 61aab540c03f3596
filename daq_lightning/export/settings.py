"""What a user chooses about an export, checked when it is made. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from daq_lightning.checkpoint.schemes import DEFAULT_SHARD_BYTES, Container, SchemeName, choose_scheme
from daq_lightning.numerics.formats import ScaleFormat
from daq_lightning.numerics.search.settings import ScaleSearch


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """The settings of an export.

    Attributes:
        scheme: "FP8_BLOCK", "FP8_DYNAMIC", "FP8A16", or "auto": blocks where all sizes allow it, else channels.
        search: Objective and candidates of the scale search.
        ignore: Modules to keep as they are: full names, or `re:` patterns of full names.
        container: "fp8" or "compressed-tensors"; None takes the scheme's usual one.
        scale_format: None, or "ue8m0" for scales that are powers of two.
        missing_base: What to do with a weight that the base lacks or has in another shape: "error", or "absmax" to
            quantize it without a search and say so in the report.
        max_shard_bytes: Size at which a new safetensors file begins.

    Raises:
        ValueError: An unknown choice, or choices that contradict each other.
    """

    scheme: SchemeName = "auto"
    search: ScaleSearch = field(default_factory=ScaleSearch)
    ignore: tuple[str, ...] = ()
    container: Container | None = None
    scale_format: ScaleFormat | None = None
    missing_base: Literal["error", "absmax"] = "error"
    max_shard_bytes: int = DEFAULT_SHARD_BYTES

    def __post_init__(self) -> None:
        if self.scheme != "auto":
            choose_scheme(self.scheme, self.container, self.scale_format)
        if self.missing_base not in ("error", "absmax"):
            raise ValueError(f"Unknown missing_base {self.missing_base!r}: expected 'error' or 'absmax'.")
        if self.max_shard_bytes < 1:
            raise ValueError(f"max_shard_bytes must be at least 1, got {self.max_shard_bytes}.")
