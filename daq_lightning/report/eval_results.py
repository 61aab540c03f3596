"""Figures of an evaluation as the Hub reads them: `.eval_results/*.yaml`, and `model-index` of a model card.

    eval_results   scores on a benchmark that is a dataset of the Hub: shown on the model's page and its own
    model_index    any figures, of any text, in the card's metadata
    table          the same for people, in the card

Only numbers are written: a figure that is NaN or infinite says nothing. There is no time in it unless it is
given, so that the same evaluation gives the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from daq_lightning.model.hub import is_repository
from daq_lightning.report.front_matter import dump
from daq_lightning.report.markup import visible


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What was measured of a quantized model.

    Attributes:
        figures: Name -> value, such as "kl_mean", "ppl_ratio", "same_top".
        dataset: What it was measured on, in words.
        dataset_id: The same as a dataset of the Hub, `org/name`; "" if it is none.
        tokens: How many tokens; 0 if it is not known.
    """

    figures: Mapping[str, float] = field(default_factory=dict)
    dataset: str
    dataset_id: str = ""
    tokens: int = 0

    def __post_init__(self) -> None:
        if self.dataset_id and not is_repository(self.dataset_id):
            raise ValueError(f"dataset_id must be org/name on the Hub, or empty, got {self.dataset_id!r}.")

    @property
    def known(self) -> dict[str, float]:
        """The figures that are numbers."""
        return {
            name: float(value)
            for name, value in self.figures.items()
            if not isinstance(value, bool) and math.isfinite(value)
        }


def eval_results(
    figures: Mapping[str, float], *, dataset_id: str, date: str = "", source: str = "", notes: str = ""
) -> str:
    """The content of a file in `.eval_results/`; "" without a figure.

    Args:
        figures: Task of the benchmark -> score.
        dataset_id: The benchmark: a dataset of the Hub, `org/name`.
        date: When it was measured, ISO 8601; "" takes the time of the commit.
        source: Address where more is said about it, or "".
        notes: How it was measured, or "".

    Raises:
        ValueError: A dataset that is none of the Hub: figures of one's own text belong in the card
            (`model_index`).

    Example:
        >>> print(eval_results({"default": 0.5}, dataset_id="org/benchmark"), end="")
        - dataset:
            id: org/benchmark
            task_id: default
          value: 0.5
    """
    if not is_repository(dataset_id):
        raise ValueError(
            f"dataset_id must be org/name on the Hub, got {dataset_id!r}: figures of another text belong in "
            "the model card."
        )
    rest: dict[str, Any] = {"date": date} if date else {}
    rest |= {"source": {"url": source}} if source else {}
    rest |= {"notes": visible(notes)} if notes else {}
    known = Evaluation(figures=figures, dataset=dataset_id).known
    return dump(
        [
            {"dataset": {"id": dataset_id, "task_id": task}, "value": value} | rest
            for task, value in known.items()
        ]
    )


def model_index(name: str, evaluation: Evaluation) -> list[dict[str, Any]]:
    """The value of `model-index` in the metadata of a card; empty without a figure.

    Args:
        name: Of the model.
        evaluation: What was measured.
    """
    known = evaluation.known
    if not known:
        return []
    dataset = {"name": visible(evaluation.dataset), "type": evaluation.dataset_id or "text"}
    metrics = [{"type": figure, "value": value, "name": _words(figure)} for figure, value in known.items()]
    result = {"task": {"type": "text-generation"}, "dataset": dataset, "metrics": metrics}
    return [{"name": name, "results": [result]}]


def table(evaluation: Evaluation) -> str:
    """The figures as Markdown; the names are the caller's, and the text is escaped by them."""
    lines = [f"| {_words(figure)} | {value:.4g} |" for figure, value in evaluation.known.items()]
    return "\n".join(["| figure | value |", "| --- | --- |", *lines])


def _words(figure: str) -> str:
    return visible(figure).replace("_", " ")
