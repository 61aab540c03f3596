"""What each command imports: nobody waits for transformers, the search or the trainer who does not need
them."""

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models

ROOT = Path(__file__).resolve().parents[2]
WATCHED = ("torch", "numpy", "transformers", "lightning", "torchmetrics", "peft", "sympy", "scipy", "triton")
CODE = f"""
import sys
from daq_lightning.cli import main
try:
    code = main(sys.argv[1:])
except SystemExit as end:
    code = end.code
print("imported:", code, *[name for name in {WATCHED} if name in sys.modules])
"""
QUICK = ["--n-coarse", "2", "--n-fine", "1", "--quiet"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return tiny_models.make_pair(
        tmp_path_factory.mktemp("models"), lambda: tiny_models.llama(num_hidden_layers=1)
    )


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def imported(cache, *command):
    """Exit code and watched packages of a command in a process of its own."""
    environment = os.environ | {
        "XDG_CACHE_HOME": str(cache),
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
    }
    run = subprocess.run(
        [sys.executable, "-c", CODE, *map(str, command)],
        capture_output=True, text=True, env=environment, timeout=300,
    )  # fmt: skip
    line = next(line for line in run.stdout.splitlines() if line.startswith("imported:"))
    _, code, *names = line.split()
    assert "Traceback" not in run.stderr, run.stderr
    return int(code), set(names)


@pytest.mark.slow
def test_only_the_first_export_of_an_architecture_imports_transformers(models, cache, tmp_path):
    base, post = models
    quantize = ["quantize", post, "--base", base, *QUICK]
    code, names = imported(cache, *quantize, "--out", tmp_path / "first")
    assert (code, "transformers" in names) == (0, True)
    for command in (
        [*quantize, "--out", tmp_path / "second"],
        [*quantize, "--dry-run"],
        ["verify", tmp_path / "first"],
        ["inspect", tmp_path / "first"],
        ["inspect", tmp_path / "first", "--base", base, "--post", post],
        ["chain", tmp_path / "first"],
    ):
        code, names = imported(cache, *command)
        assert (code, names - {"torch", "numpy"}) == (0, set()), command
    files = [
        {
            path.name: path.read_bytes()
            for path in (tmp_path / name).iterdir()
            if path.name != "daq_manifest.json"
        }
        for name in ("first", "second")
    ]
    assert files[0] == files[1]


@pytest.mark.slow
def test_inspect_and_chain_never_ask_for_the_architecture(models, cache, tmp_path):
    base, post = models
    assert imported(cache, "quantize", post, "--base", base, "--out", tmp_path / "out", *QUICK)[0] == 0
    for command in ("inspect", "chain"):
        assert imported(tmp_path / "another cache", command, tmp_path / "out") == (0, {"torch", "numpy"})


def test_help_and_mistakes_import_no_torch(cache):
    for expected, *command in (
        (0, "--help"),
        (0, "--version"),
        (0, "quantize", "--help"),
        (0, "quantize", "post", "--metric", "sign", "--print_config"),
        (2, "quantize", "post", "--metrik", "sign"),
        (2, "quantize", "post", "--metric", "nonsense"),
        (2, "quantize", "post", "--n-coarse", "some"),
        (2, "no-such-command"),
    ):
        assert imported(cache, *command) == (expected, set()), command


def test_the_package_is_a_command():
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    run = subprocess.run(
        [sys.executable, "-m", "daq_lightning", "--help"],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("usage: daq-lightning")


ENDS = """
import atexit, sys, daq_lightning.cli as cli
cli.main = lambda: (atexit.register(lambda: print("last words")), print("result"), {code})[-1]
class Cycle:
    def __del__(self): print("taken apart")
cycle = Cycle(); cycle.itself = cycle
cli.program()
"""


def ended(code, **where):
    return subprocess.run(
        [sys.executable, "-c", ENDS.format(code=code)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        stderr=subprocess.PIPE, text=True, check=False, timeout=60, **where,
    )  # fmt: skip


def test_the_process_ends_with_its_code_and_all_its_words_without_taking_imports_apart():
    for code in (0, 3):
        run = ended(code, stdout=subprocess.PIPE)
        assert (run.returncode, run.stdout.split("\n")) == (code, ["result", "last words", ""])
    assert "RuntimeError: no" in ended("1 / 0 if 0 else (_ for _ in ()).throw(RuntimeError('no'))").stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_words_that_nobody_could_write_are_an_error():
    with open("/dev/full", "w") as full:
        assert ended(0, stdout=full).returncode not in (0, 3)


def test_collections_wait_for_the_end_of_an_import_and_for_nothing_else():
    from daq_lightning.model.imports import without_collections

    with pytest.raises(KeyError), without_collections():
        assert not gc.isenabled()
        raise KeyError
    assert gc.isenabled()
    gc.disable()
    try:
        with without_collections():
            pass
        assert not gc.isenabled()  # as it was
    finally:
        gc.enable()
