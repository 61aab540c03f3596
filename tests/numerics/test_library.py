"""The C++ library: only this user can have written it, it is built once, a bad cache costs a build."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
import warnings
from pathlib import Path

import pytest

from daq_lightning.numerics.backends import compiling, library

COMPILER = """#!/bin/sh
# Plays the compiler: writes down that it was called, and copies a library that is built already.
for argument; do [ "$argument" = -dM ] && echo "#define PROCESSOR 1" && exit 0; done
echo build >> {folder}/builds
[ -e {folder}/broken ] && echo "no such instruction" >&2 && exit 1
sleep 0.3
while [ $# -gt 1 ]; do [ "$1" = -o ] && cp {library} "$2"; shift; done
"""

PLANTED = """
#include <cstdio>
__attribute__((constructor)) static void run() { if (FILE* file = std::fopen("%s", "w")) std::fclose(file); }
"""


@pytest.fixture
def builds(tmp_path, monkeypatch):
    """A compiler that takes no time and a cache folder of its own; returns how often was built."""
    script = tmp_path / "compiler"
    script.write_text(COMPILER.format(folder=tmp_path, library=library.library()._name))
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return lambda: (tmp_path / "builds").read_text().count("build") if (tmp_path / "builds").exists() else 0


def find():
    """What a new process finds."""
    found = library._find.__wrapped__()
    assert not isinstance(found, str), found
    assert found.daq_fold is not None
    return Path(found._name)


def in_cache(tmp_path):
    return list((tmp_path / "cache" / "daq_lightning").glob("*.so"))


def other_user(path, monkeypatch):
    if os.geteuid() == 0:
        os.chown(path, 65534, 65534)
    elif path.is_dir():  # then it is this process that is somebody else
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    else:
        pytest.skip("only root can give a file away")


def planted(tmp_path, name):
    """A library that leaves a trace when it is loaded, under the name that would be looked for."""
    source, built = tmp_path / "planted.cpp", tmp_path / "planted.so"
    source.write_text(PLANTED % (tmp_path / "trace"))
    subprocess.run(["c++", "-shared", "-fPIC", str(source), "-o", str(built)], check=True)
    built.chmod(0o700)
    path = name.with_name(f"{name.stem.rpartition('_')[0]}_{library._digest(built)}.so")
    name.unlink()
    shutil.copy(built, path)
    return path


def test_is_built_once_and_found_again(builds, tmp_path):
    first = find()
    assert first == find()
    assert builds() == 1
    assert in_cache(tmp_path) == [first]
    assert stat.S_IMODE(first.parent.stat().st_mode) == 0o700


FOLDERS = {
    "belongs to another user": other_user,
    "group can write": lambda path, _: path.chmod(0o770),
    "all can write": lambda path, _: path.chmod(0o707),
    "all can write, sticky": lambda path, _: path.chmod(0o1777),
    "link": lambda path, _: (path.rename(path.with_name("elsewhere")), path.symlink_to("elsewhere")),
}


@pytest.mark.parametrize("spoil", FOLDERS.values(), ids=FOLDERS)
def test_nothing_is_loaded_from_a_folder_that_others_can_write(builds, tmp_path, monkeypatch, spoil):
    path = planted(tmp_path, find())
    spoil(path.parent, monkeypatch)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    assert find().parent.parent == temporary
    assert not (tmp_path / "trace").exists()
    assert list(temporary.iterdir()) == []


FILES = {
    "belongs to another user": other_user,
    "group can write": lambda path, _: path.chmod(0o770),
    "all can write": lambda path, _: path.chmod(0o702),
    "link": lambda path, _: (path.rename(path.with_name("elsewhere")), path.symlink_to("elsewhere")),
    "other content than its name says": lambda path, _: path.rename(path.with_name(path.stem[:-1] + "x.so")),
}


@pytest.mark.parametrize("spoil", FILES.values(), ids=FILES)
def test_a_file_that_others_can_have_written_is_replaced(builds, tmp_path, monkeypatch, spoil):
    path = planted(tmp_path, find())
    spoil(path, monkeypatch)
    found = find()
    assert found.parent == path.parent
    assert builds() == 2
    assert not (tmp_path / "trace").exists()
    assert in_cache(tmp_path) == [found]


def test_the_trap_of_these_tests_does_spring(builds, tmp_path):
    planted(tmp_path, find())
    library._find.__wrapped__()
    assert (tmp_path / "trace").exists()


@pytest.mark.parametrize("kept", [0, 1, 100, 0.3, 0.7, -1])
def test_a_library_that_was_cut_off_is_built_again(builds, tmp_path, kept):
    path = find()
    content = path.read_bytes()
    path.unlink()  # a new file: the old one is in use by this process
    path.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    path.chmod(0o700)
    assert find().read_bytes() == content
    assert builds() == 2


def test_a_whole_file_that_is_no_library_is_built_again(builds, tmp_path):
    path = find()
    path.unlink()
    path.write_bytes(b"no library")
    path.chmod(0o700)
    path.rename(path.with_name(f"{path.stem.rpartition('_')[0]}_{library._digest(path)}.so"))
    find()
    assert builds() == 2


def test_a_relative_cache_folder_is_ignored(builds, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert find().parent == tmp_path / "home" / ".cache" / "daq_lightning"
    assert not (tmp_path / "cache").exists()


def no_home(tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(
        Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("Could not determine home directory."))
    )


def relative_home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "home")


def no_folder(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))


def read_only(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError("read-only")

    monkeypatch.setattr(library, "_one_process", refuse)


@pytest.mark.parametrize("spoil", [no_home, relative_home, no_folder, read_only])
def test_without_a_cache_folder_a_process_builds_once_and_leaves_nothing(
    builds, tmp_path, monkeypatch, spoil
):
    spoil(tmp_path, monkeypatch)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setattr(library, "_find", library.functools.cache(library._find.__wrapped__))
    assert library.why_not() is None
    assert library.library().daq_fold is not None
    assert builds() == 1
    assert list(temporary.iterdir()) == []
    assert not (tmp_path / "home").exists()


@pytest.mark.slow
def test_the_users_home_that_the_system_does_not_know(builds, tmp_path):
    """HOME unset, and no entry in the password file: as in many containers."""
    code = "import os; os.getuid = lambda: 2**31 - 9\nfrom daq_lightning.numerics.backends import library\n"
    code += "assert library.why_not() is None, library.why_not()"
    environment = {key: value for key, value in os.environ.items() if key not in ("HOME", "XDG_CACHE_HOME")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "for this process alone: there is no home folder" in done.stderr


def test_the_group_cannot_write_what_was_built_under_a_lax_umask(builds):
    before = os.umask(0)
    try:
        path = find()
    finally:
        os.umask(before)
    assert library.why_not_ours(path) is None
    assert library.why_not_ours(path.parent) is None
    find()
    assert builds() == 1


def test_a_compiler_of_several_words(builds, monkeypatch):
    monkeypatch.setenv("CXX", f"env DAQ=1 '{os.environ['CXX']}'")
    find()
    assert builds() == 1


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            "no-such-compiler -O3",
            r"No C\+\+ compiler found \(looked for no-such-compiler\); install one or set CXX",
        ),
        ("g++ 'oops", r"CXX=\"g\+\+ 'oops\" is no command: No closing quotation; correct or unset it"),
        ("false", r"false cannot build the CPU kernels"),
    ],
)
def test_a_compiler_that_is_none_is_named(builds, monkeypatch, command, message):
    monkeypatch.setenv("CXX", command)
    monkeypatch.setattr(library, "_find", library.functools.cache(library._find.__wrapped__))
    with pytest.raises(library.LibraryMissingError, match=message):
        library.library()


def test_a_build_that_fails_is_not_tried_again(builds, tmp_path, monkeypatch):
    (tmp_path / "broken").touch()
    monkeypatch.setattr(library, "_find", library.functools.cache(library._find.__wrapped__))
    assert "no such instruction" in str(library.why_not())
    tried = builds()
    assert "no such instruction" in str(library.why_not())
    assert builds() == tried
    assert list((tmp_path / "cache" / "daq_lightning").glob("*.tmp")) == []


def test_threads_build_once(builds, monkeypatch):
    monkeypatch.setattr(library, "_find", library.functools.cache(library._find.__wrapped__))
    threads = [threading.Thread(target=library.library) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert builds() == 1


@pytest.mark.slow
def test_processes_build_once_and_one_says_so(builds):
    code = "from daq_lightning.numerics.backends import library; library.library()"
    started = [
        subprocess.Popen([sys.executable, "-W", "error", "-c", code], stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    said = [process.communicate(timeout=120)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0, 0], said
    assert builds() == 1
    assert sorted(text.count("builds its CPU kernels") for text in said) == [0, 0, 1]


def test_without_a_compiler_what_one_has_built_for_this_machine_is_found(builds, tmp_path, monkeypatch):
    path = find()
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert find() == path
    changes = {"sources_number": 7, "_features": frozenset({"abacus"})}  # another processor on a shared home
    for name, value in changes.items():
        with monkeypatch.context() as changed:
            changed.setattr(library, name, lambda value=value: value)
            assert "No C++ compiler found" in library._find.__wrapped__()
    assert builds() == 1


def test_without_a_compiler_nothing_is_loaded_that_others_can_have_written(builds, tmp_path, monkeypatch):
    planted(tmp_path, find()).chmod(0o702)
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "No C++ compiler found" in library._find.__wrapped__()
    assert not (tmp_path / "trace").exists()


@pytest.fixture
def shipped(builds, tmp_path, monkeypatch):
    """The folder of a wheel's libraries, with that of this machine under each name; processors by their
    level."""
    folder = tmp_path / "lib"
    folder.mkdir()
    monkeypatch.setattr(library, "_SHIPPED", folder)
    monkeypatch.setattr(library.platform, "machine", lambda: "x86_64")
    for level in library.LEVELS["x86_64"]:
        shutil.copy(library.library()._name, folder / level.file)
    return folder


# flags of /proc/cpuinfo, in part; what is left out here is asked for by no level
V2 = "fpu sse2 ssse3 cx16 sse4_1 sse4_2 popcnt lahf_lm"
V3 = V2 + " fma movbe xsave avx f16c abm bmi1 avx2 bmi2"
V4 = V3 + " avx512f avx512dq avx512cd avx512bw avx512vl"
PROCESSORS = {
    "Xeon of 2017": (V4, "daq_x86_64_v4.so"),
    "AVX-512 in part, as Knights Landing": (V3 + " avx512f avx512cd avx512er", "daq_x86_64_v3.so"),
    "AVX-512, but no FMA": (V4.replace(" fma", ""), "daq_x86_64_v2.so"),
    "Core of 2013": (V3, "daq_x86_64_v3.so"),
    "AVX without AVX2, as Sandy Bridge": (V2 + " avx xsave", "daq_x86_64_v2.so"),
    "Core of 2008": (V2, "daq_x86_64_v2.so"),
    "Athlon 64": ("fpu sse2 lahf_lm", None),
}


@pytest.mark.parametrize(("flags", "file"), PROCESSORS.values(), ids=PROCESSORS)
def test_of_a_wheels_libraries_the_highest_is_taken_that_the_processor_can_run(
    shipped, builds, tmp_path, monkeypatch, flags, file
):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nflags\t\t: {flags}\nbugs\t: none\n\nflags\t\t: {flags} ht\n")
    monkeypatch.setattr(library, "_CPUINFO", cpuinfo)
    found = find()
    assert found == (shipped / file if file else in_cache(tmp_path)[0])
    assert builds() == (not file)


def test_a_feature_that_only_some_cores_have_does_not_count(shipped, tmp_path, monkeypatch):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"flags: {V4}\nflags: {V3}\n")
    monkeypatch.setattr(library, "_CPUINFO", cpuinfo)
    assert find() == shipped / "daq_x86_64_v3.so"


def test_a_shipped_library_that_was_compiled_from_other_sources_is_not_used(
    shipped, builds, tmp_path, monkeypatch
):
    monkeypatch.setattr(library, "sources_number", lambda: 7)
    monkeypatch.setattr(library, "_features", lambda: frozenset(V4.split()))
    assert find() == in_cache(tmp_path)[0]
    monkeypatch.setenv("CXX", "no-such-compiler")
    in_cache(tmp_path)[0].unlink()
    assert "daq_x86_64_v2.so was compiled from other sources" in library._find.__wrapped__()


def test_a_shipped_library_that_cannot_be_loaded_costs_a_build(shipped, builds, tmp_path, monkeypatch):
    for path in shipped.iterdir():
        path.write_bytes(b"no library")
    assert find() == in_cache(tmp_path)[0]
    assert builds() == 1


def test_a_file_whose_number_changes_with_the_sources(tmp_path, monkeypatch):
    before = compiling.sources_number()
    monkeypatch.setattr(compiling, "_FOLDER", shutil.copytree(compiling._FOLDER, tmp_path / "src"))
    assert compiling.sources_number() == before
    with open(tmp_path / "src" / "sums.h", "a") as file:
        file.write("\n")
    assert compiling.sources_number() != before


def test_on_a_system_without_file_locks_there_is_no_library(monkeypatch):
    monkeypatch.setattr(library, "fcntl", None)
    assert "made for Linux and macOS" in library._find.__wrapped__()


def test_a_process_that_was_stopped_while_it_built_holds_nobody_up_for_good(builds, tmp_path, monkeypatch):
    monkeypatch.setattr(library, "_PATIENCE", 0.2)
    path = find()
    path.unlink()
    [lock] = path.parent.glob("*.lock")
    with open(lock) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        find()
    assert builds() == 2


def test_a_build_is_announced_in_the_log_and_is_no_warning(builds, caplog):
    with warnings.catch_warnings(), caplog.at_level(logging.INFO, "daq_lightning"):
        warnings.simplefilter("error")
        find()
        find()
    [record] = caplog.records
    assert record.levelno == logging.INFO
    assert "some seconds, once per machine" in record.getMessage()
