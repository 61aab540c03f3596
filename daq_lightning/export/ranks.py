"""The processes that export together: what they tell each other, and how all learn what went wrong in one.

    ranks.gather(value)     the values of all, on every rank
    ranks.first(act)        rank 0 acts, all get the result
    ranks.together(act)     all act
    Agreement               the same over many steps, without waiting after each

Everything here is a collective: all ranks call it, in the same order. An error on one rank is raised on all,
so that none waits for another and all go on from the same place. One process by itself is `ALONE`, for which
nothing of this costs anything. Messages go through a group of their own on the CPU, which does not meet the
gradients, and whose patience does not end while a rank writes a large file; a rank that dies ends every call
at once.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import pickle
import socket
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from daq_lightning.checkpoint.tensor_file import CheckpointError

_PATIENCE = timedelta(hours=12)  # a living rank may write and read for long
_GRACE = 10.0  # seconds for the messages under way when the group ends
_LAG = 4  # steps that a rank may be ahead of the slowest
_TOLD = "_told_to_all_ranks"  # attribute of an error
_Value = TypeVar("_Value")


class RankLostError(CheckpointError):
    """Another rank does not answer any more."""


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """Some processes that work on one export.

    Attributes:
        rank: Number of this one.
        size: How many there are.
        group: Carries their messages; None for a process by itself.
    """

    rank: int = 0
    size: int = 1
    group: Any = None

    @classmethod
    def all(cls) -> Ranks:
        """All processes of `torch.distributed`, or this one by itself where it is not initialized.

        A collective. Call `close` when the work is done.
        """
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return ALONE
        with _answered():
            group = dist.new_group(backend="gloo", timeout=_PATIENCE)
        return cls(rank=dist.get_rank(), size=dist.get_world_size(), group=group)

    def close(self) -> None:
        """Ends the group and its threads; not a collective.

        A thread of gloo that still lets go of its last message when Python ends aborts the process.
        """
        if self.group is None or not dist.is_initialized():
            return

        def end() -> None:
            with contextlib.suppress(Exception):  # of a group whose ranks are gone already
                dist.destroy_process_group(self.group)

        ending = threading.Thread(target=end, daemon=True)  # waits for messages that may never come
        ending.start()
        ending.join(_GRACE)

    def gather(self, value: _Value) -> list[_Value]:
        """The values of all ranks, in their order, on every rank."""
        if self.size == 1:
            return [value]
        return [sent for sent, _ in self._exchange(value, None)]

    def union(self, mine: Mapping[str, _Value]) -> dict[str, _Value]:
        """One mapping of those of all ranks, on every rank."""
        return {name: value for part in self.gather(mine) for name, value in part.items()}

    def add_up(self, tensor: torch.Tensor, owner: int) -> None:
        """Adds up a tensor of every rank, on the CPU, in that of one of them; the others' are spent."""
        with _answered():
            dist.reduce(tensor, owner, group=self.group)

    def together(self, act: Callable[[], _Value]) -> _Value:
        """Acts on every rank; the first error of any rank is raised on all.

        Returns:
            What `act` gave on this rank.
        """
        if self.size == 1:
            return act()
        error = result = None
        try:
            result = act()
        except Exception as caught:
            if getattr(caught, _TOLD, False):  # the others have it already, and do not wait for it here
                raise
            error = caught
        self.agree(error)
        return result  # type: ignore[return-value]

    def first(self, act: Callable[[], _Value]) -> _Value:
        """Acts on rank 0 and gives what came of it, a value that can be pickled or an error, to all."""
        result = self.together(lambda: act() if self.rank == 0 else None)
        return self.gather(result)[0]  # type: ignore[return-value]

    def agree(self, error: Exception | None) -> None:
        """Raises on all ranks what went wrong on the first that has an error."""
        if self.size > 1:
            self._exchange(None, error)
        elif error is not None:
            raise error

    def wait_after(self, error: Exception) -> None:
        """Waits for the others after an error that all have been told of."""
        if getattr(error, _TOLD, False):
            with contextlib.suppress(RankLostError):
                self.gather(None)

    def _exchange(self, value: Any, error: Exception | None) -> list[tuple[Any, Exception | None]]:
        """The values of all ranks, or the first error of one: also where others sent values instead.

        So a rank that fails while the others are about to tell each other something does not leave them
        waiting.
        """
        messages: list[Any] = [None] * self.size
        with _answered():
            dist.all_gather_object(messages, (value, _copied(error)), group=self.group)
        for rank, (_, problem) in enumerate(messages):
            if problem is None:
                continue
            if rank == self.rank and error is not None:
                problem = error
            elif sys.version_info >= (3, 11):
                problem.add_note(f"This happened on rank {rank} of {self.size}.")
            with contextlib.suppress(AttributeError):
                setattr(problem, _TOLD, True)
            raise problem
        return messages

    def check_equal(self, what: str, parts: Callable[[], dict[str, str]]) -> None:
        """Refuses what should be the same on all ranks and is not.

        Args:
            what: How the error calls it.
            parts: Name -> value.

        Raises:
            CheckpointError: Names the first difference, and the ranks.
        """
        if self.size == 1:
            return
        described = parts()
        digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()
        if len(set(self.gather(digest))) == 1:
            return
        mine, *others = self.gather(described)
        for rank, other in enumerate(others, 1):
            for name in dict.fromkeys([*mine, *other]):
                if mine.get(name) != other.get(name):
                    raise CheckpointError(
                        f"{what} differs between rank 0 and rank {rank}: {name} is "
                        f"{mine.get(name, 'missing')} on the one, {other.get(name, 'missing')} on the other. "
                        "Expected the same model, config and settings on all ranks: start all of them "
                        "with the same code and files."
                    )
        raise CheckpointError(f"{what} differs between the ranks.")


ALONE = Ranks()
"""One process by itself."""


class Agreement:
    """Steps that all ranks take, each with work of its own, and their common end when one fails.

    An error is kept by `attempt` until `settle`, which ends a step and tells the others; all ranks raise it
    at the same step, a few after it happened, so that a fast rank need not wait for a slow one at each. A
    rank with an error takes part in what the others do together until then. A process by itself raises at
    once.

    Args:
        ranks: Who takes part; all call `settle` equally often.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._error: Exception | None = None
        self._pending: deque[tuple[Any, torch.Tensor]] = deque()

    @property
    def failed(self) -> bool:
        """Whether this rank has an error that is not raised yet."""
        return self._error is not None

    @contextlib.contextmanager
    def attempt(self) -> Iterator[None]:
        """Keeps an error of what is done inside."""
        try:
            yield
        except Exception as error:
            if self._ranks.size == 1:
                raise
            self._error = self._error or error

    def settle(self) -> None:
        """Ends a step; raises what went wrong on any rank."""
        if self._ranks.size == 1:
            return
        flag = torch.tensor([self.failed], dtype=torch.int32, device="cpu")
        with _answered():
            work = dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._ranks.group, async_op=True)
        self._pending.append((work, flag))
        if len(self._pending) > _LAG:
            self._look()

    def end(self) -> None:
        """Ends the last step."""
        self.settle()
        while self._pending:
            self._look()

    def _look(self) -> None:
        work, flag = self._pending.popleft()
        with _answered():
            work.wait()
        if not flag.item():
            return
        with _answered():
            for later, _ in self._pending:
                later.wait()
        self._pending.clear()
        self._ranks.agree(self._error)


@contextlib.contextmanager
def _answered() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # of gloo: connection closed, reset, timed out
        raise RankLostError(
            f"Another rank of this job ended, or cannot be reached any more from {socket.gethostname()} "
            f"({str(error).splitlines()[0][:200]}). Nothing was published. See what that rank printed; then "
            "start again. An export of folders goes on from its complete files with --resume."
        ) from error


def _copied(error: Exception | None) -> Exception | None:
    try:  # some errors cannot be pickled, others not unpickled: the other ranks would wait for them
        copy = pickle.loads(pickle.dumps(error))
    except Exception:
        copy = None
    if type(copy) is type(error) and str(copy) == str(error):
        return copy
    return RuntimeError(f"{type(error).__name__}: {error}")
