"""The schemes by the field's names, and which container holds which. Data only; imports no torch.

| scheme | weight scale | activations | containers, the usual one first |
| --- | --- | --- | --- |
| FP8_BLOCK | one per 128 x 128 block | FP8, dynamic | fp8, compressed-tensors |
| FP8_DYNAMIC | one per channel | FP8, dynamic per token | compressed-tensors |
| FP8A16 | one per channel | 16 bit | compressed-tensors |

Per-tensor scales are not offered: vLLM requantizes fused projections to the largest one and undoes the
search.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from daq_lightning.numerics.formats import Format, Granularity, PerBlock, PerChannel, ScaleFormat
from daq_lightning.numerics.formats.fp8 import FP8_E4M3

SchemeName: TypeAlias = Literal["auto", "FP8_BLOCK", "FP8_DYNAMIC", "FP8A16"]
"""A scheme, or "auto": FP8_BLOCK where all sizes allow it, else FP8_DYNAMIC."""
Container: TypeAlias = Literal["fp8", "compressed-tensors"]


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """How the weights of a model are quantized, whatever the container.

    Attributes:
        name: The field's name.
        format: Of the codes.
        granularity: Which elements share a scale.
        quantized_activations: Whether servers run the matrix product in FP8 as well.
        containers: Those that readers load, the usual one first.
    """

    name: str
    format: Format
    granularity: Granularity
    quantized_activations: bool
    containers: tuple[Container, ...]


SCHEMES: Mapping[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        Scheme(
            name="FP8_BLOCK",
            format=FP8_E4M3,
            granularity=PerBlock(128, 128),
            quantized_activations=True,
            containers=("fp8", "compressed-tensors"),
        ),
        Scheme(
            name="FP8_DYNAMIC",
            format=FP8_E4M3,
            granularity=PerChannel(),
            quantized_activations=True,
            containers=("compressed-tensors",),
        ),
        Scheme(
            name="FP8A16",
            format=FP8_E4M3,
            granularity=PerChannel(),
            quantized_activations=False,
            containers=("compressed-tensors",),
        ),
    )
}

DEFAULT_SHARD_BYTES = 5 * 10**9
"""Size at which a new safetensors file begins, as Hugging Face saves models."""

SCALES_KEPT: Mapping[Container, ScaleFormat] = {"fp8": "float32", "compressed-tensors": "bfloat16"}
"""What the readers of a container keep of a scale: transformers casts those of compressed-tensors to
bfloat16."""


def choose_scheme(
    name: str, container: Container | None = None, scale_format: ScaleFormat | None = None
) -> tuple[Scheme, Container, ScaleFormat]:
    """A scheme with its container and the format of its scales.

    Args:
        name: "FP8_BLOCK", "FP8_DYNAMIC" or "FP8A16".
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
    kept = SCALES_KEPT[container]
    if scale_format not in (None, kept, "ue8m0"):
        raise ValueError(
            f"{name} in the {container} container is read with {kept} scales: scale_format={scale_format!r} "
            f"would be rounded on load; use {kept!r} or 'ue8m0'."
        )
    return scheme, container, scale_format or kept
