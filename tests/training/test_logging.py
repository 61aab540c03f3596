"""What loggers, other callbacks and users are told: names, values, pictures."""

from __future__ import annotations

import csv
import importlib.util
import json
import math
import sys
import warnings
from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from live import Tuning, data, folder_bytes, make_trainer, tiny_llama
from safetensors.torch import load_file

from daq_lightning import DeltaAwareQuantization, ScaleSearch
from daq_lightning.export.timings import Timings
from daq_lightning.numerics.objectives import measure

QUICK = ScaleSearch(metric="cosine", n_coarse=3, n_fine=0)
COST = {"daq/search_seconds", "daq/export_seconds", "daq/bytes"}
FIGURES = {"sign_rate", "cosine", "gain", "mse", "norm", "noise"}
NAMES = COST | {f"daq/{prefix}{name}" for name in FIGURES for prefix in ("", "absmax_")}
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


class Listening(Logger):
    """A logger of somebody else, which has the interface and nothing more."""

    name = version = "listening"

    def __init__(self) -> None:
        super().__init__()
        self.told: list[tuple[int | None, dict[str, float]]] = []

    def log_metrics(self, metrics, step=None):
        self.told.append((step, dict(metrics)))

    def log_hyperparams(self, *arguments, **options):
        pass


def exported(folder: Path, *loggers, module=None, **changes):
    callback = DeltaAwareQuantization(dirpath=str(folder / "exports"), search=QUICK, **changes)
    trainer = make_trainer(folder, callback, logger=list(loggers), max_steps=2)
    trainer.fit(Tuning() if module is None else module, data())
    return callback, trainer


def in_csv(logger: CSVLogger) -> dict[str, float]:
    """The last value of each column of the file."""
    with open(logger.experiment.metrics_file_path) as file:
        return {
            name: float(value) for row in csv.DictReader(file) for name, value in row.items() if value != ""
        }


def test_figures_twins_and_cost_reach_files_other_loggers_callback_and_trainer(tmp_path):
    file, other = CSVLogger(tmp_path), Listening()
    callback, trainer = exported(tmp_path, file, other)
    written = {name: value for name, value in in_csv(file).items() if name.startswith("daq/")}
    assert set(written) == set(callback.metrics) == NAMES
    assert written == pytest.approx(callback.metrics, rel=1e-12)
    assert (2, callback.metrics) in other.told
    shared = {name: float(value) for name, value in trainer.callback_metrics.items() if "daq/" in name}
    assert shared == pytest.approx(callback.metrics, rel=1e-6)  # the Trainer's are float32


def test_the_cost_is_that_of_the_export_and_no_file_of_it_knows(tmp_path):
    one, _ = exported(tmp_path / "one")
    two, _ = exported(tmp_path / "two", log_per_layer=True)
    files = list(one.exports[0].glob("*.safetensors"))
    assert one.metrics["daq/bytes"] == sum(file.stat().st_size for file in files) > 1e5
    assert 0 < one.metrics["daq/search_seconds"] < one.metrics["daq/export_seconds"] < 60
    said = (one.exports[0] / "daq_report.json").read_text()
    assert "seconds" not in said
    same = [folder_bytes(export.exports[0], skip=("README.md", "daq_manifest.json")) for export in (one, two)]
    assert same[0] == same[1]


def test_the_cost_is_that_of_the_slowest_rank():
    class Ranks:
        def gather(self, mine):
            return [(3.0, 1.0, 0), mine]

    timings = Timings(search_seconds=2.0, bytes=70)
    timings.collect(Ranks())
    assert (timings.search_seconds, timings.export_seconds, timings.bytes) == (3.0, 1.0, 70)


def test_figures_of_each_weight_go_to_loggers_alone_and_only_when_asked_for(tmp_path):
    file = CSVLogger(tmp_path)
    base = {name: tensor.clone() for name, tensor in tiny_llama().state_dict().items()}
    module = Tuning()
    callback, trainer = exported(tmp_path, file, module=module, log_per_layer=True)
    written = {name: value for name, value in in_csv(file).items() if name.startswith("daq/layer/")}
    assert len(written) == 7 * 2 * 3
    raw = load_file(next(callback.exports[0].glob("*.safetensors")))
    scale = raw[Q_PROJ + "_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)
    stats = measure(module.model.state_dict()[Q_PROJ], base[Q_PROJ], raw[Q_PROJ].float() * scale)
    expected = float(stats.dot / (stats.delta_sq * stats.delta_q_sq).sqrt())
    assert written[f"daq/layer/{Q_PROJ}/cosine"] == pytest.approx(expected, rel=1e-5)
    assert written[f"daq/layer/{Q_PROJ}/absmax_cosine"] <= written[f"daq/layer/{Q_PROJ}/cosine"]
    for told in (callback.metrics, trainer.callback_metrics):
        assert not [name for name in told if "layer" in name]
    quiet = CSVLogger(tmp_path / "quiet")
    exported(tmp_path / "quiet", quiet)
    assert not [name for name in in_csv(quiet) if "layer" in name]


def test_an_update_of_nothing_logs_no_nan_for_a_weight(tmp_path):
    other = Listening()
    with pytest.warns(UserWarning, match="No weight changed"):
        exported(tmp_path, other, module=Tuning(learning_rate=0.0), log_per_layer=True)
    told = {name: value for _, metrics in other.told for name, value in metrics.items() if "layer" in name}
    assert told
    assert all(map(math.isfinite, told.values()))


def test_tensorboard_holds_scalars_and_pictures(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path)
    callback, _ = exported(tmp_path, logger, log_per_layer=True)
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    assert set(events.Tags()["scalars"]) >= NAMES | {f"daq/layer/{Q_PROJ}/absmax_gain"}
    [cosine] = events.Scalars("daq/cosine")
    assert (cosine.step, cosine.value) == (2, pytest.approx(callback.metrics["daq/cosine"], rel=1e-6))
    assert events.Tags()["images"] == ["daq/served_by_layer", "daq/gain_histogram"]
    [image] = events.Images("daq/served_by_layer")
    assert (image.step, image.encoded_image_string[:8]) == (2, b"\x89PNG\r\n\x1a\n")
    assert image.width > 300
    assert image.height > 200


def test_pictures_are_only_drawn_when_asked_for(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path)
    exported(tmp_path, logger)
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    assert events.Tags()["images"] == []


class Showing(Listening):
    """Takes pictures as W&B's logger does."""

    def log_image(self, key, images, step=None):
        self.told.append((step, {key: images[0].shape}))


def test_without_matplotlib_figures_are_logged_and_it_is_said_that_pictures_are_not(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "matplotlib" else find(name, *rest)
    )
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    logger = Showing()
    with pytest.warns(UserWarning, match=r"not installed.*daq-lightning\[plot\]"):
        callback, _ = exported(tmp_path, logger, log_per_layer=True)
    told = {name for _, metrics in logger.told for name in metrics}
    assert f"daq/layer/{Q_PROJ}/gain" in told
    assert not [name for name in told if "histogram" in name]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*matplotlib.*")
        exported(tmp_path / "quiet", logger)
        exported(tmp_path / "blind", Listening(), log_per_layer=True)  # it would show none anyway


def test_a_logger_that_shows_pictures_gets_them(tmp_path):
    pytest.importorskip("matplotlib")
    logger = Showing()
    exported(tmp_path, logger, log_per_layer=True)
    shapes = {name: value for _, metrics in logger.told for name, value in metrics.items()}
    assert shapes["daq/served_by_layer"][2] == shapes["daq/gain_histogram"][2] == 3


def test_mlflow_keeps_them_in_its_files(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # which newer releases ask for
    from lightning.pytorch.loggers import MLFlowLogger

    logger = MLFlowLogger("daq", tracking_uri=f"file:{tmp_path / 'mlruns'}")
    callback, _ = exported(tmp_path, logger, log_per_layer=True)
    kept = logger.experiment.get_run(logger.run_id).data.metrics
    assert {name: kept[name] for name in NAMES} == pytest.approx(callback.metrics)
    assert f"daq/layer/{Q_PROJ}/absmax_cosine" in kept
    [entry] = logger.experiment.get_metric_history(logger.run_id, "daq/cosine")
    assert entry.step == 2


def test_an_offline_run_of_wandb_keeps_them_and_the_pictures(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    from lightning.pytorch.loggers import WandbLogger

    logger = WandbLogger(project="daq", save_dir=tmp_path, offline=True)
    callback, _ = exported(tmp_path, logger, log_per_layer=True)
    summary = dict(logger.experiment.summary)
    assert {name: summary[name] for name in NAMES} == pytest.approx(callback.metrics)
    assert f"daq/layer/{Q_PROJ}/gain" in summary
    wandb.finish()
    assert len(list((tmp_path / "wandb").rglob("daq/*_*.png"))) == 2
    assert list((tmp_path / "wandb").rglob("*.wandb"))


@pytest.mark.parametrize("argument", [{"log_per_layer": "yes"}, {"log_survival_every_n_steps": 0}])
def test_what_cannot_be_meant_is_refused(tmp_path, argument):
    with pytest.raises(MisconfigurationException, match=f"{next(iter(argument))}=.*: expected"):
        DeltaAwareQuantization(dirpath=str(tmp_path), **argument)


def test_the_report_is_what_it_was_without_any_logging(tmp_path):
    one, _ = exported(tmp_path / "one")
    two, _ = exported(tmp_path / "two", log_per_layer=True, log_survival_every_n_steps=1)
    reports = [json.loads((each.exports[0] / "daq_report.json").read_text()) for each in (one, two)]
    assert reports[0] == reports[1]
    assert torch.is_tensor(one.report.tensors[0].searched.dot)
