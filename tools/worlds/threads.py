"""Where a world is asked: in threads that it may block, each for a limited time.

Python cannot end a thread. One that is given up is left behind and its place is free again; a world that left too many
behind is asked nothing more until one of them has ended. The threads are daemons: the process ends with them running.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextvars import copy_context
from typing import TypeVar

from tools.worlds.blame import raised
from tools.worlds.world import WorldFailed

T = TypeVar("T")

MAX_RUNNING = 8
"""Threads of one world whose answers are awaited; whoever comes later waits for a place."""
MAX_LEFT_BEHIND = 8
"""Threads of one world that were given up and have not ended."""

PATIENCE_S = 120.0
"""With a world that the learner asks, whom nobody waits for."""


class _LeftBehind:
    """The threads of one world that were given up."""

    def __init__(self, world: str) -> None:
        self._world = world
        self._threads: list[threading.Thread] = []

    def give_up(self, thread: threading.Thread, timeout_s: float) -> WorldFailed:
        """Why."""
        self._threads.append(thread)
        return WorldFailed(f"the world {self._world} did not answer within {timeout_s:g} seconds")

    def require_responsive(self) -> None:
        """Raises WorldFailed where too many have not ended."""
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        if (number := len(self._threads)) >= MAX_LEFT_BEHIND:
            raise WorldFailed(
                f"the world {self._world} hangs: {number} earlier requests of it have not ended, and it is asked "
                "nothing more until one of them has"
            )


class WorldThreads:
    """The threads of one world, used on one event loop."""

    def __init__(self, world: str = "") -> None:
        self.world = world
        """Its name."""
        self._places = asyncio.Semaphore(MAX_RUNNING)
        self._left_behind = _LeftBehind(world)

    async def ask(self, work: Callable[[], T], timeout_s: float) -> T:
        """Do it in a thread of its own. What it raises is raised here; what would end a thread becomes WorldFailed.

        Raises WorldFailed where it takes longer, not counting the wait for a place, and where the world hangs.
        """
        # Whoever hangs up stops waiting; the thread keeps its place until it has ended or its time is over.
        return await asyncio.shield(self._ask(work, timeout_s))

    async def _ask(self, work: Callable[[], T], timeout_s: float) -> T:
        async with self._places:
            self._left_behind.require_responsive()
            thread, answer = _started(work, self.world)
            try:
                async with asyncio.timeout(timeout_s):
                    return await asyncio.wrap_future(answer)
            except TimeoutError as error:
                if answer.done() and not answer.cancelled():  # the work's own
                    raise
                raise self._left_behind.give_up(thread, timeout_s) from error


def in_own_thread(work: Callable[[], T]) -> T:
    """Do it and wait for it, however long it takes, in a thread that has no event loop: the world may run one of its
    own. What it raises is raised here; what would end a thread becomes WorldFailed."""
    _, answer = _started(work, "")
    return answer.result()


_LEFT_BEHIND: dict[str, _LeftBehind] = {}
"""Of worlds that whoever has no event loop waits for, by their names."""


def patiently(world: str, work: Callable[[], T]) -> T:
    """As `in_own_thread`. Raises WorldFailed where it takes longer than PATIENCE_S, and where the world hangs."""
    left_behind = _LEFT_BEHIND.setdefault(world, _LeftBehind(world))
    left_behind.require_responsive()
    thread, answer = _started(work, world)
    if not wait([answer], PATIENCE_S).done:
        raise left_behind.give_up(thread, PATIENCE_S)
    return answer.result()


def _started(work: Callable[[], T], world: str) -> tuple[threading.Thread, Future[T]]:
    answer: Future[T] = Future()
    thread = threading.Thread(target=copy_context().run, args=(_work, work, answer), name=f"world-{world}", daemon=True)
    thread.start()
    return thread, answer


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
