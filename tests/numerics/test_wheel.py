"""A wheel brings the CPU kernels compiled; without a compiler they are used, with the same results."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

from daq_lightning.numerics.backends import compiling, library

ROOT = Path(__file__).resolve().parents[2]
LEVELS = compiling.LEVELS.get(platform.machine(), ()) if sys.platform == "linux" else ()

try:
    compiling.compilers()
except compiling.CompilerMissingError:
    LEVELS = ()

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not LEVELS, reason="no compiler, or no wheels for this system"),
]


def build(tmp_path_factory, **environment):
    """The wheel of this tree, without network."""
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        str(ROOT),
    ]
    done = subprocess.run(
        [*command, "-v", "-w", str(folder)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    [wheel] = folder.glob("*.whl")
    return wheel, done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return build(tmp_path_factory)[0]


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A folder with the content of the wheel; this environment has what it depends on."""
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(folder)
    return folder


def lib(folder):
    return folder / "daq_lightning" / "numerics" / "backends" / "lib"


def run(code, installed, tmp_path, *arguments):
    """Python that has the wheel's content and no compiler in its PATH, and treats warnings as errors."""
    path = tmp_path / "no_programs"
    path.mkdir(exist_ok=True)
    environment = {
        "PATH": str(path),
        "HOME": str(tmp_path),
        "PYTHONPATH": str(installed),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-W", "error", "-c", code, *map(str, arguments)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_the_wheel_is_for_this_system_and_holds_a_library_for_each_family_of_processors(wheel, installed):
    assert wheel.name.endswith(f"-py3-none-linux_{platform.machine()}.whl")
    assert "Root-Is-Purelib: false" in next(installed.glob("*.dist-info/WHEEL")).read_text()
    assert {path.name for path in lib(installed).iterdir()} == {level.file for level in LEVELS}


def test_its_libraries_need_nothing_but_the_c_library(installed):
    if not shutil.which("readelf"):
        pytest.skip("no readelf")
    for path in lib(installed).iterdir():
        listed = subprocess.run(
            ["readelf", "-d", str(path)], capture_output=True, text=True, check=True
        ).stdout
        needed = {line.split("[")[1].split(".so")[0] for line in listed.splitlines() if "(NEEDED)" in line}
        assert needed <= {"libc", "libm", "libpthread", "ld-linux-x86-64", "ld-linux-aarch64"}


CHOOSE = """
import torch
from daq_lightning.numerics import backends
from daq_lightning.numerics.backends import library
print(backends.choose(torch.device("cpu")).__name__, library.library()._name)
"""


def test_without_a_compiler_the_wheels_library_is_used_without_a_warning(installed, tmp_path):
    backend, path = run(CHOOSE, installed, tmp_path)
    assert backend == "daq_lightning.numerics.backends.cpu"
    assert Path(path).parent == lib(installed)
    assert not (tmp_path / ".cache").exists()


SEARCH = """
import sys, torch
from pathlib import Path
from daq_lightning import PerBlock, PerChannel, ScaleSearch, search_scale
from daq_lightning.numerics.backends import library
library._SHIPPED = Path(sys.argv[1])
weight, base = torch.load(sys.argv[2])
found = {}
for metric in ("sign", "cosine", "mse", "hybrid"):
    for granularity in (PerBlock(128, 128), PerChannel()):
        # alpha 1 and alpha 2 would be as good as each other: which one wins may differ
        search = ScaleSearch(metric=metric, alpha_min=0.8, alpha_max=1.25)
        result = search_scale(weight, base, granularity=granularity, search=search)
        found[metric, str(granularity)] = result.codes.view(torch.uint8), result.scale, result.stats._asdict()
torch.save(found, sys.argv[3])
print(library.library()._name)
"""


def test_the_libraries_of_all_families_find_what_the_one_built_here_finds(installed, tmp_path):
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(256, 384, generator=generator) * 0.02
    torch.save((base + torch.randn(256, 384, generator=generator) * 1e-3, base), tmp_path / "pair")
    shutil.copytree(
        Path(library.library()._name).parent, tmp_path / ".cache" / "daq_lightning"
    )  # the one built here
    results = {}
    for level in [None, *(level for level in LEVELS if level.features <= library._features())]:
        only = tmp_path / (level.name if level else "none")
        only.mkdir()
        if level:
            shutil.copy(lib(installed) / level.file, only)
        [path] = run(SEARCH, installed, tmp_path, only, tmp_path / "pair", tmp_path / "found")
        assert Path(path).parent == (only if level else tmp_path / ".cache" / "daq_lightning")
        results[level and level.name] = torch.load(tmp_path / "found")
    expected = results.pop(None)
    assert results
    for name, found in results.items():
        for case, (codes, scale, stats) in found.items():
            assert torch.equal(codes, expected[case][0]), (name, case)
            assert torch.equal(scale, expected[case][1]), (name, case)
            for field, value in stats.items():
                tolerance = 2e-6 if value.is_floating_point() else 0
                torch.testing.assert_close(value, expected[case][2][field], rtol=tolerance, atol=0)


def test_without_a_compiler_a_wheel_is_pure_python_and_its_build_says_so(tmp_path_factory):
    wheel, said = build(tmp_path_factory, CXX="no-such-compiler")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert "No C++ compiler found (looked for no-such-compiler)" in said
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
    assert "daq_lightning/numerics/backends/src/passes.cpp" in names  # to be built on the first use
    assert not [name for name in names if name.endswith(".so")]


def test_a_source_distribution_has_all_that_a_wheel_is_built_from(tmp_path):
    pytest.importorskip("hatchling")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    [path] = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    sources = {f"daq_lightning/numerics/backends/src/{path.name}" for path in compiling._FOLDER.iterdir()}
    assert names >= sources | {".ci/wheel_hook.py", "daq_lightning/numerics/backends/compiling.py"}
    assert not [name for name in names if name.endswith(".so")]


def test_an_editable_install_compiles_nothing():
    wheel = pytest.importorskip("hatchling.builders.wheel")
    hook = wheel.WheelBuilder(str(ROOT)).get_build_hooks("")["custom"]
    build_data = {"force_include": {}, "pure_python": True}
    hook.initialize("editable", build_data)
    hook.finalize("editable", build_data, "")
    assert build_data == {"force_include": {}, "pure_python": True}
