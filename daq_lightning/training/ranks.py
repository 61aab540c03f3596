"""One rank prepares and exports; what it could not do is raised on all ranks, so that none waits for another.

`raise_on_all` and `agreed` are collectives: all ranks call them, in the same order. So neither may be called
in `on_exception`, which a single rank may reach.
"""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable

from lightning.pytorch import Trainer


def raise_on_all(trainer: Trainer, act: Callable[[], object]) -> None:
    """Acts on rank 0 alone, and raises on all ranks what was raised there."""
    problem = None
    if trainer.is_global_zero:
        try:
            act()
        except Exception as error:
            problem = error
    problem = agreed(trainer, problem)
    if problem is not None:
        raise problem


def agreed(trainer: Trainer, error: Exception | None) -> Exception | None:
    """The error of rank 0, on every rank: a copy, or its words where it cannot be copied."""
    sent = trainer.strategy.broadcast(_copied(error) if trainer.is_global_zero else None)
    return error if trainer.is_global_zero else sent


def raise_at_end(error: Exception | None) -> None:
    """Raises what went wrong in an export, after all that Lightning does at the end of training."""
    if error is None:
        return
    if sys.version_info >= (3, 11):
        error.add_note("Training itself has finished: the checkpoints that Lightning wrote are complete.")
    raise error


def _copied(error: Exception | None) -> Exception | None:
    try:  # some errors cannot be pickled, others not unpickled: the other ranks would wait in the broadcast
        copy = pickle.loads(pickle.dumps(error))
    except Exception:
        copy = None
    if type(copy) is type(error) and str(copy) == str(error):
        return copy
    return RuntimeError(f"{type(error).__name__}: {error}")
