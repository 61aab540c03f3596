"""The C++ library of the CPU kernels: found, or built once per machine with the compiler there, and loaded.

The library knows nothing of Python or torch, so it builds in seconds and runs without the interpreter's lock.

A wheel brings libraries for families of processors (`lib/`, see compiling.py): the highest that this
processor belongs to is taken, if it was compiled from the sources that lie here. Editable installs have none.

Built libraries are kept in the user's cache folder (`$XDG_CACHE_HOME/daq_lightning`, else
`~/.cache/daq_lightning`) as `native_<machine>_<compiler>_<content>.so`: hashes of the sources and the
processor's features; of everything that the compiler predefines; of the file, since loading one that was cut
off can kill the process. So another compiler version or another machine on a shared home builds its own, and
where there is no compiler any more, what one has built for this machine is still found.

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
import platform
import shlex
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from daq_lightning.numerics.backends.cache_folder import cache_folder, why_not_ours
from daq_lightning.numerics.backends.compiling import (
    FLAGS,
    LEVELS,
    NATIVE,
    CompilerError,
    CompilerMissingError,
    compile_library,
    compilers,
    predefined,
    sources_number,
)

if TYPE_CHECKING:
    from torch import Tensor

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_SHIPPED = Path(__file__).with_name("lib")
_CPUINFO = Path("/proc/cpuinfo")
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
        what = problem.decode()
        raise RuntimeError(f"{function.__name__} refused its arguments: {what}. Please report this.")


def why_not() -> str | None:
    """None if the library is built or can be built here (some seconds, once per machine), else the reason."""
    with _lock:
        found = _find()
    return found if isinstance(found, str) else None


@functools.cache
def _find() -> ctypes.CDLL | str:
    """The library, or why there is none: also that is found out once."""
    if fcntl is None:
        return "the kernels for CPUs are made for Linux and macOS"
    shipped = _load_shipped()
    if isinstance(shipped, ctypes.CDLL):
        return shipped
    try:
        commands = compilers()
    except CompilerMissingError as error:
        return _load_cached() or f"{error} {shipped}".rstrip()
    problem = ""
    for compiler in commands:
        for processor in NATIVE:
            try:
                return _load([*compiler, *FLAGS, *processor])
            except (OSError, CompilerError) as error:
                problem = str(error)
    return f"{shlex.join(commands[-1])} cannot build the CPU kernels: {problem[-500:]}"


def _load_shipped() -> ctypes.CDLL | str:
    """The library of the wheel for the highest level that this processor has; else why it is not used, if it
    is there.
    """
    problem = ""
    for level in LEVELS.get(platform.machine(), ()):
        path = _SHIPPED / level.file
        if not path.is_file() or not level.features <= _features():
            continue
        try:
            found = ctypes.CDLL(str(path))
            found.daq_sources.restype = ctypes.c_uint64
            if found.daq_sources() == sources_number():
                return found
            problem = f"{path} was compiled from other sources."
        except (OSError, AttributeError) as error:  # made for a newer system, or not by us
            problem = f"{path} cannot be used: {error}."
    return problem


def _load_cached() -> ctypes.CDLL | None:
    """What any compiler has built for this machine."""
    folder, _ = cache_folder()
    try:
        return _load_built(folder, f"{_machine()}_") if folder is not None and _features() else None
    except OSError:
        return None


def _load(command: list[str]) -> ctypes.CDLL:
    """The library that this command builds: from the cache, built there, or for this process alone."""
    key = f"{_machine()}_{_hash(b' '.join([*map(os.fsencode, command), predefined(command)]))}"
    folder, problem = cache_folder()
    if folder is not None:
        try:
            found = _load_built(folder, key)
            if found is not None:
                return found
            with _one_process(folder / f"native_{key}.lock"):
                found = _load_built(folder, key)  # another process may have built it meanwhile
                return found or ctypes.CDLL(str(_build(command, folder, key, "once per machine")))
        except OSError as error:  # read-only, full, or mounted so that nothing in it can be run
            problem = str(error)
    with tempfile.TemporaryDirectory(prefix="daq_lightning_") as private:
        return ctypes.CDLL(str(_build(command, Path(private), key, f"for this process alone: {problem}")))


def _machine() -> str:
    """A hash of the sources and of what the processor can do."""
    return _hash(" ".join([f"{sources_number():x}", platform.machine(), *sorted(_features())]).encode())


def _features() -> frozenset[str]:
    """What the processor can do and the system lets it do, in Linux' words; empty where that is not Linux."""
    try:
        lines = _CPUINFO.read_text(errors="replace").splitlines()
    except OSError:
        return frozenset()
    rows = [line for line in lines if line.startswith(("flags", "Features"))]  # "Features" on ARM
    cores = [frozenset(row.partition(":")[2].split()) for row in rows]
    return frozenset.intersection(*cores) if cores else frozenset()  # a thread may move to any core


def _load_built(folder: Path, key: str) -> ctypes.CDLL | None:
    """The library whose key begins so, if the folder has a good one; bad ones are removed."""
    for path in folder.glob(f"native_{key}*.so"):
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
    try:
        compile_library(command, Path(unfinished))
        os.chmod(unfinished, 0o700)  # linkers go by the umask, which may let the group write
        path = folder / f"native_{key}_{_digest(Path(unfinished))}.so"
        os.replace(unfinished, path)
    finally:
        Path(unfinished).unlink(missing_ok=True)
    return path


def _digest(path: Path) -> str:
    return _hash(path.read_bytes())


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


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
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()
