"""What a release is made by: one version, bounds that can be tested, workflows that call what is there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

import daq_lightning

ROOT = Path(__file__).resolve().parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PYPROJECT = (ROOT / "pyproject.toml").read_text()


def test_the_version_is_one_and_has_an_entry_in_the_changelog() -> None:
    assert f'\nversion = "{daq_lightning.__version__}"\n' in PYPROJECT
    assert f"\n## {daq_lightning.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_lowest_versions_are_the_bounds_of_every_dependency() -> None:
    command = [sys.executable, str(ROOT / ".ci" / "lowest.py")]
    lowest = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    declared = re.search(r"^dependencies = \[\n(.*?)^\]", PYPROJECT, re.DOTALL | re.MULTILINE)
    assert declared is not None
    wanted = {one.name: one for one in map(Requirement, re.findall(r'^  "(.+)",', declared[1], re.MULTILINE))}
    found = {name: Version(version) for name, version in (line.split("==") for line in lowest)}
    assert found.keys() == wanted.keys()
    for name, version in found.items():
        (bound,) = (one.version for one in wanted[name].specifier if one.operator == ">=")
        assert Version(bound) == version


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_have_jobs_whose_scripts_are_here(path: Path) -> None:
    content = yaml.safe_load(path.read_text())
    jobs = content["jobs"]
    steps = [step for job in jobs.values() for step in job["steps"]]
    assert {need for job in jobs.values() for need in [job.get("needs", [])] if isinstance(need, str)} <= set(
        jobs
    )
    scripts = {name for step in steps for name in re.findall(r"\.ci/[\w.]+", step.get("run", ""))}
    assert scripts
    for name in scripts:
        assert (ROOT / name).is_file(), name
        assert name.endswith(".py") or os.access(ROOT / name, os.X_OK), name
    assert content["permissions"] == {"contents": "read"}  # more only where a job says so


def test_the_release_is_published_without_a_token_that_is_kept() -> None:
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text())["jobs"]
    assert jobs["publish"]["permissions"]["id-token"] == "write"
    assert jobs["publish"]["needs"] == "check"
    assert "secrets." not in (ROOT / ".github" / "workflows" / "release.yml").read_text()


def test_the_matrix_has_every_python_that_is_promised() -> None:
    matrix = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text())["jobs"]["versions"]
    assert matrix["strategy"]["matrix"]["python"] == ["3.10", "3.11", "3.12", "3.13"]
    assert 'requires-python = ">=3.10"' in PYPROJECT
