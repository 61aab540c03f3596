"""FSDP1 and DeepSpeed as Lightning runs them, on a GPU."""

from __future__ import annotations

import pytest
import sharded_runs
from live import Tuning, data, folder_bytes, make_trainer

from daq_lightning import DeltaAwareQuantization
from daq_lightning.audit.verify import run_checks

pytestmark = [pytest.mark.gpu, pytest.mark.slow]


def test_fsdp1_writes_the_files_of_a_single_gpu(tmp_path):
    for name, strategy in (("single", "auto"), ("fsdp", "fsdp")):
        folder = tmp_path / name
        callback = sharded_runs.quantization(folder)
        trainer = make_trainer(
            folder, callback, accelerator="cuda", devices=1, strategy=strategy, max_epochs=1, max_steps=-1
        )
        trainer.fit(sharded_runs.Steps(), data(4))
    assert folder_bytes(tmp_path / "fsdp" / "exports") == folder_bytes(tmp_path / "single" / "exports")


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_exports(tmp_path, stage):
    pytest.importorskip("deepspeed")
    callback = DeltaAwareQuantization(dirpath=str(tmp_path / "exports"))
    strategy = f"deepspeed_stage_{stage}"
    make_trainer(tmp_path, callback, accelerator="cuda", devices=1, strategy=strategy).fit(Tuning(), data())
    assert not any(check.problems for check in run_checks(callback.exports[-1]))
    assert callback.report is not None
    assert callback.report.totals().n_changed > 0
