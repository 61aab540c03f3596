"""Which layout an export gets: the one that was asked for, if its sizes and its readers allow it.

    auto        FP8_BLOCK if all sizes are multiples of 128, else FP8_DYNAMIC
    groups      a row is cut into whole groups, or the scheme is refused, with the weights by name
    a budget    each weight has a rung of a ladder, what servers fuse the same one

Readers compute garbage from sizes that do not fit, or refuse them; see `daq_lightning.checkpoint.readers`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from daq_lightning.checkpoint.ladders import LADDERS
from daq_lightning.checkpoint.layouts import Layout, Layouts, make_layout
from daq_lightning.checkpoint.readers import check_readable, notes_on_mixed, notes_on_readers
from daq_lightning.checkpoint.schemes import FULL, SCHEMES
from daq_lightning.checkpoint.tensor_file import CheckpointError, TensorSpec
from daq_lightning.model.fusion import fused_groups
from daq_lightning.numerics.formats import PerBlock

if TYPE_CHECKING:
    from daq_lightning.checkpoint.schemes import Container
    from daq_lightning.export.plan import TensorPlan
    from daq_lightning.export.settings import ExportSettings
    from daq_lightning.model.outline import Role

_LISTED = 8
_PACKED_ROWS = 8  # of zero points in an int32


class Placed(NamedTuple):
    """Where a weight stands on the ladder.

    Attributes:
        rung: A scheme, or "16".
        reason: Why, in a few words; "" where there is no budget.
    """

    rung: str
    reason: str = ""


def rungs_of(settings: ExportSettings, chosen: Sequence[TensorSpec]) -> tuple[list[Layout], list[str]]:
    """The layouts that weights may have, the lowest first, and what the user should know of the choice.

    Args:
        settings: What the user chose.
        chosen: The weights to quantize.

    Raises:
        CheckpointError: Rungs that no container holds together.
    """
    scheme, container, notes = _scheme_of(settings, chosen)
    if settings.budget is None:
        return [make_layout(scheme, container=container, scale_format=settings.scale_format)], notes
    names = [name for name in settings.ladder or LADDERS[scheme] if name != FULL]
    if len(names) > 1:
        if settings.container == "fp8":
            raise CheckpointError(
                f"The fp8 container holds one scheme, and this ladder has {', '.join(names)}: leave "
                f"container='fp8' out, or use ladder=('FP8_BLOCK', {FULL!r})."
            )
        container = "compressed-tensors"
    own = {name: SCHEMES[name].scale_format is not None for name in names}
    return [
        make_layout(name, container=container, scale_format=None if own[name] else settings.scale_format)
        for name in names
    ], notes


def _scheme_of(
    settings: ExportSettings, chosen: Sequence[TensorSpec]
) -> tuple[str, Container | None, list[str]]:
    """The lowest scheme and the container that the settings mean, and what the user should know of it."""
    scheme = settings.ladder[0] if settings.ladder else settings.scheme
    if scheme != "auto":
        return scheme, settings.container, []
    odd = _odd(chosen, 128, 128)
    if not odd:
        return "FP8_BLOCK", settings.container, []
    note = (
        f"FP8_DYNAMIC instead of FP8_BLOCK: {len(odd)} weights have sizes that are not multiples of "
        f"128, such as {odd[0].name} {odd[0].shape}."
    )
    return "FP8_DYNAMIC", None, [note]


def rungs_for(
    names: Sequence[str], rungs: Sequence[Layout], settings: ExportSettings, specs: Mapping[str, TensorSpec]
) -> list[str]:
    """The rungs that some weights can have, all of them the same: their sizes decide.

    Args:
        names: Weights that servers fuse.
        rungs: As `rungs_of` gives them.
        settings: What the user chose.
        specs: The weights by name.
    """
    found = []
    for layout in rungs:
        with contextlib.suppress(CheckpointError):
            _check_sizes(layout, [specs[name] for name in names])
            found.append(layout.scheme.name)
    ladder = settings.ladder or LADDERS[rungs[0].scheme.name]
    return [*found, FULL] if FULL in ladder else found


def lowest(
    settings: ExportSettings, rungs: Sequence[Layout], chosen: Sequence[TensorSpec]
) -> dict[str, Placed]:
    """Every weight on the lowest rung that its sizes allow; without a budget there is only one."""
    first, specs = rungs[0].scheme.name, {spec.name: spec for spec in chosen}
    if settings.budget is None:
        return dict.fromkeys(specs, Placed(first))
    groups = {tuple(names): rungs_for(names, rungs, settings, specs) for names in fused_groups(specs)}
    return {
        name: Placed(rung, "no scheme of the ladder fits its sizes" * (rung == FULL))
        for names, allowed in groups.items()
        for name, rung in dict.fromkeys(names, (allowed or [first])[0]).items()
    }


def check_layouts(
    rungs: Sequence[Layout],
    placed: Mapping[str, Placed],
    chosen: Sequence[TensorSpec],
    roles: Mapping[str, Role],
) -> list[str]:
    """What the user should know of the readers of the layouts.

    Args:
        rungs: The layouts of the export.
        placed: Name -> rung, of the weights to quantize.
        chosen: These weights.
        roles: Name -> role, of all tensors.

    Raises:
        CheckpointError: Sizes that a scheme cannot hold, or readers that do not load it.
    """
    notes: list[str] = []
    on = {layout.scheme.name: [spec for spec in chosen if placed[spec.name].rung == layout.scheme.name]
          for layout in rungs}  # fmt: skip
    for layout in rungs:
        if on[layout.scheme.name]:
            notes += _check_layout(layout, on[layout.scheme.name], roles)
    used = [name for name, specs in on.items() if specs]
    experts = {placed[spec.name].rung for spec in chosen if roles[spec.name] == "expert"}
    return list(dict.fromkeys(notes + notes_on_mixed(used, sorted(experts))))


def layouts_of(quantized: Sequence[TensorPlan], lowest: Layout) -> Layouts:
    """The layouts of some tensors; of several, each with the modules it is for, in all their names.

    Experts that are all in one layout are named by a pattern: transformers finds their scheme by it.
    """
    groups: dict[str, tuple[Layout, dict[str, None]]] = {}
    of_experts = {tensor.layout.scheme.name for tensor in quantized if tensor.role == "expert"}
    for tensor in quantized:
        targets = groups.setdefault(tensor.layout.scheme.name, (tensor.layout, {}))[1]
        names = [tensor.spec.name, tensor.key]
        if tensor.role == "expert":
            names = ["re:.*\\.experts\\..*"] if len(of_experts) == 1 else names[:1]
        targets.update(dict.fromkeys(name.removesuffix(".weight") for name in names))
    upwards = sorted(groups.values(), key=lambda group: group[0].scheme.format.bits)
    every = tuple((layout, tuple(targets)) for layout, targets in upwards)
    return Layouts(groups=every or ((lowest, ()),))


def _check_layout(layout: Layout, chosen: Sequence[TensorSpec], roles: Mapping[str, Role]) -> list[str]:
    """Checks the weights of one layout."""
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
