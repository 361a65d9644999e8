"""What happens in the runs of one request, as it happens; it holds the adapter's lease until it is closed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, aclosing

from runtime.agent.loop import Run, RunEvent, StepTaken
from runtime.http.parts import Parts
from runtime.store.keys import Key


class RunEvents:
    """Iterate it, then close it: closing ends what still runs and gives the lease back. May be closed twice.

    An object and not a generator: one that nobody has begun to iterate would give nothing back when it is closed.
    """

    def __init__(self, parts: Parts, runs: Sequence[Run], lease: AsyncExitStack, key: Key) -> None:
        self._metrics = parts.metrics
        self._load = parts.load
        self._key = key
        self._agent = runs[0].turn.episode.agent
        self._cutting = parts.cutting
        self._lease = lease
        streams = [run.events(parts.log, parts.limits) for run in runs]
        self._stream = streams[0] if len(streams) == 1 else _Merged(streams)

    def __aiter__(self) -> RunEvents:
        return self

    async def __anext__(self) -> RunEvent:
        event = await self._cutting.next_of(self._stream)
        if isinstance(event, StepTaken):
            num_beside = sum(len(each.completion_token_ids) for each in event.candidates if not each.is_chosen)
            self._metrics.count_step(event.step, self._agent, num_beside)
            self._metrics.count_unjudged(event.is_unjudged, self._agent)
            self._load.count(self._key, event.step, num_beside)
        return event

    async def first(self) -> RunEvent:
        """The first event. Where it fails or is cancelled, all is closed."""
        try:
            return await anext(self)
        except BaseException:
            await self.aclose()
            raise

    async def aclose(self) -> None:
        try:
            await self._stream.aclose()
        finally:
            await self._lease.aclose()


class _Merged:
    """The events of several runs, as they arrive."""

    def __init__(self, streams: Sequence[AsyncGenerator[RunEvent, None]]) -> None:
        self._streams = streams
        self._arrivals: asyncio.Queue[RunEvent | Exception | None] = asyncio.Queue()
        self._tasks: list[asyncio.Task[None]] = []
        self._num_running = len(streams)

    def __aiter__(self) -> _Merged:
        return self

    async def __anext__(self) -> RunEvent:
        if not self._tasks:
            self._tasks = [asyncio.create_task(self._follow(stream)) for stream in self._streams]
        while self._num_running:
            arrival = await self._arrivals.get()
            if isinstance(arrival, Exception):
                raise arrival
            if arrival is not None:
                return arrival
            self._num_running -= 1
        raise StopAsyncIteration

    async def aclose(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _follow(self, stream: AsyncGenerator[RunEvent, None]) -> None:
        """Put the events of one run on the common queue; None ends it."""
        try:
            async with aclosing(stream) as events:
                async for event in events:
                    self._arrivals.put_nowait(event)
        except Exception as error:
            self._arrivals.put_nowait(error)
        self._arrivals.put_nowait(None)
