"""The two files of an export that are for people: `recipe.yaml`, which makes it again, and the model card.

    cd OUT && daq-lightning quantize --config recipe.yaml        writes ../made-again, byte for byte the same

Paths in a recipe are relative to the folder of the export, as those of the manifest are, and nothing in it
depends on how that folder is called. There is one where the command line can say all of an export: two
folders, with or without an adapter. A model in training, or tensors in a mapping, have none.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from daq_lightning.checkpoint.folder import config_dtype, read_card
from daq_lightning.checkpoint.manifest import relative_to
from daq_lightning.checkpoint.reader import Checkpoint
from daq_lightning.checkpoint.tensor_file import CheckpointError
from daq_lightning.model.hub import is_repository, repository_of
from daq_lightning.report.card import CardFacts, model_card
from daq_lightning.report.eval_results import Evaluation
from daq_lightning.report.front_matter import dump

if TYPE_CHECKING:
    from daq_lightning.export.job import Job
    from daq_lightning.report.figures import ExportReport

AGAIN = "../made-again"
_HEAD = """# Makes this export again. Paths are relative to the folder of this file: call it there,
#     daq-lightning quantize --config recipe.yaml
# The same bytes come from the same models and versions (daq_manifest.json), on the same kind of processor.
"""


def make_recipe(job: Job, folder: Path, out: Path | None) -> str:
    """The content of recipe.yaml; "" where the command line cannot say what was done.

    Args:
        job: What was exported.
        folder: Where its files are now, beside `out`.
        out: Where they will be; None for another machine, where paths are absolute.
    """
    source, base = job.source.weights, job.base
    if not (isinstance(source, Checkpoint) and _is_plain(source) and isinstance(base, Checkpoint)):
        return ""
    if not _is_plain(base) or len(base.places) > 1:
        return ""
    settings, search, lineage = job.settings, job.settings.search, job.lineage
    adapter = source.places[1] if len(source.places) > 1 else None
    options: dict[str, Any] = {
        "post": _from(folder, out, source.path),
        "base": _from(folder, out, base.path),
        "out": AGAIN,
        **({} if adapter is None else {"adapter": _from(folder, out, adapter)}),
        "scheme": settings.scheme,
        "ignore": list(settings.ignore),
        "container": settings.container,
        "scale_format": settings.scale_format,
        "max_shard_bytes": settings.max_shard_bytes,
        "metric": search.metric,
        "range": [search.alpha_min, search.alpha_max],
        "n_coarse": search.n_coarse,
        "n_fine": search.n_fine,
        "alpha_scope": search.alpha_scope,
        "tau": search.tau,
        "spacing": search.spacing,
        "rounding": settings.rounding,
        "kv_cache": settings.kv_cache,
        "kv_text": _from(folder, out, job.cache.text) if job.cache and job.cache.text else None,
        "missing_base": settings.missing_base,
        "budget": settings.budget,
        "ladder": list(settings.ladder) or None,
    }
    calibration = job.calibration
    if calibration is not None:
        text = calibration.text
        options["calibrate"] = calibration.SELF if text is None else _from(folder, out, text)
        options["calibrate_sha256"] = calibration.sha256 or None
    if lineage.chain_from is not None:
        options["parent"] = _from(folder, out, Path(lineage.parent))
        options["chain_from"] = lineage.chain_from
    recipe = _HEAD + dump({name: value for name, value in options.items() if value is not None})
    # a path that is no UTF-8 has no YAML that could be read again
    return recipe if _are_text(options.values()) else ""


def existing_card(job: Job) -> str:
    """The card of the fine-tuned model: that of its folder, or of the adapter that is merged in; "" without.

    Raises:
        CheckpointError: It cannot be read.
    """
    source = job.source.weights
    return read_card(source.places[-1]) if isinstance(source, Checkpoint) else ""


def make_card(job: Job, report: ExportReport, recipe: bool, *, evaluation: Evaluation | None = None) -> str:
    """The content of README.md.

    Args:
        job: What was exported.
        report: What became of it.
        recipe: Whether there is a recipe.yaml.
        evaluation: What was measured of the quantized model, if anything.
    """
    source, base = job.source.weights, job.base
    published = from_base = base_card = ""
    named = (job.source.config or {}).get("_name_or_path")
    if isinstance(source, Checkpoint):
        published = repository_of(source.places[-1])
        named = None if len(source.places) > 1 else named  # with an adapter: where its base came from
    if isinstance(base, Checkpoint):
        from_base = repository_of(base.path)
        with contextlib.suppress(CheckpointError):  # no more than a license is taken from it
            base_card = read_card(base.path)
    facts = CardFacts(
        report=report,
        layouts=job.plan.layouts,
        config=job.source.config,
        published=published,
        base=str(named) if is_repository(named) else from_base,
        base_card=base_card,
        recipe=recipe,
        trained=bool(job.training),
        evaluation=evaluation or _validated(report),
    )
    return model_card(existing_card(job), facts)


def _validated(report: ExportReport) -> Evaluation | None:
    """The figures of the Trainer's validation, if it ran with the exported weights."""
    if not report.validation:
        return None
    figures = {name: values["served"] for name, values in report.validation.items()}
    figures |= {f"{name} unquantized": values["unquantized"] for name, values in report.validation.items()}
    return Evaluation(figures=figures, dataset="the validation data of the training run")


def _are_text(values: Iterable[object]) -> bool:
    try:
        "".join(value for value in values if isinstance(value, str)).encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_plain(checkpoint: Checkpoint) -> bool:
    """Whether a path says all of it: a folder, read in its own dtype."""
    usual = config_dtype(checkpoint.config) or torch.bfloat16
    return checkpoint.path.is_dir() and checkpoint.dtype == usual


def _from(folder: Path, out: Path | None, path: Path) -> str:
    """A path from the folder of an export: as the manifest has it, or without links where that fails; of a
    model in the Hub's cache, its name and commit, which are the same on every machine."""
    repository = repository_of(path.absolute())
    if repository:
        return f"{repository}@{path.name}"
    short = relative_to(str(path.absolute()), None if out is None else out.absolute())
    if out is None:
        return short
    if os.path.exists(folder / short) and os.path.samefile(folder / short, path):
        return short
    return os.path.relpath(path.resolve(), folder.resolve())
