"""The weights that an export with a setting would be read back as, without writing it.

Scales come from the search that exports use, in the format that the readers of the scheme keep; rounding with
curvature changes the codes at these scales.

Legend: M out, N in.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.retention.curvature import Curvature
from benchmarks.retention.settings import Setting
from benchmarks.retention.subjects import Subject
from daq_lightning.checkpoint.schemes import choose_scheme
from daq_lightning.numerics.objectives import DeltaStats, measure
from daq_lightning.numerics.quantize import dequantize
from daq_lightning.numerics.rounding.rounding import round_with_curvature
from daq_lightning.numerics.search.search import search_batch


class Quantized(NamedTuple):
    """float32 weights by name, and the sums of their updates."""

    weights: dict[str, Tensor]
    stats: DeltaStats


def quantized(subject: Subject, setting: Setting, curvature: Curvature | None = None) -> Quantized:
    """Weights of a subject under a setting; curvature where its rounding is not "nearest"."""
    if setting.kind in ("post", "base"):
        weights = dict(subject.post if setting.kind == "post" else subject.base)
        return Quantized(weights, total(subject, weights))
    scheme, _, scale_format = choose_scheme(setting.scheme)
    by_shape: dict[torch.Size, list[str]] = {}
    for name in subject.quantized:
        by_shape.setdefault(subject.post[name].shape, []).append(name)
    weights, stats = {}, DeltaStats.zero(torch.device("cpu"))
    for names in by_shape.values():
        results = search_batch(
            [subject.post[name] for name in names],
            [subject.base[name] for name in names],
            scheme.granularity,
            setting.search(),
            scale_format=scale_format,
            names=names,
            fmt=scheme.format,
        )
        for name, result in zip(names, results, strict=True):
            codes = result.codes
            if setting.rounding != "nearest":
                assert curvature is not None
                sides = curvature.factors(name, setting)
                codes = round_with_curvature(
                    subject.post[name],
                    result.scale,
                    scheme.granularity,
                    inputs=sides.inputs,
                    outputs=sides.outputs,
                    name=name,
                    fmt=scheme.format,
                ).codes
            else:
                stats = stats.add(result.stats.total())
            weights[name] = dequantize(codes, result.scale, scheme.granularity)
    return Quantized(weights, stats if setting.rounding == "nearest" else total(subject, weights))


def total(subject: Subject, weights: Mapping[str, Tensor]) -> DeltaStats:
    """The sums of the quantized weights of a subject."""
    stats = DeltaStats.zero(torch.device("cpu"))
    for name in subject.quantized:
        stats = stats.add(measure(subject.post[name], subject.base[name], weights[name]))
    return stats
