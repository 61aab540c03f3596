"""The format of a quantized base, which an export of scheme "keep" takes over: an adapter's on its own base.

    container, scheme, group size     those of the base, of each weight its own
    scales, zero points               the base's own, to the bit
    codes                             the base's own where nothing changed; else chosen anew
    modules in 16 bit                 stay so; the quantization_config is the base's

Nearest codes at these scales are a "plain merge". The dequantized base lies on the very grid, so they are the
base's codes again wherever the update is below half a step: most of an adapter is gone. `rounding` chooses
them along a curvature instead.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from daq_lightning.checkpoint.layouts import Layout, Layouts, listed_modules, read_layouts
from daq_lightning.checkpoint.layouts.parts import GLOBAL_SCALE, SCALE
from daq_lightning.checkpoint.layouts.scales import NumberScales
from daq_lightning.checkpoint.reader import Checkpoint
from daq_lightning.checkpoint.tensor_file import CheckpointError
from daq_lightning.numerics.objectives import as_searched
from daq_lightning.numerics.quantize import quantize
from daq_lightning.numerics.rounding.written import measured

if TYPE_CHECKING:
    from daq_lightning.export.plan import ExportPlan, TensorPlan
    from daq_lightning.export.settings import ExportSettings
    from daq_lightning.export.source import Source
    from daq_lightning.export.stream import Pair
    from daq_lightning.numerics.search.stages import SearchResult

_LISTED = 3
_NAME_ONE = "name a scheme, such as scheme='W4A16' or 'FP8_DYNAMIC'"


@dataclass(frozen=True, kw_only=True)
class KeptFormat:
    """The format of a quantized folder.

    Attributes:
        checkpoint: The folder.
        layouts: Name -> layout, of its quantized weights.
    """

    checkpoint: Checkpoint
    layouts: Mapping[str, Layout]

    @classmethod
    def of(cls, base: Mapping[str, Tensor]) -> KeptFormat:
        """The format of a base.

        Raises:
            CheckpointError: It is not quantized, in a format that this package does not write, or with
                tensors that an export would lose.
        """
        if not isinstance(base, Checkpoint) or not base.path.is_dir():
            raise CheckpointError(
                "scheme='keep' writes in the format of a quantized base, which is read from its folder: pass "
                f"base='<folder>', or {_NAME_ONE}."
            )
        method = base.raw.quantization.get("quant_method")
        if method == "bitsandbytes":
            raise CheckpointError(
                f"scheme='keep': {base.path} is quantized by bitsandbytes, which is a format to train on and "
                f"not one to serve: {_NAME_ONE}."
            )
        if not base.quantized:
            raise CheckpointError(
                f"scheme='keep' writes in the format of a quantized base, and {base.path} is not quantized: "
                f"{_NAME_ONE}."
            )
        try:
            found = read_layouts(base.raw.quantization)
            layouts = {name: _layout_of(base, name, found) for name in base if base.stored(name) is not None}
        except ValueError as error:
            raise CheckpointError(
                f"scheme='keep': {base.path}: {str(error).rstrip('.')}. Or {_NAME_ONE}."
            ) from error
        kept = cls(checkpoint=base, layouts=layouts)
        kept._check()
        return kept

    @property
    def names(self) -> frozenset[str]:
        """The weights that the base quantizes."""
        return frozenset(self.layouts)

    @property
    def quantization_config(self) -> dict[str, Any]:
        """That of the base, as it is."""
        return dict(self.checkpoint.raw.quantization)

    def settings(self, source: Source, settings: ExportSettings) -> ExportSettings:
        """The settings that name this format, of the modules of a model that it quantizes.

        Args:
            source: The fine-tuned model, under the names of the base.
            settings: Of scheme "keep".
        """
        outline = source.outline
        others = [
            spec.name.removesuffix(".weight")
            for spec in source.specs
            if spec.name not in self.names
            and outline.role(outline.keys[spec.name], len(spec.shape)) in ("linear", "expert", "upcast")
        ]
        layout = next(iter(self.layouts.values()))  # of several, whichever: each weight has its own
        return dataclasses.replace(
            settings,
            scheme=layout.scheme.name,  # type: ignore[arg-type]
            container=layout.container,
            scale_format=layout.scale_format,
            ignore=tuple(others),
        )

    def applied(self, plan: ExportPlan) -> ExportPlan:
        """The plan of these settings, with the base's own list of unquantized modules.

        Raises:
            CheckpointError: The model has not the weights that the base quantizes.
        """
        planned = {tensor.spec.name for tensor in plan.quantized}
        if planned != self.names:
            odd = sorted(planned ^ self.names)
            raise CheckpointError(
                f"scheme='keep': {self.checkpoint.path} quantizes {len(self.names)} weights, of which the "
                f"fine-tuned model has other ones, or as something else than a Linear module: "
                f"{', '.join(odd[:_LISTED])}{', ...' * (len(odd) > _LISTED)}. Pass the base that it was "
                f"trained on, or {_NAME_ONE}."
            )
        listed = tuple(listed_modules(self.quantization_config))
        return dataclasses.replace(plan, tensors=tuple(map(_explained, plan.tensors)), ignore=listed)

    def global_scale(self, name: str) -> Tensor | None:
        """What the scales of a weight are multiplied with in the file, where there is such a scale."""
        stored = self.checkpoint.stored(name)
        factor = None if stored is None else stored.parts.get(GLOBAL_SCALE)
        return None if factor is None else self.checkpoint.raw[factor]

    def merged(self, pair: Pair, plain: SearchResult, reader_dtype: torch.dtype) -> SearchResult:
        """The plain merge of a weight: the base's scales, and nearest codes.

        Where a weight equals its base, the codes are the base's own too.

        Args:
            pair: The weight, and what it is measured against.
            plain: The same at absmax scales, in units of the base's global scale.
            reader_dtype: What readers dequantize to.

        Returns:
            A result as of a search: alpha is the multiple that the base's scales are of the absmax scales.
        """
        name, weight, layout = pair.plan.spec.name, as_searched(pair.weight), pair.plan.layout
        own = self.checkpoint.unpacked(name)
        codes, scale = own.codes.to(weight.device), own.scale.to(weight.device)
        zero = None if own.zero is None else own.zero.to(weight.device)
        if not self.unchanged(name, weight):
            codes = quantize(weight, scale, layout.granularity, layout.scheme.format, zero)
        alpha = scale.double() / plain.scale.double()
        result = dataclasses.replace(plain, codes=codes, scale=scale, zero=zero, alpha=alpha)
        base = weight if pair.base is None else as_searched(pair.base)
        return measured(result, weight, base, layout.granularity, reader_dtype)

    def unchanged(self, name: str, weight: Tensor) -> bool:
        """Whether a weight is still what the base holds, in the dtype that the base is read in."""
        return bool((weight == self.checkpoint[name].to(weight.device)).all())

    def _check(self) -> None:
        """Refuses weights that the layout would store otherwise, and tensors that it has no place for."""
        base, odd, held = self.checkpoint, list[str](), set[str]()
        for name in self.names:
            stored = base.stored(name)
            assert stored is not None
            held |= set(stored.parts.values())
            expected = self.layouts[name].stored(base.specs[name])
            found = {part: base.raw.entries[tensor] for part, tensor in stored.parts.items()}
            if {part: (spec.name, spec.dtype, spec.shape) for part, spec in expected.items()} != {
                part: (entry.name, entry.dtype, entry.shape) for part, entry in found.items()
            }:
                odd.append(name)
        if odd:
            raise CheckpointError(
                f"scheme='keep': {base.path} stores {len(odd)} weights otherwise than its "
                f"quantization_config says, such as {', '.join(sorted(odd)[:_LISTED])}: {_NAME_ONE}."
            )
        lost = sorted(set(base.raw.entries) - held - set(base.specs))
        if lost:
            raise CheckpointError(
                f"scheme='keep': {base.path} has scales of activations or of the KV cache "
                f"({', '.join(lost[:_LISTED])}), which were calibrated before this fine-tuning and are not "
                f"written again: {_NAME_ONE}."
            )


def _layout_of(base: Checkpoint, name: str, layouts: Layouts) -> Layout:
    """The layout of a weight, with the dtype that its scales have in the file."""
    layout, stored = layouts.of(name.removesuffix(".weight")), base.stored(name)
    if layout is None or stored is None:
        raise CheckpointError(f"no config group is for {name}, which is quantized")
    if not isinstance(layout.scales, NumberScales):
        return layout
    dtype = base.raw.entries[stored.parts[SCALE]].dtype if SCALE in stored.parts else None
    return dataclasses.replace(layout, scale_dtype=dtype)


def _explained(tensor: TensorPlan) -> TensorPlan:
    """Why a tensor is stored so: because the base has it so."""
    if tensor.quantize:
        return dataclasses.replace(tensor, reason=f"{tensor.reason}, as in the base")
    reason = tensor.reason.replace("ignored by pattern", "in 16 bit in the base")
    return dataclasses.replace(tensor, reason=reason)
