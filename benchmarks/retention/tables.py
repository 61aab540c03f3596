"""The tables: means over seeds, with the least and the largest in brackets."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from benchmarks.retention import goals
from benchmarks.retention import settings as s
from benchmarks.retention.rows import Rows
from benchmarks.retention.settings import RANGES, Setting

BASES = {
    "fp8": "base in FP8, full fine-tuning",
    "fp8-small": "base in FP8, a small update",
    "bf16": "base in bfloat16, full fine-tuning",
    "lora": "base in bfloat16, LoRA",
}
MODELS = {"toy": "Toy (2 M byte LM)", "minilm": "MiniLM-L6 (22.7 M)"}


class Column(NamedTuple):
    """A figure of a row and how it is written."""

    title: str
    figure: str
    form: Callable[[float], str]
    ranged: bool = True


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _small(value: float) -> str:
    return f"{value:.1e}".replace("e-0", "e-").replace("e+00", "")


def _ratio(value: float) -> str:
    return f"{value:.2f}" if value < 2 else f"{value:.1f}" if value < 10 else f"{value:.0f}"


def _two(value: float) -> str:
    return f"{value:.2f}"


MODEL_COLUMNS = (
    Column("gap kept %", "style_gap_kept", _percent),
    Column("KL, style", "style_kld_mean", _small),
    Column("KL, other text", "other_kld_mean", _small),
    Column("update gain", "style_update_gain", _two),
    Column("top kept %", "style_top_kept", _percent),
    Column("reverted %", "style_top_reverted", _percent, ranged=False),
    Column("elsewhere %", "style_top_elsewhere", _percent, ranged=False),
    Column("KL along", "style_kld_along", _small, ranged=False),
    Column("KL across", "style_kld_across", _small, ranged=False),
)
WEIGHT_COLUMNS = (
    Column("sign rate %", "sign_rate", _percent, ranged=False),
    Column("cosine", "cosine", _two, ranged=False),
    Column("gain", "gain", _two, ranged=False),
    Column("delta L2", "delta_q_norm", _two, ranged=False),
)
_KLD = Column("KL, style", "style_kld_mean", _small)
_LEFT = (
    Column("gap kept %", "style_gap_kept", _percent),
    Column("KL, other text", "other_kld_mean", _small),
    Column("update gain", "style_update_gain", _two, ranged=False),
    Column("top kept %", "style_top_kept", _percent, ranged=False),
)
ROUNDING_COLUMNS = (
    _KLD,
    Column("absmax / KL", "less", _ratio),
    Column("KL / best GPTQ", "of_gptq", _ratio),
    *_LEFT,
)
SERVED_COLUMNS = (_KLD, Column("KL / floor", "of_floor", _ratio), *_LEFT)


def subjects(rows: Rows) -> list[tuple[str, str]]:
    """Models and bases that have rows, in the order in which they are shown."""
    return [(model, base) for model in MODELS for base in BASES if (model, base) in rows.subjects()]


def all_tables(rows: Rows) -> str:
    """Markdown."""
    parts = []
    for model, base in subjects(rows):
        title = f"{MODELS[model]}, {BASES[base]}"
        seeds = len(rows.of(model, base, Setting()))
        parts.append(f"## {title} ({seeds} seed{'s' * (seeds > 1)})")
        for heading, lines, columns in _tables():
            table = list(_table(rows, model, base, lines, columns))
            if table:
                parts += [f"### {heading}", "\n".join(table)]
    return "\n\n".join([f"## Goals\n\n{goals.table(rows)}", *parts]) + "\n"


def _tables() -> Iterator[tuple[str, list[tuple[str, Setting]], tuple[Column, ...]]]:
    both = (*MODEL_COLUMNS, *WEIGHT_COLUMNS)
    baselines = [("base", Setting(kind="base")), ("fine-tuned, not quantized", Setting(kind="post"))]
    baselines += [("absmax, block", Setting()), ("absmax, channel", Setting(scheme="FP8_DYNAMIC"))]
    baselines += [(f"llm-compressor {name}", Setting(kind=name)) for name in ("AbsMax", "SmoothQuant", "AWQ")]
    yield "Plain quantization (Table 2 of the paper)", baselines, both
    for metric, table in (("mse", "Table 3"), ("sign", "Table 4"), ("cosine", "Table 5"), ("hybrid", "ours")):
        lines = [
            (
                f"{kind} [{low:g}, {high:g}]",
                Setting(objective=metric, low=low, high=high, scheme=scheme, scope=scope),
            )
            for kind, scheme, scope in (
                ("block", "FP8_BLOCK", "group"),
                ("block, one alpha a tensor", "FP8_BLOCK", "tensor"),
                ("channel", "FP8_DYNAMIC", "group"),
                ("channel, one alpha a tensor", "FP8_DYNAMIC", "tensor"),
            )
            for low, high in RANGES
        ]
        yield f"Scales searched for {metric} ({table})", lines, both
    yield "Rounding, weights only (block, absmax scales)", ROUNDING, ROUNDING_COLUMNS
    served = [("activations alone: the floor", Setting(kind="post", activations=True))]
    served += [(label, replace(setting, activations=True)) for label, setting in ROUNDING]
    yield "Weights and activations in FP8", served, SERVED_COLUMNS
    for scheme in s.FOUR_BIT:
        lines = [(_label(setting), setting) for setting in s.every_four_bit(scheme)]
        yield f"Four bit: {scheme}, weights only", lines, ROUNDING_COLUMNS


ROUNDING: list[tuple[str, Setting]] = [
    ("nearest, absmax", Setting()),
    ("nearest, hybrid scales", s.HYBRID),
    ("update alone, .1/.3", s.UPDATE),
    ("inputs right, update left, .001/.1", s.INPUTS_UPDATE),
    *(
        (f"GPTQ, {'activation' if one.ordered else 'natural'} order, {one.damping_in:g}", one)
        for one in s.gptq()
    ),
    ("activations (K-FAC), .001/.01", s.ACTIVATIONS),
    ("activations + .1 update", s.ACTIVATIONS_UPDATE),
    ("gradients of 16 steps", s.GRADIENTS),
    ("activations, text of its own", s.SELF),
]


FOUR_BIT: list[tuple[str, Setting]] = [
    *ROUNDING,
    ("activations (K-FAC), .03/.1", s.DAMPED),
    ("activations, .03/.1, + .1 update", s.DAMPED_UPDATE),
]


def _label(setting: Setting) -> str:
    """Of a row in four bit."""
    scales = f"{setting.objective} scales"
    if setting.rounding == "nearest":
        return f"nearest, {scales}"
    labels = {(one.rounding, one.update, one.damping_in, one.ordered): label for label, one in FOUR_BIT}
    label = labels[setting.rounding, setting.update, setting.damping_in, setting.ordered]
    return f"{label}{', whole run' * setting.whole_run}, {scales}"


def _table(
    rows: Rows, model: str, base: str, lines: Sequence[tuple[str, Setting]], columns: Sequence[Column]
) -> Iterator[str]:
    filled = [(label, _beside(rows, model, base, setting)) for label, setting in lines]
    filled = [(label, found) for label, found in filled if found]
    if not filled:
        return
    yield f"| | {' | '.join(column.title for column in columns)} |"
    yield "| --- " * (1 + len(columns)) + "|"
    for label, found in filled:
        yield f"| {label} | {' | '.join(_cell(found, column) for column in columns)} |"


def _beside(rows: Rows, model: str, base: str, setting: Setting) -> list[dict[str, float]]:
    """The rows of a setting, each beside absmax, the best GPTQ and the floor of the same seed."""

    def least(others: Sequence[Setting], seed: float) -> float:
        found = [row for other in others for row in rows.of(model, base, other) if row["seed"] == seed]
        return min((row["style_kld_mean"] for row in found), default=math.nan)

    found = rows.of(model, base, setting)
    plain = setting.scheme if setting.scheme in s.FOUR_BIT else "FP8_BLOCK"
    gptq = s.all_gptq(plain, setting.whole_run)
    for row in found:
        kl, seed = row["style_kld_mean"], row["seed"]
        floor = least([Setting(kind="post", activations=True)], seed)
        row["less"] = least([Setting(scheme=plain)], seed) / kl if kl else math.nan
        row["of_gptq"] = kl / least(gptq, seed)
        row["of_floor"] = kl / floor if setting.activations else math.nan
    return found


def _cell(found: Sequence[dict[str, float]], column: Column) -> str:
    values = [row[column.figure] for row in found if math.isfinite(row[column.figure])]
    if not values:
        return "-"
    mean = column.form(sum(values) / len(values))
    least, largest = column.form(min(values)), column.form(max(values))
    return mean if not column.ranged or least == largest else f"{mean} ({least}-{largest})"
