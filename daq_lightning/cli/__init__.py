"""The command `daq-lightning`: quantize, inspect, evaluate, follow and verify checkpoints, without a Trainer.

    daq-lightning quantize POST --base BASE --out OUT
    daq-lightning inspect OUT
    daq-lightning evaluate OUT --post POST --base BASE --text FILE
    daq-lightning chain OUT
    daq-lightning verify OUT

torch is imported once the arguments are known to be right, so that `--help` and a mistyped option answer at
once.

Exit codes:
      0  fine
      1  problems were found: figures that differ (inspect), a folder that is not as it should be (verify,
         chain)
      2  wrong arguments or input, or a destination that cannot be written
     70  an error in this program, to be reported
    130  interrupted; 141 the reader of a pipe went away
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence

from daq_lightning.cli import commands
from daq_lightning.cli.arguments import in_options, make_parser, normalized
from daq_lightning.cli.evaluate import evaluate
from daq_lightning.cli.ranks import speaker, spread_over_gpus

_COMMANDS = {
    "quantize": commands.quantize,
    "inspect": commands.inspect,
    "evaluate": evaluate,
    "chain": commands.chain,
    "verify": commands.verify,
}
# options that are paths: `~` is the home folder
_PATHS = ("post", "base", "out", "adapter", "parent", "folder", "html", "text", "tokenizer", "calibrate")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code.

    Args:
        argv: Arguments without the program's name; None takes those of the process.
    """
    own = argv is None  # only then this process is the command, and may become another
    argv = normalized(list(sys.argv[1:] if argv is None else argv))
    with _any_text():
        return _run(argv, own, debug="--debug" in argv)


def _run(argv: list[str], own: bool, debug: bool) -> int:
    try:
        options = make_parser().parse_args(argv)
        with _without_interrupts():
            import torch  # noqa: F401
        chosen = options[options.subcommand]
        for name in _PATHS:
            if chosen.get(name) is not None:
                chosen[name] = os.path.expanduser(chosen[name])
        if own and not chosen.get("dry_run"):
            spread_over_gpus(argv, chosen.get("device"))
        code = _COMMANDS[options.subcommand](chosen)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print(f"\n{speaker()}: interrupted; nothing was published.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, OSError, ImportError) as error:
        if debug:
            traceback.print_exc()
        print(f"{speaker()}: error: {in_options(' '.join(str(error).split()))}", file=sys.stderr)
        return 2
    except Exception as error:
        if debug:
            traceback.print_exc()
        shown = " ".join(f"{type(error).__name__}: {error}".split())
        print(
            f"{speaker()}: unexpected error: {shown[:500]}. This is a mistake in daq-lightning: please "
            "report it with the output of the same command with --debug.",
            file=sys.stderr,
        )
        return os.EX_SOFTWARE


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
