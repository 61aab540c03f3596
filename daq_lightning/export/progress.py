"""How far an export is, its rate and the time left: a bar on a terminal, else lines for a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

_LINE_SECONDS = 5.0
_UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9}
_Part = TypeVar("_Part")


def with_progress(
    parts: Sequence[_Part], size: Callable[[_Part], int], what: str = "Export"
) -> Iterator[_Part]:
    """The parts of an export one after the other; each counts as done when the next is asked for.

    Args:
        parts: What is exported.
        size: Bytes that a part makes.
        what: What is done, in a word.
    """
    return _with_bar(parts, size, what) if sys.stderr.isatty() else _with_lines(parts, size, what)


def _with_bar(parts: Sequence[_Part], size: Callable[[_Part], int], what: str) -> Iterator[_Part]:
    from tqdm import tqdm

    with tqdm(total=sum(map(size, parts)), unit="B", unit_scale=True, desc=what, dynamic_ncols=True) as bar:
        for part in parts:
            yield part
            bar.update(size(part))


def _with_lines(parts: Sequence[_Part], size: Callable[[_Part], int], what: str) -> Iterator[_Part]:
    total, done = sum(map(size, parts)), 0
    start = last = time.monotonic()
    for part in parts:
        yield part
        done += size(part)
        now = time.monotonic()
        if done == total or now - last > _LINE_SECONDS:
            last, rate = now, done / max(now - start, 1e-9)
            sys.stderr.write(
                f"{what}: {done / max(total, 1):.0%} of {size_text(total)}, {rate / 1e6:.3g} MB/s, "
                f"{(total - done) / max(rate, 1e-9):.0f} s left\n"
            )
            sys.stderr.flush()


@contextmanager
def telling(what: str, shown: bool) -> Iterator[Callable[[float], None]]:
    """Something to be told how much is done, from 0 to 1.

    Args:
        what: What is done, in a few words.
        shown: Whether anybody is to see it.
    """
    if not shown:
        yield lambda share: None
    elif sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(total=100, desc=what, bar_format="{l_bar}{bar}| {elapsed}, {remaining} left") as bar:

            def move(share: float) -> None:
                bar.update(100 * share - bar.n)

            yield move
    else:
        start = last = time.monotonic()

        def tell(share: float) -> None:
            nonlocal last
            now = time.monotonic()
            if now - last > _LINE_SECONDS:
                last = now
                left = (now - start) * (1 - share) / max(share, 1e-9)
                sys.stderr.write(f"{what}: {share:.0%}, {left:.0f} s left\n")
                sys.stderr.flush()

        yield tell


def size_text(size: float) -> str:
    """A number of bytes with a unit that leaves something of it to read.

    Example:
        >>> size_text(80), size_text(123_456), size_text(1.2e12)
        ('80 B', '123 kB', '1.2e+03 GB')
    """
    unit = next((unit for unit in ("B", "kB", "MB") if size < 1000 * _UNITS[unit]), "GB")
    return f"{size / _UNITS[unit]:.3g} {unit}"
