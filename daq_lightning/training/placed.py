"""Where the exports of a run go: names that are free here and, of a URL, there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from daq_lightning.checkpoint.remote import Remote
from daq_lightning.checkpoint.urls import is_url
from daq_lightning.export.disk import too_little_room
from daq_lightning.training.claims import free_name

if TYPE_CHECKING:
    from daq_lightning.export.ranks import Ranks
    from daq_lightning.training.run_settings import RunSettings


@contextlib.contextmanager
def free_place(settings: RunSettings, name: str, ranks: Ranks) -> Iterator[str]:
    """The destination of an export: of this name, or the first of `<name>-v1`, ... that is free. A
    collective.

    Args:
        settings: Of the run.
        name: As the schedule has it.
        ranks: Who exports.

    Yields:
        A path, or a URL.
    """

    def taken(name: str) -> bool:
        return is_url(settings.dirpath) and bool(Remote(settings.place(name)).names())

    with contextlib.ExitStack() as stack:
        folder = ranks.first(lambda: stack.enter_context(free_name(settings.folder / name, taken)))
        yield settings.place(folder.name)


def shows_progress(trainer: Trainer) -> bool:
    """Whether a run shows a bar, and its exports one of their own."""
    bar = trainer.progress_bar_callback
    return isinstance(bar, TQDMProgressBar) and bar.is_enabled


def warn_of_little_room(settings: RunSettings, nbytes: int) -> None:
    """Says when training begins that an export does not fit now; there may be room when it is due.

    Args:
        settings: Of the run.
        nbytes: What an export needs.
    """
    problem = too_little_room(settings.folder / "export", nbytes)
    if problem:
        rank_zero_warn(
            f"{problem[0].upper()}{problem[1:]}. Make room before it is due: an export that does not fit is "
            "not begun, training goes on without it, and the error is raised when training is over."
        )
