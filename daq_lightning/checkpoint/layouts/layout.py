"""What every layout answers: under which names and shapes a quantized weight is stored, how codes and scales
become those tensors and come back, and what config.json says."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from daq_lightning.checkpoint.layouts.parts import Codes, Part, Scales, Unpacked
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
        targets: The modules it is for, as compressed-tensors names them; empty for all.
        group: How many neighbours in a row share a scale; None for the scheme's own.
    """

    scheme: str
    powers_of_two: bool = False
    targets: tuple[str, ...] = ()
    group: int | None = None


@dataclass(frozen=True, kw_only=True)
class Layout(ABC):
    """One way to lay out a quantized checkpoint.

    Attributes:
        scheme: What is quantized how.
        scale_format: What the readers keep of a scale.
        kv_cache: Whether keys and values are cached in FP8, of which only compressed-tensors can speak.
        scale_dtype: Of scales that are numbers, in the file; None for the usual one.
    """

    container: ClassVar[Container]
    scheme: Scheme
    scale_format: ScaleFormat
    kv_cache: bool = False
    scale_dtype: torch.dtype | None = None

    @property
    def granularity(self) -> Granularity:
        """Which elements share a scale."""
        return self.scheme.granularity

    @property
    @abstractmethod
    def codes(self) -> Codes:
        """How codes are packed."""

    @property
    @abstractmethod
    def scales(self) -> Scales:
        """How scales are stored."""

    @abstractmethod
    def quantization_config(self, ignore: Sequence[str]) -> dict[str, Any]:
        """The `quantization_config` of config.json.

        Args:
            ignore: Full names of every Linear module that is NOT quantized, lm_head and routers included.
                Readers trust this list: a module that is neither quantized nor listed loads as garbage,
                without an error.
        """

    def config_of_groups(
        self, groups: Sequence[tuple[Scheme, Sequence[str]]], ignore: Sequence[str]
    ) -> dict[str, Any]:
        """The `quantization_config` of a checkpoint in several schemes.

        Args:
            groups: Schemes, each with what it is for: full names of modules, `re:` and a pattern of them, or
                "Linear" for all.
            ignore: As for `quantization_config`.

        Raises:
            ValueError: The container holds one scheme.
        """
        raise ValueError(f"The {self.container} container holds one scheme, got {len(groups)}.")

    def names(self, weight_name: str) -> dict[str, str]:
        """Part -> the name of its tensor."""
        return {part: weight_name + stored.suffix for part, stored in self._parts((1, 1)).items()}

    def stored(self, weight: TensorSpec) -> dict[str, TensorSpec]:
        """What the file holds of a quantized weight: part -> the tensor, in file order."""
        return {
            part: TensorSpec(name=weight.name + stored.suffix, dtype=stored.dtype, shape=stored.shape)
            for part, stored in self._parts((weight.shape[0], weight.shape[1])).items()
        }

    def pack(
        self,
        codes_MN: Tensor,
        scale: Tensor,
        *,
        zero: Tensor | None = None,
        global_scale: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The tensors of `stored` from the result of a search.

        Args:
            codes_MN: Values of the format, in its dtype.
            scale: float32, what multiplies them.
            zero: int8, of asymmetric schemes: what codes are counted from.
            global_scale: float32 (1), of scales in E4M3: ``scale * global_scale`` are values of E4M3.

        Raises:
            ValueError: The file cannot hold a scale exactly.
        """
        return self.codes.pack(codes_MN, zero) | self.scales.pack(scale, global_scale)

    def unpack(self, parts: Mapping[str, Tensor], shape: Sequence[int]) -> Unpacked:
        """Codes, scale and zero points from the tensors of `stored`.

        Args:
            parts: Part -> tensor, as read.
            shape: Of the weight.

        Raises:
            ValueError: What is stored beside the codes contradicts the shape.
        """
        codes_MN, zero = self.codes.unpack(parts, (shape[0], shape[1]))
        return Unpacked(codes_MN, self.scales.unpack(parts), zero)

    def _parts(self, shape_MN: tuple[int, int]) -> dict[str, Part]:
        grid = self.granularity.grid(shape_MN)
        return self.codes.parts(shape_MN, grid) | self.scales.parts(grid)
