"""The fp8 container: fine-grained FP8 as DeepSeek-V3 introduced it, one scale per 128 x 128 block.

    X.weight              float8_e4m3fn (M, N)
    X.weight_scale_inv    float32 (ceil(M / 128), ceil(N / 128)); in spite of its name it MULTIPLIES to
    dequantize

Readers: transformers, vLLM, SGLang; all keep the scale in float32.

Source: transformers `FineGrainedFP8Config`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from daq_lightning.checkpoint.layouts.layout import Described, Layout
from daq_lightning.checkpoint.layouts.parts import Codes, PlainCodes, Scales
from daq_lightning.checkpoint.layouts.scales import NumberScales
from daq_lightning.checkpoint.tensor_file import CheckpointError

if TYPE_CHECKING:
    from daq_lightning.checkpoint.schemes import Container

_BLOCK = [128, 128]


class Fp8Layout(Layout):
    """See the module."""

    container: ClassVar[Container] = "fp8"

    @property
    def codes(self) -> Codes:
        """One an element."""
        return PlainCodes(self.scheme.format.dtype)

    @property
    def scales(self) -> Scales:
        """float32, as `X.weight_scale_inv`."""
        return NumberScales(self.scale_dtype or torch.float32, "_scale_inv")

    def quantization_config(self, ignore: Sequence[str]) -> dict[str, Any]:
        """See `Layout.quantization_config`; vLLM matches full names only, no patterns."""
        config: dict[str, Any] = {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "weight_block_size": list(_BLOCK),
            "modules_to_not_convert": list(ignore),
        }
        if self.scale_format == "ue8m0":
            config["scale_fmt"] = "ue8m0"
        return config


def read_fp8(quantization: Mapping[str, Any]) -> Described:
    """What a `quantization_config` of this container says.

    Raises:
        CheckpointError: Other blocks than 128 x 128, or activations that are not quantized when they come.
    """
    size = quantization.get("weight_block_size")
    if size != _BLOCK or quantization.get("activation_scheme") != "dynamic":
        raise CheckpointError(
            f"quantization_config of the fp8 container should have weight_block_size {_BLOCK} and dynamic "
            f"activations, got {size or 'none'} and {quantization.get('activation_scheme')!r}"
        )
    return Described(scheme="FP8_BLOCK", powers_of_two=quantization.get("scale_fmt") == "ue8m0")
