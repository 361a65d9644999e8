"""POST /v1/chat/completions: admit, run, and write the answer, whole or as a stream of server-sent events."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from openai.types.chat import ChatCompletion

from runtime.agent.loop import Progress
from runtime.http.admission import Run
from runtime.http.chat_answer import Answer, Choice, step_summary
from runtime.http.errors import ApiError, as_api_error
from runtime.http.parts import Parts
from runtime.http.run_events import Happening, Happenings, open_runs
from runtime.http.schemas import EPISODE_ID, ChatCompletionRequest
from runtime.http.sse import EventStream, event, json_answer, until_gone
from runtime.http.strict_json import StrictJsonRoute
from runtime.store.episodes import Step

EPISODE_HEADER = {
    "name": "x-episode-id",
    "in": "header",
    "required": False,
    "description": "Continue or begin this episode; without it the conversation itself tells.",
    "schema": {"type": "string", "pattern": EPISODE_ID},
}
"""Documented by hand and read by hand: FastAPI's own way of reading a header is a tenth of a small request."""

_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {
        "model": ChatCompletion,
        "description": "The answer, or where `stream` was asked for its chunks as server-sent events.",
        "content": {"text/event-stream": {}},
    }
}


def chat_routes(parts: Parts) -> APIRouter:
    router = APIRouter(route_class=StrictJsonRoute)

    @router.post("/v1/chat/completions", responses=_ANSWERS, openapi_extra={"parameters": [EPISODE_HEADER]})
    async def create_chat_completion(body: ChatCompletionRequest, request: Request) -> Response:
        """Answer a conversation. Every step behind the answer is in the log before its last byte leaves."""
        runs, happenings = await open_runs(parts, body, asked_episode(request))
        choices = [Choice(index, parts.protocol, body.logprobs) for index in range(len(runs))]
        answer = Answer(body.model, choices, runs[0].turn.step_id)
        if not body.stream:
            await until_gone(request.receive, _gather(answer, happenings))
            return json_answer(answer.whole(), episode_headers(runs, choices[0].steps[-1].id))
        # The first happening is awaited here, so that what fails at once fails with its own status and not in a stream.
        first = await until_gone(request.receive, anext(happenings))
        wants_usage = body.stream_options is not None and body.stream_options.include_usage
        events = _events(answer, first, happenings, wants_usage)
        return EventStream(events, episode_headers(runs, runs[0].turn.step_id))

    return router


def asked_episode(request: Request) -> str | None:
    """The episode that a request's header names. Raises ApiError for what is no episode's id."""
    episode_id = request.headers.get("x-episode-id")
    if episode_id is not None and not re.fullmatch(EPISODE_ID, episode_id):
        raise ApiError(400, f"x-episode-id: {episode_id!r} does not match {EPISODE_ID}", None, "x-episode-id")
    return episode_id


async def _gather(answer: Answer, happenings: Happenings) -> None:
    async with aclosing(happenings):
        async for number, happening in happenings:
            answer.choices[number].add(happening)


async def _events(answer: Answer, first: Happening, rest: Happenings, wants_usage: bool) -> AsyncGenerator[bytes, None]:
    """The stream's body. What is known at one time leaves in one piece: each costs a system call on both sides."""
    piece = event(answer.opening()) + _chunks(answer, *first)
    async with aclosing(rest):
        try:
            while not answer.is_complete:
                yield piece
                piece = _chunks(answer, *await anext(rest))
        except Exception as error:  # the status line is gone; the client's library raises for an error event
            yield event(as_api_error(error).body)
            return
    if wants_usage:
        piece += event(answer.chunk([], usage=answer.usage()))
    yield piece + b"data: [DONE]\n\n"


def _chunks(answer: Answer, number: int, happening: Progress | Step) -> bytes:
    chunks = [answer.chunk([entry]) for entry in answer.choices[number].add(happening)]
    if isinstance(happening, Step):
        chunks[-1]["stepagent"] = {"step": step_summary(happening)}
    return b"".join(map(event, chunks))


def episode_headers(runs: list[Run], step_id: str) -> dict[str, str]:
    return {
        "x-episode-id": runs[0].turn.episode.id,
        "x-step-id": step_id,
        "x-adapter": runs[0].policy.adapter_name,
    }
