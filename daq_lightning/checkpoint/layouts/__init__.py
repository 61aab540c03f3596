"""The deployable layouts: how codes and scales are named and shaped, and what config.json says of them.

| scheme | container | weight scale | activations | readers |
| --- | --- | --- | --- | --- |
| FP8_BLOCK | fp8 | `X.weight_scale_inv` float32, 128 x 128 | FP8, dynamic | transformers, vLLM, SGLang |
| FP8_BLOCK | compressed-tensors | `X.weight_scale` float32, 128 x 128 | FP8, dynamic | vLLM; transformers if dense |
| FP8_DYNAMIC | compressed-tensors | `X.weight_scale` float32 (M, 1) | FP8, dynamic per token | transformers, vLLM |
| FP8A16 | compressed-tensors | `X.weight_scale` float32 (M, 1) | 16 bit | transformers, vLLM on a GPU |

Every scale MULTIPLIES to dequantize, `weight_scale_inv` too. transformers casts the scales of a compressed-tensors
folder to bfloat16 while vLLM keeps float32, so there only scales that bfloat16 represents are searched: both readers
then compute the same weights.

Per-tensor scales are not offered: vLLM requantizes fused projections to the largest one and undoes the search.

Sources: transformers FineGrainedFP8Config; compressed-tensors 0.20 QuantizationConfig.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

from daq_lightning.checkpoint.tensor_file import CheckpointError
from daq_lightning.numerics.formats import Granularity, PerBlock, PerChannel, ScaleFormat

Scheme: TypeAlias = Literal["auto", "FP8_BLOCK", "FP8_DYNAMIC", "FP8A16"]
SCHEMES: tuple[str, ...] = get_args(Scheme)
Container: TypeAlias = Literal["fp8", "compressed-tensors"]

BLOCK = PerBlock(128, 128)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One way to lay out a quantized checkpoint.

    Attributes:
        scheme: The field's name of it.
        container: Which reader's configuration describes it.
        granularity: Which elements share a scale.
        scale_format: What the readers keep of a scale.
        quantized_activations: Whether the server runs the matrix product in FP8 as well.
    """

    scheme: str
    container: Container
    granularity: Granularity
    scale_format: ScaleFormat
    quantized_activations: bool = True

    def scale_name(self, weight_name: str) -> str:
        """`X.weight` -> the name of its scale."""
        return weight_name + ("_scale_inv" if self.container == "fp8" else "_scale")

    def scale_shape(self, shape_MN: tuple[int, int]) -> tuple[int, int]:
        """Shape of the scale of a weight of this shape."""
        return self.granularity.grid(shape_MN)

    def quantization_config(self, ignore: Sequence[str]) -> dict[str, Any]:
        """The `quantization_config` of config.json.

        Args:
            ignore: Full names of every Linear module that is NOT quantized, lm_head and routers included. Readers
                trust this list: a module that is neither quantized nor listed loads as garbage, without an error.
        """
        if self.container == "fp8":
            config: dict[str, Any] = {
                "quant_method": "fp8",
                "activation_scheme": "dynamic",
                "fmt": "e4m3",
                "weight_block_size": [BLOCK.rows, BLOCK.cols],
                "modules_to_not_convert": list(ignore),
            }
            if self.scale_format == "ue8m0":
                config["scale_fmt"] = "ue8m0"
            return config
        return {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "quantization_status": "compressed",
            "ignore": list(ignore),
            "kv_cache_scheme": None,
            "config_groups": {
                "group_0": {
                    "format": "float-quantized",
                    "targets": ["Linear"],
                    "weights": self._weights(),
                    "input_activations": self._activations(),
                    "output_activations": None,
                }
            },
        }

    def _weights(self) -> dict[str, Any]:
        weights: dict[str, Any] = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False}
        if isinstance(self.granularity, PerBlock):
            return weights | {
                "strategy": "block",
                "block_structure": [self.granularity.rows, self.granularity.cols],
            }
        return weights | {"strategy": "channel"}

    def _activations(self) -> dict[str, Any] | None:
        if not self.quantized_activations:
            return None
        activations: dict[str, Any] = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": True}
        if isinstance(self.granularity, PerBlock):
            return activations | {"strategy": "group", "group_size": BLOCK.cols}
        return activations | {"strategy": "token"}


def make_layout(scheme: str, *, container: Container | None = None, scale_format: ScaleFormat | None = None) -> Layout:
    """The layout of a scheme.

    Args:
        scheme: "FP8_BLOCK", "FP8_DYNAMIC" or "FP8A16".
        container: None takes the scheme's usual one: "fp8" for FP8_BLOCK, else "compressed-tensors".
        scale_format: None takes what the container's readers keep; "ue8m0" asks for powers of two, which survive
            servers that requantize block scales to them (DeepGEMM on Hopper and Blackwell).

    Raises:
        ValueError: Unknown scheme, or a combination that no reader loads.
    """
    if scheme not in SCHEMES or scheme == "auto":
        raise ValueError(f"Unknown scheme {scheme!r}: expected one of {', '.join(SCHEMES)}.")
    block = scheme == "FP8_BLOCK"
    container = container or ("fp8" if block else "compressed-tensors")
    if container not in get_args(Container):
        raise ValueError(f"Unknown container {container!r}: expected one of {', '.join(get_args(Container))}.")
    if container == "fp8" and not block:
        raise ValueError(f"{scheme} has no fp8 container: use container='compressed-tensors' or scheme='FP8_BLOCK'.")
    kept: ScaleFormat = "float32" if container == "fp8" else "bfloat16"
    if scale_format not in (None, kept, "ue8m0"):
        raise ValueError(
            f"{scheme} in the {container} container is read with {kept} scales: scale_format={scale_format!r} would "
            f"be rounded on load; use {kept!r} or 'ue8m0'."
        )
    return Layout(
        scheme=scheme,
        container=container,
        granularity=BLOCK if block else PerChannel(),
        scale_format=scale_format or kept,
        quantized_activations=scheme != "FP8A16",
    )


def read_layout(quantization: Mapping[str, Any]) -> Layout:
    """The layout that a `quantization_config` describes.

    Raises:
        CheckpointError: It is missing, or describes something else than the layouts of this package.
    """
    method = quantization.get("quant_method")
    if method == "fp8":
        size = quantization.get("weight_block_size")
        if size != [128, 128] or quantization.get("activation_scheme") != "dynamic":
            raise CheckpointError(
                "quantization_config of the fp8 container should have weight_block_size [128, 128] and dynamic "
                f"activations, got {size or 'none'} and {quantization.get('activation_scheme')!r}"
            )
        scale_format: ScaleFormat | None = "ue8m0" if quantization.get("scale_fmt") == "ue8m0" else None
        return make_layout("FP8_BLOCK", container="fp8", scale_format=scale_format)
    groups = quantization.get("config_groups")
    groups = list(groups.values()) if isinstance(groups, Mapping) else []
    if method != "compressed-tensors" or len(groups) != 1:
        raise CheckpointError(
            "config.json should have a quantization_config with quant_method 'fp8' or 'compressed-tensors' (and one "
            f"config group), got {method!r} with {len(groups)} groups"
        )
    group = groups[0] if isinstance(groups[0], Mapping) else {}
    weights = group.get("weights")
    weights = weights if isinstance(weights, Mapping) else {}
    block = weights.get("strategy") == "block" and weights.get("block_structure") == [128, 128]
    if (weights.get("num_bits"), weights.get("type")) != (8, "float") or not (
        block or weights.get("strategy") == "channel"
    ):
        raise CheckpointError(
            f"weights should be 8-bit floats with a scale per channel or 128 x 128 block, got {weights}"
        )
    scheme = "FP8_BLOCK" if block else "FP8_DYNAMIC" if group.get("input_activations") else "FP8A16"
    return make_layout(scheme, container="compressed-tensors")


def listed_modules(quantization: Mapping[str, Any]) -> list[str]:
    """The modules that a `quantization_config` says are not quantized: names, and patterns after `re:`.

    Raises:
        CheckpointError: The list is none.
    """
    field = "modules_to_not_convert" if quantization.get("quant_method") == "fp8" else "ignore"
    listed = quantization.get(field) or []
    if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
        raise CheckpointError(f"quantization_config should have a list of names in {field}, got {listed!r:.80}")
    return listed
