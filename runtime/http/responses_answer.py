"""Steps and tokens as an answer of /v1/responses: whole, and as the events of a stream.

Bodies are plain dicts in the shape of openai's `Response` and its stream events, as in `chat_answer`. Calls and
results of tools that the server ran are no output items: nobody is to run them again. They stand under `stepagent`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from policies.chat.chat_protocol import CallDelta, ChatProtocol, TextDelta
from policies.chat.messages import action_message
from policies.types import SamplingParams, ToolCalls
from runtime.agent.loop import RunEvent, StepTaken
from runtime.agent.step import Delta, Progress
from runtime.http.chat_answer import num_hidden_tokens, step_summary
from runtime.http.logprobs import Logprobs
from runtime.http.responses_schemas import ResponsesRequest
from runtime.store.episodes import Step, StopReason

EFFORTS = frozenset({"none", "minimal", "low", "medium", "high", "xhigh", "max"})
"""That OpenAI's clients read in an answer. A model's template may know others."""

_OUT_OF_ROOM = (StopReason.TOKEN_LIMIT, StopReason.STEP_LIMIT, StopReason.DEADLINE)


def response_id(first_step_id: str) -> str:
    return f"resp_{first_step_id}"


def echo_of(request: ResponsesRequest) -> dict[str, Any]:
    """What a response repeats of its request. Of thousands of tools it takes too long for the event loop."""
    repeated = {
        "model", "instructions", "previous_response_id", "top_logprobs", "max_output_tokens", "parallel_tool_calls",
        "store", "background", "user", "safety_identifier",
    }  # fmt: skip
    choice, effort = request.tool_choice, request.reasoning.effort
    return request.model_dump(mode="json", by_alias=True, include=repeated) | {
        "text": {"format": _shown_format(request)},
        "tools": [tool.model_dump() for tool in request.tools or ()],
        "tool_choice": "auto" if choice is None else choice if isinstance(choice, str) else choice.model_dump(),
        "metadata": {key: str(value) for key, value in request.metadata.model_dump(exclude_none=True).items()},
        "reasoning": {"effort": effort if effort in EFFORTS else None, "summary": None},
        "truncation": "disabled",
    }


def said_in(steps: Sequence[Step]) -> str:
    """What a run's steps said, as it was shown: an empty line between two of them."""
    return "\n\n".join(text for step in steps if (text := step.action.text))


def replayed(
    protocol: ChatProtocol, request: ResponsesRequest, steps: Sequence[Step]
) -> tuple[list[dict[str, Any]], ResponseAnswer]:
    """The stream's events of a logged response, and its answer."""
    first = steps[0]
    answer = ResponseAnswer(request, echo_of(request), first.id, protocol, first.sampling, first.created_at)
    events = answer.opening()
    for number, step in enumerate(steps):
        deltas = _deltas_of(step, is_first=not said_in(steps[:number]))
        events += answer.add(Progress(0, (), deltas)) + answer.add(StepTaken(0, step))
    return events, answer


def _deltas_of(step: Step, is_first: bool) -> tuple[Delta, ...]:
    deltas: list[Delta] = []
    if reasoning := getattr(step.action, "reasoning", ""):
        deltas.append(TextDelta("reasoning", reasoning))
    if step.action.text:
        deltas.append(TextDelta("text", step.action.text if is_first else f"\n\n{step.action.text}"))
    if isinstance(step.action, ToolCalls) and step.stop_reason is StopReason.CLIENT_TOOLS:
        for index, call in enumerate(action_message(step.action)["tool_calls"]):
            deltas.append(CallDelta(index, call["function"]["name"], call["function"]["arguments"], call["id"]))
    return tuple(deltas)


@dataclass(slots=True)
class OutputItem:
    """One item of the output, as far as it was told."""

    id: str
    kind: str
    """`reasoning`, `message` or `function_call`."""
    index: int
    """Its place in the output."""
    text: str = ""
    """What was said or thought, or a call's arguments."""
    call_id: str = ""
    name: str = ""
    is_open: bool = True

    def shown(self, status: str, logprobs: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
        head = {"type": self.kind, "id": self.id, "status": status}
        match self.kind:
            case "message":
                return {**head, "role": "assistant", "content": [text_part(self.text, logprobs)]}
            case "reasoning":
                return {**head, "summary": [], "content": [{"type": "reasoning_text", "text": self.text}]}
        return {**head, "call_id": self.call_id, "name": self.name, "arguments": self.text}


class ResponseAnswer:
    """An answer, gathered as it happens."""

    def __init__(
        self,
        request: ResponsesRequest,
        echo: dict[str, Any],
        step_id: str,
        protocol: ChatProtocol,
        sampling: SamplingParams,
        created_at: float | None = None,
    ) -> None:
        """`echo` is the request's `echo_of`; `sampling` is how the agent samples for this request: where it says
        nothing, the agent's own way counts."""
        self.id = response_id(step_id)
        self.steps: list[Step] = []
        self._step_id = step_id
        self._protocol = protocol
        self._items: list[OutputItem] = []
        self._logprobs = Logprobs(protocol) if request.wants_logprobs else None
        self._error: dict[str, Any] | None = None
        self._num_events = 0
        self._head = echo | {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "id": self.id,
            "object": "response",
            "created_at": int(created_at or time.time()),
        }

    @property
    def is_complete(self) -> bool:
        return bool(self.steps) and self.steps[-1].stop_reason is not None

    def add(self, event: RunEvent) -> list[dict[str, Any]]:
        """Take what happened; returns it as stream events."""
        if isinstance(event, Progress):
            return self._progress(event)
        self.steps.append(event.step)
        if self._logprobs:
            self._logprobs.end_step()
        return self._closing() if self.is_complete else [self._of_step(event.step)]

    def opening(self) -> list[dict[str, Any]]:
        """The first events."""
        return [self._event(f"response.{kind}", response=self.whole()) for kind in ("created", "in_progress")]

    def failure(self, error: dict[str, Any]) -> dict[str, Any]:
        """The last event of a stream that cannot go on. The client's library raises for its `error`."""
        return self._event("error", message=error["message"], code=error["code"], param=error["param"], error=error)

    def fail(self, error: dict[str, Any]) -> None:
        """A response that nobody waits for cannot go on."""
        self._error = {"code": error["code"] or "server_error", "message": error["message"]}

    def whole(self) -> dict[str, Any]:
        """The response as it stands now."""
        return self._head | {
            "status": self._status(),
            "error": self._error,
            "incomplete_details": {"reason": "max_output_tokens"} if self._status() == "incomplete" else None,
            "output": self._output() if self.is_complete else [],
            "usage": self._usage() if self.is_complete else None,
            "stepagent": {"steps": [step_summary(step) for step in self.steps]},
        }

    # ------------------------------------------------------------------------------------------- as it comes

    def _progress(self, progress: Progress) -> list[dict[str, Any]]:
        logprobs = self._logprobs.take(progress) if self._logprobs else []
        events = []
        for delta in progress.deltas:
            if isinstance(delta, CallDelta):
                events += self._call_piece(delta)
            elif delta.kind == "text":
                events += self._say(delta.text, logprobs)
                logprobs = []
            else:
                events += self._think(delta.text)
        return events

    def _say(self, text: str, logprobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        item = self._item("message")
        events = [] if item else self._close("reasoning")
        if item is None:
            item = self._open("message", f"msg_{self._step_id}")
            events += self._message_opening(item)
        item.text += text
        return [*events, self._in_text(item, "response.output_text.delta", delta=text, logprobs=logprobs)]

    def _message_opening(self, item: OutputItem) -> list[dict[str, Any]]:
        return [
            self._added(item.shown("in_progress") | {"content": []}, item),
            self._in_text(item, "response.content_part.added", part=text_part("")),
        ]

    def _think(self, text: str) -> list[dict[str, Any]]:
        """Thoughts before the first words. Those between steps of the server's are told by `stepagent` alone."""
        item, events = self._item("reasoning"), []
        if (item is None and self._items) or (item is not None and not item.is_open):
            return []
        if item is None:
            item = self._open("reasoning", f"rs_{self._step_id}")
            events = [self._added(item.shown("in_progress") | {"content": []}, item)]
        item.text += text
        return [*events, self._in_text(item, "response.reasoning_text.delta", delta=text)]

    def _call_piece(self, piece: CallDelta) -> list[dict[str, Any]]:
        item = next((each for each in self._items if each.call_id == piece.id), None)
        events: list[dict[str, Any]] = []
        if item is None:
            events += self._close("reasoning", "message", "function_call")
            item = self._open("function_call", f"fc_{piece.id}")
            item.call_id, item.name = piece.id, piece.name
            events.append(self._added(item.shown("in_progress"), item))
        item.text += piece.arguments_piece
        if piece.arguments_piece:
            kind = "response.function_call_arguments.delta"
            events.append(self._event(kind, item_id=item.id, output_index=item.index, delta=piece.arguments_piece))
        return events

    def _of_step(self, step: Step) -> dict[str, Any]:
        """A step with server-run tools was taken; the response goes on."""
        return self._event("response.in_progress", response=self.whole()) | {"stepagent": {"step": step_summary(step)}}

    def _closing(self) -> list[dict[str, Any]]:
        events = []
        if not any(item.kind != "reasoning" for item in self._items):  # an empty answer is an answer, too
            events += self._close("reasoning")
            events += self._message_opening(self._open("message", f"msg_{self._step_id}"))
        events += self._close("reasoning", "message", "function_call")
        return [*events, self._event(f"response.{self._status()}", response=self.whole())]

    def _close(self, *kinds: str) -> list[dict[str, Any]]:
        """The last events of the items of these kinds that are still open. A message stays open for further steps."""
        events = []
        for item in self._items:
            if not item.is_open or item.kind not in kinds:
                continue
            item.is_open = False
            events += self._done(item)
        return events

    def _done(self, item: OutputItem) -> list[dict[str, Any]]:
        events = []
        match item.kind:
            case "message":
                logprobs = self._logprobs.told if self._logprobs else []
                part = text_part(item.text, logprobs)
                events.append(self._in_text(item, "response.output_text.done", text=item.text, logprobs=logprobs))
                events.append(self._in_text(item, "response.content_part.done", part=part))
            case "reasoning":
                events.append(self._in_text(item, "response.reasoning_text.done", text=item.text))
            case "function_call":
                place = {"item_id": item.id, "output_index": item.index, "name": item.name, "arguments": item.text}
                events.append(self._event("response.function_call_arguments.done", **place))
        shown = self._shown(item)
        return [*events, self._event("response.output_item.done", output_index=item.index, item=shown)]

    # ----------------------------------------------------------------------------------------------- pieces

    def _item(self, kind: str) -> OutputItem | None:
        return next((item for item in self._items if item.kind == kind), None)

    def _open(self, kind: str, item_id: str) -> OutputItem:
        item = OutputItem(item_id, kind, len(self._items))
        self._items.append(item)
        return item

    def _added(self, shown: dict[str, Any], item: OutputItem) -> dict[str, Any]:
        return self._event("response.output_item.added", output_index=item.index, item=shown)

    def _in_text(self, item: OutputItem, kind: str, **more: Any) -> dict[str, Any]:
        return self._event(kind, item_id=item.id, output_index=item.index, content_index=0, **more)

    def _event(self, kind: str, **more: Any) -> dict[str, Any]:
        self._num_events += 1
        return {"type": kind, "sequence_number": self._num_events - 1, **more}

    def _status(self) -> str:
        if self._error is not None:
            return "failed"
        if not self.is_complete:
            return "in_progress"
        return "incomplete" if self.steps[-1].stop_reason in _OUT_OF_ROOM else "completed"

    def _output(self) -> list[dict[str, Any]]:
        return [self._shown(item) for item in self._items]

    def _shown(self, item: OutputItem) -> dict[str, Any]:
        is_last = item is self._items[-1]
        status = "incomplete" if is_last and self.is_complete and self._status() == "incomplete" else "completed"
        return item.shown(status, self._logprobs.told if self._logprobs and item.kind == "message" else ())

    def _usage(self) -> dict[str, Any]:
        """Tokens of every step that was taken for this answer."""
        prompt = sum(len(step.prompt_token_ids) for step in self.steps)
        completion = sum(len(step.completion_token_ids) for step in self.steps)
        return {
            "input_tokens": prompt,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": completion,
            "output_tokens_details": {"reasoning_tokens": num_hidden_tokens(self.steps, self._protocol)},
            "total_tokens": prompt + completion,
        }


def text_part(text: str, logprobs: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": list(logprobs)}


def _shown_format(request: ResponsesRequest) -> dict[str, Any]:
    wanted = request.text.format
    if wanted.type != "json_schema":
        return {"type": wanted.type}
    return {"type": wanted.type, "name": wanted.name, "schema": wanted.json_schema}
