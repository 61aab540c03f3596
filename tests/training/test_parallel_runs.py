"""Several runs in one `dirpath`: none disturbs another, and a snapshot stays exactly as long as something
refers to it.

Runs that have to be at the same place at the same time are processes, which wait for each other after their
imports.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback, ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from live import Tuning, data, fit, folder_bytes, make_trainer, tiny_llama

from daq_lightning import CheckpointError, DeltaAwareQuantization, ScaleSearch
from daq_lightning.checkpoint.reader import Checkpoint
from daq_lightning.training.base import take_snapshot
from daq_lightning.training.claims import claim, free_name

QUICK = ScaleSearch(metric="cosine", n_coarse=3, n_fine=0)


def quantization(folder: Path, **changes) -> DeltaAwareQuantization:
    return DeltaAwareQuantization(**({"dirpath": str(folder / "exports"), "search": QUICK} | changes))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "exports").iterdir())


def together(folder: Path, scenario: str, count: int) -> list[str]:
    """Starts processes that begin a scenario at the same moment; their outputs."""
    folder.mkdir(exist_ok=True)
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, scenario, str(folder), str(number), str(count)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for number in range(count)
    ]
    try:
        outputs = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * count, "\n".join(outputs)
    return outputs


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ["same", "different"])
def test_runs_that_start_at_once_in_one_folder_each_write_their_own_export(tmp_path, scenario):
    together(tmp_path / "many", scenario, 3)
    bases = ["base"] if scenario == "same" else ["base", "base-v1", "base-v2"]
    assert names(tmp_path / "many") == [*bases, "step=2", "step=2-v1", "step=2-v2"]
    found = [folder_bytes(tmp_path / "many" / "exports" / f"step=2{end}", ("daq_manifest.json",
    "daq_report.json"))
             for end in ("", "-v1", "-v2")]  # fmt: skip
    for number in range(3):
        alone = tmp_path / f"alone{number}"
        run(scenario, alone, number)
        expected = folder_bytes(alone / "exports" / "step=2", ("daq_manifest.json", "daq_report.json"))
        assert expected in found
    # every manifest names the base that its run began with
    for end in ("", "-v1", "-v2"):
        out = tmp_path / "many" / "exports" / f"step=2{end}"
        lineage = json.loads((out / "daq_manifest.json").read_text())["lineage"]
        assert (out / lineage["base_path"]).resolve().is_dir()


@pytest.mark.slow
def test_snapshots_taken_at_once_are_whole_and_equal_ones_are_one(tmp_path):
    together(tmp_path, "snapshots", 3)
    # ten rounds; in each, two processes take the same weights and the third takes others
    for round_ in range(10):
        assert names(tmp_path / f"round{round_}") == ["base", "base-v1"]
        values = {
            float(Checkpoint(path)["w"][0, 0]) for path in (tmp_path / f"round{round_}" / "exports").iterdir()
        }
        assert values == {0.0, 1.0}


@pytest.mark.slow
def test_a_claim_ends_with_its_process(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from daq_lightning.training.claims import claim\n"
        "with claim(Path(sys.argv[1])): print('claimed', flush=True); time.sleep(600)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "step=2")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "claimed\n"
    with free_name(tmp_path / "step=2") as name:
        assert name == tmp_path / "step=2-v1"
    with claim(tmp_path / "step=2", wait=False) as claimed:
        assert not claimed
    process.kill()
    process.communicate()
    with free_name(tmp_path / "step=2") as name:
        assert name == tmp_path / "step=2"
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_cannot_be_claimed_is_an_error_that_says_so(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="cannot be written"), free_name(tmp_path / "file" / "step=2"):
        pass


# What becomes of a snapshot


class Interrupted(Tuning):
    """Is interrupted before its step of this number."""

    def __init__(self, step: int, error: type[BaseException] = KeyboardInterrupt) -> None:
        super().__init__()
        self.step, self.error = step, error

    def training_step(self, batch, batch_idx):
        if self.steps == self.step:
            raise self.error("now")
        return super().training_step(batch, batch_idx)


def interrupt(folder: Path, *callbacks: L.Callback, step: int = 0, **changes) -> None:
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        fit(folder, *callbacks, module=Interrupted(step), **changes)


def test_a_run_that_is_interrupted_before_its_first_step_leaves_no_snapshot(tmp_path):
    interrupt(tmp_path, quantization(tmp_path))
    assert names(tmp_path) == []
    module = Interrupted(0, RuntimeError)
    with pytest.raises(RuntimeError, match="now"):
        fit(tmp_path, quantization(tmp_path), module=module)
    assert names(tmp_path) == []


def test_a_run_without_steps_leaves_no_snapshot(tmp_path):
    with pytest.warns(UserWarning, match="exported nothing"):
        fit(tmp_path, quantization(tmp_path), max_steps=-1, max_epochs=0)
    assert names(tmp_path) == []


def test_a_run_that_is_refused_after_its_snapshot_leaves_none(tmp_path):
    with pytest.raises(CheckpointError, match="needs parent"):
        fit(tmp_path, quantization(tmp_path, chain_from="weights", parent=str(tmp_path / "none")))
    assert names(tmp_path) == []


def test_a_snapshot_of_a_run_that_made_steps_stays(tmp_path):
    """Its weights are still in memory, from where a script may save them."""
    callback = quantization(tmp_path)
    interrupt(tmp_path, callback, step=2)
    assert names(tmp_path) == ["base"]


def test_a_snapshot_that_a_saved_checkpoint_refers_to_stays_and_serves_a_resumed_run(tmp_path):
    def save(trainer, module):
        trainer.save_checkpoint(tmp_path / "early.ckpt")

    interrupt(tmp_path, quantization(tmp_path), LambdaCallback(on_train_start=save))
    assert names(tmp_path) == ["base"]
    fit(tmp_path, quantization(tmp_path), ckpt=tmp_path / "early.ckpt")
    assert names(tmp_path) == ["base", "step=4"]


def test_a_snapshot_that_a_checkpoint_of_model_checkpoint_refers_to_stays(tmp_path):
    saver = ModelCheckpoint(dirpath=tmp_path / "saved", every_n_train_steps=1, filename="{step}")
    interrupt(tmp_path, saver, quantization(tmp_path), step=1)
    assert names(tmp_path) == ["base"]
    assert (tmp_path / "saved" / "step=1.ckpt").exists()


@pytest.mark.parametrize("saver", [
    lambda folder: OnExceptionCheckpoint(folder, "last"),
    lambda folder: ModelCheckpoint(dirpath=folder, filename="last", save_on_exception=True, save_top_k=0),
])  # fmt: skip
def test_a_checkpoint_saved_after_the_exception_holds_the_base_too(tmp_path, saver):
    interrupt(tmp_path, quantization(tmp_path), saver(tmp_path / "saved"), step=2, enable_checkpointing=True)
    [file] = (tmp_path / "saved").glob("*.ckpt")
    resumed = quantization(tmp_path)
    fit(tmp_path, resumed, ckpt=file)
    assert names(tmp_path) == ["base", "step=4"]


def test_a_checkpoint_saved_when_the_fit_is_over_holds_the_base_too(tmp_path):
    trainer = make_trainer(tmp_path, quantization(tmp_path))
    trainer.fit(Tuning(), data())
    trainer.save_checkpoint(tmp_path / "final.ckpt")
    fit(tmp_path, quantization(tmp_path), ckpt=tmp_path / "final.ckpt", max_steps=6)
    assert names(tmp_path) == ["base", "step=4", "step=6"]


def test_a_snapshot_that_an_export_names_stays(tmp_path):
    callback = quantization(tmp_path, export_on_exception=True)
    interrupt(tmp_path, callback)
    assert names(tmp_path) == ["base", "step=0"]


def test_a_snapshot_of_another_run_stays(tmp_path):
    fit(tmp_path, quantization(tmp_path))
    interrupt(tmp_path, quantization(tmp_path))  # the same weights: it uses the same snapshot
    assert names(tmp_path) == ["base", "step=4"]
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        other = Interrupted(0)
        other.model = tiny_llama(1)
        make_trainer(tmp_path, quantization(tmp_path)).fit(other, data())
    assert names(tmp_path) == ["base", "step=4"], "its own went, the other's stayed"


def test_a_snapshot_that_a_second_run_began_to_use_stays_when_its_maker_ends(tmp_path):
    second = quantization(tmp_path)

    def begin_second(trainer, module):
        fit(tmp_path / "second", second)
        raise KeyboardInterrupt

    interrupt(tmp_path, quantization(tmp_path), LambdaCallback(on_train_start=begin_second))
    assert names(tmp_path) == ["base", "step=4"]


def test_snapshots_between_exports_are_not_taken_for_those_of_another_run(tmp_path):
    saver = ModelCheckpoint(
        dirpath=tmp_path / "saved", every_n_train_steps=1, save_top_k=-1, save_last=True, filename="{step}"
    )
    callback = quantization(tmp_path, export_on="checkpoint", reference="previous_checkpoint", keep_last=1)
    fit(tmp_path, saver, callback)
    assert names(tmp_path) == ["base", "base-step=3", "base-step=4", "step=4"]


def test_a_base_that_is_gone_is_still_an_error_when_the_run_resumes(tmp_path):
    saver = ModelCheckpoint(dirpath=tmp_path / "saved", every_n_train_steps=2, filename="{step}")
    fit(tmp_path, saver, quantization(tmp_path, base="memory"), max_steps=2)
    with pytest.raises(MisconfigurationException, match="kept in memory"):
        fit(tmp_path, quantization(tmp_path, base="memory"), ckpt=tmp_path / "saved" / "step=2.ckpt")


# What the processes do


def wait_for_all(folder: Path, number: int, count: int, name: str) -> None:
    (folder / f"{name}-{number}").touch()
    while len(list(folder.glob(f"{name}-*"))) < count:
        time.sleep(0.001)


def run(scenario: str, folder: Path, number: int) -> None:
    model = tiny_llama(0 if scenario == "same" else number)
    fit(folder, quantization(folder), module=Tuning(model), max_steps=2)


def _main(scenario: str, folder: Path, number: int, count: int) -> None:
    wait_for_all(folder, number, count, "ready")
    if scenario != "snapshots":
        run(scenario, folder, number)
        return
    for round_ in range(10):
        weights = {"w": torch.full((64, 64), float(number == 2)), "x": torch.ones(256, 256)}
        (folder / f"round{round_}").mkdir(exist_ok=True)
        wait_for_all(folder, number, count, f"begin{round_}")
        base = take_snapshot(weights, weights, folder / f"round{round_}" / "exports" / "base")
        assert torch.equal(base.weights["w"], weights["w"])


if __name__ == "__main__":
    _main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
