"""POST /v1/chat/completions: admit, run, and write the answer, whole or as a stream of server-sent events."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

from fastapi import APIRouter, Request
from fastapi.responses import Response
from openai.types.chat import ChatCompletion

from runtime.agent.loop import Run, RunEvent, StepTaken
from runtime.agent.scorers import ChosenBy
from runtime.http.admission import Caller, addressed, admit
from runtime.http.best_of import BY_HEADER, NUM_HEADER, asked_in_headers
from runtime.http.chat_answer import ChatAnswer, Choice, step_summary
from runtime.http.errors import ApiError, as_api_error
from runtime.http.keys import asking_key
from runtime.http.parts import Parts
from runtime.http.run_events import RunEvents
from runtime.http.schemas import EPISODE_ID, ChatCompletionRequest
from runtime.http.sse import EventStream, json_answer, sse_event, until_gone
from runtime.http.strict_json import router_at
from runtime.store.episodes import Fact, Step

TOOLS_OF = ("server", "client")
SYSTEM_OF = ("agent", "client")

CALLERS_HEADERS = [
    {
        "name": "x-episode-id",
        "in": "header",
        "required": False,
        "description": "Continue or begin this episode; without it the conversation itself tells.",
        "schema": {"type": "string", "pattern": EPISODE_ID},
    },
    {
        "name": "x-stepagent-tools",
        "in": "header",
        "required": False,
        "description": "Whose tools a request without `tools` gets: the server's, run by the server, or none.",
        "schema": {"type": "string", "enum": list(TOOLS_OF)},
    },
    {
        "name": "x-stepagent-system",
        "in": "header",
        "required": False,
        "description": "Whose system prompt a request without one gets: the agent's, or none.",
        "schema": {"type": "string", "enum": list(SYSTEM_OF)},
    },
    {
        "name": NUM_HEADER,
        "in": "header",
        "required": False,
        "description": "So many actions are drawn at each step and one is chosen; the answer is told after the choice.",
        "schema": {"type": "integer", "minimum": 1, "maximum": 999_999},
    },
    {
        "name": BY_HEADER,
        "in": "header",
        "required": False,
        "description": "What chooses; `auto`: the reward model beside the adapter, else the mean logprob.",
        "schema": {"type": "string", "enum": list(ChosenBy)},
    },
]
"""Documented by hand and read by hand: FastAPI's own way of reading a header is a tenth of a small request."""

_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {
        "model": ChatCompletion,
        "description": "The answer, or where `stream` was asked for its chunks as server-sent events.",
        "content": {"text/event-stream": {}},
    }
}


class Answer(Protocol):
    """An answer in some wire form, gathered as it happens."""

    def add(self, event: RunEvent) -> object: ...


def chat_routes(parts: Parts) -> APIRouter:
    router = router_at("")

    @router.post("/v1/chat/completions", responses=_ANSWERS, openapi_extra={"parameters": CALLERS_HEADERS})
    async def create_chat_completion(body: ChatCompletionRequest, request: Request) -> Response:
        """Answer a conversation. Every step behind the answer is in the log before its last byte leaves."""
        runs, events = await until_gone(request.receive, open_runs(parts, body, caller_of(request)))
        choices = [Choice(index, parts.protocol, body.logprobs, body.functions is not None) for index in range(body.n)]
        answer = ChatAnswer(body.model, choices, runs[0].turn.step_id)
        if not body.stream:
            await until_gone(request.receive, gather(answer, events))
            return json_answer(answer.whole(), headers_of(runs, choices[0].steps[-1].id, body.warnings))
        # The first event is awaited here, so that what fails at once fails with its own status and not in a stream.
        first = await until_gone(request.receive, events.first())
        wants_usage = body.stream_options is not None and body.stream_options.include_usage
        stream = _stream(answer, first, events, wants_usage)
        return EventStream(stream, events, headers_of(runs, runs[0].turn.step_id, body.warnings))

    return router


def caller_of(request: Request) -> Caller:
    """Who asks, and what its headers say. Raises ApiError for a header that says nothing that is known."""
    episode_id = request.headers.get("x-episode-id")
    if episode_id is not None and not re.fullmatch(EPISODE_ID, episode_id):
        raise ApiError(400, f"x-episode-id: {episode_id!r} does not match {EPISODE_ID}", None, "x-episode-id")
    tools = _one_of(request, "x-stepagent-tools", TOOLS_OF)
    system = _one_of(request, "x-stepagent-system", SYSTEM_OF)
    return Caller(asking_key(request), episode_id, tools, system, asked_in_headers(request.headers))


def _one_of(request: Request, header: str, known: Sequence[str]) -> str | None:
    """A header's value; None where it is not sent. Raises ApiError for any other than those known."""
    said = request.headers.get(header)
    if said is not None and said not in known:
        raise ApiError(400, f"{header}: {said!r} is not one of {', '.join(known)}", None, header)
    return said


async def open_runs(
    parts: Parts,
    body: ChatCompletionRequest,
    caller: Caller,
    previous: Step | None = None,
    beside: Callable[[Run], tuple[Fact, ...]] = lambda run: (),
) -> tuple[list[Run], RunEvents]:
    """A request's runs, and their events, which hold the adapter's lease until they are closed. Raises as `addressed`
    and `admit`.

    `beside` says what is logged together with a run's last step.
    """
    to = addressed(parts, body, caller)
    async with AsyncExitStack() as lease:
        await lease.enter_async_context(parts.load.place(caller.key, body.n * to.choosing.num_draws))
        used = partial(parts.load.usage_of, caller.key)
        admitted = await admit(parts, to, caller, lease, previous)
        runs = [replace(run, beside=beside(run), beside_each=used) for run in admitted]
        return runs, RunEvents(parts, runs, lease.pop_all(), caller.key)


async def gather(answer: Answer, events: RunEvents) -> None:
    """Take all events into an answer that is sent whole."""
    async with aclosing(events):
        async for event in events:
            answer.add(event)


async def _stream(
    answer: ChatAnswer, first: RunEvent, rest: RunEvents, wants_usage: bool
) -> AsyncGenerator[bytes, None]:
    """The stream's body. What is known at one time leaves in one piece: each costs a system call on both sides."""
    piece = sse_event(answer.opening()) + _chunks(answer, first)
    try:
        while not answer.is_complete:
            yield piece
            piece = _chunks(answer, await anext(rest))
    except Exception as error:  # the status line is gone; the client's library raises for an error event
        yield sse_event(as_api_error(error).body)
        return
    if wants_usage:
        piece += sse_event(answer.chunk([], usage=answer.usage()))
    yield piece + b"data: [DONE]\n\n"


def _chunks(answer: ChatAnswer, event: RunEvent) -> bytes:
    chunks = [answer.chunk([entry]) for entry in answer.add(event)]
    if isinstance(event, StepTaken):
        chunks[-1]["stepagent"] = {"step": step_summary(event.step)}
    return b"".join(map(sse_event, chunks))


def headers_of(runs: list[Run], step_id: str, warnings: Sequence[str] = ()) -> dict[str, str]:
    headers = {
        "x-episode-id": runs[0].turn.episode.id,
        "x-step-id": step_id,
        "x-adapter": runs[0].policy.adapter_name,
    }
    if warnings:
        headers["x-stepagent-warning"] = ascii("; ".join(warnings))[1:-1][:1000]
    return headers
