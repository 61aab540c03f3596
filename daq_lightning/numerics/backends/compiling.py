"""How the C++ library is compiled: for the processor at hand or, in a wheel, for families of processors.

The build of a wheel (`.ci/wheel_hook.py`) loads this file by itself, where neither torch nor the package
can be imported: it uses the standard library only, and imports nothing of the package.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

COMPILERS = ("c++", "g++", "clang++")
# no -ffast-math: rounding relies on (x + m) - m being evaluated as written, and sums must see a base that is
# NaN
FLAGS = (
    *("-O3", "-std=c++17", "-shared", "-fPIC", "-pthread", "-fopenmp-simd", "-ffp-contract=off"),
    *("-fno-math-errno", "-fno-trapping-math", "-ffinite-math-only", "-fno-signed-zeros"),
)
NATIVE = (("-march=native", "-mprefer-vector-width=512"), ("-march=native",), ("-mcpu=native",), ())
"""Flags for the processor at hand: the first that the compiler takes."""

SHIPPED_FLAGS = (
    *("-static-libstdc++", "-static-libgcc"),  # a slim image may have none, or older ones than the compiler's
    "-Wl,--exclude-libs,ALL",  # and whoever uses the system's does not get ours
    "-Wl,--strip-all",
)


class Level(NamedTuple):
    """A family of processors that a wheel has a library for."""

    name: str
    flags: tuple[str, ...]
    features: frozenset[str]  # what such a processor has, in the words of /proc/cpuinfo

    @property
    def file(self) -> str:
        return f"daq_{self.name}.so"


_V2 = frozenset(["cx16", "lahf_lm", "popcnt", "sse4_1", "sse4_2", "ssse3"])
_V3 = _V2 | frozenset(["abm", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe", "xsave"])
_V4 = _V3 | frozenset(["avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512vl"])
LEVELS = {
    "x86_64": (
        Level("x86_64_v4", ("-march=x86-64-v4", "-mprefer-vector-width=512"), _V4),
        Level("x86_64_v3", ("-march=x86-64-v3",), _V3),
        Level("x86_64_v2", ("-march=x86-64-v2",), _V2),
    ),
    "aarch64": (Level("aarch64", (), frozenset()),),
}
"""Machine, as the system calls it -> the families of a wheel, the fastest first."""

_FOLDER = Path(__file__).with_name("src")
_HEADERS = ("abreast.h", "abreast_search.h", "common.h", "matmul.h", "search.h", "sums.h")
_SOURCES = ("factor.cpp", "passes.cpp", "rounding.cpp", "search.cpp")


class CompilerMissingError(RuntimeError):
    """There is no compiler here, or the one that was asked for is none."""


class CompilerError(RuntimeError):
    """A compiler does not take these flags or sources; the message is its own."""


def compilers() -> list[list[str]]:
    """The commands of the C++ compilers in PATH: of the environment variable CXX, or else the usual ones.

    Raises:
        CompilerMissingError: None of them is there.
    """
    wanted = os.environ.get("CXX", "")
    try:
        candidates = [shlex.split(wanted)] if wanted.strip() else [[name] for name in COMPILERS]
    except ValueError as error:
        raise CompilerMissingError(
            f"The environment variable CXX={wanted!r} is no command: {error}; correct or unset it."
        ) from error
    found = [command for command in candidates if shutil.which(command[0])]
    if not found:
        names = ", ".join(command[0] for command in candidates)
        raise CompilerMissingError(f"No C++ compiler found (looked for {names}); install one or set CXX.")
    return found


def sources_number() -> int:
    """64 bits of a hash of sources and flags. A library has its own compiled in, as `daq_sources()`."""
    texts = ((_FOLDER / name).read_bytes() for name in (*_HEADERS, *_SOURCES))
    return int(hashlib.sha256(b"".join([*texts, *map(os.fsencode, FLAGS)])).hexdigest()[:16], 16)


def predefined(command: Sequence[str]) -> bytes:
    """Everything that a compiler predefines with its flags: its version, and what it knows of the processor.

    Raises:
        CompilerError: It does not take the flags.
    """
    return _run([*command, "-dM", "-E", "-x", "c++", os.devnull])


def compile_library(command: Sequence[str], out: Path) -> None:
    """Compiles the library with a compiler and its flags.

    Raises:
        CompilerError: It cannot be compiled so.
    """
    sources = [str(_FOLDER / name) for name in _SOURCES]
    _run([*command, f"-DDAQ_SOURCES=0x{sources_number():x}u", *sources, "-o", str(out)])


def _run(command: list[str]) -> bytes:
    done = subprocess.run(command, capture_output=True)
    if done.returncode:
        raise CompilerError(done.stderr.decode(errors="replace"))
    return done.stdout
