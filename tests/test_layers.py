"""The house: one order of rooms, and the few sentences about who may import what, print, and open files."""

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "daq_lightning"
ROOMS = ["numerics", "checkpoint", "metrics", "model", "report", "export", "audit", "training", "cli"]
"""A room imports only from itself and from rooms before it."""
EXCEPT = {("cli", "training")}
"""What the order would allow and the house does not."""

ONLY_IN = {
    "ctypes": ("numerics.backends",),
    "huggingface_hub": ("model",),
    "lightning": ("training",),
    "peft": ("model",),
    "torchmetrics": ("metrics", "report.model_figures", "training.validate"),
    "transformers": ("model",),
    "triton": ("numerics.backends",),
    "yaml": ("report.front_matter",),
}
"""Package -> the places that may import it."""
LAZY = {"huggingface_hub", "jsonargparse", "matplotlib", "peft", "regex", "tqdm", "transformers", "yaml"}
"""Packages that are imported inside functions only."""
WITHOUT_TORCH = {
    "numerics.bins",
    "numerics.formats",
    "numerics.formats.fp8",
    "numerics.rounding.settings",
    "numerics.search.settings",
    "checkpoint.schemes",
    "export.settings",
    "cli.arguments",
}
HEAVY = {"lightning", "matplotlib", "peft", "torchmetrics", "transformers", "triton"}
"""Packages that `import daq_lightning` leaves alone."""
LONGEST_CHAIN, MOST_LINES, MOST_COLUMNS = 8, 300, 110
OPENS = {"open", "os.open", "read_text", "write_text", "read_bytes", "write_bytes"}


def modules():
    """Dotted name inside the package ("" is the package itself) -> file."""
    found = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT / PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()
NAMES = pytest.mark.parametrize("name", MODULES, ids=lambda name: name or PACKAGE)


@functools.cache
def imports(name):
    """Every import of a module as (full dotted name, whether it runs when the module is imported); not for
    types."""
    found = []

    def visit(node, at_top):
        if isinstance(node, ast.Import):
            found.extend((alias.name, at_top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: imports are absolute"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.append((full if full.removeprefix(f"{PACKAGE}.") in MODULES else node.module, at_top))
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            return
        in_function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            visit(child, at_top and not in_function)

    visit(ast.parse(MODULES[name].read_text()), True)
    return found


def inside(name):
    """The modules of the package that a module imports, anywhere in it."""
    targets = {
        target.removeprefix(PACKAGE).removeprefix(".") for target, _ in imports(name) if is_ours(target)
    }
    return targets - {"", name}


def is_ours(target):
    return target.partition(".")[0] == PACKAGE


@functools.cache
def longest_chain(name, above=()):
    assert name not in above, f"a circle: {' > '.join([*above, name])}"
    return (
        name,
        *max((longest_chain(target, (*above, name)) for target in inside(name)), key=len, default=()),
    )


@NAMES
def test_a_room_imports_only_rooms_before_it(name):
    room = name.partition(".")[0]
    if room in ("", "__main__"):  # the entrance names what the rooms have
        return
    for target in inside(name):
        other = target.partition(".")[0]
        assert ROOMS.index(other) <= ROOMS.index(room), f"{name} imports {target}"
        assert (room, other) not in EXCEPT, f"{name} imports {target}"


@NAMES
def test_packages_are_imported_where_they_belong(name):
    for target, at_top in imports(name):
        package = target.partition(".")[0]
        places = ONLY_IN.get(package)
        assert places is None or f"{name}.".startswith(tuple(f"{place}." for place in places)), (
            f"{name} imports {target}"
        )
        assert not (at_top and package in LAZY), f"{name} imports {target} at its top"
        assert not (at_top and package == "torch" and name in WITHOUT_TORCH), f"{name} imports {target}"


@NAMES
def test_the_longest_chain_of_imports_is_short(name):
    chain = longest_chain(name)
    assert len(chain) <= LONGEST_CHAIN or name in ("", "__main__"), " > ".join(chain)


@NAMES
def test_only_the_command_prints_and_only_checkpoint_opens_files(name):
    room = name.partition(".")[0]
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        assert called != "print" or room == "cli", f"{name} prints in line {node.lineno}"
        opens = called in OPENS or called.rpartition(".")[2] in OPENS - {"open"}
        allowed = room in ("checkpoint", "cli") or name in (
            "numerics.backends.library",
            "numerics.backends.compiling",
            "report.html",
        )
        assert not opens or allowed, f"{name} opens a file in line {node.lineno}"


@NAMES
def test_a_module_is_short(name):
    lines = MODULES[name].read_text().splitlines()
    assert len(lines) <= MOST_LINES
    assert [number for number, line in enumerate(lines, 1) if len(line) > MOST_COLUMNS] == []


def test_the_entrance_shows_the_rooms():
    shown = {path.name for path in (ROOT / PACKAGE).iterdir() if path.name != "__pycache__"}
    rooms = {room for room in ROOMS if room != "metrics"}
    assert shown == rooms | {"metrics.py", "__init__.py", "__main__.py", "py.typed"}


def test_importing_the_package_loads_no_heavy_package():
    code = (
        "import sys, torch; before = set(sys.modules); "
        "import daq_lightning, daq_lightning.numerics.search.search; "
        "print(*sorted({name.partition('.')[0] for name in set(sys.modules) - before}))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert PACKAGE in run.stdout.split()
    assert set(run.stdout.split()) & HEAVY == set()
