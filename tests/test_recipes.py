"""The recipes run from a shell, as README says, and leave checkpoints that plain transformers loads."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from daq_lightning import Chain, ExportReport

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
ROWS = ("base", "BF16 fine-tuned", "absmax FP8", "DAQ sign", "DAQ cosine", "DAQ hybrid", "DAQ curvature")


def run(recipe: str, out: Path, *more: str) -> str:
    """What a recipe prints with --fast."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, str(ROOT / "recipes" / recipe), "--fast", "--out", str(out), *more]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}, cwd=out
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What the demo printed, and the folder that it wrote."""
    out = tmp_path_factory.mktemp("demo")
    return run("finetune_and_export.py", out), out


def table(printed: str) -> dict[str, list[str]]:
    lines = [line for line in printed.splitlines() if line.startswith("| ") and "---" not in line]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: row[1:] for row in cells[1:]}


def test_demo_compares_every_checkpoint_with_real_numbers(demo: tuple[str, Path]) -> None:
    rows = table(demo[0])
    assert tuple(rows) == ROWS
    for name, cells in rows.items():
        numbers = [float(cell.rstrip("%")) for cell in cells if cell != "-"]
        assert len(numbers) == (3 if name in ROWS[:2] else 6), (name, cells)
        assert all(abs(number) < 1e4 for number in numbers), (name, cells)  # NaN fails too
    assert rows["base"][1] == "0.0%"
    assert rows["BF16 fine-tuned"][1] == "100.0%"
    assert float(rows["BF16 fine-tuned"][2]) == 0
    # what the search maximizes: the update nearer its full strength, more of its signs
    assert abs(float(rows["DAQ hybrid"][5]) - 1) < abs(float(rows["absmax FP8"][5]) - 1)
    assert float(rows["DAQ sign"][3]) > float(rows["absmax FP8"][3])
    # and what codes along the curvature are for: outputs nearer to those of the unquantized model
    assert float(rows["DAQ curvature"][2]) < 0.5 * float(rows["absmax FP8"][2])


def test_demo_shows_progress_and_no_warnings(demo: tuple[str, Path]) -> None:
    assert len(re.findall(r"^\[ *\d+ s\]", demo[0], re.MULTILINE)) >= 5
    assert "Warning" not in demo[0]


def test_demo_exports_load_in_transformers(demo: tuple[str, Path]) -> None:
    for name in ROWS[2:]:
        (folder,) = (demo[1] / name.replace(" ", "-")).glob("step=*")
        codes = load_file(folder / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
        assert codes.dtype == torch.float8_e4m3fn
        model = AutoModelForCausalLM.from_pretrained(folder)
        logits = model(input_ids=torch.arange(40, 60)[None]).logits
        assert bool(logits.isfinite().all())


def test_lora_recipe_compares_the_merged_weights_with_both_exports(tmp_path: Path) -> None:
    printed = run("lora_sft.py", tmp_path)
    rows = table(printed)
    assert tuple(rows) == ("base", "merged", "merged BF16", "plain FP8", "DAQ")
    assert rows["base"][1] == "0.0%"
    assert rows["merged"][1:3] == ["100.0%", "0.00e+00"]
    assert all(abs(float(cell.rstrip("%"))) < 1e4 for row in rows.values() for cell in row if cell != "-")
    # base="auto" took the frozen weights: the update is small beside them, and no copy of them was written
    report = ExportReport.load(next((tmp_path / "DAQ").glob("step=*")))
    assert 0 < report.metrics()["delta_norm"] < 1
    assert [folder.name for folder in (tmp_path / "DAQ").iterdir()] == ["step=3"]


def test_chain_recipe_runs_three_stages_that_verify(tmp_path: Path) -> None:
    printed = run("continual_chain.py", tmp_path)
    rows = table(printed)
    assert len(rows) == 10
    assert rows["no FP8, stage 1"][3] == "100.0%"
    assert all(abs(float(cell.rstrip("%"))) < 1e4 for row in rows.values() for cell in row)
    assert "altered or foreign files: none" in printed
    for chain in ("plain-FP8", "DAQ"):
        (last,) = (tmp_path / chain / "stage-3").glob("step=*")
        lineage = Chain.open(last)
        assert [stage.manifest.lineage.chain_from for stage in lineage.stages] == [
            None,
            "deployed",
            "deployed",
        ]
        assert lineage.verify() == []


def test_sharded_recipe_trains_on_two_processes_exports_and_goes_on(tmp_path: Path) -> None:
    printed = run("fsdp2_sft.py", tmp_path)
    assert "28 weights as FP8_BLOCK" in printed
    assert printed.count("loads in transformers") == 1  # rank 0 alone speaks
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "exports" / "step=3")
    assert bool(model(input_ids=torch.arange(40, 60)[None]).logits.isfinite().all())
    # started again it goes on from there, with the same base
    assert "step=5 loads" in run("fsdp2_sft.py", tmp_path, "--steps", "5")
    assert sorted(path.name for path in (tmp_path / "exports").glob("base*")) == ["base"]
    first, second = (ExportReport.load(tmp_path / "exports" / name) for name in ("step=3", "step=5"))
    assert 0 < first.metrics()["delta_norm"] < second.metrics()["delta_norm"]


def test_sharded_recipe_begins_with_exactly_the_weights_of_a_folder(tmp_path: Path) -> None:
    base, _ = tiny_models.make_pair(tmp_path, tiny_models.llama)
    tokenizer = Tokenizer(WordLevel({"?": 0, "the": 1}, unk_token="?"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(base)
    run("fsdp2_sft.py", tmp_path, "--model", str(base), "--lr", "0")
    export = tmp_path / "exports" / "step=3"
    tensors = json.loads((export / "daq_manifest.json").read_text())["tensors"]
    prints = [(entry["base"], entry["weights"]["bfloat16"]) for entry in tensors.values() if "base" in entry]
    assert len(prints) == 14
    assert all(before == after for before, after in prints)
    assert (export / "tokenizer.json").is_file()


def test_slurm_script_is_bash() -> None:
    subprocess.run(["bash", "-n", str(ROOT / "recipes" / "slurm.sh")], check=True)


def test_two_folders_become_one_that_plain_transformers_loads(tmp_path: Path) -> None:
    base, post = tiny_models.make_pair(tmp_path, tiny_models.llama)
    command = [
        sys.executable,
        str(ROOT / "recipes" / "two_folders.py"),
        str(post),
        str(base),
        str(tmp_path / "fp8"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr[-3000:]
    assert "14 weights as FP8_BLOCK" in done.stdout
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "fp8").config.hidden_size == tiny_models.HIDDEN
