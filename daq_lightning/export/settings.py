"""What a user chooses about an export, checked when it is made. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from daq_lightning.checkpoint.kv_cache import KVCache
from daq_lightning.checkpoint.ladders import check_ladder
from daq_lightning.checkpoint.schemes import DEFAULT_SHARD_BYTES, Container, SchemeName, choose_scheme
from daq_lightning.numerics.formats import ScaleFormat
from daq_lightning.numerics.rounding.settings import RoundingChoice
from daq_lightning.numerics.search.settings import ScaleSearch


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """The settings of an export. The command line takes its help from these words.

    Attributes:
        scheme: What codes are, and which weights share a scale. "FP8_BLOCK": FP8, a block of 128 x 128.
            "FP8_DYNAMIC": FP8, a row. "FP8A16": the same, activations stay in 16 bit. "MXFP8": FP8, 32 of a
            row, powers of two. "W8A8": int8, a row. "W4A16": int4, 128 of a row, activations in 16 bit, as in
            all that follow. "W4A16_ASYM": the same with zero points. "W4A16_G32", "W4A16_ASYM_G32": 32 of a
            row. "NVFP4A16": E2M1, 16 of a row. "MXFP4A16": E2M1, 32 of a row, powers of two. "auto":
            FP8_BLOCK if all sizes are multiples of 128, else FP8_DYNAMIC. "keep": format, scales and
            unquantized modules of the base, a quantized folder such as the one that an adapter was trained
            on.
        search: Objective and candidates of the scale search.
        rounding: How codes are chosen once scales are fixed. "nearest": each by itself. "curvature": so that
            their errors cancel where the model is sensitive to them, at plain scales unless a search other
            than the default is asked for; without data the update itself says where that is, which an adapter
            cannot. "auto": "curvature" where there is data for it, else "nearest".
        ignore: Modules to keep in high precision: full names, or `re:PATTERN` of full names.
        container: Naming of scales and config; if not given, the scheme's usual one.
        scale_format: How scales are rounded; if not given, as readers keep them. "ue8m0": powers of two, for
            servers that would round them so (vLLM with DeepGEMM).
        kv_cache: Servers are to cache keys and values in FP8 (E4M3): "fp8" with scales of 1.0,
            "fp8-calibrated" with a scale for the keys and one for the values of each layer, from the largest
            that data shows. Needs the compressed-tensors container, and takes it.
        missing_base: A weight that the base lacks, or has in another shape, is an "error", or gets a plain
            scale without a search ("absmax"), which the report says.
        max_shard_bytes: Size at which a new safetensors file begins.
        budget: What quantized weights may take, scales included: mean bits ("4.5 bits") or bytes of all
            ("2.1 GB"). The weights that lose most for their bytes go up to a larger format; scheme is the
            lowest.
        ladder: With a budget, the schemes from the lowest up; "16" keeps a weight in 16 bit. If not given,
            four bits go up to FP8A16 (FP8_DYNAMIC if there are experts), and all to 16.

    Raises:
        ValueError: An unknown choice, or choices that contradict each other.
    """

    scheme: SchemeName = "auto"
    search: ScaleSearch = field(default_factory=ScaleSearch)
    rounding: RoundingChoice = "auto"
    ignore: tuple[str, ...] = ()
    container: Container | None = None
    scale_format: ScaleFormat | None = None
    kv_cache: KVCache | None = None
    missing_base: Literal["error", "absmax"] = "error"
    max_shard_bytes: int = DEFAULT_SHARD_BYTES
    budget: str | int | None = None
    ladder: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_ladder(self.scheme, self.ladder, self.budget)
        if isinstance(self.budget, int):  # as a recipe says it
            object.__setattr__(self, "budget", f"{self.budget} B")
        if self.scheme == "keep":
            self._check_kept()
        elif self.scheme != "auto":
            choose_scheme(self.scheme, self.container, self.scale_format)
        if self.missing_base not in ("error", "absmax"):
            raise ValueError(f"Unknown missing_base {self.missing_base!r}: expected 'error' or 'absmax'.")
        if self.rounding not in get_args(RoundingChoice):
            raise ValueError(
                f"Unknown rounding {self.rounding!r}: expected 'auto', 'nearest' or 'curvature'."
            )
        if self.kv_cache not in (None, *get_args(KVCache)):
            raise ValueError(f"Unknown kv_cache {self.kv_cache!r}: expected 'fp8' or 'fp8-calibrated'.")
        if self.kv_cache is not None and self.container == "fp8":
            raise ValueError(
                f"kv_cache={self.kv_cache!r}: no reader looks for it in the fp8 container. Use "
                "container='compressed-tensors', or leave the container out."
            )
        if self.max_shard_bytes < 1:
            raise ValueError(f"max_shard_bytes must be at least 1, got {self.max_shard_bytes}.")

    def _check_kept(self) -> None:
        """Raises ValueError for choices that the base has made already."""
        chosen = {
            "container": self.container is not None,
            "scale_format": self.scale_format is not None,
            "ignore": bool(self.ignore),
            "metric or search": self.search != ScaleSearch(),
            "kv_cache": self.kv_cache is not None,
            "budget": self.budget is not None,
        }
        given = [name for name, is_given in chosen.items() if is_given]
        if given:
            raise ValueError(
                f"scheme='keep' takes format, scales, cache and unquantized modules from the base: leave "
                f"{', '.join(given)} out, or name a scheme."
            )

    @property
    def by_curvature(self) -> bool:
        """Whether codes are chosen along a curvature."""
        return self.rounding == "curvature"

    @property
    def scale_search(self) -> ScaleSearch:
        """What gives the scales: plain ones are as good once codes are chosen along a curvature."""
        plain = self.by_curvature and self.search == ScaleSearch()
        return ScaleSearch.absmax() if plain else self.search
