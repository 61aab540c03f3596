"""LightningCLI reads the recipe's YAML, prints it completely, and reads the same from what it printed."""

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import yaml
from lightning.pytorch.cli import LightningCLI

from daq_lightning import DeltaAwareQuantization, ScaleSearch

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "recipes"


def command_line(monkeypatch: pytest.MonkeyPatch, *args: str) -> LightningCLI:
    """The command that the recipe names, without a process and a run of its own."""
    monkeypatch.syspath_prepend(str(RECIPES))
    monkeypatch.setattr(sys, "argv", ["test"])
    with warnings.catch_warnings():  # of jsonargparse, about how lightning 2.6 calls it
        warnings.simplefilter("ignore")
        return LightningCLI(run=False, args=list(args))


def print_config(monkeypatch: pytest.MonkeyPatch, file: Path) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as end:
        command_line(monkeypatch, "--config", str(file), "--print_config")
    assert end.value.code == 0
    return printed.getvalue()


def holds(whole, part) -> bool:
    """Whether a tree has everything that another has."""
    if isinstance(part, dict):
        return all(key in whole and holds(whole[key], value) for key, value in part.items())
    if isinstance(part, list):
        return len(whole) == len(part) and all(map(holds, whole, part))
    return whole == part


def test_the_printed_config_says_all_that_the_recipe_says_and_prints_itself(
    monkeypatch, tmp_path: Path
) -> None:
    file = tmp_path / "printed.yaml"
    file.write_text(print_config(monkeypatch, RECIPES / "config.yaml"))
    content = yaml.safe_load(file.read_text())
    assert holds(content, yaml.safe_load((RECIPES / "config.yaml").read_text()))
    arguments = content["trainer"]["callbacks"][0]["init_args"]
    assert set(arguments) == set(DeltaAwareQuantization.__init__.__annotations__) - {"return"}
    assert print_config(monkeypatch, file) == file.read_text()


@pytest.mark.slow
def test_the_command_in_the_recipe_reads_it() -> None:
    (command,) = re.findall(
        r"(?m)^#   PYTHONPATH=recipes python (.*)$", (RECIPES / "config.yaml").read_text()
    )
    path = os.pathsep.join([str(ROOT), str(RECIPES)])
    run = subprocess.run(
        [sys.executable, *shlex.split(command), "--print_config"],
        capture_output=True, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": path},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert holds(yaml.safe_load(run.stdout), yaml.safe_load((RECIPES / "config.yaml").read_text()))


def parsed_callback(monkeypatch: pytest.MonkeyPatch, file: Path) -> DeltaAwareQuantization:
    """The callback that a config makes, without a run."""
    found = command_line(monkeypatch, "--config", str(file), "--model.init_args.folder", "null").trainer
    (callback,) = [one for one in found.callbacks if isinstance(one, DeltaAwareQuantization)]  # type: ignore[attr-defined]
    return callback


def test_the_recipe_and_its_printed_form_make_the_same_callback(monkeypatch, tmp_path: Path) -> None:
    file = tmp_path / "printed.yaml"
    file.write_text(print_config(monkeypatch, RECIPES / "config.yaml"))
    one, two = (parsed_callback(monkeypatch, file) for file in (RECIPES / "config.yaml", file))
    assert vars(one) == vars(two)
    assert one._settings.choices.scheme == "FP8_BLOCK"
    assert one._settings.choices.search == ScaleSearch(metric="hybrid", alpha_min=0.5, alpha_max=2.0)


def test_a_search_is_written_out_in_yaml(monkeypatch, tmp_path: Path) -> None:
    content = yaml.safe_load((RECIPES / "config.yaml").read_text())
    arguments = content["trainer"]["callbacks"][0]["init_args"]
    del arguments["metric"], arguments["alpha_range"]
    arguments["search"] = {"metric": "sign", "n_coarse": 3, "alpha_scope": "layer"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    callback = parsed_callback(monkeypatch, tmp_path / "config.yaml")
    assert callback._settings.choices.search == ScaleSearch(metric="sign", n_coarse=3, alpha_scope="layer")


@pytest.mark.parametrize(
    ("name", "value"), [("scheme", "INT8"), ("metric", "nonsense"), ("chain_from", "guess")]
)
def test_a_wrong_value_is_refused_by_the_parser(
    monkeypatch, capsys, tmp_path: Path, name: str, value: str
) -> None:
    content = yaml.safe_load((RECIPES / "config.yaml").read_text())
    content["trainer"]["callbacks"][0]["init_args"][name] = value
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(SystemExit):
        parsed_callback(monkeypatch, tmp_path / "config.yaml")
    assert value in capsys.readouterr().err
