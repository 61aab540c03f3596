"""The schemes by the field's names, and which container holds which. Data only; imports no torch.

| scheme | codes | weight scale | activations | containers, the usual one first |
| --- | --- | --- | --- | --- |
| FP8_BLOCK | E4M3 | one per 128 x 128 block | FP8, dynamic per token and 128 | fp8, compressed-tensors |
| FP8_DYNAMIC | E4M3 | one per channel | FP8, dynamic per token | compressed-tensors |
| FP8A16 | E4M3 | one per channel | 16 bit | compressed-tensors |
| MXFP8 | E4M3 | power of two per 32 of a row | MXFP8, dynamic | compressed-tensors |
| W8A8 | int8 | one per channel | int8, dynamic per token | compressed-tensors |
| W4A16 | int4 | one per 128 of a row | 16 bit | compressed-tensors |
| W4A16_ASYM | int4 | one, and a zero point, per 128 of a row | 16 bit | compressed-tensors |
| W4A16_G32, W4A16_ASYM_G32 | int4 | the same per 32 of a row | 16 bit | compressed-tensors |
| NVFP4A16 | E2M1 | E4M3 per 16 of a row, one power of two a weight | 16 bit | compressed-tensors |
| MXFP4A16 | E2M1 | power of two per 32 of a row | 16 bit | compressed-tensors |

Per-tensor scales are not offered: vLLM requantizes fused projections to the largest one and undoes the
search.

Source of the names and of what they mean: compressed-tensors 0.20, `quant_scheme`. It has no name for int4 in
groups of 32, which llm-compressor and vLLM know as W4A16 with `group_size: 32`: "_G32" is ours, so that a
ladder, a report and a list of fallbacks can say it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias, get_args

from daq_lightning.numerics.formats import Format, Granularity, PerBlock, PerChannel, ScaleFormat
from daq_lightning.numerics.formats.fp4 import FP4_E2M1
from daq_lightning.numerics.formats.fp8 import FP8_E4M3
from daq_lightning.numerics.formats.int4 import INT4, INT4_ASYM
from daq_lightning.numerics.formats.int8 import INT8

SchemeName: TypeAlias = Literal[
    "auto",
    "FP8_BLOCK",
    "FP8_DYNAMIC",
    "FP8A16",
    "MXFP8",
    "W8A8",
    "W4A16",
    "W4A16_ASYM",
    "W4A16_G32",
    "W4A16_ASYM_G32",
    "NVFP4A16",
    "MXFP4A16",
    "keep",
]
"""A scheme; "auto": FP8_BLOCK where all sizes allow it, else FP8_DYNAMIC; or "keep": that of a quantized
base."""
Container: TypeAlias = Literal["fp8", "compressed-tensors"]


@dataclass(frozen=True, kw_only=True)
class Activations:
    """How servers quantize the input of a quantized Linear: as it comes, by scales that they find.

    Attributes:
        format: Of the codes.
        group: Features of a token that share a scale; None for all of them.
        scale_format: "float32", or "ue8m0" for powers of two.
    """

    format: Format
    group: int | None = None
    scale_format: ScaleFormat = "float32"


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """How the weights of a model are quantized, whatever the container.

    Attributes:
        name: The field's name.
        format: Of the codes.
        title: The format in words.
        code: The format in one word, for tables.
        granularity: Which elements share a scale.
        activations: What servers make of activations; None leaves them in 16 bit.
        containers: Those that readers load, the usual one first.
        scale_format: What readers keep of a scale; None where that depends on the container.
    """

    name: str
    format: Format
    title: str
    code: str
    granularity: Granularity
    activations: Activations | None = None
    containers: tuple[Container, ...] = ("compressed-tensors",)
    scale_format: ScaleFormat | None = None

    @property
    def asymmetric(self) -> bool:
        """Whether a group has a zero point too."""
        return self.format.zero_point

    @property
    def quantized_activations(self) -> bool:
        """Whether servers run the matrix product in the format as well."""
        return self.activations is not None

    @property
    def group(self) -> int | None:
        """How many neighbours in a row share a scale; None where whole rows do, or blocks of several."""
        granularity = self.granularity
        if not isinstance(granularity, PerBlock) or granularity.rows != 1:
            return None
        return granularity.cols

    def in_groups(self, size: int | None) -> Scheme:
        """The same with other groups, of integers of four bits, whose groups have any size; None for its own.

        Raises:
            ValueError: A scheme whose groups have one size.
        """
        if size in (None, self.group):
            return self
        if self.format not in (INT4, INT4_ASYM) or size < 1:
            raise ValueError(f"{self.name} has groups of {self.group} weights, got {size}.")
        return replace(self, granularity=PerBlock(1, size))


_FP8, _INT4, _FP4 = "FP8 (E4M3)", "4-bit integers", "FP4 (E2M1)"

SCHEMES: Mapping[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        Scheme(
            name="FP8_BLOCK",
            format=FP8_E4M3,
            title=_FP8,
            code="e4m3",
            granularity=PerBlock(128, 128),
            activations=Activations(format=FP8_E4M3, group=128),
            containers=("fp8", "compressed-tensors"),
        ),
        Scheme(
            name="FP8_DYNAMIC",
            format=FP8_E4M3,
            title=_FP8,
            code="e4m3",
            granularity=PerChannel(),
            activations=Activations(format=FP8_E4M3),
        ),
        Scheme(name="FP8A16", format=FP8_E4M3, title=_FP8, code="e4m3", granularity=PerChannel()),
        Scheme(
            name="MXFP8",
            format=FP8_E4M3,
            title="MXFP8 (E4M3)",
            code="e4m3",
            granularity=PerBlock(1, 32),
            activations=Activations(format=FP8_E4M3, group=32, scale_format="ue8m0"),
            scale_format="ue8m0",
        ),
        Scheme(
            name="W8A8",
            format=INT8,
            title="8-bit integers",
            code="int8",
            granularity=PerChannel(),
            activations=Activations(format=INT8),
        ),
        Scheme(name="W4A16", format=INT4, title=_INT4, code="int4", granularity=PerBlock(1, 128)),
        Scheme(
            name="W4A16_ASYM",
            format=INT4_ASYM,
            title=_INT4,
            code="int4",
            granularity=PerBlock(1, 128),
        ),
        Scheme(name="W4A16_G32", format=INT4, title=_INT4, code="int4", granularity=PerBlock(1, 32)),
        Scheme(
            name="W4A16_ASYM_G32",
            format=INT4_ASYM,
            title=_INT4,
            code="int4",
            granularity=PerBlock(1, 32),
        ),
        Scheme(
            name="NVFP4A16",
            format=FP4_E2M1,
            title=f"NV{_FP4}",
            code="e2m1",
            granularity=PerBlock(1, 16),
            scale_format="e4m3",
        ),
        Scheme(
            name="MXFP4A16",
            format=FP4_E2M1,
            title=f"MX{_FP4}",
            code="e2m1",
            granularity=PerBlock(1, 32),
            scale_format="ue8m0",
        ),
    )
}

FULL = "16"
"""Beside schemes, in a ladder of them: a weight that is kept in 16 bit."""

LADDERS: Mapping[str, tuple[str, ...]] = {
    "FP8_BLOCK": ("FP8_BLOCK", FULL),
    "FP8_DYNAMIC": ("FP8_DYNAMIC", FULL),
    "FP8A16": ("FP8A16", FULL),
    "MXFP8": ("MXFP8", FULL),
    "W8A8": ("W8A8", FULL),
    "W4A16": ("W4A16", "W4A16_G32", "FP8A16", FULL),
    "W4A16_ASYM": ("W4A16_ASYM", "W4A16_ASYM_G32", "FP8A16", FULL),
    "W4A16_G32": ("W4A16_G32", "FP8A16", FULL),
    "W4A16_ASYM_G32": ("W4A16_ASYM_G32", "FP8A16", FULL),
    "NVFP4A16": ("NVFP4A16", "FP8A16", FULL),
    "MXFP4A16": ("MXFP4A16", "FP8A16", FULL),
}
"""Lowest scheme -> the ladder that it begins, if no other is asked for."""

DEFAULT_SHARD_BYTES = 5 * 10**9
"""Size at which a new safetensors file begins, as Hugging Face saves models."""

SCALES_KEPT: Mapping[Container, ScaleFormat] = {"fp8": "float32", "compressed-tensors": "bfloat16"}
"""What the readers of a container keep of a scale that is a number: transformers casts those of
compressed-tensors to bfloat16."""


def choose_scheme(
    name: str, container: Container | None = None, scale_format: ScaleFormat | None = None
) -> tuple[Scheme, Container, ScaleFormat]:
    """A scheme with its container and the format of its scales.

    Args:
        name: One of `SCHEMES`.
        container: None takes the scheme's usual one.
        scale_format: None takes what the container's readers keep; "ue8m0" asks for powers of two, which
            survive servers that requantize block scales to them (DeepGEMM on Hopper and Blackwell).

    Raises:
        ValueError: Unknown scheme, or a combination that no reader loads.
    """
    if name not in SCHEMES:
        raise ValueError(f"Unknown scheme {name!r}: expected one of {', '.join(get_args(SchemeName))}.")
    scheme = SCHEMES[name]
    container = container or scheme.containers[0]
    if container not in SCALES_KEPT:
        raise ValueError(f"Unknown container {container!r}: expected one of {', '.join(SCALES_KEPT)}.")
    if container not in scheme.containers:
        raise ValueError(
            f"{name} has no {container} container: use container={scheme.containers[0]!r} or "
            "scheme='FP8_BLOCK'."
        )
    if scheme.scale_format is not None and scale_format not in (None, scheme.scale_format):
        raise ValueError(
            f"{name} stores its scales as {scheme.scale_format}: leave scale_format out, got "
            f"{scale_format!r}."
        )
    kept = scheme.scale_format or SCALES_KEPT[container]
    if scale_format not in (None, kept, "ue8m0"):
        raise ValueError(
            f"{name} in the {container} container is read with {kept} scales: scale_format={scale_format!r} "
            f"would be rounded on load; use {kept!r} or 'ue8m0'."
        )
    return scheme, container, scale_format or kept
