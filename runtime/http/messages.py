"""/v1/messages: the same agent in Anthropic's form."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from runtime.agent.loop import RunEvent
from runtime.http.admission import prompt_length
from runtime.http.chat import CALLERS_HEADERS, caller_of, gather, headers_of, open_runs
from runtime.http.errors import ANTHROPIC_ERROR_RESPONSES, MESSAGES, anthropic_error, as_api_error
from runtime.http.messages_answer import MessageAnswer
from runtime.http.messages_schemas import CountRequest, MessagesRequest
from runtime.http.parts import Parts
from runtime.http.run_events import RunEvents
from runtime.http.sse import EventStream, json_answer, sse_event, until_gone
from runtime.http.strict_json import made_of_body, router_at

_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The message, or where `stream` was asked for its events as server-sent events.",
        "content": {"application/json": {}, "text/event-stream": {}},
    }
}


def message_routes(parts: Parts) -> APIRouter:
    router = router_at(MESSAGES, errors=ANTHROPIC_ERROR_RESPONSES)

    @router.post("", responses=_ANSWERS, openapi_extra={"parameters": CALLERS_HEADERS})
    async def create_message(body: MessagesRequest, request: Request) -> Response:
        """Answer a conversation. Every step behind the answer is in the log before its last byte leaves."""
        chat = await made_of_body(request, False, body.as_chat)
        runs, events = await until_gone(request.receive, open_runs(parts, chat, caller_of(request)))
        answer = MessageAnswer(body, runs[0].turn.step_id, parts.protocol)
        if not body.stream:
            await until_gone(request.receive, gather(answer, events))
            return json_answer(answer.whole(), headers_of(runs, answer.steps[-1].id, body.warnings))
        # Awaited here, so that what fails at once fails with its own status and not in a stream.
        first = await until_gone(request.receive, events.first())
        headers = headers_of(runs, runs[0].turn.step_id, body.warnings)
        return EventStream(_stream(answer, first, events), events, headers)

    @router.post("/count_tokens")
    async def count_tokens(body: CountRequest, request: Request) -> dict[str, int]:
        """How many tokens the prompt of such a request has."""
        chat = await made_of_body(request, False, body.as_chat)
        return {"input_tokens": await prompt_length(parts, chat, caller_of(request))}

    return router


async def _stream(answer: MessageAnswer, first: RunEvent, rest: RunEvents) -> AsyncGenerator[bytes, None]:
    """The stream's body. What is known at one time leaves in one piece."""
    piece = _written([*answer.opening(), *answer.add(first)])
    try:
        while not answer.is_complete:
            yield piece
            piece = _written(answer.add(await anext(rest)))
    except Exception as error:  # the status line is gone
        yield _written([anthropic_error(as_api_error(error))])
        return
    yield piece


def _written(events: list[dict[str, Any]]) -> bytes:
    return b"".join(sse_event(each, each["type"]) for each in events)
