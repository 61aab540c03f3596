"""The format of a quantized base, which an export of scheme "keep" takes over: an adapter's on its own base.

    container, scheme, group size     those of the base
    scales, zero points               the base's own, to the bit
    codes                             the base's own where nothing changed; else chosen anew
    modules in 16 bit                 stay so; the quantization_config is the base's

Nearest codes at these scales are a "plain merge". The dequantized base lies on the very grid, so they are the
base's codes again wherever the update is below half a step: most of an adapter is gone. `rounding` chooses
them along a curvature instead.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from daq_lightning.checkpoint.layouts import Layout, listed_modules, read_layout
from daq_lightning.checkpoint.layouts.parts import GLOBAL_SCALE, SCALE, Unpacked
from daq_lightning.checkpoint.layouts.scales import NumberScales
from daq_lightning.checkpoint.reader import Checkpoint
from daq_lightning.checkpoint.tensor_file import CheckpointError
from daq_lightning.export.plan import ExportPlan, plan_export
from daq_lightning.numerics.objectives import DeltaStats, as_searched
from daq_lightning.numerics.quantize import quantize
from daq_lightning.numerics.rounding.written import stats_of_codes
from daq_lightning.numerics.rounding.zero import counted_from_zero
from daq_lightning.numerics.search.search import search_scale
from daq_lightning.numerics.search.settings import ScaleSearch
from daq_lightning.numerics.search.stages import SearchResult

if TYPE_CHECKING:
    from daq_lightning.export.settings import ExportSettings
    from daq_lightning.export.source import Source
    from daq_lightning.export.stream import Pair

_LISTED = 3
_NAME_ONE = "name a scheme, such as scheme='W4A16' or 'FP8_DYNAMIC'"


@dataclass(frozen=True, kw_only=True)
class KeptFormat:
    """The format of a quantized folder.

    Attributes:
        checkpoint: The folder.
        layout: Of all its quantized weights.
    """

    checkpoint: Checkpoint
    layout: Layout

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
            layout = read_layout(base.raw.quantization)
        except ValueError as error:
            raise CheckpointError(f"scheme='keep': {base.path}: {error} Or {_NAME_ONE}.") from error
        if isinstance(layout.scales, NumberScales):
            first = next(weight for name in base if (weight := base.stored(name)) is not None)
            layout = dataclasses.replace(layout, scale_dtype=base.raw.entries[first.parts[SCALE]].dtype)
        kept = cls(checkpoint=base, layout=layout)
        kept._check()
        return kept

    @property
    def names(self) -> frozenset[str]:
        """The weights that the base quantizes."""
        return frozenset(name for name in self.checkpoint if self.checkpoint.stored(name) is not None)

    @property
    def quantization_config(self) -> dict[str, Any]:
        """That of the base, as it is."""
        return dict(self.checkpoint.raw.quantization)

    def plan(self, source: Source, settings: ExportSettings) -> ExportPlan:
        """The plan of a model in this format.

        Args:
            source: The fine-tuned model, under the names of the base.
            settings: Of scheme "keep".

        Raises:
            CheckpointError: As for `plan_export`, or the model has not the weights that the base quantizes.
        """
        kinds = source.outline
        others = [
            spec.name.removesuffix(".weight")
            for spec in source.specs
            if spec.name not in self.names
            and kinds.role(kinds.keys[spec.name], len(spec.shape)) in ("linear", "expert")
        ]
        named = dataclasses.replace(
            settings,
            scheme=self.layout.scheme.name,  # type: ignore[arg-type]
            container=self.layout.container,
            scale_format=self.layout.scale_format,
            ignore=tuple(others),
        )
        plan = plan_export(source.specs, source.outline, named, self.layout)
        planned = {tensor.spec.name for tensor in plan.quantized}
        if planned != self.names:
            odd = sorted(planned ^ self.names)
            raise CheckpointError(
                f"scheme='keep': {self.checkpoint.path} quantizes {len(self.names)} weights, of which the "
                f"fine-tuned model has other ones, or as something else than a Linear module: "
                f"{', '.join(odd[:_LISTED])}{', ...' * (len(odd) > _LISTED)}. Pass the base that it was "
                f"trained on, or {_NAME_ONE}."
            )
        tensors = tuple(
            dataclasses.replace(tensor, reason=f"{tensor.reason}, as in the base")
            if tensor.quantize
            else dataclasses.replace(
                tensor, reason=tensor.reason.replace("ignored by pattern", "in 16 bit in the base")
            )
            for tensor in plan.tensors
        )
        return dataclasses.replace(
            plan, tensors=tensors, ignore=tuple(listed_modules(self.quantization_config))
        )

    def merged(self, pairs: Sequence[Pair], reader_dtype: torch.dtype) -> list[SearchResult]:
        """The plain merge of some weights: the base's scales, and nearest codes.

        Where a weight equals its base, the codes are the base's own too.

        Args:
            pairs: The weights, and what they are measured against.
            reader_dtype: What readers dequantize to.

        Returns:
            Results as of a search: alpha is the multiple that the base's scale is of the absmax scale of the
            merged weight, `absmax_stats` are the sums of that one.

        Raises:
            ValueError: NaN or Inf in a weight, by name.
        """
        return [self._merged(pair, reader_dtype) for pair in pairs]

    def unchanged(self, name: str, weight: Tensor) -> bool:
        """Whether a weight is still what the base holds, in the dtype that the base is read in."""
        return bool((weight == self.checkpoint[name].to(weight.device)).all())

    def _merged(self, pair: Pair, reader_dtype: torch.dtype) -> SearchResult:
        name, granularity, fmt = pair.plan.spec.name, self.layout.granularity, self.layout.scheme.format
        weight = as_searched(pair.weight)
        base = weight if pair.base is None else as_searched(pair.base)
        stored = self.checkpoint.stored(name)
        assert stored is not None
        own = Unpacked(*(None if part is None else part.to(weight.device)  # type: ignore[arg-type]
                         for part in self.checkpoint.unpacked(name)))  # fmt: skip
        factor = stored.parts.get(GLOBAL_SCALE)
        global_scale = None if factor is None else self.checkpoint.raw[factor].to(weight.device)
        plain = search_scale(
            weight,
            base,
            granularity,
            ScaleSearch.absmax(),
            scale_format=self.layout.scale_format,
            name=name,
            fmt=fmt,
            global_scale=global_scale,
        )
        codes = own.codes
        if not self.unchanged(name, weight):
            moved = counted_from_zero(weight, own.scale, own.zero, granularity)
            codes = quantize(moved, own.scale, granularity, fmt)
        result = SearchResult(
            codes=codes,
            scale=own.scale,
            alpha=own.scale.double() / plain.scale.double(),
            stats=plain.absmax_stats,
            absmax_stats=plain.absmax_stats,
            global_scale=global_scale,
            zero=own.zero,
        )
        return measured(result, weight, base, self.layout, reader_dtype)

    def _check(self) -> None:
        """Refuses weights that the layout would store otherwise, and tensors that it has no place for."""
        base, odd, held = self.checkpoint, list[str](), set[str]()
        for name in self.names:
            stored = base.stored(name)
            assert stored is not None
            held |= set(stored.parts.values())
            expected = self.layout.stored(base.specs[name])
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


def measured(
    result: SearchResult, weight: Tensor, base: Tensor, layout: Layout, reader_dtype: torch.dtype
) -> SearchResult:
    """The same codes and scales with their sums, of the whole weight as one group.

    Args:
        result: Codes, scales and zero points.
        weight: The fine-tuned weight.
        base: The weight before.
        layout: Says which elements share a scale.
        reader_dtype: What a reader dequantizes to.
    """
    centered = Unpacked(result.codes, result.scale, result.zero).centered

    def seen_in(dtype: torch.dtype) -> DeltaStats:
        stats = stats_of_codes(weight, base, centered, result.scale, layout.granularity, dtype)
        return stats.map(lambda field: field[None])

    return dataclasses.replace(result, stats=seen_in(torch.float32), dequantized_stats=seen_in(reader_dtype))
