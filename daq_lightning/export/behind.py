"""Writing behind: calls that a thread makes one after the other, while the next weight is searched."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class Behind:
    """Runs calls one after the other in a thread, a bounded number of them ahead of it; use as a context
    manager.

    An error of a call surfaces in a later `run` or in `wait`.
    """

    def __enter__(self) -> Behind:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="write-behind")
        self._pending: deque[Future[None]] = deque()
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def run(self, function: Callable[..., None], *arguments: object) -> None:
        """Queues a call; waits while another is queued already."""
        self._pending.append(self._pool.submit(function, *arguments))
        while len(self._pending) > 1:
            self._pending.popleft().result()

    def then(self, act: Callable[[], None]) -> None:
        """Acts when what is queued now is done, however it ended; waits for nothing."""
        if self._pending:
            self._pending[-1].add_done_callback(lambda _: act())
        else:
            act()

    def wait(self) -> None:
        """Waits for all calls."""
        while self._pending:
            self._pending.popleft().result()
