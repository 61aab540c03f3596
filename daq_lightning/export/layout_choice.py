"""Which layout an export gets: the one that was asked for, if its sizes and its readers allow it.

    auto        FP8_BLOCK if all sizes are multiples of 128, else FP8_DYNAMIC
    groups      a row is cut into whole groups, or the scheme is refused, with the weights by name
    a budget    each weight has a rung of a ladder, what servers fuse the same one
    keep        each weight has the layout that it has in the base

Readers compute garbage from sizes that do not fit, or refuse them; see `daq_lightning.checkpoint.readers`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from daq_lightning.checkpoint.readers import check_readable, notes_on_mixed, notes_on_readers
from daq_lightning.checkpoint.schemes import FULL, LADDERS, SCHEMES
from daq_lightning.checkpoint.tensor_file import CheckpointError, TensorSpec
from daq_lightning.export.sizes import check_sizes, odd_sizes
from daq_lightning.numerics.formats import PerBlock
from daq_lightning.numerics.formats.fp8 import FP8_E4M3

if TYPE_CHECKING:
    from daq_lightning.checkpoint.layouts import Layout
    from daq_lightning.checkpoint.schemes import Container
    from daq_lightning.export.settings import ExportSettings
    from daq_lightning.model.outline import Role
    from daq_lightning.numerics.formats import ScaleFormat


_INSTEAD_FOR_EXPERTS = {"FP8A16": "FP8_DYNAMIC"}


def quantizable(settings: ExportSettings) -> tuple[Role, ...]:
    """The roles of weights that readers take in the lowest scheme of the settings."""
    lowest = settings.ladder[0] if settings.ladder else settings.scheme
    fp8 = lowest == "auto" or SCHEMES[lowest].format is FP8_E4M3
    return ("linear", "expert", "upcast") if fp8 else ("linear", "expert")


def rungs_of(
    settings: ExportSettings, chosen: Sequence[TensorSpec], *, experts: bool
) -> tuple[list[tuple[str, Container | None, ScaleFormat | None]], list[str]]:
    """The schemes that weights may have, the lowest first, as `make_layout` takes them; and what the user
    should know of the choice.

    Args:
        settings: What the user chose.
        chosen: The weights to quantize.
        experts: Whether there are experts among them.

    Raises:
        CheckpointError: Rungs that no container holds together.
    """
    scheme, container, notes = _scheme_of(settings, chosen)
    if settings.budget is None:
        return [(scheme, container, settings.scale_format)], notes
    # vLLM has no experts in FP8 whose activations stay in 16 bit
    usual = [_INSTEAD_FOR_EXPERTS.get(name, name) if experts else name for name in LADDERS[scheme]]
    names = [name for name in settings.ladder or usual if name != FULL]
    if len(names) > 1:
        if settings.container == "fp8":
            raise CheckpointError(
                f"The fp8 container holds one scheme, and this ladder has {', '.join(names)}: leave "
                f"container='fp8' out, or use ladder=('FP8_BLOCK', {FULL!r})."
            )
        container = "compressed-tensors"
    own = {name: SCHEMES[name].scale_format is not None for name in names}
    return [(name, container, None if own[name] else settings.scale_format) for name in names], notes


def _scheme_of(
    settings: ExportSettings, chosen: Sequence[TensorSpec]
) -> tuple[str, Container | None, list[str]]:
    """The lowest scheme and the container that the settings mean, and what the user should know of it."""
    scheme = settings.ladder[0] if settings.ladder else settings.scheme
    if scheme != "auto":
        return scheme, settings.container, []
    odd = odd_sizes(chosen, 128, 128)
    if not odd:
        return "FP8_BLOCK", settings.container, []
    note = (
        f"FP8_DYNAMIC instead of FP8_BLOCK: {len(odd)} weights have sizes that are not multiples of "
        f"128, such as {odd[0].name} {odd[0].shape}."
    )
    return "FP8_DYNAMIC", None, [note]


def check_layouts(
    rungs: Sequence[Layout],
    layouts: Mapping[str, Layout],
    chosen: Sequence[TensorSpec],
    roles: Mapping[str, Role],
    model: str,
) -> list[str]:
    """What the user should know of the readers of the layouts.

    Args:
        rungs: The layouts of the export.
        layouts: Name -> layout, of the weights that are not kept in 16 bit.
        chosen: The weights to quantize.
        roles: Name -> role, of all tensors.
        model: Name of the model's class.

    Raises:
        CheckpointError: Sizes that a scheme cannot hold, or readers that do not load it.
    """
    notes: list[str] = []
    used: list[str] = []
    for layout in rungs:
        specs = [spec for spec in chosen if layouts.get(spec.name) == layout]
        if specs:
            notes += _check_layout(layout, specs, roles, model)
            used.append(layout.scheme.name)
    of_experts = [layouts.get(spec.name) for spec in chosen if roles[spec.name] == "expert"]
    experts = {FULL if layout is None else layout.scheme.name for layout in of_experts}
    return list(dict.fromkeys(notes + notes_on_mixed(used, sorted(experts))))


def _check_layout(
    layout: Layout, chosen: Sequence[TensorSpec], roles: Mapping[str, Role], model: str
) -> list[str]:
    """Checks the weights of one layout."""
    check_sizes(layout, chosen)
    experts = any(roles[spec.name] == "expert" for spec in chosen)
    blocks = isinstance(layout.granularity, PerBlock) and layout.granularity.rows > 1
    check_readable(layout.scheme.name, layout.container, blocks=blocks, experts=experts)
    form = str(layout.quantization_config(()).get("format", ""))
    return notes_on_readers(layout.scheme.name, form, experts=experts, model=model)
