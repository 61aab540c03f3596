"""The compressed-tensors container, as llm-compressor writes it: FP8 codes with a scale per channel or per
block.

    X.weight          float8_e4m3fn (M, N)
    X.weight_scale    float32 (M, 1), or (ceil(M / 128), ceil(N / 128)); MULTIPLIES to dequantize

transformers casts these scales to bfloat16 while vLLM keeps float32, so only scales that bfloat16 represents
are searched: both readers then compute the same weights.

Source: compressed-tensors 0.20 `QuantizationConfig`, format `float-quantized`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from daq_lightning.checkpoint.kv_cache import KV_CACHE_SCHEME
from daq_lightning.checkpoint.layouts.layout import Described, Layout
from daq_lightning.checkpoint.tensor_file import CheckpointError
from daq_lightning.numerics.formats import PerBlock

if TYPE_CHECKING:
    from daq_lightning.checkpoint.schemes import Container

_FORMAT = "float-quantized"
_FLOAT8: Mapping[str, Any] = {"num_bits": 8, "type": "float", "symmetric": True}


class CompressedTensorsLayout(Layout):
    """See the module."""

    container: ClassVar[Container] = "compressed-tensors"

    def scale_name(self, weight_name: str) -> str:
        """`X.weight` -> `X.weight_scale`."""
        return f"{weight_name}_scale"

    def quantization_config(self, ignore: Sequence[str]) -> dict[str, Any]:
        """See `Layout.quantization_config`."""
        return {
            "quant_method": "compressed-tensors",
            "format": _FORMAT,
            "quantization_status": "compressed",
            "ignore": list(ignore),
            "kv_cache_scheme": dict(KV_CACHE_SCHEME) if self.kv_cache else None,
            "config_groups": {
                "group_0": {
                    "format": _FORMAT,
                    "targets": ["Linear"],
                    "weights": self._weights(),
                    "input_activations": self._activations(),
                    "output_activations": None,
                }
            },
        }

    def _weights(self) -> dict[str, Any]:
        weights = {**_FLOAT8, "dynamic": False}
        if isinstance(self.granularity, PerBlock):
            return weights | {
                "strategy": "block",
                "block_structure": [self.granularity.rows, self.granularity.cols],
            }
        return weights | {"strategy": "channel"}

    def _activations(self) -> dict[str, Any] | None:
        if not self.scheme.quantized_activations:
            return None
        activations = {**_FLOAT8, "dynamic": True}
        if isinstance(self.granularity, PerBlock):
            return activations | {"strategy": "group", "group_size": self.granularity.cols}
        return activations | {"strategy": "token"}


def read_compressed_tensors(quantization: Mapping[str, Any]) -> Described:
    """What a `quantization_config` of this container says; it has no word for powers of two.

    Raises:
        CheckpointError: Several config groups, or weights that are not FP8 with a scale per channel or block.
    """
    groups = quantization.get("config_groups")
    groups = list(groups.values()) if isinstance(groups, Mapping) else []
    if len(groups) != 1:
        raise CheckpointError(f"quantization_config should have one config group, got {len(groups)}")
    group = groups[0] if isinstance(groups[0], Mapping) else {}
    weights = group.get("weights")
    weights = weights if isinstance(weights, Mapping) else {}
    block = weights.get("strategy") == "block" and weights.get("block_structure") == [128, 128]
    float8 = (weights.get("num_bits"), weights.get("type")) == (_FLOAT8["num_bits"], _FLOAT8["type"])
    if not float8 or not (block or weights.get("strategy") == "channel"):
        raise CheckpointError(
            f"weights should be 8-bit floats with a scale per channel or 128 x 128 block, got {weights}"
        )
    name = "FP8_BLOCK" if block else "FP8_DYNAMIC" if group.get("input_activations") else "FP8A16"
    return Described(scheme=name)
