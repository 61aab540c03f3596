"""Which weights of a family no blocks of 128 fit at the sizes of its own default configuration."""

from __future__ import annotations

import torch

from benchmarks.families.models import class_of
from daq_lightning.model.architecture import Architecture

BLOCK = 128


def that_fit_no_blocks(family: str, *, experts: bool) -> list[str]:
    """The last parts of their names; [] also of a class whose default configuration makes no model.

    Args:
        family: By name.
        experts: Whether its experts are quantized.
    """
    kind = class_of(family)
    try:
        with torch.device("meta"):
            outline = Architecture(kind(kind.config_class())).outline({})
    except Exception:  # a default of transformers' own that lacks something
        return []
    odd = set()
    for key, shape in outline.parameters.items():
        role = outline.roles.get(key)
        linear = role in ("linear", "upcast") and len(shape) == 2
        if linear or (role == "expert" and experts and len(shape) == 3):
            rows, cols = shape[-2:]
            parts = 2 if role == "expert" and "gate_up" in key else 1
            if rows % (parts * BLOCK) or cols % BLOCK:
                odd.add(key.removesuffix(".weight").rpartition(".")[2])
    return sorted(odd)
