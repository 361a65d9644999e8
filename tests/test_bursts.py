"""Bursts lose nothing, keep nothing waiting, and end what they were given."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing

import pytest

from runtime.agent.bursts import Bursts


class Stream:
    """Gives numbers with a pause before each, and remembers whether it was closed."""

    def __init__(self, pauses_s: Sequence[float], error: Exception | None = None) -> None:
        self.is_closed = False
        self._pauses_s = pauses_s
        self._error = error

    async def items(self) -> AsyncIterator[int]:
        try:
            for number, pause_s in enumerate(self._pauses_s):
                await asyncio.sleep(pause_s)
                yield number
            if self._error:
                raise self._error
        finally:
            self.is_closed = True


async def test_a_quick_stream_comes_as_its_first_item_and_the_rest() -> None:
    bursts = [burst async for burst in Bursts(Stream([0.0] * 50).items(), gap_s=5.0)]
    assert bursts == [[0], list(range(1, 50))]


async def test_a_quick_stream_that_has_ended_is_not_waited_for() -> None:
    began = time.monotonic()
    assert [burst async for burst in Bursts(Stream([0.0] * 3).items(), gap_s=5.0)] == [[0], [1, 2]]
    assert time.monotonic() - began < 1.0


async def test_a_slow_streams_items_come_one_by_one() -> None:
    assert [burst async for burst in Bursts(Stream([0.03] * 4).items(), gap_s=0.001)] == [[0], [1], [2], [3]]


async def test_an_item_is_held_no_longer_than_the_gap_though_none_follows() -> None:
    bursts = Bursts(Stream([0.0, 0.0, 30.0]).items(), gap_s=0.02)
    async with aclosing(bursts), asyncio.timeout(5):
        assert [await anext(bursts), await anext(bursts)] == [[0], [1]]


async def test_what_a_stream_raises_comes_after_its_items() -> None:
    bursts = Bursts(Stream([0.0] * 5, ValueError("broken")).items(), gap_s=0.01)
    assert [await anext(bursts), await anext(bursts)] == [[0], [1, 2, 3, 4]]
    with pytest.raises(ValueError, match="broken"):
        await anext(bursts)


async def test_an_empty_stream_has_no_burst() -> None:
    assert [burst async for burst in Bursts(Stream([]).items(), gap_s=0.01)] == []


@pytest.mark.parametrize("num_taken", [1, 2])
async def test_whoever_leaves_closes_the_stream(num_taken: int) -> None:
    stream = Stream([0.0] * 10 + [30.0])
    async with aclosing(Bursts(stream.items(), gap_s=0.01)) as bursts:
        for _ in range(num_taken):
            await anext(bursts)
    assert stream.is_closed


async def test_whoever_is_cancelled_while_waiting_closes_the_stream() -> None:
    stream = Stream([30.0])

    async def read() -> None:
        async with aclosing(Bursts(stream.items(), gap_s=0.01)) as bursts:
            await anext(bursts)

    waiting = asyncio.ensure_future(read())
    await asyncio.sleep(0.02)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert stream.is_closed
