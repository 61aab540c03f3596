"""The model card of an export, `README.md`: what the Hub has to know, and what a reader of the page has to.

    card of the fine-tuned model      kept, whatever it says
    <!-- daq-lightning: begin -->     what is quantized, figures, how to serve it, how it was made
    <!-- daq-lightning: end -->       another export of this one writes this part anew

Of existing metadata all stays but what quantization changes; `base_model_relation: quantized` is what the Hub
lists a model under quantizations for, and not under fine-tunes. The card names no folder and no time, so that
the same weights give the same card anywhere; and nothing in it that comes from files is read as markup.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from daq_lightning.checkpoint.families import family_of
from daq_lightning.model.hub import is_repository
from daq_lightning.numerics.formats import PerBlock
from daq_lightning.report.eval_results import Evaluation, model_index, table
from daq_lightning.report.front_matter import merge, read_texts, split_card
from daq_lightning.report.serving import creation, serving

if TYPE_CHECKING:
    from daq_lightning.checkpoint.layouts import Layouts
    from daq_lightning.report.figures import ExportReport, Side

BEGIN, END = "<!-- daq-lightning: begin -->", "<!-- daq-lightning: end -->"
_OURS = re.compile(rf"\n*{re.escape(BEGIN)}(?:(?!{re.escape(BEGIN)}).)*?{re.escape(END)}\n*", re.DOTALL)
_SPECIAL = re.compile(r"[\\`*\[\]<>|!&]")
_INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag")
_LISTED = 3
_SCALES = (
    "The scales of these weights were searched so that rounding to {family} keeps what fine-tuning changed "
    "(Delta-Aware Quantization, [arXiv 2603.22324](https://arxiv.org/abs/2603.22324))."
)
_CODES = (
    "The {family} codes of these weights were chosen so that their errors cancel where the model is "
    "sensitive to them, and what fine-tuning changed is kept (after GPTQ, "
    "[arXiv 2210.17323](https://arxiv.org/abs/2210.17323), for both sides of a weight)."
)


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What a card is made of.

    Attributes:
        report: Of the export.
        layouts: How weights are stored.
        config: Content of the model's config.json; None if it has none.
        published: Name of the fine-tuned model on the Hub, "" if it is not known to be there.
        base: Name of the base on the Hub, or "".
        base_card: Card of the base: says license and language, where the model's own does not.
        recipe: Whether there is a recipe.yaml.
        trained: Whether the callback made it.
        evaluation: What was measured of the quantized model, if anything.
    """

    report: ExportReport
    layouts: Layouts
    config: Mapping[str, Any] | None
    published: str = ""
    base: str = ""
    base_card: str = ""
    recipe: bool = False
    trained: bool = False
    evaluation: Evaluation | None = None


def model_card(existing: str, facts: CardFacts) -> str:
    """The card of an export.

    Args:
        existing: The card of the fine-tuned model; "" without one.
        facts: What was done.

    Example:
        >>> from daq_lightning import ExportReport  # doctest: +SKIP
        >>> card = model_card("---\\nlicense: mit\\n---\\n# Our model\\n", facts)  # doctest: +SKIP
    """
    front, body = split_card(existing)
    body, family = _OURS.sub("\n\n", body).strip("\n"), family_of(facts.report.scheme)
    try:
        metadata = _metadata(front or "", facts)
    except ValueError as error:
        metadata = _metadata("", facts)
        body = f"The metadata of the card below could not be read ({error}):\n\n~~~\n{front}~~~\n\n{body}"
    if not body.strip():
        of = facts.published or facts.base
        body = f"# {family} of {of}" if of else f"# {family} export of a fine-tuned model"
        about = ""
    else:
        about = (
            "What stands above, and any scores in the metadata of this card, were written for the model "
            "before it was quantized.\n\n"
        )
    section = f"{BEGIN}\n\n## {family} quantization\n\n{about}{_section(facts)}\n{END}\n"
    # of a name that is no UTF-8, the escapes
    section = section.encode("utf-8", "backslashreplace").decode()
    return f"---\n{metadata}---\n\n{body}\n\n{section}"


def _metadata(front: str, facts: CardFacts) -> str:
    """The YAML of the card.

    Raises:
        ValueError: The existing one cannot be read.
    """
    existing = read_texts(front)
    replaced = {"base_model_relation", "tags"}
    named = [name for name in existing.get("base_model", []) if is_repository(name)]
    if facts.published or named != existing.get("base_model", []):
        replaced.add("base_model")  # of a local path, the Hub knows nothing
    if existing.get("library_name") == ["peft"]:  # an adapter's; the export holds the merged model
        replaced.add("library_name")
    base_models = [facts.published] if facts.published else named or [facts.base] * bool(facts.base)
    ours: dict[str, Any] = {"base_model": base_models} if base_models else {}
    ours["base_model_relation"] = "quantized"
    if facts.config is not None:
        ours["library_name"] = "transformers"
        classes = facts.config.get("architectures") or []
        if isinstance(classes, list) and any(str(name).endswith("ForCausalLM") for name in classes):
            ours["pipeline_tag"] = "text-generation"
    ours |= _of_base(facts.base_card, licensed="license" in existing)
    ours["quantized_by"] = "daq-lightning"
    tags = [tag for tag in existing.get("tags", []) if not tag.startswith("base_model:")]
    schemes = [layout.scheme.name for layout in facts.layouts.every]
    tags += [*(family_of(name).lower() for name in schemes), "quantized", "vllm", "daq-lightning"]
    if facts.layouts.quantization_config(())["quant_method"] == "compressed-tensors":
        tags.append("compressed-tensors")
    if facts.evaluation is not None and facts.evaluation.known:
        ours["model-index"] = model_index(
            f"{family_of(facts.report.scheme)} of {facts.published or facts.base or 'model'}",
            facts.evaluation,
        )
    return merge(front, ours | {"tags": list(dict.fromkeys(tags))}, replaced)


def _of_base(card: str, licensed: bool) -> dict[str, Any]:
    """What a model takes over from its base."""
    try:
        found = read_texts(split_card(card)[0] or "")
    except ValueError:
        return {}
    kept = {key: found[key] for key in _INHERITED if key in found}
    return {
        key: values if key == "language" and len(values) > 1 else values[0]
        for key, values in kept.items()
        if not (licensed and key.startswith("license"))
    }


def _section(facts: CardFacts) -> str:
    parts = [
        _about(facts),
        "### What was kept of the update",
        _figures(facts.report),
        *_evaluation(facts.evaluation),
        "### Deployment",
        serving(facts.layouts.every, facts.config is not None, facts.report.kv_cache),
        "### Creation",
        creation(facts.report, recipe=facts.recipe, trained=facts.trained),
    ]
    return "\n\n".join(parts) + "\n"


def _about(facts: CardFacts) -> str:
    report, family = facts.report, family_of(facts.report.scheme)
    reasons: dict[str, list[str]] = {}
    for name, reason in report.kept.items():
        reasons.setdefault(reason.removeprefix("kept: "), []).append(name)
    kept = [
        f"- {plain(reason)}: {len(names)} ({', '.join(map(plain, names[:_LISTED]))}"
        f"{', ...' if len(names) > _LISTED else ''})"
        for reason, names in reasons.items()
    ]
    return "\n".join(
        [
            (_CODES if any(tensor.rounding is not None for tensor in report.tensors) else _SCALES).format(
                family=family
            ),
            "",
            *_schemes(facts),
            *([] if report.kv_cache is None else [f"- KV cache: {plain(report.kv_cache.words())}"]),
            f"- not quantized, in {report.dtype}: {len(report.kept)} tensors"
            + (", by reason:" if kept else ""),
            *(f"  {line}" for line in kept),
        ]
    )


def _schemes(facts: CardFacts) -> list[str]:
    """Which weights are in which scheme, and why."""
    report, lines = facts.report, []
    for layout in facts.layouts.every:
        scheme = layout.scheme
        count = sum(tensor.scheme == scheme.name for tensor in report.tensors)
        shared = f"{scheme.group} weights of a row" if scheme.group else "a row"
        if isinstance(scheme.granularity, PerBlock) and not scheme.group:
            shared = f"a block of {scheme.granularity.rows} x {scheme.granularity.cols}"
        zero = " and one zero point" * scheme.asymmetric
        family = family_of(scheme.name)
        activations = "16 bit" if scheme.activations is None else f"{family}, scaled when the model runs"
        lines += [
            f"- quantized: {count} weights of linear layers, as {scheme.name}: {scheme.title}, "
            f"one {layout.scale_format} scale{zero} for {shared}",
            f"- activations: {activations}",
        ]
    return lines + [
        f"- {plain(line)}" for line in ([] if report.placement is None else report.placement.lines())
    ]


def _figures(report: ExportReport) -> str:
    """The table of the summary, for all weights together."""
    sides: tuple[tuple[Side, str], ...] = (
        ("absmax", "plain absmax scales"),
        ("searched", f"these scales, {family_of(report.scheme)} kernels (vLLM, SGLang)"),
        ("dequantized", f"these scales, dequantized to {report.dtype} (transformers)"),
    )
    rows = []
    for side, words in sides:
        if any(getattr(tensor, side) is None for tensor in report.tensors):
            continue
        values = report.metrics(side)
        # nothing to keep: figures of a direction would be those of rounding noise
        still = values["delta_norm"] == 0
        direction = ["-" if still else f"{values[name]:.4f}" for name in ("sign_rate", "cosine", "gain")]
        rows.append(f"| {words} | {' | '.join(direction)} | {values['mse']:.3e} | {values['lost']:.2%} |")
    metric = plain(str(report.search.get("metric")))
    measured = sum(not tensor.without_base for tensor in report.tensors)
    return "\n".join(
        [
            "| | sign rate | cosine | gain | mse | lost |",
            "| --- | --- | --- | --- | --- | --- |",
            *rows,
            "",
            f"Over all elements of {measured or len(report.tensors)} weights. The update is what fine-tuning "
            "changed; sign rate: share of changes that keep their sign; cosine: of the update and what is "
            "left of it; gain: its strength along its own direction, 1 is full; lost: share of elements "
            "whose change became zero. "
            f"{'Plain scales' if report.plain else f'Searched for {metric}'}; each weight by itself is in "
            "`daq_report.json`.",
            *(f"\n- note: {plain(note)}" for note in report.notes[:_LISTED]),
            *([f"\n- and {len(report.notes) - _LISTED} more in `daq_report.json`"] * (len(report.notes) > 3)),
        ]
    )


def _evaluation(evaluation: Evaluation | None) -> list[str]:
    """The section on the quantized model's own figures, if there are any."""
    if evaluation is None or not evaluation.known:
        return []
    tokens = f", {evaluation.tokens:,} tokens" if evaluation.tokens else ""
    about = f"Of the quantized model, on {plain(evaluation.dataset)}{tokens}:"
    names = {plain(name): value for name, value in evaluation.known.items()}
    return ["### Evaluation", about, table(dataclasses.replace(evaluation, figures=names))]


def plain(text: str) -> str:
    """Text as Markdown that shows it and does nothing else.

    Example:
        >>> plain("a <!-- b\\n![x](y)")
        'a \\\\<\\\\!-- b \\\\!\\\\[x\\\\](y)'
    """
    return _SPECIAL.sub(lambda found: f"\\{found[0]}", " ".join(text.split()))
