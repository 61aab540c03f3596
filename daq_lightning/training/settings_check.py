"""What a user passes to the callback, checked when it is made: each error says what was expected instead."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from daq_lightning.checkpoint.urls import is_url, local_path


def require(ok: bool, name: str, value: object, expected: str) -> None:
    """Raises MisconfigurationException, with what was expected of an argument and what came, if not ok."""
    if not ok:
        raise MisconfigurationException(f"{name}={value!r}: expected {expected}.")


@contextlib.contextmanager
def as_misconfiguration() -> Iterator[None]:
    """Turns what is wrong with a model into what Lightning calls a misconfigured run."""
    try:
        yield
    except ValueError as error:
        raise MisconfigurationException(str(error)) from error


def choice(name: str, value: object, choices: Sequence[str | None]) -> None:
    """Raises MisconfigurationException for a value that is none of the choices."""
    require(value in choices, name, value, f"one of {', '.join(map(repr, choices))}")


def flag(name: str, value: object) -> None:
    """Raises MisconfigurationException for what is neither True nor False: "no" would count as true."""
    require(isinstance(value, bool), name, value, "True or False")


def names(name: str, value: object, expected: str) -> None:
    """Raises MisconfigurationException for what is neither None nor a list of strings; a string is none."""
    listed = isinstance(value, (list, tuple)) and all(isinstance(one, str) for one in value)
    require(value is None or listed, name, value, expected)


def count(name: str, value: object, *, optional: bool = True) -> None:
    """Raises MisconfigurationException for what is no whole number >= 1, or None if it is optional; True is
    none."""
    whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    expected = "a whole number of at least 1" + ", or None" * optional
    require(whole or (optional and value is None), name, value, expected)


def path(name: str, value: Any, expected: str) -> str:
    """The path as a string; anything that is no path (None would become a folder "None") is refused."""
    require(isinstance(value, (str, os.PathLike)) and str(value) != "", name, value, expected)
    return os.path.expanduser(value)


def destination(name: str, value: Any, expected: str) -> str:
    """A path as a string, or a URL of another file system as it is."""
    value = path(name, value, expected)
    return value.rstrip("/") if is_url(value) else str(local_path(value))


def local(name: str, value: str) -> str:
    """A path as it is; a URL is refused."""
    if is_url(value):
        raise MisconfigurationException(
            f"{name}={value!r}: only local folders and files are read. Copy it to this machine first."
        )
    return value


def chain(parent: Any, chain_from: Any, base: str) -> str | None:
    """The parent as a string; a parent and what the run began with belong together.

    Args:
        parent: Folder of the export before.
        chain_from: None, "weights" or "deployed".
        base: The base of the run; a folder may be the parent itself.
    """
    parent = None if parent is None else path("parent", parent, "None or a path")
    choice("chain_from", chain_from, (None, "weights", "deployed"))
    if parent is not None and chain_from is None:
        raise MisconfigurationException(
            f"parent={parent!r}: say what this stage was trained from with chain_from='deployed' (the "
            "parent's dequantized FP8 weights) or chain_from='weights' (the high-precision weights it was "
            "made from)."
        )
    folder = base not in ("auto", "snapshot", "memory") and not base.endswith(".ckpt")
    if chain_from is not None and parent is None and not folder:
        raise MisconfigurationException(
            f"chain_from={chain_from!r}: needs parent='<folder of the export before>'; leave chain_from out "
            "for a run that goes on from none."
        )
    return parent
