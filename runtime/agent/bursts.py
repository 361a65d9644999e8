"""A stream's items in bursts: what a quick stream gives within a few milliseconds is handed on together.

Reading, parsing, writing and sending cost much the same for one token as for ten. The first item is handed on at once
and the last ones when the stream ends, so that nobody waits longer for an answer. Refused: one item after another as
they come, which spends more on a quick engine's tokens than the engine does.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import TypeVar

T = TypeVar("T")


async def in_bursts(
    stream: AsyncIterator[T], gap_s: float, ends_at: float | None = None
) -> AsyncGenerator[list[T], None]:
    """The stream's items in order, in lists that are never empty and come at least `gap_s` apart, the last one aside.

    At `ends_at`, a time.monotonic() value, it ends with what has come by then. Raises what the stream raises, after the
    items before. Closing this iterator closes the stream.
    """
    arrived: list[T] = []
    is_news = asyncio.Event()

    async def gather() -> None:
        async with aclosing(stream) as items:  # type: ignore[type-var]
            async for item in items:
                arrived.append(item)
                is_news.set()

    gathering = asyncio.create_task(gather())
    gathering.add_done_callback(lambda _: is_news.set())
    left_s = None if ends_at is None else max(0.0, ends_at - time.monotonic())
    ending = None if left_s is None else asyncio.get_running_loop().call_later(left_s, gathering.cancel)
    try:
        while not gathering.done():
            await is_news.wait()
            is_news.clear()
            if arrived:
                burst = arrived.copy()
                arrived.clear()
                yield burst
            if not gathering.done():
                await asyncio.wait((gathering,), timeout=gap_s)
        if arrived:
            yield arrived
        if not gathering.cancelled():
            await gathering
    finally:
        if ending is not None:
            ending.cancel()
        gathering.cancel()
        await asyncio.gather(gathering, return_exceptions=True)
