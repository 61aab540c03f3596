"""Two processes: a run under DDP exports what one process would, resumes to the same bytes, and errors reach
all ranks.

The runs happen in a process group of their own, which is killed as a whole if it hangs.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from lightning.pytorch import Callback
from live import end_process_group, folder_bytes

pytestmark = pytest.mark.slow


def run(scenario: str, folder: Path, timeout: int = 150) -> subprocess.CompletedProcess[str]:
    process = subprocess.Popen(
        [sys.executable, __file__, scenario, str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, output)


def test_a_resumed_ddp_run_exports_the_same_bytes_and_each_weight_once(tmp_path):
    result = run("resume", tmp_path)
    assert result.returncode == 0, result.stdout
    whole, parts = (folder_bytes(tmp_path / name / "exports" / "step=4") for name in ("whole", "parts"))
    assert whole == parts
    assert sorted(path.name for path in (tmp_path / "parts" / "exports").iterdir()) == [
        "base",
        "step=2",
        "step=4",
    ]
    # every weight counts once, although every rank holds it
    from daq_lightning import ExportReport

    report = ExportReport.load(tmp_path / "whole" / "exports" / "step=4")
    assert int(report.totals().n) == 7 * 128 * 128


def test_a_base_that_does_not_fit_stops_all_ranks(tmp_path):
    result = run("bad_base", tmp_path)
    assert result.returncode == 0, result.stdout


def attributes(callback) -> dict:
    """What a user reads of a callback after the fit, as JSON can hold it."""
    return {
        "exports": [str(path) for path in callback.exports],
        "metrics": callback.metrics,
        "summary": None if callback.report is None else callback.report.summary(),
        "tensors": None if callback.report is None else callback.report.to_dict()["tensors"],
    }


def expected(folder: Path, names: list[str]) -> dict:
    """The same, from the files alone."""
    from daq_lightning import ExportReport

    report = ExportReport.load(folder / "exports" / names[-1])
    return {
        "exports": [str(folder / "exports" / name) for name in names],
        "summary": report.summary(),
        "tensors": report.to_dict()["tensors"],
    }


@pytest.mark.parametrize("scenario", ["ranks", "ranks_checkpoint", "ranks_best"])
def test_report_metrics_and_exports_are_the_same_on_every_rank(tmp_path, scenario):
    result = run(scenario, tmp_path)
    assert result.returncode == 0, result.stdout
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert ranks[0] == ranks[1]
    assert ranks[0]["trainer"]["daq/cosine"] == pytest.approx(ranks[0]["metrics"]["daq/cosine"])
    names = {
        "ranks": ["step=2", "step=4"],
        "ranks_checkpoint": ["step=2", "step=4"],
        "ranks_best": ["step=4"],
    }
    found = expected(tmp_path, names[scenario])
    assert {name: ranks[0][name] for name in found} == found
    assert math.isfinite(ranks[0]["metrics"]["daq/cosine"])


@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork"])
def test_report_metrics_and_exports_reach_the_process_that_started_the_workers(tmp_path, strategy):
    result = run(strategy, tmp_path)
    assert result.returncode == 0, result.stdout
    parent = json.loads((tmp_path / "parent.json").read_text())
    found = expected(tmp_path, ["step=2", "step=4"])
    assert {name: parent[name] for name in found} == found
    assert math.isfinite(parent["metrics"]["daq/cosine"])
    assert sorted(path.name for path in (tmp_path / "exports").iterdir()) == ["base", "step=2", "step=4"]
    assert list((tmp_path / "temporary").glob("daq*")) == []  # nothing stays behind


def test_exports_of_a_run_that_failed_reach_the_process_that_started_the_workers(tmp_path):
    result = run("failing_spawn", tmp_path)
    assert result.returncode == 0, result.stdout
    parent = json.loads((tmp_path / "parent.json").read_text())
    found = expected(tmp_path, ["step=2"])
    assert {name: parent[name] for name in found} == found


@pytest.mark.parametrize(
    ("scenario", "kind", "message"),
    [
        ("spoiled", "ValueError", "1 NaN"),
        ("spoiled_strangely", "RuntimeError", "StubbornError: one and two"),
        ("destination", "CheckpointError", "exports"),
        ("broken_base", "OSError", "the disk is gone"),
        ("lost_best", "CheckpointError", "step=4.ckpt"),
    ],
)
def test_an_error_of_the_rank_that_exports_is_raised_on_all_ranks(tmp_path, scenario, kind, message):
    result = run(scenario, tmp_path)
    assert result.returncode == 0, result.stdout
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    if scenario == "spoiled_strangely":  # an error that cannot be sent is told in words
        assert ranks[0]["kind"] == "StubbornError"
        assert (ranks[1]["kind"], ranks[1]["message"]) == (kind, message)
        return
    assert [rank["kind"] for rank in ranks] == [kind, kind]
    assert ranks[0]["message"] == ranks[1]["message"]
    assert message in ranks[0]["message"]


def _resume(folder: Path) -> None:
    from lightning.pytorch.callbacks import ModelCheckpoint
    from test_when import Repeatable, fit, quantization

    def train(name: str, epochs: int, ckpt: Path | None = None) -> None:
        saver = ModelCheckpoint(
            dirpath=folder / name / "checkpoints", every_n_epochs=1, save_top_k=-1, filename="{step}"
        )
        callback = quantization(folder / name, export_on="checkpoint")
        fit(
            *(folder / name, saver, callback), module=Repeatable(), ckpt=ckpt,
            max_steps=-1, max_epochs=epochs, strategy="ddp_fork", devices=2,
        )  # fmt: skip

    train("whole", 2)
    train("parts", 1)
    train("parts", 2, folder / "parts" / "checkpoints" / "step=2.ckpt")


def _bad_base(folder: Path) -> None:
    from test_when import fit, quantization

    callback = quantization(folder, base=str(folder / "missing"))
    with pytest.raises(Exception, match="does not exist"):
        fit(folder, callback, strategy="ddp_fork", devices=2)


def _write(folder: Path, content: dict, name: str | None = None) -> None:
    name = f"rank{os.environ.get('LOCAL_RANK', 0)}" if name is None else name
    (folder / f"{name}.json").write_text(json.dumps(content))


def _ranks(folder: Path, **changes) -> None:
    import lightning.pytorch as L
    from live import Tuning, data, make_trainer
    from test_when import quantization, saver

    L.seed_everything(3, verbose=False)
    others = [saver(folder, monitor="train_loss", save_top_k=2 if changes else 1)] if changes else []
    callback = quantization(folder, **(changes or {"every_n_train_steps": 2}))
    trainer = make_trainer(folder, callback, *others, strategy="ddp", devices=2)
    trainer.fit(Tuning(), data(16))
    trainer_metrics = {
        name: float(value) for name, value in trainer.callback_metrics.items() if "daq/" in name
    }
    _write(folder, attributes(callback) | {"trainer": trainer_metrics})


def _spawn(folder: Path, strategy: str) -> None:
    from live import Tuning, data, make_trainer
    from test_when import quantization

    (folder / "temporary").mkdir()
    os.environ["TMPDIR"] = str(folder / "temporary")
    callback = quantization(folder, every_n_train_steps=2)
    make_trainer(folder, callback, strategy=strategy, devices=2).fit(Tuning(), data(16))
    _write(folder, attributes(callback), "parent")


class Failing(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 3:
            raise RuntimeError("the data is gone")


def _failing_spawn(folder: Path) -> None:
    from live import Tuning, data, make_trainer
    from test_when import quantization

    callback = quantization(folder, every_n_train_steps=2)
    with pytest.raises(Exception, match="the data is gone"):
        make_trainer(folder, callback, Failing(), strategy="ddp_spawn", devices=2).fit(Tuning(), data(16))
    _write(folder, attributes(callback), "parent")


def _error(folder: Path, callback, *others) -> None:
    """What a fit under DDP raises on this rank."""
    from live import Tuning, data, make_trainer

    trainer = make_trainer(folder, *others, callback, strategy="ddp", devices=2)
    with pytest.raises(Exception) as raised:
        trainer.fit(Tuning(), data(16))
    _write(folder, {"kind": type(raised.value).__name__, "message": str(raised.value)})


def _spoiled(folder: Path) -> None:
    from lightning.pytorch.callbacks import LambdaCallback
    from test_when import quantization

    def spoil(trainer, module):
        module.model.model.layers[0].mlp.up_proj.weight.data[0, 0] = math.nan

    _error(folder, quantization(folder), LambdaCallback(on_train_end=spoil))


class StubbornError(Exception):
    """Cannot be unpickled: its arguments are not those of Exception."""

    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")


def _spoiled_strangely(folder: Path) -> None:
    from test_when import quantization

    from daq_lightning.training import placed as module

    def fail(folder, taken):  # rank 0 alone chooses the name
        raise StubbornError("one", "two")

    module.free_name = fail
    _error(folder, quantization(folder))


def _destination(folder: Path) -> None:
    from test_when import quantization

    if os.environ.get("LOCAL_RANK", "0") == "0":
        (folder / "exports").write_text("mine")
    _error(folder, quantization(folder))


def _broken_base(folder: Path) -> None:
    from test_when import quantization

    callback = quantization(folder)

    def fail(*args, **kwargs):
        raise OSError("the disk is gone")

    callback._prepare = fail
    _error(folder, callback)


def _lost_best(folder: Path) -> None:
    import shutil

    from lightning.pytorch.callbacks import LambdaCallback
    from test_when import quantization, saver

    def lose(trainer, module):
        trainer.strategy.barrier()
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)

    best = saver(folder, monitor="train_loss", save_top_k=1, every_n_train_steps=4)
    _error(folder, quantization(folder, which="best"), best, LambdaCallback(on_train_end=lose))


SCENARIOS = {
    "resume": _resume,
    "bad_base": _bad_base,
    "ranks": _ranks,
    "ranks_checkpoint": lambda folder: _ranks(folder, export_on="checkpoint"),
    "ranks_best": lambda folder: _ranks(folder, which="best"),
    "ddp_spawn": lambda folder: _spawn(folder, "ddp_spawn"),
    "ddp_fork": lambda folder: _spawn(folder, "ddp_fork"),
    "failing_spawn": _failing_spawn,
    "spoiled": _spoiled,
    "spoiled_strangely": _spoiled_strangely,
    "destination": _destination,
    "broken_base": _broken_base,
    "lost_best": _lost_best,
}

if __name__ == "__main__":
    SCENARIOS[sys.argv[1]](Path(sys.argv[2]))
    end_process_group()
