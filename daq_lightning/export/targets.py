"""Which modules each layout of an export is for, in all the names that readers know them by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from daq_lightning.checkpoint.layouts.groups import Layouts
from daq_lightning.model.fusion import experts_of

if TYPE_CHECKING:
    from daq_lightning.checkpoint.layouts import Layout
    from daq_lightning.export.plan import TensorPlan


def layouts_of(quantized: Sequence[TensorPlan], lowest: Layout) -> Layouts:
    """The layouts of some tensors; of several, each with the modules it is for, the smallest format first.

    Experts are named by patterns, one a layer, for readers call their projections by other names than the
    files; those that are all in one layout by one for all layers, which transformers needs.
    """
    groups: dict[Layout, dict[str, None]] = {}
    of_experts = {tensor.layout for tensor in quantized if tensor.role == "expert"}
    for tensor in quantized:
        targets = groups.setdefault(tensor.layout, {})
        names = [name.removesuffix(".weight") for name in (tensor.spec.name, tensor.key)]
        if tensor.role == "expert":
            names = [experts_of("" if len(of_experts) == 1 else names[0])]
        targets.update(dict.fromkeys(names))
    upwards = sorted(groups, key=lambda layout: layout.scheme.format.bits)
    every = tuple((layout, tuple(groups[layout])) for layout in upwards)
    return Layouts(groups=every or ((lowest, ()),))
