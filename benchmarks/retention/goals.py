"""What the study is held against: figures that were wanted before it was run, and those found."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from benchmarks.retention import settings as s
from benchmarks.retention.rows import Rows
from benchmarks.retention.settings import Setting

_PLAIN, _BEST = Setting(), (s.ACTIVATIONS, s.ACTIVATIONS_UPDATE)
_FLOOR = Setting(kind="post", activations=True)
_BASES = {
    "fp8": "base in FP8",
    "fp8-small": "base in FP8, small update",
    "bf16": "base in bfloat16",
    "lora": "LoRA",
}
_MET = ("missed", "met")


class Goal(NamedTuple):
    """A figure of a subject, or the ratio of the KL of two settings.

    Attributes:
        model: "toy" or "minilm".
        base: What was fine-tuned.
        name: What is compared.
        above: The KL above the line, that of the best of these settings; or what is at least so much kept.
        below: The KL below the line; empty for the share of the gap that is kept.
        wanted: At least, or at most.
        least: Whether it is at least.
    """

    model: str
    base: str
    name: str
    above: Sequence[Setting]
    below: Sequence[Setting]
    wanted: float
    least: bool


def table(rows: Rows) -> str:
    """Markdown: each goal, what was found (mean, least and largest of the seeds), and whether all seeds met
    it."""
    lines = ["| | wanted | found | |", "| --- | --- | --- | --- |"]
    for goal in _goals():
        found = list(_found(rows, goal))
        if not found:
            continue
        kept = not goal.below
        form: Callable[[float], str] = (
            (lambda x: f"{100 * x:.1f} %") if kept
            else (lambda x: f"{x:,.0f}" if x >= 100 else f"{x:.3g}")
        )  # fmt: skip
        met = all(value >= goal.wanted if goal.least else value <= goal.wanted for value in found)
        mean, least, largest = (form(value) for value in (sum(found) / len(found), min(found), max(found)))
        shown = mean if least == largest else f"{mean} ({least}-{largest})"
        wanted = f"{'' if goal.least else 'at most '}{form(goal.wanted)}"
        model = "toy" if goal.model == "toy" else "MiniLM"
        lines.append(f"| {model}, {_BASES[goal.base]}: {goal.name} | {wanted} | {shown} | {_MET[met]} |")
    return "\n".join(lines)


def _found(rows: Rows, goal: Goal) -> Iterator[float]:
    """One value a seed that has all its rows."""

    def least(settings: Sequence[Setting]) -> dict[float, float]:
        best: dict[float, float] = {}
        for setting in settings:
            for row in rows.of(goal.model, goal.base, setting):
                kl = row["style_kld_mean"]
                best[row["seed"]] = min(kl, best.get(row["seed"], kl))
        return best

    if not goal.below:
        yield from (row["style_gap_kept"] for row in rows.of(goal.model, goal.base, goal.above[0]))
        return
    above, below = least(goal.above), least(goal.below)
    yield from (above[seed] / below[seed] for seed in above if seed in below)


def _goals() -> Iterator[Goal]:
    for base, less in (("fp8", 2000), ("bf16", 25), ("lora", 25)):
        yield Goal("toy", base, "KL of absmax / that of activations", [_PLAIN], [s.ACTIVATIONS], less, True)
    yield Goal("toy", "fp8", "the same of the hybrid", [s.HYBRID], [s.ACTIVATIONS], 20, True)
    for base in ("fp8", "bf16", "lora"):
        yield Goal("toy", base, "activations / best GPTQ", [s.ACTIVATIONS], s.gptq(), 0.5, False)
    yield Goal("toy", "fp8", "absmax / update alone", [_PLAIN], [s.UPDATE], 300, True)
    for base in ("fp8", "fp8-small"):
        for name, setting in (
            ("activations + .1 update", s.ACTIVATIONS_UPDATE),
            ("inputs right, update left", s.INPUTS_UPDATE),
        ):
            yield Goal("minilm", base, f"absmax / {name}", [_PLAIN], [setting], 300, True)
        yield Goal(
            "minilm", base, "gap kept with activations + .1 update", [s.ACTIVATIONS_UPDATE], [], 0.995, True
        )
    yield Goal("minilm", "lora", "activations / absmax", [s.ACTIVATIONS], [_PLAIN], 1 / 3, False)
    yield Goal("minilm", "lora", "activations / best GPTQ", [s.ACTIVATIONS], s.gptq(), 0.6, False)
    for model, base in (
        ("toy", "fp8"),
        ("toy", "bf16"),
        ("toy", "lora"),
        ("minilm", "fp8"),
        ("minilm", "lora"),
    ):
        served = [replace(one, activations=True) for one in _BEST]
        yield Goal(model, base, "FP8 activations too: best / the floor", served, [_FLOOR], 1.1, False)
    for scheme in s.FOUR_BIT:
        every = s.every_four_bit(scheme)
        mse = [one for one in every if one.rounding == "nearest" and one.objective == "mse"]
        for model, of_nearest, of_gptq, whole_run in (
            ("toy", 1 / 20, 0.5, False),
            ("minilm", 1 / 3, 1.0, False),
            ("minilm", 1 / 3, 1.0, True),
        ):
            ours = [one for one in every if one.rounding == "activations" and one.whole_run == whole_run]
            gptq = s.all_gptq(scheme, whole_run)
            for base in ("fp8", "bf16", "lora"):
                name = f"{scheme}, activations{' of the whole run' * whole_run} /"
                yield Goal(model, base, f"{name} nearest, MSE scales", ours, mse, of_nearest, False)
                yield Goal(model, base, f"{name} best GPTQ", ours, gptq, of_gptq, False)
