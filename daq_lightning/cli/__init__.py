"""The command `daq-lightning`: quantize, inspect, evaluate, follow and verify checkpoints, without a Trainer.

    daq-lightning quantize POST --base BASE --out OUT
    daq-lightning inspect OUT
    daq-lightning evaluate OUT --post POST --base BASE --text FILE
    daq-lightning chain OUT
    daq-lightning verify OUT
    daq-lightning completion bash

torch is imported once the arguments are known to be right, so that `--help` and a mistyped option answer at
once.

Exit codes are those of `daq_lightning.cli.words.EXIT_CODES`: 0 done, 1 an input was refused, 2 the command
line is wrong, 3 a check found problems, 70 a mistake of this program, 130 interrupted, 143 terminated.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from reprlib import repr as shown
from typing import Any, TextIO, cast

from daq_lightning.cli import commands
from daq_lightning.cli.arguments import make_parser
from daq_lightning.cli.evaluate import evaluate
from daq_lightning.cli.inputs import UsageError, check_recipe
from daq_lightning.cli.inspect import inspect
from daq_lightning.cli.logs import LOGGER, log_versions, logged
from daq_lightning.cli.normalized import normalized
from daq_lightning.cli.ranks import speaker, spread_over_gpus
from daq_lightning.cli.visible import Visible, visible
from daq_lightning.cli.words import INTERRUPTED, MISTAKE, NO_READER, REFUSED, TERMINATED, USAGE, in_options
from daq_lightning.model.imports import without_collections

_COMMANDS = {
    "quantize": commands.quantize,
    "inspect": inspect,
    "evaluate": evaluate,
    "chain": commands.chain,
    "verify": commands.verify,
    "completion": commands.completion,
}
# options that are paths: `~` is the home folder
_PATHS = ("post", "base", "out", "adapter", "parent", "folder", "html", "text", "tokenizer", "calibrate")


def program() -> None:
    """The command as a process of its own: runs it and ends the process with its exit code.

    What was imported is not taken apart at the end, which takes longer than the import of torch once
    transformers is there. Threads have ended and everything registered with `atexit` has run by then.
    """
    ended: list[int] = []
    atexit.register(_leave, ended)  # the first to be registered is the last to run
    ended.append(main())
    sys.exit(ended[0])


def _leave(ended: list[int]) -> None:
    """Ends the process if the command has ended; what cannot be flushed is left for Python to report."""
    if not ended:
        return
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except (OSError, ValueError):
        return
    os._exit(ended[0])


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code.

    Args:
        argv: Arguments without the program's name; None takes those of the process.
    """
    own = argv is None  # only then this process is the command, and may become another
    argv = normalized(list(sys.argv[1:] if argv is None else argv))
    with _any_text(), contextlib.redirect_stdout(cast(TextIO, Visible(sys.stdout))):
        return _run(argv, own)


def _run(argv: list[str], own: bool) -> int:
    debug = "--debug" in argv
    try:
        check_recipe(argv)
        with without_collections():
            options = make_parser().parse_args(argv)
        chosen = options[options.subcommand]
        debug = chosen.debug or chosen.log_level == "debug"
        with logged(chosen.log_level):
            return _command(options.subcommand, chosen, argv, own)
    except KeyboardInterrupt as error:
        what = "terminated" if isinstance(_cause(error), _TerminatedError) else "interrupted"
        print(f"\n{speaker()}: {what}; nothing was published. {error}".rstrip(), file=sys.stderr)
        return TERMINATED if what == "terminated" else INTERRUPTED
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return NO_READER
    except (ValueError, OSError, ImportError) as error:
        if debug:
            traceback.print_exc()
        print(f"{speaker()}: error: {visible(in_options(' '.join(str(error).split())))}", file=sys.stderr)
        return USAGE if isinstance(error, UsageError) else REFUSED
    except Exception as error:
        if debug:
            traceback.print_exc()
        if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
            print(f"{speaker()}: error: the memory of this machine is not enough.", file=sys.stderr)
            return REFUSED
        what = " ".join(f"{type(error).__name__}: {error}".split())
        print(
            f"{speaker()}: unexpected error: {visible(what[:500])}. This is a mistake in daq-lightning: "
            "please report it with the output of the same command with --debug.",
            file=sys.stderr,
        )
        return MISTAKE


def _command(name: str, chosen: Any, argv: list[str], own: bool) -> int:
    start = time.monotonic()
    if name != "completion":
        with _without_interrupts(), without_collections():
            import torch  # noqa: F401
    log_versions()
    for option in _PATHS:
        if chosen.get(option) is not None:
            if not isinstance(chosen[option], str):  # of a recipe
                raise UsageError(
                    f"{option}: expected a path, got {shown(chosen[option])[:80]}; put it in quotes."
                )
            chosen[option] = os.path.expanduser(chosen[option])
    if own and not chosen.get("dry_run"):
        spread_over_gpus(argv, chosen.get("device"))
    with _terminating():
        code = _COMMANDS[name](chosen)
    sys.stdout.flush()
    LOGGER.info("%s: exit code %d after %.1f s", name, code, time.monotonic() - start)
    return code


class _TerminatedError(KeyboardInterrupt):
    """SIGTERM, which ends a command as Ctrl-C does: what it completed can be gone on from."""


def _cause(error: BaseException) -> BaseException:
    return error if error.__cause__ is None else _cause(error.__cause__)


@contextlib.contextmanager
def _terminating() -> Iterator[None]:
    """Turns SIGTERM, as schedulers and service managers send it, into an interrupt."""

    def end(*_: object) -> None:
        raise _TerminatedError

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _any_text() -> Iterator[None]:
    """Lets names that the terminal's encoding cannot hold be printed, as escapes, instead of failing."""
    streams = [stream for stream in (sys.stdout, sys.stderr) if isinstance(stream, io.TextIOWrapper)]
    before = [stream.errors for stream in streams]
    for stream in streams:
        stream.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        for stream, errors in zip(streams, before, strict=True):
            stream.reconfigure(errors=errors)


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """Holds Ctrl-C back until the end: in the middle of its import, torch aborts the process or fails."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: held.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if held:
        raise KeyboardInterrupt
