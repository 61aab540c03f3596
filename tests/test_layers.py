"""Who may import whom: the wings do not know each other, and heavy packages stay out until they are used."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "daq_lightning"

INSIDE = {
    "": {"callback", "chain", "checkpoint", "cli", "export", "metrics", "numerics", "plan", "report", "training"},
    "architecture": {"checkpoint.folder", "checkpoint.tensor_file"},
    "arguments": set(),
    "callback": {"checkpoint", "numerics", "report", "training"},
    "chain": {"checkpoint", "report"},
    "checkpoint": {"checkpoint", "numerics"},
    "cli": {
        *("arguments", "chain", "checkpoint", "export", "inspection", "numerics", "plan", "preparation", "report"),
        *("source", "verify"),
    },
    "contract": {"architecture", "checkpoint", "numerics.formats", "report", "selection"},
    "export": {"checkpoint", "numerics", "pipeline", "plan", "preparation", "readers", "record", "report", "source"},
    "inspection": {"architecture", "checkpoint", "numerics", "readers", "report"},
    "metrics": {"numerics"},
    "numerics": {"numerics"},
    "pipeline": {"checkpoint", "plan"},
    "plan": {"architecture", "checkpoint.layouts", "checkpoint.tensor_file", "numerics.formats", "selection"},
    "preparation": {"checkpoint", "numerics", "plan", "source"},
    "readers": {"numerics"},
    "record": {"checkpoint", "numerics", "plan", "preparation", "report"},
    "report": {"checkpoint.folder", "checkpoint.tensor_file", "numerics.objectives"},
    "selection": {"architecture", "checkpoint.tensor_file"},
    "source": {"architecture", "checkpoint"},
    "training": {
        *("architecture", "checkpoint", "export", "metrics", "numerics", "preparation", "report", "source"),
        "training",
    },
    "verify": {"checkpoint", "contract"},
}
"""Module or wing -> modules or wings of the package that it may import, at its top or inside a function."""

AT_TOP = {
    "callback": {"lightning", "typing_extensions"},
    "checkpoint": {"safetensors"},
    "metrics": {"torchmetrics"},
    "numerics.backends.cuda": {"triton"},
    "training": {"lightning", "safetensors", "typing_extensions"},
}
"""Module or wing -> packages besides torch that it may import when it is imported itself."""

LAZILY = {
    "architecture": {"huggingface_hub", "transformers"},
    "callback": {"peft", "transformers"},
    "arguments": {"jsonargparse"},
    "checkpoint": {"regex"},
    "cli": {"jsonargparse"},
    "inspection": {"tqdm"},
    "pipeline": {"tqdm"},
    "numerics.backends": {"triton"},
    "report": {"matplotlib"},
    "training": {"deepspeed", "peft", "transformers"},
}
"""Module or wing -> packages that it may import inside functions, or for type checkers only."""

HEAVY = {"lightning", "matplotlib", "peft", "torchmetrics", "transformers", "triton"}
"""Packages that `import daq_lightning` leaves alone; lightning and torchmetrics import two of the others."""


def modules():
    """Dotted name inside the package ("" is the package itself) -> file."""
    found = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT / PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def within(name, allowed):
    """Whether a module is one of the allowed modules, or lies in one of the allowed wings."""
    return any(name == entry or name.startswith(entry + ".") for entry in allowed)


def row(table, name):
    """The entries of a module, of the wing around it, and so on outwards."""
    parts = name.split(".")
    return set().union(*(table.get(".".join(parts[:length]), set()) for length in range(1, len(parts) + 1)))


def imports(source, name, is_package):
    """Every import as (full dotted name, whether it runs when the module is imported)."""
    found = []

    def visit(node, at_top):
        if isinstance(node, ast.Import):
            found.extend((alias.name, at_top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = node.module or ""
            if node.level:
                around = [PACKAGE, *filter(None, name.split("."))]
                around = around[: len(around) - node.level + is_package]
                start = ".".join([*around, *filter(None, [node.module])])
            for alias in node.names:
                inner = f"{start}.{alias.name}".removeprefix(PACKAGE + ".")
                found.append((f"{start}.{alias.name}" if inner in MODULES else start, at_top))
        types_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        in_function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            visit(child, at_top and not in_function and not types_only)

    visit(ast.parse(source), True)
    return found


def violations(source, name, is_package=False):
    """What a module imports and may not, as sentences."""
    wing = name.split(".")[0]
    if wing not in INSIDE:
        return [f"{PACKAGE}.{name} is not in the import table: say in tests/test_layers.py what it may import"]
    found = []
    for target, at_top in imports(source, name, is_package):
        package, _, inner = target.partition(".")
        if package == PACKAGE:
            if not within(inner, INSIDE[wing]):
                found.append(f"{PACKAGE}.{name} imports {target}; it may import {sorted(INSIDE[wing]) or 'nothing'}")
        elif package != "torch" and package not in sys.stdlib_module_names:
            allowed = row(AT_TOP, name) | (set() if at_top else row(LAZILY, name))
            if package not in allowed:
                where = "at its top" if at_top else "inside a function"
                found.append(f"{PACKAGE}.{name} imports {target} {where}; there it may import {sorted(allowed)}")
    return found


def imported_with(name):
    """Packages that come along when a module is imported, by reading: works for those that are not installed."""
    waiting, seen, outside = [name], set(), set()
    while waiting:
        module = waiting.pop()
        parts = module.split(".")
        around = [".".join(parts[:length]) for length in range(len(parts) + 1)]  # a module comes after its packages
        for each in around:
            if each in seen or each not in MODULES:
                continue
            seen.add(each)
            for target, at_top in imports(MODULES[each].read_text(), each, MODULES[each].name == "__init__.py"):
                package, _, inner = target.partition(".")
                if at_top and package == PACKAGE:
                    waiting.append(inner)
                elif at_top:
                    outside.add(package)
    return outside


@pytest.mark.parametrize("name", MODULES, ids=lambda name: name or PACKAGE)
def test_every_module_imports_only_what_the_table_allows(name):
    path = MODULES[name]
    assert violations(path.read_text(), name, path.name == "__init__.py") == []


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("report", "from daq_lightning.export.run import export_checkpoint"),
        ("report", "def f():\n    from daq_lightning import export"),
        ("report", "from . import export"),
        ("plan", "from daq_lightning.checkpoint.reader import load_checkpoint"),
        ("numerics.search", "from daq_lightning.checkpoint import reader"),
        ("numerics.search", "import safetensors"),
        ("numerics.search", "import triton"),
        ("numerics.backends.reference", "import triton"),
        ("numerics.backends.reference", "from ...checkpoint import reader"),
        ("export", "import lightning"),
        ("export", "from daq_lightning.training import weights"),
        ("export", "from safetensors.torch import save_file"),
        ("training.adapters", "import peft"),
        ("training.adapters", "try:\n    import peft\nexcept ImportError:\n    peft = None"),
        ("checkpoint.reader", "import lightning"),
        ("callback", "from daq_lightning import cli"),
        ("metrics", "from daq_lightning import SignPreservationRate"),
        ("novelty", "import torch"),
    ],
)
def test_the_table_finds_an_import_across_the_wings(name, source):
    assert len(violations(source, name)) == 1


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("report", "from daq_lightning.numerics.objectives import DeltaStats"),
        ("report", "def plot():\n    import matplotlib.pyplot as plt"),
        ("plan", "from daq_lightning.checkpoint.layouts import FP8_BLOCK"),
        ("numerics.quantize", "from . import objectives\nimport math, torch.nn"),
        ("numerics.backends.cuda", "import triton.language as tl"),
        ("training.adapters", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import peft"),
        ("callback", "import lightning.pytorch as pl"),
        ("export", "from daq_lightning.checkpoint.writer import write"),
    ],
)
def test_the_table_lets_pass_what_it_names(name, source):
    assert violations(source, name) == []


@pytest.mark.parametrize("name", ["", "numerics.search.search"], ids=lambda name: name or PACKAGE)
def test_no_heavy_package_is_named_on_the_way_of_the_import(name):
    assert imported_with(name) & HEAVY == set()


def test_importing_the_package_loads_no_heavy_package():
    code = (
        "import sys, torch; before = set(sys.modules); import daq_lightning, daq_lightning.numerics.search.search; "
        "print(*sorted({name.partition('.')[0] for name in set(sys.modules) - before}))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert PACKAGE in run.stdout.split()
    assert set(run.stdout.split()) & HEAVY == set()
