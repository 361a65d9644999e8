"""POST /v1/responses: the same agent in OpenAI's newer form, for text and function calls."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from openai.types.responses import Response as ResponseBody

from runtime.agent.conversation import history_of
from runtime.agent.loop import RunEvent
from runtime.http.chat import EPISODE_HEADER, asked_episode, episode_headers, gather, open_runs
from runtime.http.errors import ApiError, as_api_error
from runtime.http.keys import asking_key
from runtime.http.parts import Parts
from runtime.http.responses_answer import ResponseAnswer, first_step_id
from runtime.http.responses_schemas import ResponsesRequest
from runtime.http.run_events import RunEvents
from runtime.http.sse import EventStream, json_answer, sse_event, until_gone
from runtime.http.strict_json import StrictJsonRoute
from runtime.store.episodes import Step
from runtime.store.step_log import StepLog

_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {
        "model": ResponseBody,
        "description": "The response, or where `stream` was asked for its events as server-sent events.",
        "content": {"text/event-stream": {}},
    }
}


def response_routes(parts: Parts) -> APIRouter:
    router = APIRouter(route_class=StrictJsonRoute)

    @router.post("/v1/responses", responses=_ANSWERS, openapi_extra={"parameters": [EPISODE_HEADER]})
    async def create_response(body: ResponsesRequest, request: Request) -> Response:
        """Answer an input. Every step behind the answer is in the log before its last byte leaves."""
        previous = last_step_of(parts.log, body.previous_response_id) if body.previous_response_id else None
        history = history_of(parts.log.path_to(previous.id)) if previous else ()
        runs, events = await open_runs(
            parts, body.as_chat(history), asked_episode(request), asking_key(request), previous
        )
        answer = ResponseAnswer(body, runs[0].turn.step_id)
        if not body.stream:
            await until_gone(request.receive, gather(answer, events))
            return json_answer(answer.whole(), episode_headers(runs, answer.steps[-1].id))
        # Awaited here, so that what fails at once fails with its own status and not in a stream.
        first = await until_gone(request.receive, events.first())
        return EventStream(_stream(answer, first, events), events, episode_headers(runs, runs[0].turn.step_id))

    return router


def last_step_of(log: StepLog, response_id: str) -> Step:
    """The step in which a response ended. Raises ApiError for one that is not known, or was never answered whole."""
    step = log.step(first_step_id(response_id))
    children = {} if step is None else {each.parent_id: each for each in log.steps(step.episode_id)}
    while step is not None and step.stop_reason is None:
        step = children.get(step.id)
    if step is None:
        message = f"there is no response {response_id!r} that was answered to its end; send the conversation as input"
        raise ApiError(400, message, "previous_response_not_found", "previous_response_id")
    return step


async def _stream(answer: ResponseAnswer, first: RunEvent, rest: RunEvents) -> AsyncGenerator[bytes, None]:
    """The stream's body. What is known at one time leaves in one piece."""
    piece = _written([*answer.opening(), *answer.add(first)])
    try:
        while not answer.is_complete:
            yield piece
            piece = _written(answer.add(await anext(rest)))
    except Exception as error:  # the status line is gone
        yield _written([answer.failure(as_api_error(error).error)])
        return
    yield piece


def _written(events: list[dict[str, Any]]) -> bytes:
    return b"".join(sse_event(each, each["type"]) for each in events)
