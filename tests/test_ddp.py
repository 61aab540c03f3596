"""Two processes: a run under DDP exports what one process would, resumes to the same bytes, and errors reach all ranks.

The runs happen in a process group of their own, which is killed as a whole if it hangs.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from live import folder_bytes


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
    assert sorted(path.name for path in (tmp_path / "parts" / "exports").iterdir()) == ["base", "step=2", "step=4"]
    # every weight counts once, although every rank holds it
    from daq_lightning import ExportReport

    report = ExportReport.load(tmp_path / "whole" / "exports" / "step=4")
    assert int(report.totals().n) == 7 * 128 * 128


def test_a_base_that_does_not_fit_stops_all_ranks(tmp_path):
    result = run("bad_base", tmp_path)
    assert result.returncode == 0, result.stdout


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


if __name__ == "__main__":
    {"resume": _resume, "bad_base": _bad_base}[sys.argv[1]](Path(sys.argv[2]))
