"""An event loop in a thread of its own, for coroutines of other people: what blocks there blocks no request."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")


class BackgroundLoop:
    """Runs coroutines for other threads. The process may end while it runs: its thread is a daemon."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._is_closed = False
        self._thread = threading.Thread(target=self._turn, name=name, daemon=True)
        self._thread.start()

    def _turn(self) -> None:
        """asyncio ends the loop where a task raises SystemExit. Whoever awaits that task gets it too, and tells it."""
        while not self._is_closed:
            with suppress(SystemExit, KeyboardInterrupt):
                self._loop.run_forever()

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Run it there. Cancelling the future cancels the coroutine."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def run(self, work: Coroutine[Any, Any, T]) -> T:
        """The same, awaited from another event loop."""
        return await asyncio.wrap_future(self.submit(work))

    def close(self, within_s: float = 1.0) -> None:
        """Stop it. A coroutine that blocks the thread is left behind."""
        self._is_closed = True
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(within_s)
