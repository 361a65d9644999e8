"""Where a world is asked: in threads that it may block, each for a limited time.

Python cannot end a thread. One that is given up is left behind and its place is free again; a world that left too many
behind is asked nothing more until one of them has ended. The threads are daemons: the process ends with them running.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextvars import copy_context
from typing import TypeVar

from tools.worlds.blame import raised
from tools.worlds.world import WorldFailed

T = TypeVar("T")

MAX_RUNNING = 8
"""Threads of one world whose answers are awaited; whoever comes later waits for a place."""
MAX_LEFT_BEHIND = 8
"""Threads of one world that were given up and have not ended."""


class WorldThreads:
    """The threads of one world, used on one event loop."""

    def __init__(self, world: str = "") -> None:
        self._world = world
        self._places = asyncio.Semaphore(MAX_RUNNING)
        self._left_behind: list[threading.Thread] = []

    async def ask(self, work: Callable[[], T], timeout_s: float) -> T:
        """Do it in a thread of its own. What it raises is raised here; what would end a thread becomes WorldFailed.

        Raises WorldFailed where it takes longer, not counting the wait for a place, and where the world hangs.
        """
        # Whoever hangs up stops waiting; the thread keeps its place until it has ended or its time is over.
        return await asyncio.shield(self._ask(work, timeout_s))

    async def _ask(self, work: Callable[[], T], timeout_s: float) -> T:
        async with self._places:
            self._require_responsive()
            answer: Future[T] = Future()
            thread = threading.Thread(
                target=copy_context().run, args=(_work, work, answer), name=f"world-{self._world}", daemon=True
            )
            thread.start()
            try:
                async with asyncio.timeout(timeout_s):
                    return await asyncio.wrap_future(answer)
            except TimeoutError as error:
                if answer.done() and not answer.cancelled():  # the work's own
                    raise
                self._left_behind.append(thread)
                raise WorldFailed(f"the world {self._world} did not answer within {timeout_s:g} seconds") from error

    def _require_responsive(self) -> None:
        self._left_behind = [thread for thread in self._left_behind if thread.is_alive()]
        if (number := len(self._left_behind)) >= MAX_LEFT_BEHIND:
            raise WorldFailed(
                f"the world {self._world} hangs: {number} earlier requests of it have not ended, and it is asked "
                "nothing more until one of them has"
            )


def in_own_thread(work: Callable[[], T]) -> T:
    """Do it and wait for it, in a thread that has no event loop: the world may run one of its own.

    What it raises is raised here; what would end a thread becomes WorldFailed.
    """
    answer: Future[T] = Future()
    threading.Thread(target=copy_context().run, args=(_work, work, answer), name="world", daemon=True).start()
    return answer.result()


def _work(work: Callable[[], T], answer: Future[T]) -> None:
    """What the thread does. Its caller may have gone: `answer` is cancelled then, and takes nothing."""
    try:
        value = work()
    except BaseException as error:
        if answer.set_running_or_notify_cancel():
            answer.set_exception(_that_ends_nobody(error))
    else:
        if answer.set_running_or_notify_cancel():
            answer.set_result(value)


def _that_ends_nobody(error: BaseException) -> Exception:
    """StopIteration cannot be raised into a future; SystemExit and its like would end who awaits it."""
    if isinstance(error, Exception) and not isinstance(error, StopIteration):
        return error
    return WorldFailed(f"it {raised(error)}")
