"""POST /v1/chat/completions: admit, run, and write the answer, whole or as a stream of server-sent events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from contextlib import aclosing
from typing import Any, TypeVar, cast

import orjson
from fastapi import APIRouter, Header, Request
from fastapi.responses import Response, StreamingResponse
from openai.types.chat import ChatCompletion

from runtime.admission import Run, admitted
from runtime.agent import Progress
from runtime.answers import Answer, Choice, step_summary
from runtime.parts import Parts
from runtime.routes.bodies import StrictJsonRoute
from runtime.routes.errors import as_api_error
from runtime.types import Step
from runtime.wire import EPISODE_ID, ChatCompletionRequest

T = TypeVar("T")
Happening = tuple[int, Progress | Step]
"""A choice's number, and what happened in its run."""
Happenings = AsyncGenerator[Happening, None]


_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {
        "model": ChatCompletion,
        "description": "The answer, or where `stream` was asked for its chunks as server-sent events.",
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
    }
}


def chat_routes(parts: Parts) -> APIRouter:
    router = APIRouter(route_class=StrictJsonRoute)

    @router.post("/v1/chat/completions", responses=_ANSWERS)
    async def create_chat_completion(
        body: ChatCompletionRequest,
        request: Request,
        x_episode_id: str | None = Header(None, pattern=EPISODE_ID),
    ) -> Response:
        """Answer a conversation. Every step behind the answer is in the log before its last byte leaves."""
        opened = _happenings(parts, body, x_episode_id)
        runs, happenings = cast(list[Run], await anext(opened)), cast(Happenings, opened)
        choices = [Choice(index, parts.protocol, body.logprobs) for index in range(len(runs))]
        answer = Answer(body.model, choices, runs[0].turn.step_id)
        if not body.stream:
            await _until_gone(request, _gather(answer, happenings))
            return _json(answer.whole(), _headers(runs, choices[0].steps[-1].id))
        # The first happening is awaited here, so that what fails at once fails with its own status and not in a stream.
        first = await anext(happenings)
        wants_usage = body.stream_options is not None and body.stream_options.include_usage
        events = _events(answer, first, happenings, wants_usage)
        return StreamingResponse(events, media_type="text/event-stream", headers=_headers(runs, runs[0].turn.step_id))

    return router


async def _happenings(
    parts: Parts, body: ChatCompletionRequest, episode_id: str | None
) -> AsyncGenerator[list[Run] | Happening, None]:
    """First the runs of a request, then what happens in them. The adapter's lease lasts as long as the iterator."""
    async with admitted(parts, body, episode_id) as runs:
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


async def _gather(answer: Answer, happenings: Happenings) -> None:
    async with aclosing(happenings):
        async for number, happening in happenings:
            answer.choices[number].add(happening)


async def _events(
    answer: Answer,
    first: Happening,
    rest: Happenings,
    wants_usage: bool,
) -> AsyncIterator[bytes]:
    async with aclosing(rest):
        try:
            yield _event(answer.opening())
            for chunk in _chunks(answer, *first):
                yield _event(chunk)
            async for number, happening in rest:
                for chunk in _chunks(answer, number, happening):
                    yield _event(chunk)
        except Exception as error:  # the status line is gone; the client's library raises for an error event
            yield _event(as_api_error(error).body)
            return
    if wants_usage:
        yield _event(answer.chunk([], usage=answer.usage()))
    yield b"data: [DONE]\n\n"


def _chunks(answer: Answer, number: int, happening: Progress | Step) -> list[dict[str, Any]]:
    entries = answer.choices[number].add(happening)
    chunks = [answer.chunk([entry]) for entry in entries]
    if isinstance(happening, Step):
        chunks[-1]["stepagent"] = {"step": step_summary(happening)}
    return chunks


async def _until_gone(request: Request, work: Awaitable[T]) -> T:
    """Await the work, but cancel it where the client hangs up: nobody would read the answer."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
    finally:
        gone.cancel()
        if not task.done():
            task.cancel()
    return await task


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _headers(runs: list[Run], step_id: str) -> dict[str, str]:
    return {
        "x-episode-id": runs[0].turn.episode.id,
        "x-step-id": step_id,
        "x-adapter": runs[0].policy.adapter_name,
    }


def _json(body: dict[str, Any], headers: dict[str, str]) -> Response:
    return Response(orjson.dumps(body), media_type="application/json", headers=headers)


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(body) + b"\n\n"
