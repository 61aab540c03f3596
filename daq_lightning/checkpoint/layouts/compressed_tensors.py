"""The compressed-tensors container, as llm-compressor writes it.

| scheme | format | X.weight... | X.weight_scale |
| --- | --- | --- | --- |
| FP8_* | float-quantized | float8_e4m3fn (M, N) | float32 (M, 1) or (ceil(M / 128), ceil(N / 128)) |
| MXFP8 | mxfp8-quantized | float8_e4m3fn (M, N) | uint8 exponent (M, N / 32) |
| W8A8 | int-quantized | int8 (M, N) | bfloat16 (M, 1) |
| W4A16 | pack-quantized | _packed int32 (M, N / 8), _shape | bfloat16 (M, N / 128) |
| W4A16_ASYM | pack-quantized | the same, _zero_point int32 (M / 8, N / 128) | bfloat16 (M, N / 128) |
| NVFP4A16 | nvfp4-pack-quantized | _packed uint8 (M, N / 2) | float8_e4m3fn (M, N / 16), _global_scale |
| MXFP4A16 | mxfp4-pack-quantized | _packed uint8 (M, N / 2) | uint8 exponent (M, N / 32) |

W4A16_G32 and W4A16_ASYM_G32 are these two with a group_size of 32.

Several schemes in one checkpoint are several config groups, whose targets are the names of their modules;
where their formats differ, that of the whole is "mixed-precision".

A scale MULTIPLIES to dequantize, but for `_global_scale`, which divides. transformers casts scales that are
numbers to bfloat16 while vLLM keeps float32 of some, so only scales that bfloat16 represents are searched:
both readers then compute the same weights.

Source: compressed-tensors 0.20, `QuantizationConfig` and `quant_scheme`; vLLM, `compressed_tensors.schemes`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from daq_lightning.checkpoint.kv_cache import KV_CACHE_SCHEME
from daq_lightning.checkpoint.layouts.fp4 import PackedFp4
from daq_lightning.checkpoint.layouts.int32 import PackedIntegers
from daq_lightning.checkpoint.layouts.layout import Described, Layout
from daq_lightning.checkpoint.layouts.parts import Codes, PlainCodes, Scales
from daq_lightning.checkpoint.layouts.scales import E4M3Scales, ExponentScales, NumberScales
from daq_lightning.checkpoint.tensor_file import CheckpointError
from daq_lightning.numerics.formats import Format, PerBlock

if TYPE_CHECKING:
    from daq_lightning.checkpoint.schemes import Activations, Container, Scheme

_SAID = ("num_bits", "type", "strategy", "group_size", "block_structure", "symmetric")
"""What tells the weights of one scheme from those of another."""
_ALL = ("Linear",)


class CompressedTensorsLayout(Layout):
    """See the module."""

    container: ClassVar[Container] = "compressed-tensors"

    @property
    def codes(self) -> Codes:
        """Of four bits, several in an element."""
        if self.scheme.format.bits == 8:
            return PlainCodes(self.scheme.format.dtype)
        return PackedIntegers(self.scheme.asymmetric) if _is_integer(self.scheme.format) else PackedFp4()

    @property
    def scales(self) -> Scales:
        """As the scheme says, else numbers."""
        if self.scheme.scale_format == "ue8m0":
            return ExponentScales()
        if self.scheme.scale_format == "e4m3":
            return E4M3Scales()
        usual = torch.bfloat16 if _is_integer(self.scheme.format) else torch.float32
        return NumberScales(self.scale_dtype or usual)

    def quantization_config(self, ignore: Sequence[str]) -> dict[str, Any]:
        """See `Layout.quantization_config`."""
        return self.config_of_groups([(self.scheme, _ALL)], ignore)

    def config_of_groups(
        self, groups: Sequence[tuple[Scheme, Sequence[str]]], ignore: Sequence[str]
    ) -> dict[str, Any]:
        """See `Layout.config_of_groups`."""
        forms = {_format(scheme): None for scheme, _ in groups}
        return {
            "quant_method": "compressed-tensors",
            "format": next(iter(forms)) if len(forms) == 1 else "mixed-precision",
            "quantization_status": "compressed",
            "ignore": list(ignore),
            "kv_cache_scheme": dict(KV_CACHE_SCHEME) if self.kv_cache else None,
            "config_groups": {
                f"group_{index}": {
                    "format": _format(scheme),
                    "targets": list(targets),
                    "weights": _weights(scheme),
                    "input_activations": _activations(scheme.activations),
                    "output_activations": None,
                }
                for index, (scheme, targets) in enumerate(groups)
            },
        }


def read_compressed_tensors(quantization: Mapping[str, Any], schemes: Iterable[Scheme]) -> list[Described]:
    """What a `quantization_config` of this container says; it has no word for powers of two.

    Args:
        quantization: As in config.json.
        schemes: Those that it may be of.

    Returns:
        The schemes of its config groups, each with its targets.

    Raises:
        CheckpointError: No config group, or weights that no scheme has.
    """
    groups = quantization.get("config_groups")
    groups = list(groups.values()) if isinstance(groups, Mapping) else []
    if not groups:
        raise CheckpointError("quantization_config should have a config group, got none")
    known = [scheme for scheme in schemes if "compressed-tensors" in scheme.containers]
    return [_described(group if isinstance(group, Mapping) else {}, known) for group in groups]


def _described(group: Mapping[str, Any], known: Sequence[Scheme]) -> Described:
    weights, targets = group.get("weights"), group.get("targets")
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise CheckpointError(f"a config group should have a list of names in targets, got {targets!r:.80}")
    said = _said(weights) if isinstance(weights, Mapping) else {}
    activations = bool(group.get("input_activations"))
    size = said.get("group_size")
    like = [scheme for scheme in known if scheme.quantized_activations == activations]
    for scheme in like:
        if _said(_weights(scheme)) == said:
            return Described(scheme=scheme.name, targets=tuple(targets))
    for scheme in like:  # of groups that no scheme has by name
        with contextlib.suppress(ValueError):
            if isinstance(size, int) and _said(_weights(scheme.in_groups(size))) == said:
                return Described(scheme=scheme.name, targets=tuple(targets), group=size)
    names = ", ".join(scheme.name for scheme in known)
    raise CheckpointError(
        f"weights {'with' if activations else 'without'} quantized activations should be described as those "
        f"of {names}, got {weights}"
    )


def _is_integer(fmt: Format) -> bool:
    return not fmt.dtype.is_floating_point


def _format(scheme: Scheme) -> str:
    """compressed-tensors' name of how a scheme is stored."""
    if _is_integer(scheme.format):
        return "int-quantized" if scheme.format.bits == 8 else "pack-quantized"
    if scheme.scale_format is None:
        return "float-quantized"
    if scheme.format.bits == 8:
        return "mxfp8-quantized"
    return "nvfp4-pack-quantized" if scheme.scale_format == "e4m3" else "mxfp4-pack-quantized"


def _weights(scheme: Scheme) -> dict[str, Any]:
    """The QuantizationArgs of the weights of a scheme."""
    weights = _args(scheme.format) | {"symmetric": not scheme.asymmetric, "dynamic": False}
    if scheme.scale_format is not None:
        kept = {"ue8m0": "torch.uint8", "e4m3": "torch.float8_e4m3fn"}[scheme.scale_format]
        weights |= {"scale_dtype": kept, "zp_dtype": kept}
    if scheme.asymmetric:
        weights |= {"zp_dtype": "torch.int8"}
    if scheme.group is not None:
        strategy = "tensor_group" if scheme.scale_format == "e4m3" else "group"
        return weights | {"strategy": strategy, "group_size": scheme.group}
    if isinstance(scheme.granularity, PerBlock):
        block = [scheme.granularity.rows, scheme.granularity.cols]
        return weights | {"strategy": "block", "block_structure": block}
    return weights | {"strategy": "channel"}


def _activations(activations: Activations | None) -> dict[str, Any] | None:
    """The QuantizationArgs of activations."""
    if activations is None:
        return None
    found = _args(activations.format) | {"symmetric": True, "dynamic": True}
    if activations.scale_format == "ue8m0":
        found |= {"scale_dtype": "torch.uint8", "zp_dtype": "torch.uint8"}
    if activations.group is None:
        return found | {"strategy": "token"}
    return found | {"strategy": "group", "group_size": activations.group}


def _args(fmt: Format) -> dict[str, Any]:
    return {"num_bits": fmt.bits, "type": "int" if _is_integer(fmt) else "float"}


def _said(weights: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that tell schemes apart, with the defaults of what is left out."""
    defaults = {"symmetric": True, "num_bits": 8, "type": "int"}
    return {key: weights.get(key, defaults.get(key)) for key in _SAID}
