"""What `--log-level` does: lines of the logger "daq_lightning" and warnings on stderr, while a command runs.

2026-11-28 16:00:00,000 INFO daq_lightning.cli: POST is /models/fine-tuned
"""

from __future__ import annotations

import contextlib
import logging
import platform
import sys
from collections.abc import Iterator

LOGGER = logging.getLogger("daq_lightning.cli")
_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


@contextlib.contextmanager
def logged(level: str | None) -> Iterator[None]:
    """Logs from this level on; None leaves logging and warnings as they are. Both are restored in the end."""
    if level is None:
        yield
        return
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(_FORMAT))
    loggers = [logging.getLogger("daq_lightning"), logging.getLogger("py.warnings")]
    before = [(logger.level, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.setLevel(level.upper())
        logger.propagate = False
        logger.addHandler(handler)
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        for logger, (old_level, old_propagate) in zip(loggers, before, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(old_level)
            logger.propagate = old_propagate


def log_versions() -> None:
    """Says, at level DEBUG, what is running."""
    if LOGGER.isEnabledFor(logging.DEBUG):
        import torch

        from daq_lightning import __version__

        LOGGER.debug(
            "daq_lightning %s, torch %s, Python %s, %s",
            __version__, torch.__version__, platform.python_version(), platform.platform(),
        )  # fmt: skip
