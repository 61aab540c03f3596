"""Whether there is room for an export, before anything of it is made.

What a killed export to the same place left counts as free: it is removed, or gone on with.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from daq_lightning.checkpoint.destination import unfinished
from daq_lightning.checkpoint.tensor_file import CheckpointError
from daq_lightning.export.progress import size_text

if TYPE_CHECKING:
    from daq_lightning.checkpoint.tensor_file import TensorSpec

_BLOCK = 512  # bytes, of `st_blocks`


def bytes_of(shards: Mapping[str, Sequence[TensorSpec]]) -> int:
    """What the tensors of planned files take."""
    return sum(spec.nbytes for specs in shards.values() for spec in specs)


def too_little_room(out: Path, nbytes: int) -> str:
    """Why so many bytes do not fit where an export goes; "" if they do.

    Args:
        out: The destination; need not exist.
        nbytes: What it needs.
    """
    place = out.absolute().parent
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free + sum(map(_taken_by, unfinished(out)))
    if nbytes <= free:
        return ""
    return f"the export needs {size_text(nbytes)}, and {place} has {size_text(free)} free"


def check_room(out: Path, nbytes: int, *, elsewhere: bool = False) -> None:
    """Refuses an export that does not fit.

    Args:
        out: Where it is written.
        nbytes: What it needs.
        elsewhere: Whether it is only written there to be uploaded.

    Raises:
        CheckpointError: With both numbers.
    """
    problem = too_little_room(out, nbytes)
    if problem:
        advice = "set TMPDIR to a folder with more" if elsewhere else "choose another destination"
        earlier = " An earlier export there stays until the new one is complete." if out.is_dir() else ""
        raise CheckpointError(
            f"{out} was not begun: {problem}. Make room, or {advice}.{earlier} Nothing was written."
        )


def _taken_by(folder: Path) -> int:
    return _BLOCK * sum(path.stat().st_blocks for path in folder.rglob("*") if path.is_file())
