"""Bins of changes by their size in steps of the format, and what a change can become. Imports no torch."""

from __future__ import annotations

STEP_EDGES: tuple[float, ...] = tuple(2.0**power for power in range(-8, 4))
"""Where a bin ends and the next begins, in steps; the first has no lower end but 0, the last no upper one."""
STEP_BINS = len(STEP_EDGES) + 1
OUTCOMES = ("flipped", "lost", "kept")
"""What quantization makes of a change: one of the opposite sign, none at all, or one of its own sign."""
