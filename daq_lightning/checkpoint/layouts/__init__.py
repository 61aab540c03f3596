"""The deployable layouts: how codes and scales are named and shaped, and what config.json says of them.

One container a file; `make_layout` chooses it, `read_layouts` recognizes it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from daq_lightning.checkpoint.layouts.compressed_tensors import (
    CompressedTensorsLayout,
    read_compressed_tensors,
)
from daq_lightning.checkpoint.layouts.fp8 import Fp8Layout, read_fp8
from daq_lightning.checkpoint.layouts.groups import Layouts as Layouts
from daq_lightning.checkpoint.layouts.layout import Described
from daq_lightning.checkpoint.layouts.layout import Layout as Layout
from daq_lightning.checkpoint.schemes import SCHEMES, Container, choose_scheme
from daq_lightning.checkpoint.tensor_file import CheckpointError
from daq_lightning.numerics.formats import ScaleFormat

_LAYOUTS: Mapping[Container, type[Layout]] = {
    layout.container: layout for layout in (Fp8Layout, CompressedTensorsLayout)
}


_READERS: Mapping[Container, Callable[[Mapping[str, Any]], Sequence[Described]]] = {
    "fp8": lambda quantization: [read_fp8(quantization)],
    "compressed-tensors": lambda quantization: read_compressed_tensors(quantization, SCHEMES.values()),
}


def make_layout(
    name: str,
    *,
    container: Container | None = None,
    scale_format: ScaleFormat | None = None,
    group: int | None = None,
) -> Layout:
    """The layout of a scheme; arguments and errors are those of `choose_scheme`, but for `group`: how many
    neighbours in a row share a scale, None for the scheme's own."""
    scheme, container, scale_format = choose_scheme(name, container, scale_format)
    return _LAYOUTS[container](scheme=scheme.in_groups(group), scale_format=scale_format)


def listed_modules(quantization: Mapping[str, Any]) -> list[str]:
    """The modules that a `quantization_config` says are not quantized: names, and patterns after `re:`.

    Raises:
        CheckpointError: The list is none.
    """
    field = "modules_to_not_convert" if quantization.get("quant_method") == "fp8" else "ignore"
    listed = quantization.get(field) or []
    if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
        raise CheckpointError(
            f"quantization_config should have a list of names in {field}, got {listed!r:.80}"
        )
    return listed


def read_layouts(quantization: Mapping[str, Any]) -> Layouts:
    """The layouts that a `quantization_config` describes: one, or one a config group.

    Raises:
        CheckpointError: It is missing, or describes something else than the layouts of this package.
    """
    method: Any = quantization.get("quant_method")
    if method not in list(_READERS):  # by equality: it may be anything
        raise CheckpointError(
            "config.json should have a quantization_config with quant_method 'fp8' or 'compressed-tensors', "
            f"got {method!r}"
        )
    groups = [
        (
            make_layout(
                one.scheme,
                container=method,
                scale_format="ue8m0" if one.powers_of_two else None,
                group=one.group,
            ),
            one.targets,
        )
        for one in _READERS[method](quantization)
    ]
    return Layouts(groups=tuple(groups))


def read_layout(quantization: Mapping[str, Any]) -> Layout:
    """The one layout that a `quantization_config` describes.

    Raises:
        CheckpointError: As for `read_layouts`, or it describes several.
    """
    found = read_layouts(quantization).every
    if len(found) != 1:
        raise CheckpointError(f"quantization_config should have one config group, got {len(found)}")
    return found[0]
