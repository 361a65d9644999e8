"""A stream's items in bursts: what a quick stream gives within a few milliseconds is handed on together.

Reading, parsing, writing and sending cost much the same for one token as for ten. The first item is handed on at once
and the last ones when the stream ends, so that nobody waits longer for an answer. Refused: one item after another as
they come, which spends more on a quick engine's tokens than the engine does.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Generic, TypeVar

T = TypeVar("T")


class Bursts(Generic[T]):
    """The stream's items in order, in lists that are never empty and come at least `gap_s` apart, the last one aside.

    At `ends_at`, a time.monotonic() value, it ends with what has come by then. Raises what the stream raises, after the
    items before. Closing it closes the stream.
    """

    def __init__(self, stream: AsyncIterator[T], gap_s: float, ends_at: float | None = None) -> None:
        self._stream = stream
        self._gap_s = gap_s
        self._ends_at = ends_at
        self._arrived: list[T] = []
        self._is_news = asyncio.Event()
        self._gathering: asyncio.Task[None] | None = None
        self._ending: asyncio.TimerHandle | None = None
        self._is_first = True

    def __aiter__(self) -> Bursts[T]:
        return self

    async def __anext__(self) -> list[T]:
        gathering = self._gathering or self._start()
        if not self._is_first and not gathering.done():
            await asyncio.wait((gathering,), timeout=self._gap_s)
        self._is_first = False
        while not self._arrived and not gathering.done():
            self._is_news.clear()
            await self._is_news.wait()
        if self._arrived:
            burst, self._arrived = self._arrived, []
            return burst
        if not gathering.cancelled():
            await gathering
        raise StopAsyncIteration

    async def aclose(self) -> None:
        if self._ending is not None:
            self._ending.cancel()
        if self._gathering is not None:
            self._gathering.cancel()
            await asyncio.gather(self._gathering, return_exceptions=True)

    def _start(self) -> asyncio.Task[None]:
        self._gathering = asyncio.create_task(self._gather())
        self._gathering.add_done_callback(lambda _: self._is_news.set())
        if self._ends_at is not None:
            left_s = max(0.0, self._ends_at - time.monotonic())
            self._ending = asyncio.get_running_loop().call_later(left_s, self._gathering.cancel)
        return self._gathering

    async def _gather(self) -> None:
        async with aclosing(self._stream) as items:  # type: ignore[type-var]
            async for item in items:
                self._arrived.append(item)
                self._is_news.set()
