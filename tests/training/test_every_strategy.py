"""Every strategy, one process and several: the same files, the same figures, on every rank."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sharded_runs
from live import folder_bytes
from sharded_runs import STRATEGIES

pytestmark = pytest.mark.slow
SCRIPT = sharded_runs.__file__


def launched(kind: str, folder: Path, scenario: str = "everything") -> Path:
    folder.mkdir(exist_ok=True)
    arguments = [scenario, kind, str(folder)]
    for code, output in sharded_runs.launch(SCRIPT, arguments, sharded_runs.strategy(kind)[1]):
        assert code == 0, output
    return folder


@pytest.fixture(scope="module")
def single(tmp_path_factory) -> Path:
    return launched("single", tmp_path_factory.mktemp("runs") / "single")


@pytest.mark.parametrize("kind", STRATEGIES)
def test_all_strategies_write_the_same_files_and_report_the_same_figures(single, tmp_path, kind):
    found = launched(kind, tmp_path / kind)
    for run in ("full-whole", "full-parts", "lora-whole", "lora-parts"):
        expected, got = (folder_bytes(place / run / "exports") for place in (single, found))
        assert set(got) == set(expected)
        assert [name for name in expected if got[name] != expected[name]] == []
        assert len([name for name in got if name.startswith("step=4/model-")]) > 4
    for lora in (False, True):
        expected = json.loads((single / f"lora={lora}-rank0.json").read_text())
        for rank in range(sharded_runs.strategy(kind)[1]):
            assert json.loads((found / f"lora={lora}-rank{rank}.json").read_text()) == expected


def test_fsdp1_writes_the_same_files_and_refuses_adapters(tmp_path):
    single = launched("single", tmp_path / "single", "without_checkpoints")
    found = launched("fsdp1", tmp_path / "fsdp1", "without_checkpoints")
    assert folder_bytes(found / "exports") == folder_bytes(single / "exports")
    for rank in range(2):
        assert "adapters in a model that FSDP1" in (found / f"said{rank}").read_text()
        assert "flat shard of FSDP1" in (found / f"judged{rank}").read_text()
    assert (single / "said0").read_text() == ""


@pytest.mark.parametrize("kind", ["ddp2", "fsdp2tp2"])
def test_bases_of_every_kind_and_the_best_checkpoint_give_the_same_files(tmp_path, kind):
    single = launched("single", tmp_path / "single", "bases")
    found = launched(kind, tmp_path / kind, "bases")
    for run in ("memory", "ckpt", "folder", "best", "apart"):
        expected, got = (folder_bytes(place / run / "exports") for place in (single, found))
        assert set(got) == set(expected)
        assert [name for name in expected if got[name] != expected[name]] == [], run
        assert any("model-" in name for name in got)
    assert "step=2/adapter/adapter_model.safetensors" in got
    for rank in range(sharded_runs.strategy(kind)[1]):
        said = (found / f"other{rank}").read_text()
        assert "The plan of the export differs between rank 0 and rank 1" in said
        assert "o_proj.weight is" in said
    assert not (found / "other" / "exports").exists()  # before anything was written


@pytest.mark.parametrize("kind", ["ddp2", "fsdp2"])
def test_training_is_bit_identical_with_and_without_the_callback(tmp_path, kind):
    launched(kind, tmp_path, "identical")


@pytest.mark.parametrize("kind", ["ddp2", "fsdp2"])
def test_an_error_of_one_rank_never_stops_a_run_and_surfaces_at_its_end_on_all(tmp_path, kind):
    launched(kind, tmp_path, "failing")
    for rank in range(2):
        said = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert said == {"said": "the disk of rank 1 is gone", "exports": ["step=4"]}
    assert sorted(path.name for path in (tmp_path / "exports").glob("step=*")) == ["step=4"]
    assert not list((tmp_path / "exports").glob(".step*"))


def test_a_rank_that_is_left_alone_exports_and_waits_for_nobody(tmp_path):
    launched("ddp2", tmp_path, "left_alone")
    assert (tmp_path / "said1").read_text() == "rank 1 has failed"
    assert "rank 1 has failed" not in (tmp_path / "said0").read_text()  # of gloo: the connection is closed
    assert (tmp_path / "exports" / "step=1" / "config.json").is_file()


def test_all_strategies_validate_what_will_be_served_to_the_same_figures(tmp_path):
    kinds = ("single", "ddp2", "fsdp2", "fsdp2tp2")
    found = {kind: launched(kind, tmp_path / kind, "validated") for kind in kinds}
    for lora in (False, True):
        expected = json.loads((found["single"] / f"lora={lora}-rank0.json").read_text())
        assert expected["metrics"]["daq/val_loss"] != expected["metrics"]["daq/unquantized_val_loss"]
        for kind, folder in found.items():
            for rank in range(sharded_runs.strategy(kind)[1]):
                got = json.loads((folder / f"lora={lora}-rank{rank}.json").read_text())
                assert got["exports"] == expected["exports"]
                for name in ("daq/val_loss", "daq/unquantized_val_loss"):
                    assert got["metrics"][name] == pytest.approx(expected["metrics"][name], rel=1e-5), kind
    for kind, folder in found.items():
        # rejected at first, then with layers kept: published, or rejected for good, by all ranks alike
        said = [(folder / f"kept{rank}").read_text() for rank in range(sharded_runs.strategy(kind)[1])]
        notes = [
            note
            for report in folder.glob("kept/exports/*/daq_report.json")
            for note in json.loads(report.read_text())["notes"]
        ]
        assert "Kept in 16 bit, the largest KL alone" in said[0] + " ".join(notes)
        assert len(set(said)) == 1
