"""Which layout an export gets: the one that was asked for, if its sizes and its readers allow it.

    auto        FP8_BLOCK if all sizes are multiples of 128, else FP8_DYNAMIC
    groups      a row is cut into whole groups, or the scheme is refused, with the weights by name

Readers compute garbage from sizes that do not fit, or refuse them; see `daq_lightning.checkpoint.readers`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from daq_lightning.checkpoint.readers import check_readable, notes_on_readers
from daq_lightning.checkpoint.tensor_file import CheckpointError, TensorSpec
from daq_lightning.numerics.formats import PerBlock

if TYPE_CHECKING:
    from daq_lightning.checkpoint.layouts import Layout
    from daq_lightning.checkpoint.schemes import Container
    from daq_lightning.export.settings import ExportSettings
    from daq_lightning.model.outline import Role

_LISTED = 8
_PACKED_ROWS = 8  # of zero points in an int32


def scheme_of(
    settings: ExportSettings, chosen: Sequence[TensorSpec]
) -> tuple[str, Container | None, list[str]]:
    """The scheme and container that the settings mean, and what the user should know of the choice.

    Args:
        settings: What the user chose.
        chosen: The weights to quantize.
    """
    odd = _odd(chosen, 128, 128)
    if settings.scheme != "auto":
        return settings.scheme, settings.container, []
    if not odd:
        return "FP8_BLOCK", settings.container, []
    note = (
        f"FP8_DYNAMIC instead of FP8_BLOCK: {len(odd)} weights have sizes that are not multiples of "
        f"128, such as {odd[0].name} {odd[0].shape}."
    )
    return "FP8_DYNAMIC", None, [note]


def check_layout(layout: Layout, chosen: Sequence[TensorSpec], roles: Mapping[str, Role]) -> list[str]:
    """What the user should know of the readers of a layout.

    Args:
        layout: Of the export.
        chosen: The weights to quantize.
        roles: Name -> role, of all tensors.

    Raises:
        CheckpointError: Sizes that the scheme cannot hold, or readers that do not load it.
    """
    _check_sizes(layout, chosen)
    experts = any(roles[spec.name] == "expert" for spec in chosen)
    blocks = isinstance(layout.granularity, PerBlock) and layout.granularity.rows > 1
    check_readable(layout.scheme.name, layout.container, blocks=blocks, experts=experts)
    form = str(layout.quantization_config(()).get("format", ""))
    return notes_on_readers(layout.scheme.name, form, experts=experts)


def _check_sizes(layout: Layout, chosen: Sequence[TensorSpec]) -> None:
    """Raises CheckpointError for weights that do not consist of whole groups."""
    scheme, granularity = layout.scheme, layout.granularity
    if scheme.group is not None:
        odd = _odd(chosen, 1, scheme.group)
        if odd:
            raise CheckpointError(
                f"{scheme.name} cuts rows into groups of {scheme.group}; {len(odd)} weights have rows of "
                f"another length: {_listed(odd)}. Use a scheme with one scale per row (scheme='FP8_DYNAMIC', "
                f"'W8A8'), {_smaller(scheme.group)}or keep these weights (ignore)."
            )
    elif isinstance(granularity, PerBlock):
        odd = _odd(chosen, granularity.rows, granularity.cols)
        if odd:
            raise CheckpointError(
                f"{scheme.name} needs sizes that are multiples of {granularity.cols}; {len(odd)} weights "
                f"have others: {_listed(odd)}. Readers would compute garbage. Use scheme='FP8_DYNAMIC' (one "
                "scale per channel) or scheme='auto'."
            )
    if scheme.asymmetric:
        odd = _odd(chosen, _PACKED_ROWS, 1)
        if odd:
            raise CheckpointError(
                f"{scheme.name} packs the zero points of {_PACKED_ROWS} rows into one number; {len(odd)} "
                f"weights have a number of rows that is no multiple of it: {_listed(odd)}. vLLM would not "
                "load them. Use scheme='W4A16', or keep these weights (ignore)."
            )


def _smaller(group: int) -> str:
    return "one of smaller groups (scheme='MXFP4A16': 32, 'NVFP4A16': 16), " if group > 32 else ""


def _odd(specs: Iterable[TensorSpec], rows: int, cols: int) -> list[TensorSpec]:
    return [spec for spec in specs if spec.shape[0] % rows or spec.shape[1] % cols]


def _listed(specs: Sequence[TensorSpec]) -> str:
    shown = ", ".join(f"{spec.name} {spec.shape}" for spec in specs[:_LISTED])
    return shown + ", ..." * (len(specs) > _LISTED)
