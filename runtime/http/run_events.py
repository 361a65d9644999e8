"""What happens in the runs that answer a request, as it happens."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import cast

from runtime.agent.loop import Progress
from runtime.http.admission import Run, admitted
from runtime.http.parts import Parts
from runtime.http.schemas import ChatCompletionRequest
from runtime.store.episodes import Step

Happening = tuple[int, Progress | Step]
"""A choice's number, and what happened in its run."""
Happenings = AsyncGenerator[Happening, None]


async def open_runs(
    parts: Parts, body: ChatCompletionRequest, episode_id: str | None, previous: Step | None = None
) -> tuple[list[Run], Happenings]:
    """A request's runs, and what happens in them. The adapter's lease lasts until the iterator has ended.

    `previous` is the step that the conversation continues; None: the conversation itself tells. Raises what
    `admitted` raises.
    """
    opened = _opened(parts, body, episode_id, previous)
    return cast(list[Run], await anext(opened)), cast(Happenings, opened)


async def _opened(
    parts: Parts, body: ChatCompletionRequest, episode_id: str | None, previous: Step | None
) -> AsyncGenerator[list[Run] | Happening, None]:
    """First the runs, then what happens in them."""
    async with admitted(parts, body, episode_id, previous) as runs:
        yield runs
        async with aclosing(_merged(parts, runs) if len(runs) > 1 else _single(parts, runs[0])) as happenings:
            async for happening in happenings:
                yield happening


async def _single(parts: Parts, run: Run) -> Happenings:
    async with aclosing(run.start(parts)) as happenings:
        async for happening in happenings:
            _count(parts, happening)
            yield 0, happening


async def _merged(parts: Parts, runs: list[Run]) -> Happenings:
    """What happens in several runs, as it arrives."""
    arrivals: asyncio.Queue[Happening | Exception | None] = asyncio.Queue()
    tasks = [asyncio.create_task(_follow(parts, number, run, arrivals)) for number, run in enumerate(runs)]
    try:
        for _ in tasks:
            while (arrival := await arrivals.get()) is not None:
                if isinstance(arrival, Exception):
                    raise arrival
                yield arrival
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _follow(parts: Parts, number: int, run: Run, arrivals: asyncio.Queue[Happening | Exception | None]) -> None:
    """Put what happens in one of several runs on their common queue; None ends it."""
    try:
        async with aclosing(run.start(parts)) as happenings:
            async for happening in happenings:
                _count(parts, happening)
                arrivals.put_nowait((number, happening))
    except Exception as error:
        arrivals.put_nowait(error)
    arrivals.put_nowait(None)


def _count(parts: Parts, happening: Progress | Step) -> None:
    if isinstance(happening, Step):
        parts.metrics.count_step(happening)
