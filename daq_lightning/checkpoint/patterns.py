"""Regular expressions that a foreign file holds, matched with a bound.

A pattern such as ``(a+)+b`` needs time exponential in the length of what it is matched with, and both come
from files that anybody may have written. Each matcher has some seconds to spend; real files (module names, a
few wildcards) need none of them.
"""

from __future__ import annotations

import time
from typing import Any

from daq_lightning.checkpoint.tensor_file import CheckpointError

_SECONDS = 2.0
_PER_MATCH = (
    1e-4  # seconds that a match may take before it counts: long lists of harmless patterns are no attack
)
_LONGEST = 10_000  # characters of a pattern: also compiling takes time


class BoundedMatcher:
    """Matches the patterns of one file as `re.match` does.

    Args:
        where: Names the file in errors.
    """

    def __init__(self, where: str) -> None:
        self._where, self._left = where, _SECONDS
        self._compiled: dict[str, Any] = {}

    def matches(self, pattern: str, text: str) -> bool:
        """Whether a pattern matches at the start of a text.

        Raises:
            CheckpointError: It is no regular expression, or the patterns of this file took too long.
        """
        if pattern not in self._compiled:
            self._compiled[pattern] = self._compile(pattern)
        start = time.monotonic()
        try:
            found = self._compiled[pattern].match(text, timeout=self._left) is not None
        except TimeoutError:
            found, self._left = False, 0.0
        self._left -= max(0.0, time.monotonic() - start - _PER_MATCH)
        if self._left <= 0:
            raise CheckpointError(
                f"{self._where} has patterns that take too long to match, such as {pattern[:80]!r}: expected "
                "names of modules or simple regular expressions, without repetitions in repetitions."
            )
        return found

    def _compile(self, pattern: str) -> Any:
        import regex  # unlike `re`, it can be stopped; transformers needs it anyway

        try:
            if len(pattern) > _LONGEST:
                raise ValueError(f"it has {len(pattern)} characters")
            return regex.compile(pattern)
        except (regex.error, ValueError, OverflowError, RecursionError, MemoryError) as error:
            raise CheckpointError(
                f"{self._where} has the pattern {pattern[:80]!r}, which is no regular expression: {error}."
            ) from error
