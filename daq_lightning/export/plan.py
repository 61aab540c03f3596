"""Which tensor is stored how, and why: decided from names, shapes and roles, before any weight is read.

    linear, expert  -> codes and scale of the scheme
    everything else -> kept: head, router, embedding, norm, bias, vision tower
    the list of unquantized Linear modules goes into config.json, because readers trust it blindly

One scheme serves the whole model, `layout_choice` says which; or each weight has a rung of a ladder, as
`mixed` places it. Projections that servers fuse (q/k/v, gate/up) are quantized together or not at all, in one
scheme, and where a weight has a global scale they share one: servers take one of them for all.

Source: the readers, as listed in `daq_lightning.checkpoint.layouts`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from daq_lightning.checkpoint.layouts import Layout, Layouts, make_layout
from daq_lightning.checkpoint.manifest import KEPT
from daq_lightning.checkpoint.schemes import FULL
from daq_lightning.checkpoint.tensor_file import CheckpointError, TensorSpec
from daq_lightning.export.ignore import ignored_by
from daq_lightning.export.layout_choice import check_layouts, quantizable, rungs_of
from daq_lightning.export.listed import ignore_list
from daq_lightning.export.progress import size_text
from daq_lightning.export.rungs import Placed, lowest
from daq_lightning.export.sizes import kept_dtype
from daq_lightning.export.targets import layouts_of
from daq_lightning.model.fusion import check_experts, check_fused, shared_input
from daq_lightning.model.outline import Outline, Role

if TYPE_CHECKING:
    from daq_lightning.export.settings import ExportSettings

_KEEP_REASON: Mapping[Role, str] = {
    "router": "router",
    "head": "output head",
    "outside": "outside the language model",
    "stack": "experts in one tensor, which readers take only in 16 bit",
    "float32": "transformers keeps it in float32",
    "plain": "vLLM reads it in 16 bit",
    "upcast": "vLLM reads it in 16 bit, or FP8",
    "conv1d": "Conv1D (transposed Linear), which no reader takes",
    "other": "not a Linear weight",
}


@dataclass(frozen=True, kw_only=True)
class TensorPlan:
    """What happens to one tensor.

    Attributes:
        spec: Name, dtype and shape as the weight comes in.
        key: Its name in memory.
        role: What it is to the model.
        quantize: Whether it is stored as codes and scale.
        stored: Part -> what the file will hold of it: those of the layout, or `KEPT`, the tensor in its final
            dtype.
        reason: Why, in a few words.
        together: Equal for weights that are searched and rounded together, for they share an input; else "".
        form: Its layout; None for a tensor that is kept.
    """

    spec: TensorSpec
    key: str
    role: Role
    quantize: bool
    stored: Mapping[str, TensorSpec]
    reason: str
    together: str = ""
    form: Layout | None = None

    @property
    def layout(self) -> Layout:
        """The layout of a quantized tensor."""
        if self.form is None:
            raise ValueError(f"{self.spec.name} is not quantized, and has no layout.")
        return self.form


@dataclass(frozen=True, kw_only=True)
class ExportPlan:
    """The plan of a checkpoint.

    Attributes:
        tensors: One entry per tensor, in file order.
        rungs: The layouts that tensors may have, the lowest first.
        ignore: Full names of the Linear modules that are not quantized, in checkpoint and in memory names.
        dtype: Of kept tensors, and the `dtype` of config.json.
        notes: What the user should know, such as a fallback.
        placed: Name -> rung, of all weights that could be quantized.
    """

    tensors: tuple[TensorPlan, ...]
    rungs: tuple[Layout, ...]
    ignore: tuple[str, ...]
    dtype: torch.dtype
    notes: tuple[str, ...]
    placed: Mapping[str, Placed]

    @property
    def layout(self) -> Layout:
        """The layout of the quantized tensors; the lowest, where a budget places them."""
        return self.rungs[0]

    @property
    def quantized(self) -> list[TensorPlan]:
        """The tensors that are searched."""
        return [tensor for tensor in self.tensors if tensor.quantize]

    @property
    def layouts(self) -> Layouts:
        """The layouts of all quantized tensors; of several, each with the modules it is for."""
        return layouts_of(self.quantized, self.layout)

    @property
    def stored(self) -> list[TensorSpec]:
        """Everything that the files will hold, in order."""
        return [spec for tensor in self.tensors for spec in tensor.stored.values()]

    @property
    def stored_together(self) -> list[list[TensorSpec]]:
        """The same, in parts that go into one file: a tensor, or all that are rounded together."""
        parts: dict[str, list[TensorSpec]] = {}
        for tensor in self.tensors:
            parts.setdefault(tensor.together or f"={tensor.spec.name}", []).extend(tensor.stored.values())
        return list(parts.values())

    def table(self) -> str:
        """The plan as text, one line per tensor, then a summary and the notes."""
        width = max((len(tensor.spec.name) for tensor in self.tensors), default=0)
        lines = [
            f"{tensor.spec.name:{width}}  {'x'.join(map(str, tensor.spec.shape)):>14}  "
            f"{str(tensor.spec.dtype).removeprefix('torch.'):>9} -> "
            f"{self._stored_as(tensor):9} {tensor.reason}"
            for tensor in self.tensors
        ]
        before = sum(tensor.spec.nbytes for tensor in self.tensors)
        after = sum(spec.nbytes for spec in self.stored)
        lines.append(
            f"{self.layouts.scheme}: {len(self.quantized)} of {len(self.tensors)} tensors in "
            f"{' and '.join(dict.fromkeys(one.scheme.title for one in self.layouts.every))}, "
            f"{size_text(before)} -> {size_text(after)}"
        )
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def _stored_as(self, tensor: TensorPlan) -> str:
        if tensor.quantize:
            return tensor.layout.scheme.code
        return str(tensor.stored[KEPT].dtype).removeprefix("torch.")

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain values."""
        tensors = {
            tensor.spec.name: {
                "shape": list(tensor.spec.shape),
                "quantize": tensor.quantize,
                "scheme": tensor.layout.scheme.name if tensor.quantize else None,
                "reason": tensor.reason,
            }
            for tensor in self.tensors
        }
        return {
            "scheme": self.layouts.scheme,
            "bytes": sum(spec.nbytes for spec in self.stored),
            "tensors": tensors,
            "notes": list(self.notes),
        }


def plan_export(
    specs: Sequence[TensorSpec],
    outline: Outline,
    settings: ExportSettings,
    placed: Mapping[str, Placed] | None = None,
    kept: Mapping[str, Layout] | None = None,
) -> ExportPlan:
    """Decides what happens to every tensor.

    Args:
        specs: The tensors of the checkpoint, in order.
        outline: Says which role each tensor has, and its name in memory.
        settings: What the user chose.
        placed: The rungs of weights, as a budget places them; None for the lowest that takes each.
        kept: Name -> layout, of a base which is kept; None for those that the settings mean.

    Raises:
        CheckpointError: Nothing to quantize, sizes that the scheme cannot hold, experts of several shapes, an
            ignore pattern that matches nothing, or one that splits projections which servers fuse.
    """
    keys = outline.keys
    roles: dict[str, Role] = {spec.name: outline.role(keys[spec.name], len(spec.shape)) for spec in specs}
    ignored = ignored_by(settings.ignore, specs, keys)
    chosen = [
        spec for spec in specs if roles[spec.name] in quantizable(settings) and spec.name not in ignored
        and spec.dtype.is_floating_point and min(spec.shape) > 0
    ]  # fmt: skip
    if not chosen:
        conv1d = " Its Conv1D layers hold transposed weights, which no reader takes." * (
            "conv1d" in roles.values()
        )
        plain = " Its other Linear layers are of a kind that vLLM reads in 16 bit." * (
            "plain" in roles.values()
        )
        raise CheckpointError(
            f"{outline.model} has no Linear weight to quantize among its {len(specs)} tensors "
            f"(output heads, routers and ignored modules are kept).{conv1d}{plain}"
        )
    check_fused({spec.name for spec in chosen}, roles)
    check_experts(chosen, specs, keys, roles)
    dtype, masters = kept_dtype(specs)
    if kept is None:
        experts = any(roles[spec.name] == "expert" for spec in chosen)
        schemes, notes = rungs_of(settings, chosen, experts=experts)
        rungs = [make_layout(name, container=held, scale_format=scale) for name, held, scale in schemes]
        placed = lowest(settings, rungs, chosen, dtype) if placed is None else placed
        named = {layout.scheme.name: layout for layout in rungs}
        layouts = {spec.name: named[one.rung] for spec in chosen if (one := placed[spec.name]).rung != FULL}
    else:
        layouts, notes = {spec.name: kept[spec.name] for spec in chosen}, []
        rungs = sorted(dict.fromkeys(layouts.values()), key=lambda layout: layout.scheme.format.bits)
        placed = {name: Placed(layout.scheme.name) for name, layout in layouts.items()}
    notes += check_layouts(rungs, layouts, chosen, roles, outline.model) + _on_stacks(specs, roles)
    doubles = sum(spec.dtype == torch.float64 for spec in chosen)
    if doubles:
        notes.append(f"{doubles} weights are float64: they were searched and measured as float32.")
    reasons = dict.fromkeys(ignored, "ignored by pattern")
    reasons |= {name: one.reason for name, one in placed.items() if one.rung == FULL}
    shared = {spec.name: shared_input(spec.name) for spec in chosen}
    tensors = tuple(
        _quantized(spec, keys[spec.name], roles[spec.name], layouts[spec.name],
                   placed[spec.name].reason, shared[spec.name] if settings.by_curvature else "")
        if spec.name in layouts
        else _kept(spec, keys, roles[spec.name], (dtype, masters), reasons.get(spec.name, ""))
        for spec in specs
    )  # fmt: skip
    return ExportPlan(
        tensors=tensors,
        ignore=ignore_list(tensors, outline, rungs[0].container),
        dtype=dtype,
        notes=tuple(notes),
        placed={spec.name: placed[spec.name] for spec in chosen},
        rungs=tuple(rungs),
    )


def _on_stacks(specs: Sequence[TensorSpec], roles: Mapping[str, Role]) -> list[str]:
    """What to know of experts that are not quantized since they are in one tensor."""
    stacks = [spec for spec in specs if roles[spec.name] == "stack"]
    if not stacks:
        return []
    kept, every = (sum(spec.nbytes for spec in some) for some in (stacks, specs))
    return [
        f"The experts of each layer are in one tensor (such as {stacks[0].name}), which no reader takes "
        f"quantized: {size_text(kept)} of {size_text(every)} stay in 16 bit."
    ]


def _quantized(spec: TensorSpec, key: str, role: Role, layout: Layout, why: str, together: str) -> TensorPlan:
    fused = shared_input(spec.name) if layout.scale_format == "e4m3" else ""
    return TensorPlan(
        spec=spec,
        key=key,
        role=role,
        quantize=True,
        stored=layout.stored(spec),
        reason=why or layout.scheme.name,
        together=together or fused,
        form=layout,
    )


def _kept(
    spec: TensorSpec, keys: Mapping[str, str], role: Role, kept: tuple[torch.dtype, bool], reason: str
) -> TensorPlan:
    dtype, masters = kept
    cast = spec.dtype == torch.float64 or (masters and spec.dtype == torch.float32)  # no reader takes float64
    stored = TensorSpec(name=spec.name, dtype=dtype if cast else spec.dtype, shape=spec.shape)
    return TensorPlan(
        spec=spec,
        key=keys[spec.name],
        role=role,
        quantize=False,
        stored={KEPT: stored},
        reason=f"kept: {reason or _KEEP_REASON.get(role, role)}",
    )
