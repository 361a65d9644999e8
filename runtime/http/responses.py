"""/v1/responses: the same agent in OpenAI's newer form, for text and function calls."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Collection
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response
from openai.types.responses import Response as ResponseBody

from policies.chat.messages import action_message
from policies.types import Message, ToolCalls
from runtime.agent.conversation import history_of
from runtime.agent.loop import Run, RunEvent
from runtime.http.admission import FEW_MESSAGES, prompt_length
from runtime.http.chat import CALLERS_HEADERS, caller_of, gather, headers_of, open_runs
from runtime.http.errors import ApiError, as_api_error
from runtime.http.keys import asking_key
from runtime.http.parts import Parts
from runtime.http.responses_answer import ResponseAnswer, echo_of, replayed, response_id, said_in
from runtime.http.responses_schemas import ResponsesRequest
from runtime.http.run_events import RunEvents
from runtime.http.schemas import ChatCompletionRequest
from runtime.http.sse import EventStream, json_answer, sse_event, until_gone
from runtime.http.strict_json import made_of_body, router_at
from runtime.off_loop import off_loop
from runtime.store.episodes import Episode, ResponseDeletion, ResponseRecord, Step
from runtime.store.keys import Key
from runtime.store.step_log import Mark, Whose

_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {
        "model": ResponseBody,
        "description": "The response, or where `stream` was asked for its events as server-sent events.",
        "content": {"text/event-stream": {}},
    }
}


def response_routes(parts: Parts) -> APIRouter:
    router = router_at("/v1/responses")
    background = Background()
    if parts.erasing is not None:
        parts.erasing.on_erased.append(background.forget)

    @router.post("", responses=_ANSWERS, openapi_extra={"parameters": CALLERS_HEADERS})
    async def create_response(body: ResponsesRequest, request: Request) -> Response:
        """Answer an input. Every step behind the answer is in the log before its last byte leaves."""
        runs, events, answer = await until_gone(request.receive, open_response(parts, body, request))
        if body.background:
            background.start(answer, events, runs[0].turn.episode)
            return json_answer(answer.whole(), headers_of(runs, runs[0].turn.step_id, body.warnings))
        if not body.stream:
            await until_gone(request.receive, gather(answer, events))
            return json_answer(answer.whole(), headers_of(runs, answer.steps[-1].id, body.warnings))
        # Awaited here, so that what fails at once fails with its own status and not in a stream.
        first = await until_gone(request.receive, events.first())
        headers = headers_of(runs, runs[0].turn.step_id, body.warnings)
        return EventStream(_stream(answer, first, events), events, headers)

    @router.post("/input_tokens")
    async def count_input_tokens(body: ResponsesRequest, request: Request) -> dict[str, Any]:
        """How many tokens the prompt of such a request has."""
        chat, previous = await made_of_body(request, True, _as_chat, parts, body, asking_key(request))
        length = await prompt_length(parts, chat, caller_of(request), previous)
        return {"object": "response.input_tokens", "input_tokens": length}

    @router.get("/{response_id}", responses=_ANSWERS)
    async def read_response(
        response_id: str,
        request: Request,
        stream: bool = False,
        starting_after: Annotated[int, Query(ge=-1, lt=2**63)] = -1,
    ) -> Response:
        """A stored response; as a stream, its events again, those after `starting_after`."""
        if (running := background.answer(response_id, asking_key(request))) is not None:
            return json_answer(running.whole(), {})
        record, steps = _stored(parts, response_id, asking_key(request))
        asked = ResponsesRequest.model_validate(record.request)
        events, answer = await off_loop(True, replayed, parts.protocol, asked, steps)
        if not stream:
            return json_answer(answer.whole(), {})
        body = _written([event for event in events if event["sequence_number"] > starting_after])
        return Response(body, media_type="text/event-stream")

    @router.delete("/{response_id}")
    async def delete_response(response_id: str, request: Request) -> dict[str, Any]:
        """It can no longer be retrieved or continued. Its steps stay in the log."""
        _stored(parts, response_id, asking_key(request))
        await parts.log.commit(ResponseDeletion(response_id))
        return {"id": response_id, "object": "response", "deleted": True}

    @router.post("/{response_id}/cancel", responses=_ANSWERS)
    async def cancel_response(response_id: str, request: Request) -> Response:
        """End a background response. What was not answered by then is not logged."""
        if (answer := await background.cancel(response_id, asking_key(request))) is not None:
            return json_answer(answer.whole() | {"status": "cancelled"}, {})
        _stored(parts, response_id, asking_key(request))
        raise ApiError(400, "only a background response that still runs can be cancelled", None, "response_id")

    @router.get("/{response_id}/input_items")
    async def list_input_items(
        response_id: str,
        request: Request,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        order: Annotated[str, Query(pattern="^(asc|desc)$")] = "desc",
        after: str | None = None,
    ) -> dict[str, Any]:
        """What the response was given as `input`, in pages; the newest first, unless `order` is `asc`."""
        record, _ = _stored(parts, response_id, asking_key(request))
        items = _input_items(record)
        items = items if order == "asc" else items[::-1]
        ids = [item["id"] for item in items]
        begin = ids.index(after) + 1 if after in ids else 0
        page = items[begin : begin + limit]
        edges = {"first_id": page[0]["id"], "last_id": page[-1]["id"]} if page else {"first_id": None, "last_id": None}
        return {"object": "list", "data": page, "has_more": begin + limit < len(items), **edges}

    return router


async def open_response(
    parts: Parts, body: ResponsesRequest, request: Request
) -> tuple[list[Run], RunEvents, ResponseAnswer]:
    """The run of a request, its events, and the answer that gathers them. Raises as `admit`."""
    caller = caller_of(request)
    chat, previous = await made_of_body(request, _is_slow(body), _as_chat, parts, body, caller.key)
    logged = await made_of_body(request, False, _logged_request, body) if body.store else None
    echo = await made_of_body(request, False, echo_of, body)
    runs, events = await open_runs(parts, chat, caller, previous, lambda run: _record(run, logged))
    return runs, events, ResponseAnswer(body, echo, runs[0].turn.step_id, parts.protocol, runs[0].turn.sampling)


def _is_slow(body: ResponsesRequest) -> bool:
    """Whether it may need more of the log than others should wait for."""
    return body.previous_response_id is not None or len(body.input) > 10 * FEW_MESSAGES


def _as_chat(parts: Parts, body: ResponsesRequest, key: Key) -> tuple[ChatCompletionRequest, Step | None]:
    """The request as a chat completion, and the logged step that it continues by name."""
    item_of = _items_of(parts, key)
    if body.previous_response_id is None:
        return body.as_chat((), item_of), None
    try:
        record, steps = _stored(parts, body.previous_response_id, key)
    except ApiError:
        message = (
            f"there is no response {body.previous_response_id!r} that was stored and answered to its end; "
            "send the conversation as input"
        )
        raise ApiError(400, message, "previous_response_not_found", "previous_response_id") from None
    history = _without_prompt(parts, steps[-1], history_of(parts.log.path_to(steps[-1].id)))
    return body.as_chat(history, item_of, record.request.get("instructions")), steps[-1]


def _without_prompt(parts: Parts, step: Step, history: tuple[Message, ...]) -> tuple[Message, ...]:
    """A logged conversation as its client has it: the agent that goes on is told its own prompt."""
    episode = parts.log.episode(step.episode_id)
    agent = parts.agent(episode.agent) if episode else None
    return agent.untold(history) if agent else history


def _logged_request(body: ResponsesRequest) -> dict[str, Any]:
    return body.model_dump(mode="json", by_alias=True, exclude_none=True, exclude={"stream", "warnings"})


def _record(run: Run, request: dict[str, Any] | None) -> tuple[ResponseRecord, ...]:
    """What is logged of a response beside its steps; None: it is not stored."""
    if request is None:
        return ()
    step_id = run.turn.step_id
    return (ResponseRecord(response_id(step_id), run.turn.episode.id, step_id, request),)


def _stored(parts: Parts, name: str, key: Key) -> tuple[ResponseRecord, list[Step]]:
    """A stored response and its steps. Raises ApiError (404) for one that is not there, or is another key's."""
    record = parts.log.response(name)
    episode = None if record is None else parts.log.episode(record.episode_id)
    if record is None or episode is None or not key.sees(episode.owner):
        raise ApiError(404, f"there is no response {name!r}: it was not stored, or was deleted", "response_not_found")
    return record, parts.log.run_from(record.step_id)


def _items_of(parts: Parts, key: Key) -> Callable[[str], Message]:
    """Finds the message behind an output item of an earlier response. What it raises names the item."""

    def item_of(item_id: str) -> Message:
        kind, _, name = item_id.partition("_")
        if kind in ("msg", "rs"):
            steps = parts.log.run_from(name)
        else:
            found = parts.log.marked_steps(Mark.CALL, [name], Whose(is_anybodys=True))
            steps = [step for each in found[:1] if (step := parts.log.step(each.step_id))]
        episode = parts.log.episode(steps[0].episode_id) if steps else None
        if episode is None or not key.sees(episode.owner):
            raise ValueError(f"input: there is no item {item_id!r} of an earlier response; send the item itself")
        return _message_of(kind, name, steps)

    return item_of


def _message_of(kind: str, name: str, steps: list[Step]) -> Message:
    """The part of a response's message that an item is: its text, its thought, or one call."""
    action = steps[-1].action
    if kind == "msg":
        return {"role": "assistant", "content": said_in(steps)}
    if kind == "rs":
        return {"role": "assistant", "content": "", "reasoning_content": getattr(action, "reasoning", "")}
    calls = action_message(action)["tool_calls"] if isinstance(action, ToolCalls) else []
    return {"role": "assistant", "content": "", "tool_calls": [call for call in calls if call["id"] == name]}


def _input_items(record: ResponseRecord) -> list[dict[str, Any]]:
    given = record.request["input"]
    items = [{"role": "user", "content": given}] if isinstance(given, str) else given
    return [_shown_item(item, f"{record.step_id}_{number}") for number, item in enumerate(items)]


def _shown_item(item: dict[str, Any], name: str) -> dict[str, Any]:
    if item.get("type", "message") != "message":
        return {"id": f"item_{name}", "status": "completed", **item}
    kind = "output_text" if item["role"] == "assistant" else "input_text"
    content = item["content"] if isinstance(item["content"], list) else [{"type": kind, "text": item["content"]}]
    shown = [part | ({"annotations": []} if part["type"] == "output_text" else {}) for part in content]
    return {"id": f"msg_{name}", "type": "message", "status": "completed", "role": item["role"], "content": shown}


class Background:
    """Responses whose clients do not wait. They live as long as the server; a key reaches its own only."""

    def __init__(self) -> None:
        self._running: dict[str, tuple[asyncio.Task[None], ResponseAnswer, Episode]] = {}

    def start(self, answer: ResponseAnswer, events: RunEvents, episode: Episode) -> None:
        task = asyncio.create_task(self._run(answer, events))
        self._running[answer.id] = (task, answer, episode)

    def answer(self, response_id: str, key: Key) -> ResponseAnswer | None:
        """One that still runs, or failed; None for every other."""
        if (running := self._running.get(response_id)) is None:
            return None
        _, answer, episode = running
        return answer if key.sees(episode.owner) else None

    async def cancel(self, response_id: str, key: Key) -> ResponseAnswer | None:
        if self.answer(response_id, key) is None:
            return None
        task, answer, _ = self._running.pop(response_id)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return answer

    def forget(self, episode_ids: Collection[str]) -> None:
        """End those of erased episodes, and keep nothing of the failed ones."""
        erased = set(episode_ids)
        for task, answer, episode in list(self._running.values()):
            if episode.id in erased:
                task.cancel()
                del self._running[answer.id]

    async def _run(self, answer: ResponseAnswer, events: RunEvents) -> None:
        try:
            await gather(answer, events)
        except Exception as error:  # told to whoever retrieves it
            answer.fail(as_api_error(error).error)
        else:
            self._running.pop(answer.id, None)


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
