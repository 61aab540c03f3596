"""The recipes run from a shell, as README says, and leave checkpoints that plain transformers loads."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).parent.parent
ROWS = ("base", "BF16 fine-tuned", "absmax FP8", "DAQ sign", "DAQ cosine", "DAQ hybrid")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What the demo printed, and the folder that it wrote."""
    out = tmp_path_factory.mktemp("demo")
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, str(ROOT / "recipes/finetune_and_export.py"), "--fast", "--out", str(out)]
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}, cwd=out)
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout, out


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
