"""The C++ library of the CPU kernels: found, built once per machine with the compiler there, and loaded.

The library knows nothing of Python or torch, so it builds in seconds and runs without the interpreter's lock.

Built libraries are kept in the user's cache folder (`$XDG_CACHE_HOME/daq_lightning`, else
`~/.cache/daq_lightning`) under a name that hashes the source, the flags and everything that the compiler
predefines for this processor: another compiler version or another machine on a shared home builds its own.
The name also ends in a hash of the library, since loading one that was cut off can kill the process.

What is loaded is run, so nobody else may have been able to write it: the folder and the file must belong to
this user, be no links, and be writable for nobody else. Where there is no such folder, a process builds for
itself, in a temporary folder that is removed as soon as the library is loaded (the system keeps it mapped).

A build takes some seconds, perhaps in the middle of a training step. It says so in one line at level INFO of
the logger "daq_lightning", or on stderr where no logging is set up: worth knowing, nothing to worry about, so
not a warning. Threads and processes that need the library meanwhile wait for it.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

try:
    import fcntl
except ImportError:  # not on this system: two processes may build at once, which does no harm
    fcntl = None

_COMPILERS = ("c++", "g++", "clang++")
# no -ffast-math: rounding relies on (x + m) - m being evaluated as written, and sums must see a base that is
# NaN
_FLAGS = (
    *("-O3", "-std=c++17", "-shared", "-fPIC", "-pthread", "-fopenmp-simd", "-ffp-contract=off"),
    *("-fno-math-errno", "-fno-trapping-math", "-ffinite-math-only", "-fno-signed-zeros"),
)
_CPU_FLAGS = (("-march=native", "-mprefer-vector-width=512"), ("-march=native",), ("-mcpu=native",), ())
_FOLDER = Path(__file__).with_name("src")
_HEADERS = ("common.h", "sums.h")
_SOURCES = ("passes.cpp", "search.cpp")
_PATIENCE = 300.0  # seconds to wait for a build in another process, which may have been stopped
_lock = threading.Lock()


class LibraryMissingError(RuntimeError):
    """There is no library, and none can be built on this machine."""


def library() -> ctypes.CDLL:
    """The library, built first if it has to be.

    Raises:
        LibraryMissingError: It cannot be built or loaded here; the message says why.
    """
    with _lock:
        found = _find()
    if isinstance(found, str):
        raise LibraryMissingError(found)
    return found


class Array(ctypes.Structure):
    """A contiguous array as the library takes it: it checks the size before it writes."""

    _fields_ = (("data", ctypes.c_void_p), ("bytes", ctypes.c_int64))


def array(tensor: Tensor) -> Array:
    """Where a contiguous tensor lies, and how long it is; nothing at no place if it is not on the CPU."""
    reachable = tensor.device.type == "cpu" and tensor.is_contiguous()
    return Array(tensor.data_ptr(), tensor.nbytes) if reachable else Array(None, 0)


def entry_point(name: str, types: Sequence[type]) -> Callable[..., None]:
    """A function of the library. It raises RuntimeError for arguments that it refuses, and MemoryError.

    Raises:
        LibraryMissingError: As `library`.
    """
    function = getattr(library(), f"daq_{name}")
    function.argtypes, function.restype, function.errcheck = list(types), ctypes.c_char_p, _raise_problem
    return function


def _raise_problem(problem: bytes | None, function: Any, _: tuple[object, ...]) -> None:
    """Every entry point returns what is wrong with its arguments, or null."""
    if problem == b"out of memory":
        raise MemoryError(f"{function.__name__}: out of memory")
    if problem is not None:
        raise RuntimeError(f"{function.__name__} refused its arguments: {problem.decode()}. Please report this.")


def why_not() -> str | None:
    """None if the library is built or can be built here (some seconds, once per machine), else the reason."""
    with _lock:
        found = _find()
    return found if isinstance(found, str) else None


@functools.cache
def _find() -> ctypes.CDLL | str:
    """The library, or why there is none: also that is found out once."""
    wanted = os.environ.get("CXX", "")
    try:
        candidates = [shlex.split(wanted)] if wanted.strip() else [[name] for name in _COMPILERS]
    except ValueError as error:
        return f"The environment variable CXX={wanted!r} is no command: {error}; correct or unset it."
    compilers = [command for command in candidates if shutil.which(command[0])]
    if not compilers:
        names = ", ".join(command[0] for command in candidates)
        return f"No C++ compiler found (looked for {names}); install one or set CXX."
    problem = ""
    for compiler in compilers:
        for cpu_flags in _CPU_FLAGS:
            command = [*compiler, *_FLAGS, *cpu_flags]
            try:
                return _load(command)
            except (OSError, LibraryMissingError) as error:
                problem = str(error)
    return f"{shlex.join(compilers[-1])} cannot build {_SOURCES[0]}: {problem[-500:]}"


def _load(command: list[str]) -> ctypes.CDLL:
    """The library that this command builds: from the cache, built there, or for this process alone."""
    key = _key(command)
    folder, problem = cache_folder()
    if folder is not None:
        try:
            found = _load_built(folder, key)
            if found is not None:
                return found
            with _one_process(folder / f"native_{key}.lock"):
                return _load_built(folder, key) or ctypes.CDLL(str(_build(command, folder, key, "once per machine")))
        except OSError as error:  # read-only, full, or mounted so that nothing in it can be run
            problem = str(error)
    with tempfile.TemporaryDirectory(prefix="daq_lightning_") as private:
        return ctypes.CDLL(str(_build(command, Path(private), key, f"for this process alone: {problem}")))


def _key(command: list[str]) -> str:
    processor = subprocess.run([*command, "-dM", "-E", "-x", "c++", os.devnull], capture_output=True)
    if processor.returncode:
        raise LibraryMissingError(processor.stderr.decode(errors="replace"))
    texts = ((_FOLDER / name).read_bytes() for name in (*_HEADERS, *_SOURCES))
    return hashlib.sha256(b"".join([*texts, *map(os.fsencode, command), processor.stdout])).hexdigest()[:24]


def _load_built(folder: Path, key: str) -> ctypes.CDLL | None:
    """The library of this key, if the folder has a good one; others of its name are removed."""
    for path in folder.glob(f"native_{key}_*.so"):
        with contextlib.suppress(OSError):
            if why_not_ours(path) is None and path.stem.endswith(_digest(path)):
                return ctypes.CDLL(str(path))
        with contextlib.suppress(OSError):
            path.unlink()
    return None


def _build(command: list[str], folder: Path, key: str, how_often: str) -> Path:
    """Builds beside its place and renames, so that nobody ever sees half a file."""
    _announce(f"daq_lightning builds its CPU kernels with {command[0]}: some seconds, {how_often}.")
    handle, unfinished = tempfile.mkstemp(dir=folder, suffix=".tmp")
    os.close(handle)
    sources = [str(_FOLDER / name) for name in _SOURCES]
    try:
        built = subprocess.run([*command, *sources, "-o", unfinished], capture_output=True)
        if built.returncode:
            raise LibraryMissingError(built.stderr.decode(errors="replace"))
        os.chmod(unfinished, 0o700)  # linkers go by the umask, which may let the group write
        path = folder / f"native_{key}_{_digest(Path(unfinished))}.so"
        os.replace(unfinished, path)
    finally:
        Path(unfinished).unlink(missing_ok=True)
    return path


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def cache_folder() -> tuple[Path | None, str]:
    """The user's cache folder; or None, and why there is none that can be trusted."""
    parent = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not parent.is_absolute():  # then the XDG specification has it ignored
        try:
            parent = Path.home() / ".cache"
        except RuntimeError:  # HOME is not set, and the system does not know the user
            return None, "there is no home folder"
        if not parent.is_absolute():
            return None, f"the home folder {parent.parent} is not an absolute path"
    folder = parent / "daq_lightning"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        problem = why_not_ours(folder)
    except OSError as error:
        return None, str(error)
    return (None, problem) if problem else (folder, "")


def why_not_ours(path: Path) -> str | None:
    """None if only this user (and root) can have written a file or folder, else what speaks against it."""
    status = path.lstat()
    if stat.S_ISLNK(status.st_mode):
        return f"{path} is a link"
    if status.st_uid != os.geteuid():
        return f"{path} belongs to another user"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"{path} can be written by other users"
    return None


@contextlib.contextmanager
def _one_process(lock: Path) -> Iterator[None]:
    """Keeps other processes out, as far as the file system knows locks."""
    with open(lock, "ab") as file:
        end = time.monotonic() + _PATIENCE
        while fcntl is not None and time.monotonic() < end:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.05)
            except OSError:  # some network file systems
                break
        yield


def _announce(text: str) -> None:
    logger = logging.getLogger("daq_lightning")
    if logger.hasHandlers():
        logger.info(text)
    else:
        print(text, file=sys.stderr, flush=True)
