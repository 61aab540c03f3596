"""The settings of the study: how scales are searched, how codes are rounded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from benchmarks.retention.subjects import BaseKind
from daq_lightning.numerics.search.settings import METRICS, ScaleSearch

RANGES = ((0.5, 2.0), (0.8, 1.25), (0.9, 1.11))
"""Of alpha, those of the paper."""
Rounding: TypeAlias = Literal[
    "nearest", "update", "inputs+update", "gptq", "activations", "gradients", "self"
]
"""Where the curvature comes from: nowhere; the update; inputs of the layers right and the update left; inputs
alone, one side; inputs and output gradients of tokens (K-FAC); gradients of the weights, one a step; as
"activations", on text that the model wrote."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How the weights of a model are quantized.

    Attributes:
        kind: "fp8", or a model to compare with: "base", "post", or a name of `others`.
        objective: "absmax" or one of METRICS; scales are those of `scheme` searched for it.
        scheme: FP8_BLOCK or FP8_DYNAMIC, or one of FOUR_BIT.
        scope: One alpha a "group" or a "tensor".
        low: Lower end of the range of alpha.
        high: Upper end.
        rounding: Of the codes at these scales.
        update: Share of the update's own statistics in the curvature.
        damping_in: Share of the identity beside the inputs' statistics.
        damping_out: Beside the outputs'.
        ordered: Whether rows and columns of the largest curvature come first.
        activations: Whether the inputs of the layers are rounded to FP8 as well, as servers do.
        whole_run: Whether statistics are those of all steps of the training, not of its last 16.
    """

    kind: str = "fp8"
    objective: str = "absmax"
    scheme: str = "FP8_BLOCK"
    scope: str = "group"
    low: float = 1.0
    high: float = 1.0
    rounding: Rounding = "nearest"
    update: float = 0.0
    damping_in: float = 0.0
    damping_out: float = 0.0
    ordered: bool = False
    activations: bool = False
    whole_run: bool = False

    @property
    def name(self) -> str:
        """One line, unique among settings."""
        parts = [self.kind] if self.kind != "fp8" else [self.scheme, self.objective]
        if self.low != self.high:
            parts += [f"[{self.low:g} {self.high:g}]", self.scope]
        if self.rounding != "nearest":
            order = "ordered" if self.ordered else "natural"
            parts += [self.rounding, f"{self.damping_in:g}/{self.damping_out:g}", order]
            parts += ["of the whole run"] * self.whole_run
        if self.update:
            parts.append(f"+{self.update:g} update")
        return " ".join(parts) + (" +activations" if self.activations else "")

    def search(self) -> ScaleSearch:
        """Of the scales."""
        if self.objective == "absmax":
            return ScaleSearch.absmax()
        return ScaleSearch(
            metric=self.objective,  # type: ignore[arg-type]
            alpha_min=self.low,
            alpha_max=self.high,
            alpha_scope="layer" if self.scope == "tensor" else "group",
        )


def settings(model: str, base_kind: BaseKind, *, quick: bool = False) -> list[Setting]:
    """Of one subject, each once.

    Args:
        model: "toy" or "minilm".
        base_kind: What was fine-tuned.
        quick: The few of a quick run.
    """
    found = [Setting(kind="post"), Setting(kind="base"), Setting(), Setting(scheme="FP8_DYNAMIC")]
    found += _searched(base_kind, quick)
    rounded = list(_rounded(model, quick))
    found += rounded
    found += [Setting(kind="post", activations=True)]
    seen = [one for one in [Setting(), HYBRID, *rounded] if _served(one)]
    found += [replace(one, activations=True) for one in seen]
    for scheme in () if quick else FOUR_BIT:
        found += four_bit(scheme, model)
    return list(dict.fromkeys(found))


HYBRID = Setting(objective="hybrid", low=0.5, high=2.0)
UPDATE = Setting(rounding="update", damping_in=0.1, damping_out=0.3)
INPUTS_UPDATE = Setting(rounding="inputs+update", damping_in=0.001, damping_out=0.1, ordered=True)
ACTIVATIONS = Setting(rounding="activations", damping_in=0.001, damping_out=0.01, ordered=True)
ACTIVATIONS_UPDATE = Setting(
    rounding="activations", update=0.1, damping_in=0.001, damping_out=0.01, ordered=True
)
DAMPED, DAMPED_UPDATE = (
    replace(one, damping_in=0.03, damping_out=0.1) for one in (ACTIVATIONS, ACTIVATIONS_UPDATE)
)
GRADIENTS = Setting(rounding="gradients", damping_in=0.001, damping_out=0.01, ordered=True)
SELF = Setting(rounding="self", damping_in=0.001, damping_out=0.01, ordered=True)


def gptq() -> list[Setting]:
    """One side, tuned over order and damping."""
    return [
        Setting(rounding="gptq", damping_in=damping, ordered=ordered)
        for ordered in (False, True)
        for damping in (0.1, 0.01, 0.001)
    ]


FOUR_BIT = ("W4A16", "NVFP4A16")
"""Integers in groups of 128, and E2M1 in groups of 16: weights only."""


def four_bit(scheme: str, model: str) -> list[Setting]:
    """Nearest with plain and with searched scales; codes chosen at plain scales (the toy) and at those of the
    least squared error, along the last batches and (MiniLM) along those of the whole run."""
    mse = Setting(scheme=scheme, objective="mse", low=0.5, high=2.0)
    nearest = [Setting(scheme=scheme), mse, replace(HYBRID, scheme=scheme)]
    scales = [mse] if model == "minilm" else nearest[:2]
    chosen = [UPDATE, INPUTS_UPDATE, *gptq(), ACTIVATIONS, ACTIVATIONS_UPDATE, DAMPED, DAMPED_UPDATE]
    if model == "minilm":
        chosen += [replace(one, whole_run=True) for one in chosen if one.rounding in ("gptq", "activations")]
    return nearest + [
        replace(one, scheme=scheme, objective=of.objective, low=of.low, high=of.high)
        for of in scales
        for one in chosen
    ]


def every_four_bit(scheme: str) -> list[Setting]:
    """Those of any model, each once."""
    return list(dict.fromkeys(four_bit(scheme, "toy") + four_bit(scheme, "minilm")))


def all_gptq(scheme: str, whole_run: bool = False) -> list[Setting]:
    """Every GPTQ of a scheme on the same batches, at whatever scales."""
    if scheme not in FOUR_BIT:
        return gptq()
    every = every_four_bit(scheme)
    return [one for one in every if one.rounding == "gptq" and one.whole_run == whole_run]


def _searched(base_kind: BaseKind, quick: bool) -> Iterator[Setting]:
    """Each objective with every granularity, scope and range on the two kinds of base that the paper has;
    elsewhere blocks, and the widest range."""
    full = base_kind in ("fp8", "bf16") and not quick
    for metric in METRICS:
        for low, high in RANGES if full else RANGES[:1]:
            for scheme in ("FP8_BLOCK", "FP8_DYNAMIC") if full else ("FP8_BLOCK",):
                for scope in ("group", "tensor") if full else ("group",):
                    yield Setting(objective=metric, low=low, high=high, scheme=scheme, scope=scope)


def _rounded(model: str, quick: bool) -> Iterator[Setting]:
    yield UPDATE
    if quick:
        yield ACTIVATIONS_UPDATE
        return
    yield from (INPUTS_UPDATE, *gptq(), ACTIVATIONS, ACTIVATIONS_UPDATE, GRADIENTS)
    if model == "toy":
        yield SELF


def _served(setting: Setting) -> bool:
    """Those that are looked at with FP8 activations too."""
    return setting in (Setting(), HYBRID, UPDATE, gptq()[1], ACTIVATIONS, ACTIVATIONS_UPDATE)
