"""The benchmark of a step of training runs, and its interval is the one of the order statistics."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "training.py"


def loaded():
    spec = importlib.util.spec_from_file_location("benchmark_of_training", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("n", "ranks"), [(2, (1, 2)), (6, (1, 6)), (15, (4, 12)), (25, (8, 18))])
def test_the_interval_is_that_of_the_tables(n, ranks):
    """Ranks from tables of the sign test, two-sided, 5 %."""
    assert loaded().interval([float(value) for value in range(1, n + 1)]) == ranks


@pytest.mark.slow
def test_it_runs_and_prints_a_line_for_each_kind_of_fit():
    run = subprocess.run(
        [sys.executable, str(SCRIPT), "--quick"], capture_output=True, text=True, check=False, timeout=280
    )
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    for kind in ("without", "with", "with survival", "collecting"):
        [line] = [line for line in lines if re.match(rf"{kind} +\d", line)]
        assert len(re.findall(r"\d+\.\d+", line)) == 8
    assert re.match(r"peak memory \d+ MB", lines[-1])
