"""What every layout answers: under which names and shapes a quantized weight is stored, and what config.json
says."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from daq_lightning.checkpoint.tensor_file import TensorSpec

if TYPE_CHECKING:
    from daq_lightning.checkpoint.schemes import Container, Scheme
    from daq_lightning.numerics.formats import Granularity, ScaleFormat


@dataclass(frozen=True, kw_only=True)
class Described:
    """What a `quantization_config` says of its scheme.

    Attributes:
        scheme: The field's name.
        powers_of_two: Whether scales are.
    """

    scheme: str
    powers_of_two: bool = False


@dataclass(frozen=True, kw_only=True)
class Layout(ABC):
    """One way to lay out a quantized checkpoint.

    Attributes:
        scheme: What is quantized how.
        scale_format: What the readers keep of a scale.
        kv_cache: Whether keys and values are cached in FP8, of which only compressed-tensors can speak.
    """

    container: ClassVar[Container]
    scheme: Scheme
    scale_format: ScaleFormat
    kv_cache: bool = False

    @property
    def granularity(self) -> Granularity:
        """Which elements share a scale."""
        return self.scheme.granularity

    @abstractmethod
    def scale_name(self, weight_name: str) -> str:
        """`X.weight` -> the name of its scale."""

    @abstractmethod
    def quantization_config(self, ignore: Sequence[str]) -> dict[str, Any]:
        """The `quantization_config` of config.json.

        Args:
            ignore: Full names of every Linear module that is NOT quantized, lm_head and routers included.
                Readers trust this list: a module that is neither quantized nor listed loads as garbage,
                without an error.
        """

    def stored(self, weight: TensorSpec) -> dict[str, TensorSpec]:
        """What the file holds of a quantized weight: part ("codes", "scale") -> the tensor, in file order."""
        shape_MN = (weight.shape[0], weight.shape[1])
        scale_shape = self.granularity.grid(shape_MN)
        return {
            "codes": TensorSpec(name=weight.name, dtype=self.scheme.format.dtype, shape=weight.shape),
            "scale": TensorSpec(name=self.scale_name(weight.name), dtype=torch.float32, shape=scale_shape),
        }

    def pack(self, codes_MN: Tensor, scale: Tensor) -> dict[str, Tensor]:
        """The tensors of `stored` from the result of a search."""
        return {"codes": codes_MN, "scale": scale}
