"""What an export did to every tensor, as numbers that can be recomputed from the files.

Each quantized tensor is listed with the sums of the scales that were written ("searched") and of plain absmax
scales ("absmax"), and the figures that follow from them. Both are those of float32 products of code and
scale, which FP8 kernels compute with; "dequantized" are the written scales for the other kind of reader:

    searched      float32(code) * scale           inside the FP8 kernels of vLLM and SGLang; what the search
    looks at dequantized   dtype(float32(code) * scale)    transformers and whoever dequantizes into 16 bit

The second rounding moves a weight by up to 2^-9 of itself, as much as many updates: where the base is a
16-bit model, some updates that the codes keep are gone in 16 bit. Totals are the figures of the added sums.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from daq_lightning.checkpoint.families import family_of
from daq_lightning.checkpoint.folder import REPORT, read_json
from daq_lightning.checkpoint.tensor_file import CheckpointError
from daq_lightning.numerics.bins import STEP_EDGES
from daq_lightning.numerics.objectives import DeltaStats, cosine, gain, mse, sign_rate
from daq_lightning.report.kv_cache import CacheReport
from daq_lightning.report.placement import Placement
from daq_lightning.report.rounding import Rounding
from daq_lightning.report.sampled import AlphaCurve, ByStep
from daq_lightning.report.shape import FLOAT_SUMS, check_report
from daq_lightning.report.validation import Validation, validation_from_dict, validation_to_dict

Side: TypeAlias = Literal["searched", "dequantized", "absmax", "plain", "root"]
_SIDES: tuple[Side, ...] = ("searched", "dequantized", "absmax", "plain", "root")
_READ_AS = {
    "searched": "float32 product of code and scale, as {family} kernels compute (vLLM, SGLang)",
    "dequantized": "that product rounded to {dtype}, as transformers dequantizes",
}
FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class TensorReport:
    """One quantized tensor.

    Attributes:
        name: Checkpoint name.
        shape: (M, N).
        dtype: Of the weight as it came in.
        scheme: Of the layout.
        alpha: Over its groups: min, mean, max, and the share of groups whose alpha is not 1 ("moved").
        searched: Sums over the tensor under the written scales.
        absmax: Sums under plain absmax scales.
        plain: Sums of a plain merge, nearest codes at the scales of a base whose format is kept; else None.
        root: Sums of the written scales against the first base of a chain, if the tensor is part of one.
        dequantized: Sums of the written scales for a reader that dequantizes to 16 bit; None where its dtype
            does not hold all values, and in reports of a version that did not look at it.
        rounding: How its codes were chosen, in an export that rounds along a curvature.
        without_base: Why it has no base; its scale is the plain one, and it is left out of the totals. ""
            with a base.
        by_step: Outcomes by the size of the change, of a sample; None without a base, and in reports of a
            version that did not look at it.
        curve: The objective over alpha, of the same sample; None for most weights.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    scheme: str
    alpha: Mapping[str, float]
    searched: DeltaStats
    absmax: DeltaStats
    plain: DeltaStats | None = None
    root: DeltaStats | None = None
    dequantized: DeltaStats | None = None
    rounding: Rounding | None = None
    without_base: str = ""
    by_step: ByStep | None = None
    curve: AlphaCurve | None = None

    def to_dict(self) -> dict[str, Any]:
        """Its entry in `daq_report.json`, under its name."""
        sides = {side: _with_sums(stats) for side in _SIDES if (stats := getattr(self, side)) is not None}
        return {
            "scheme": self.scheme,
            "shape": list(self.shape),
            "dtype": self.dtype,
            "alpha": dict(self.alpha),
            **sides,
            **({} if self.rounding is None else {"rounding": self.rounding.to_dict()}),
            **({"without_base": self.without_base} if self.without_base else {}),
            **({} if self.by_step is None else {"by_step": self.by_step.to_dict()}),
            **({} if self.curve is None else {"curve": self.curve.to_dict()}),
        }

    @classmethod
    def from_dict(cls, name: str, entry: Mapping[str, Any]) -> TensorReport:
        """The tensor of an entry, as `to_dict` wrote it."""
        return cls(
            name=name,
            shape=tuple(entry["shape"]),
            dtype=entry["dtype"],
            scheme=entry["scheme"],
            alpha=entry["alpha"],
            rounding=Rounding.from_dict(entry["rounding"]) if "rounding" in entry else None,
            without_base=entry.get("without_base", ""),
            by_step=ByStep.from_dict(entry["by_step"]) if "by_step" in entry else None,
            curve=AlphaCurve.from_dict(entry["curve"]) if "curve" in entry else None,
            **{side: _stats_from(entry[side]["sums"]) for side in _SIDES if side in entry},
        )


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """The report of one export; written as `daq_report.json`.

    Attributes:
        path: The exported folder.
        scheme: Of the layout.
        search: The settings of the search.
        tensors: The quantized tensors, in file order.
        kept: Name -> why it was not quantized.
        notes: What the user should know: fallbacks, casts, missing bases.
        dtype: What a reader dequantizes to: the dtype of the kept tensors.
        validation: Figure of the Trainer's validation -> "unquantized" and "served" -> its value: of the
            model as it was, and with the exported weights; empty where there was none.
        kv_cache: The scales of the FP8 cache of keys and values; None without one.
        placement: Which weights a budget put on which rung, and why; None without a budget.
    """

    path: str
    scheme: str
    search: Mapping[str, Any]
    tensors: tuple[TensorReport, ...]
    kept: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    dtype: str = "bfloat16"
    validation: Validation = field(default_factory=dict)
    kv_cache: CacheReport | None = None
    placement: Placement | None = None

    def totals(self, side: Side = "searched") -> DeltaStats:
        """Sums over all quantized tensors whose base is known."""
        stats = [getattr(tensor, side) for tensor in self.tensors if not tensor.without_base] or [
            getattr(tensor, side) for tensor in self.tensors
        ]
        return DeltaStats(*(torch.stack(fields).sum(0) for fields in zip(*stats, strict=True)))

    def metrics(self, side: Side = "searched") -> dict[str, float]:
        """The figures of the totals: sign_rate, cosine, gain, mse, delta_norm, lost, flipped."""
        return figures(self.totals(side))

    def _sides(self) -> list[Side]:
        return [side for side in _SIDES if all(getattr(tensor, side) is not None for tensor in self.tensors)]

    def _read_as(self, side: str) -> str:
        return _READ_AS[side].format(dtype=self.dtype, family=family_of(self.scheme))

    def to_dict(self) -> dict[str, Any]:
        """The content of `daq_report.json`."""
        return {
            "format_version": FORMAT_VERSION,
            "scheme": self.scheme,
            "dtype": self.dtype,
            "read_as": {side: self._read_as(side) for side in _READ_AS if side in self._sides()},
            "search": dict(self.search),
            "step_edges": list(STEP_EDGES),
            "totals": {side: _with_sums(self.totals(side)) for side in self._sides()},
            "notes": list(self.notes),
            **({"validation": validation_to_dict(self.validation)} if self.validation else {}),
            **({"kv_cache": self.kv_cache.to_dict()} if self.kv_cache is not None else {}),
            **({} if self.placement is None else {"placement": self.placement.to_dict()}),
            "tensors": {tensor.name: tensor.to_dict() for tensor in self.tensors},
            "kept": dict(self.kept),
        }

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ExportReport:
        """Reads the `daq_report.json` of an exported folder (or that file itself).

        Raises:
            CheckpointError: There is none, or it is not the report of an export.
        """
        file = Path(path).expanduser()
        file = file / REPORT if file.is_dir() else file
        if not file.is_file():
            raise CheckpointError(f"{file} does not exist: expected the folder of an export by this package.")
        content = read_json(file)
        if content.get("format_version") != FORMAT_VERSION:
            raise CheckpointError(
                f"{file} has report format {content.get('format_version')!r:.80}, this version reads "
                f"{FORMAT_VERSION}."
            )
        check_report(content, file, DeltaStats._fields)
        return cls(
            path=str(file.parent),
            scheme=content["scheme"],
            search=content["search"],
            tensors=tuple(TensorReport.from_dict(name, entry) for name, entry in content["tensors"].items()),
            kept=content["kept"],
            notes=tuple(content["notes"]),
            dtype=content.get("dtype", "bfloat16"),
            validation=validation_from_dict(content.get("validation", {})),
            kv_cache=CacheReport.from_dict(content["kv_cache"]) if "kv_cache" in content else None,
            placement=Placement.from_dict(content["placement"]) if "placement" in content else None,
        )

    @property
    def plain(self) -> bool:
        """Whether no other scales than plain ones were tried."""
        return self.search.get("alpha_min", 0) == self.search.get("alpha_max")

    def summary(self) -> str:
        """At most fifteen lines for a person: where it is, what was kept, how it validates, what to know."""
        count, known = len(self.tensors), self._sides()
        scales = "plain scales" if self.plain else f"search for {self.search.get('metric', '?')}"
        lines = [
            f"{family_of(self.scheme)} export: {self.path}",
            f"  {count} weights as {self.scheme}, {len(self.kept)} tensors kept; "
            + ("scales of the base" if "plain" in known else scales),
            f"  {'':12}{'sign rate':>10}{'cosine':>10}{'gain':>10}{'mse':>12}{'lost':>9}",
        ]
        for side in ("absmax", "plain", "searched", "dequantized"):
            if side not in known:
                continue
            values = self.metrics(side)
            direction = f"{values['sign_rate']:>10.4f}{values['cosine']:>10.4f}{values['gain']:>10.4f}"
            # nothing to keep: figures of a direction would be those of rounding noise
            if values["delta_norm"] == 0:
                direction = f"{'-':>10}{'-':>10}{'-':>10}"
            lines.append(f"  {side:12}{direction}{values['mse']:>12.3e}{values['lost']:>9.2%}")
        lines += [
            f"  {name}: {values['unquantized']:.5g}, as it will be served {values['served']:.5g}"
            for name, values in list(self.validation.items())[:3]
        ]
        lines += [] if self.kv_cache is None else [f"  KV cache: {self.kv_cache.words()}"]
        notes = list(self.notes)
        if len(notes) > 4:
            notes = [*notes[:3], f"and {len(notes) - 3} more in daq_report.json"]
        return "\n".join(lines + [f"  note: {note}" for note in notes])


def figures(stats: DeltaStats) -> dict[str, float]:
    """The figures of some sums; lost and flipped are shares of all elements."""
    return {
        "sign_rate": float(sign_rate(stats)),
        "cosine": float(cosine(stats)),
        "gain": float(gain(stats)),
        "mse": float(mse(stats)),
        "delta_norm": math.sqrt(float(stats.delta_sq)),
        "lost": float(stats.lost) / max(1.0, float(stats.n)),
        "flipped": float(stats.flipped) / max(1.0, float(stats.n)),
    }


def only_finite(values: Mapping[str, float]) -> dict[str, float]:
    """The figures that are numbers, for loggers and progress bars: a gain without an update is NaN, and says
    nothing.

    Example:
        >>> only_finite({"daq/gain": float("nan"), "daq/mse": 0.5})
        {'daq/mse': 0.5}
    """
    return {name: value for name, value in values.items() if math.isfinite(value)}


ALPHA_STATISTICS: tuple[str, ...] = ("min", "mean", "max", "moved")


def alpha_statistics(alpha: Tensor) -> Tensor:
    """min, mean, max and moved (share of groups with alpha != 1) of a tensor's alphas: float64, on its
    device."""
    return torch.stack([alpha.min(), alpha.mean(), alpha.max(), (alpha != 1).double().mean()])


def _with_sums(stats: DeltaStats) -> dict[str, Any]:
    values: dict[str, Any] = {
        key: value if math.isfinite(value) else None for key, value in figures(stats).items()
    }
    return values | {"sums": {name: value.item() for name, value in stats._asdict().items()}}


def _stats_from(sums: Mapping[str, float]) -> DeltaStats:
    return DeltaStats(
        **{
            name: torch.tensor(
                sums[name], dtype=torch.float64 if name in FLOAT_SUMS else torch.int64, device="cpu"
            )
            for name in DeltaStats._fields
        }
    )
