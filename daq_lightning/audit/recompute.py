"""Reads the report of an export, worst weight first, and computes its figures once more from the files alone.

    dequantized = code * scale          the codes and scales that readers will use
    figures     = measure(post, base, dequantized)          the definition, not the search's kernels

A report that was written by the search and one that comes from the files are two witnesses: where they
differ, the folder does not hold what the report says, or base or post are not the models it was made from.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from daq_lightning.checkpoint.layouts import Layout, read_layout
from daq_lightning.checkpoint.layouts.parts import GLOBAL_SCALE, SCALE, Unpacked
from daq_lightning.checkpoint.reader import Checkpoint
from daq_lightning.checkpoint.tensor_file import CheckpointError
from daq_lightning.model.from_folder import FolderModel
from daq_lightning.numerics.formats import ScaleFormat
from daq_lightning.numerics.objectives import DeltaStats, measure
from daq_lightning.numerics.quantize import dequantize, min_max_scale, quantize
from daq_lightning.numerics.tiling import bands
from daq_lightning.report.figures import ExportReport, TensorReport

TOLERANCE = 1e-5
"""Of sums, relative to the largest value that each could have: the kernels add up in another order."""

_BAND = 1 << 20  # elements that are held in float64 at a time


def recompute(
    report: ExportReport, post: Mapping[str, Tensor], base: Mapping[str, Tensor], *, progress: bool = False
) -> ExportReport:
    """The report that the files of an export give.

    Args:
        report: Says where the export is, and which tensors it quantized.
        post: The fine-tuned weights that were exported.
        base: The weights before fine-tuning.
        progress: Whether to show a progress bar.

    Returns:
        The same report with the sums of the files, both of the written scales and of plain absmax scales. The
        alphas are those of the report.

    Raises:
        CheckpointError: A tensor of the report is missing or has another shape in the export, in post or in
            base.
    """
    files = Checkpoint(report.path)
    layout = read_layout(files.raw.quantization)
    scale_format = _scale_format(files, layout)
    names, dtype = _base_names(report, base), getattr(torch, report.dtype)
    tensors = []
    for tensor in _with_progress(report.tensors, progress):
        weight = _read(post, tensor.name, tensor, "fine-tuned model")
        reference = weight if tensor.without_base else _read(base, names[tensor.name], tensor, "base")
        stored = files.stored(tensor.name)
        if stored is None or stored.granularity != layout.granularity:
            raise CheckpointError(
                f"{report.path} has no codes and scale of {tensor.name}: run `daq-lightning verify`."
            )
        written = files.unpacked(tensor.name)
        factor = stored.parts.get(GLOBAL_SCALE)
        plain = min_max_scale(
            weight,
            layout.granularity,
            scale_format=scale_format,
            fmt=layout.scheme.format,
            global_scale=None if factor is None else files.raw[factor],
        )
        searched, absmax, dequantized = _measure(weight, reference, written, plain, layout, dtype)
        dequantized = None if tensor.dequantized is None else dequantized
        tensors.append(dataclasses.replace(tensor, searched=searched, absmax=absmax, dequantized=dequantized))
    return dataclasses.replace(report, tensors=tuple(tensors))


def differences(report: ExportReport, other: ExportReport) -> dict[str, list[str]]:
    """Tensor name -> the sums in which two reports of the same tensors differ by more than `TOLERANCE`."""
    found: dict[str, list[str]] = {}
    for mine, theirs in zip(report.tensors, other.tensors, strict=True):
        for side in ("searched", "absmax", "dequantized"):
            one, two = getattr(mine, side), getattr(theirs, side)
            if one is None or two is None:
                continue
            for field, limit in _limits(one)._asdict().items():
                left, right = float(getattr(one, field)), float(getattr(two, field))
                if not abs(left - right) <= TOLERANCE * float(limit):
                    found.setdefault(mine.name, []).append(
                        f"{side} {field}: report {left:g}, files {right:g}"
                    )
    return found


def _measure(
    weight: Tensor,
    base: Tensor,
    written: Unpacked,
    plain: tuple[Tensor, Tensor | None],
    layout: Layout,
    dtype: torch.dtype,
) -> tuple[DeltaStats, DeltaStats, DeltaStats]:
    """Sums of written codes, of plain absmax scales, and of the former rounded to dtype, in bands."""
    shape_MN, rows_of = (
        (weight.shape[0], weight.shape[1]),
        layout.granularity.cell((weight.shape[0], weight.shape[1])),
    )
    parts = list[tuple[DeltaStats, DeltaStats, DeltaStats]]()
    granularity, (scale, zero) = layout.granularity, plain
    for rows in bands(shape_MN, layout.granularity, _BAND):
        groups = slice(rows.start // rows_of[0], -(-rows.stop // rows_of[0]))
        kept = dequantize(
            written.codes[rows], written.scale[groups], granularity, zero=_part(written.zero, groups)
        )
        of_plain = quantize(
            weight[rows], scale[groups], granularity, layout.scheme.format, _part(zero, groups)
        )
        absmax = dequantize(of_plain, scale[groups], granularity, zero=_part(zero, groups))
        parts.append(
            (
                measure(weight[rows], base[rows], kept),
                measure(weight[rows], base[rows], absmax),
                measure(weight[rows], base[rows], kept.to(dtype)),
            )
        )
    searched, plain_stats, dequantized = (
        DeltaStats(*(torch.stack(fields).sum(0) for fields in zip(*side, strict=True)))
        for side in zip(*parts, strict=True)
    )
    return searched, plain_stats, dequantized


def _part(zero: Tensor | None, groups: slice) -> Tensor | None:
    return None if zero is None else zero[groups]


def _limits(stats: DeltaStats) -> DeltaStats:
    """What each sum is compared with: counts with the number of elements, products with the norms."""
    count = stats.n.double()
    dot = (stats.delta_sq * stats.delta_q_sq).sqrt()
    return DeltaStats(
        n=torch.zeros_like(count),
        n_changed=count,
        sign_equal=count,
        preserved=count,
        flipped=count,
        lost=count,
        dot=dot,
        delta_sq=stats.delta_sq,
        delta_q_sq=stats.delta_q_sq,
        error_sq=stats.error_sq,
    )


def _read(mapping: Mapping[str, Tensor], name: str, tensor: TensorReport, role: str) -> Tensor:
    where = f" {mapping.path}" if isinstance(mapping, Checkpoint) else ""
    if name not in mapping:
        raise CheckpointError(
            f"The {role}{where} has no tensor {name}: pass the one that the export was made from."
        )
    weight = mapping[name]
    if tuple(weight.shape) != tensor.shape:
        raise CheckpointError(
            f"The {role}{where} has {name} in shape {tuple(weight.shape)}, the export has {tensor.shape}: "
            "pass the one that the export was made from."
        )
    return weight


def _base_names(report: ExportReport, base: Mapping[str, Tensor]) -> dict[str, str]:
    """Names in the export -> names in the base, which may be of an older form."""
    names = {tensor.name: tensor.name for tensor in report.tensors}
    if all(name in base for name in names):
        return names
    keys = FolderModel(Path(report.path), len(Checkpoint(report.path).raw)).outline([*base, *names]).keys
    by_key = {keys[name]: name for name in base}
    return {name: name if name in base else by_key.get(keys[name], name) for name in names}


def _scale_format(files: Checkpoint, layout: Layout) -> ScaleFormat:
    """What scales were rounded to. compressed-tensors does not say it of powers of two, but the scales do."""
    if layout.scheme.scale_format is not None:
        return layout.scale_format
    for name in files:
        stored = files.stored(name)
        if stored is not None:
            mantissa = torch.frexp(files.raw[stored.parts[SCALE]].float()).mantissa
            if not bool((mantissa == 0.5).all()):
                return layout.scale_format
    return "ue8m0"


def _with_progress(tensors: Iterable[TensorReport], progress: bool) -> Iterator[TensorReport]:
    if not progress:
        yield from tensors
        return
    from tqdm import tqdm

    yield from tqdm(tensors, desc="Recompute", unit="tensor", dynamic_ncols=True)
