"""The command `evaluate`: the model that will be served, judged on a text, and the words for it."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from daq_lightning.checkpoint.families import family_of
from daq_lightning.cli.inputs import (
    UsageError,
    checkpoint_of,
    export_folder,
    model_folder,
    print_json,
    weights_of,
)
from daq_lightning.cli.words import DONE

if TYPE_CHECKING:
    from jsonargparse import Namespace

    from daq_lightning.audit.evaluate import Evaluation
    from daq_lightning.report.levels import Level

_CONTEXT = 512
_QUANTILES = ("kld_median", "kld_p99", "kld_p999", "kld_max")
_FEW = 100  # tokens with a changed top, below which shares of them say little


def evaluate(options: Namespace) -> int:
    """Judges an export on a text."""
    import torch

    from daq_lightning.audit.evaluate import evaluate
    from daq_lightning.checkpoint.text_file import read_documents
    from daq_lightning.export.checks import check_device
    from daq_lightning.model.hub import is_repository
    from daq_lightning.model.tokens import load_tokenizer, most_tokens, windows_of
    from daq_lightning.report.levels import quality_class

    post, base = options.post, options.base
    if options.adapter is not None:
        post, base = post or base, base or post
    if post is None:
        raise UsageError("--post is missing: pass the fine-tuned model that was given to quantize.")
    if options.text is None:
        raise UsageError("--text is missing: pass a .txt or .jsonl file to judge the model by.")
    for name, least in (("limit", 2), ("context", 2), ("batch_size", 1)):
        given = options[name]
        if given is not None and given < least:
            raise UsageError(f"--{name.replace('_', '-')}: expected {least} or more, got {given}.")
    check_device(options.device)
    out = export_folder(options.out)
    if options.dataset is not None and not is_repository(options.dataset):
        raise UsageError(
            f"--dataset: expected the ORG/NAME of a dataset of the Hub, got {options.dataset!r}."
        )
    models: dict[str, Any] = {
        "export": checkpoint_of(out, "OUT"),
        "post": weights_of(post, options.adapter),
    }
    if base is not None:
        models["base"] = checkpoint_of(base, "--base")
    sizes = [size for files in models.values() if (size := most_tokens(files.config)) is not None]
    context = options.context or min([_CONTEXT, *sizes])
    if context > min([context, *sizes]):
        raise ValueError(f"--context {context}: the models take {min(sizes)} tokens.")
    documents = read_documents(options.text)
    folders = [out, post] if options.tokenizer is None else [model_folder(options.tokenizer, "--tokenizer")]
    windows = windows_of(documents, load_tokenizer(folders), context, options.limit)
    try:
        found = evaluate(
            models,
            windows,
            device=options.device or "cpu",
            batch_size=options.batch_size,
            weights_only=options.weights_only,
            progress=sys.stderr.isatty() and not options.quiet,
        )
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"{options.device} has too little memory: pass a smaller --batch-size or --context, or leave "
            f"--device out. {str(error).splitlines()[0]}"
        ) from error
    if options.dataset is not None:
        _write_results(Path(out), options.dataset, found, Path(options.text).name)
    if options.json:
        print_json(
            {
                "path": out,
                "post": post,
                "base": base,
                "adapter": options.adapter,
                "text": options.text,
                "context": context,
                "limit": options.limit,
                "device": str(options.device or "cpu"),
                **_plain(dataclasses.asdict(found)),
                "level": level_found(found),
                "class": quality_class(found.figures["kld_mean"]),
                "verdict": headline(found),
            }
        )
    else:
        print(text_of(found, Path(options.text).name, context))
    return DONE


def _write_results(out: Path, dataset: str, found: Evaluation, text: str) -> None:
    """The figures as the Hub reads them; those of an earlier evaluation on the same dataset are replaced."""
    from daq_lightning.report.eval_results import eval_results

    notes = f"{found.scheme}, {found.tokens:,} tokens of {text}, against the unquantized model"
    path = out / ".eval_results" / f"{dataset.replace('/', '--')}.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(eval_results(found.figures, dataset_id=dataset, notes=notes), encoding="utf-8")


def headline(found: Evaluation) -> str:
    """One sentence: whether the update is served, and how far the predictions are from those of POST."""
    from daq_lightning.report.levels import percent, quality_class

    figures = found.figures
    kld = figures["kld_mean"]
    whole = f"predictions differ from POST by {_number(kld)} nats a token (llama.cpp: {quality_class(kld)})"
    if found.changed is None:
        sentence = f"{whole}."
    elif not found.changed:
        sentence = f"Training changed the first choice of none of {found.tokens:,} tokens; {whole}."
    else:
        sentence = (
            f"{percent(figures['top_kept'])} of the first choices that training changed are served, "
            f"{_percent(figures['top_reverted'], 1)} fall back to the base; {whole}."
        )
    return f"{level_found(found).capitalize()}: {sentence[0].lower()}{sentence[1:]}"


def level_found(found: Evaluation) -> Level:
    """The worse of two: what is kept of the choices that training changed, and the distance from POST."""
    from daq_lightning.report.levels import level_of, level_of_divergence

    levels = [level_of_divergence(found.figures["kld_mean"])]
    if found.changed:
        levels.append(level_of(found.figures["top_kept"]))
    return "bad" if "bad" in levels else "fair" if "fair" in levels else "good"


def text_of(found: Evaluation, text: str, context: int) -> str:
    """The verdict, then the figures, with a word on each."""
    figures, family = found.figures, family_of(found.scheme)
    inputs = (
        f"activations in {family} as on a server" if found.quantized_activations else "activations in 16 bit"
    )
    inputs += ", keys and values cached in FP8" if found.kv_cache else ""
    lines = [
        headline(found),
        "",
        f"{found.tokens:,} tokens of {text} were predicted, in {found.windows:,} windows of up to {context}.",
        f"Export: {found.scheme}, {found.dtype}, {inputs}. POST"
        f"{' and base' if found.changed is not None else ''}: {found.reference_dtype}.",
        "",
        _row("KLD from POST", _with_error(figures, "kld_mean", 4), "nats a token, mean"),
        _row(
            "",
            " / ".join(f"{figures[name]:.3g}" for name in _QUANTILES),
            "median / 99 % / 99.9 % / max",
        ),
        _row(
            "perplexity",
            f"{figures['perplexity']:.4f} ({figures['reference_perplexity']:.4f})",
            f"export (POST); ratio {_with_error(figures, 'perplexity_ratio', 5)}",
        ),
        _row(
            "delta-p",
            _share(figures, "delta_p_mean"),
            f"of the true token, mean; RMS {_share(figures, 'delta_p_rms')}",
        ),
        _row("same top", _share(figures, "same_top"), "tokens with the first choice of POST"),
        _row(
            "flips",
            _percent(figures["flips"], 2),
            f"{_percent(figures['flipped_right'], 2)} became right, "
            f"{_percent(figures['flipped_wrong'], 2)} wrong",
        ),
    ]
    if found.changed is not None:
        lines += ["", *_retention(figures, found.changed)]
    notes = []
    if found.changed is not None and 0 < found.changed < _FEW:
        notes.append(f"Training changed only {found.changed} tokens of this text: more text would say more.")
    if found.unseen:
        notes.append(
            f"{len(found.unseen)} modules with quantized weights kept their input in 16 bit, which servers "
            f"quantize: {', '.join(found.unseen[:3])}{', ...' if len(found.unseen) > 3 else ''}."
        )
    return "\n".join([*lines, *(f"note: {note}" for note in notes)])


def _retention(figures: Mapping[str, float], changed: int) -> list[str]:
    """What was kept of base -> post."""
    from daq_lightning.report.levels import percent

    rows = [
        _row(
            "changed by training",
            _percent(figures["top_changed"], 2),
            f"tokens whose first choice differs between base and POST ({changed:,})",
        )
    ]
    if changed:
        rows.append(
            _row(
                "  of these",
                f"{percent(figures['top_kept'])} / {_percent(figures['top_reverted'], 1)} / "
                f"{_percent(figures['top_elsewhere'], 1)}",
                "kept / reverted to the base / elsewhere",
            )
        )
    return [
        _row(
            "recovery",
            _number(figures["recovery"]),
            f"of what training gained on this text: perplexity of the base {figures['base_perplexity']:.4f}",
        ),
        *rows,
        _row(
            "disturbed",
            _percent(figures["top_disturbed"], 2),
            "of the others, given a new first choice",
        ),
        _row("gain", _number(figures["update_gain"]), "strength of the update in the predictions, 1 is full"),
        _row(
            "KLD along, across",
            f"{_number(figures['kld_along'])} / {_number(figures['kld_across'])}",
            f"a wrong strength of the update / all else; from the base {_number(figures['kld_base'])}",
        ),
    ]


def _row(name: str, value: str, meaning: str) -> str:
    return f"{name:20} {value:>40}  {meaning}".rstrip()


def _number(value: float) -> str:
    return f"{value:.4g}"


def _with_error(figures: Mapping[str, float], name: str, digits: int) -> str:
    value, error = figures[name], figures[f"{name}_error"]
    return f"{value:.{digits}g}" + ("" if math.isnan(error) else f" +- {error:.2g}")


def _share(figures: Mapping[str, float], name: str) -> str:
    value, error = figures[name], figures[f"{name}_error"]
    return _percent(value, 3) + ("" if math.isnan(error) else f" +- {_percent(error, 3)}")


def _percent(share: float, digits: int) -> str:
    return f"{100 * share:.{digits}f} %"


def _plain(content: Any) -> Any:
    """The same with None for numbers that JSON does not have."""
    if isinstance(content, Mapping):
        return {key: _plain(value) for key, value in content.items()}
    if isinstance(content, float) and not math.isfinite(content):
        return None
    return content
