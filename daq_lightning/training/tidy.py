"""What runs that were killed leave in a `dirpath`, and what of it the next run removes."""

from __future__ import annotations

import contextlib
import glob
import os
import re
from pathlib import Path

from daq_lightning.checkpoint.destination import alone, remove_leftovers
from daq_lightning.checkpoint.locks import lock
from daq_lightning.checkpoint.tensor_file import CheckpointError
from daq_lightning.training.claims import claim

# what a writer of a folder of this name, or a claim of the name, leaves beside it when it is killed
_LEFT = re.compile(
    r"\.(.+?)(?:\.partial-[0-9a-f]{8}(?:\.lock)?|\.earlier-[0-9a-f]{8}|\.lock|\.claim|\.writing)"
)


def tidy(dirpath: Path) -> None:
    """Removes what runs that were killed left in a `dirpath`: unfinished folders, locks that nobody holds.

    A later run need not write the same folders, so it looks for all. What `quantize --resume` can go on from
    stays, and what a living process has.
    """
    with contextlib.suppress(OSError, CheckpointError):  # who cannot write there hears of it soon enough
        matches = [match for path in dirpath.glob(".*") if (match := _LEFT.fullmatch(path.name))]
        for name in sorted({match[1] for match in matches}):
            if any(dirpath.glob(f".{glob.escape(name)}.partial-*/.*.done")):
                continue
            out, writing = dirpath / name, dirpath / f".{name}.writing"
            with claim(out, wait=False) as claimed:
                held = lock(writing, wait=False) if claimed else None
                if held is None:
                    continue
                try:
                    with alone(out):
                        remove_leftovers(out)
                finally:
                    writing.unlink()
                    os.close(held)
