"""Figures of an evaluation, held against what huggingface_hub reads in them."""

import math

import pytest
import tiny_models
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries

from daq_lightning import ScaleSearch
from daq_lightning.checkpoint.reader import load_checkpoint
from daq_lightning.export.card import make_card
from daq_lightning.export.job import prepare
from daq_lightning.export.run import run
from daq_lightning.export.settings import ExportSettings
from daq_lightning.export.source import Source
from daq_lightning.report.eval_results import Evaluation, eval_results, model_index

FIGURES = {"kl_mean": 2.4e-4, "ppl_ratio": 1.0003, "same_top": 0.992, "gain": math.nan, "worst": math.inf}
KNOWN = {"kl_mean": 2.4e-4, "ppl_ratio": 1.0003, "same_top": 0.992}


def test_the_hub_reads_scores_of_a_benchmark_as_they_were():
    text = eval_results(
        FIGURES,
        dataset_id="org/bench",
        date="2026-01-02T03:04:05Z",
        source="https://example.org/log",
        notes="8 shots: no tools",
    )
    entries = parse_eval_result_entries(yaml.safe_load(text))
    assert {entry.task_id: entry.value for entry in entries} == KNOWN
    for entry in entries:
        assert entry.dataset_id == "org/bench"
        assert entry.source_url == "https://example.org/log"
        assert entry.notes == "8 shots: no tools"
    assert "&id" not in text  # no aliases
    assert eval_results({"a": math.nan}, dataset_id="org/bench") == ""


@pytest.mark.parametrize("dataset_id", ["", "my text", "/data/valid.txt", "../bench"])
def test_a_text_that_is_no_dataset_of_the_hub_is_refused(dataset_id):
    with pytest.raises(ValueError, match="dataset_id must be org/name"):
        eval_results(FIGURES, dataset_id=dataset_id)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    base, post = tiny_models.make_pair(folder, tiny_models.llama)
    settings = ExportSettings(search=ScaleSearch(n_coarse=2, n_fine=1))
    job = prepare(Source.from_folder(post), load_checkpoint(base), settings)
    return job, run(job, folder / "out")


def test_a_card_with_an_evaluation_is_read_by_the_hub(exported):
    job, report = exported
    evaluation = Evaluation(figures=FIGURES, dataset="valid | <b>text</b>", tokens=12_345)
    card = make_card(job, report, True, evaluation=evaluation)
    read = ModelCard(card)
    results = {result.metric_type: result.metric_value for result in read.data.eval_results}
    assert results == KNOWN
    assert read.data.eval_results[0].task_type == "text-generation"
    section = card.split("### Evaluation")[1].split("###")[0]
    assert "12,345 tokens" in section
    assert "| kl mean | 0.00024 |" in section
    assert "nan" not in section
    assert "<b>" not in section.replace("\\<b\\>", "")


def test_without_figures_there_is_no_section(exported):
    job, report = exported
    plain = make_card(job, report, True)
    empty = Evaluation(figures={"gain": math.nan}, dataset="text")
    assert make_card(job, report, True, evaluation=empty) == plain
    assert "### Evaluation" not in plain
    assert "model-index" not in plain
    assert model_index("model", empty) == []
