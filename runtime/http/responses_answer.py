"""Steps and tokens as an answer of /v1/responses: whole, and as the events of a stream.

Bodies are plain dicts in the shape of openai's `Response` and its stream events, as in `chat_answer`. Calls and
results of tools that the server ran are no output items: nobody is to run them again. They stand under `stepagent`.
"""

from __future__ import annotations

import time
from typing import Any

from policies.chat_protocol import action_message
from policies.types import ToolCalls
from runtime.agent.loop import RunEvent
from runtime.agent.step import Progress
from runtime.http.chat_answer import step_summary
from runtime.http.responses_schemas import ResponsesRequest
from runtime.store.episodes import Step, StopReason

_OUT_OF_ROOM = (StopReason.TOKEN_LIMIT, StopReason.STEP_LIMIT, StopReason.DEADLINE)


def response_id(first_step_id: str) -> str:
    return f"resp_{first_step_id}"


def first_step_id(previous_response_id: str) -> str:
    return previous_response_id.removeprefix("resp_")


class ResponseAnswer:
    """An answer, gathered as it happens."""

    def __init__(self, request: ResponsesRequest, step_id: str) -> None:
        self.steps: list[Step] = []
        self._said = ""
        self._message_id = f"msg_{step_id}"
        self._num_events = 0
        self._head = _echo(request) | {
            "id": response_id(step_id),
            "object": "response",
            "created_at": int(time.time()),
            "error": None,
        }

    @property
    def is_complete(self) -> bool:
        return bool(self.steps) and self.steps[-1].stop_reason is not None

    def add(self, event: RunEvent) -> list[dict[str, Any]]:
        """Take what happened; returns it as stream events."""
        if isinstance(event, Progress):
            return self._say(event.text) if event.text else []
        self.steps.append(event.step)
        return self._closing() if self.is_complete else [self._of_step(event.step)]

    def opening(self) -> list[dict[str, Any]]:
        """The first events."""
        return [self._event(f"response.{kind}", response=self.whole()) for kind in ("created", "in_progress")]

    def failure(self, error: dict[str, Any]) -> dict[str, Any]:
        """The last event of a stream that cannot go on. The client's library raises for its `error`."""
        return self._event("error", message=error["message"], code=error["code"], param=error["param"], error=error)

    def whole(self) -> dict[str, Any]:
        """The response as it stands now."""
        return self._head | {
            "status": self._status(),
            "incomplete_details": {"reason": "max_output_tokens"} if self._status() == "incomplete" else None,
            "output": self._output() if self.is_complete else [],
            "usage": self._usage() if self.is_complete else None,
            "stepagent": {"steps": [step_summary(step) for step in self.steps]},
        }

    def _say(self, text: str) -> list[dict[str, Any]]:
        events = [] if self._said else self._message_opening()
        self._said += text
        return [*events, self._in_text("response.output_text.delta", delta=text, logprobs=[])]

    def _message_opening(self) -> list[dict[str, Any]]:
        item = self._message("in_progress") | {"content": []}
        return [
            self._event("response.output_item.added", output_index=0, item=item),
            self._in_text("response.content_part.added", part=_text_part("")),
        ]

    def _of_step(self, step: Step) -> dict[str, Any]:
        """A step with server-run tools was taken; the response goes on."""
        return self._event("response.in_progress", response=self.whole()) | {"stepagent": {"step": step_summary(step)}}

    def _closing(self) -> list[dict[str, Any]]:
        events = []
        for index, item in enumerate(self._output()):
            if item["type"] == "message":
                events += [] if self._said else self._message_opening()
                events += self._message_closing(item)
            else:
                events += self._call(index, item)
        return [*events, self._event(f"response.{self._status()}", response=self.whole())]

    def _message_closing(self, item: dict[str, Any]) -> list[dict[str, Any]]:
        return [
            self._in_text("response.output_text.done", text=self._said, logprobs=[]),
            self._in_text("response.content_part.done", part=_text_part(self._said)),
            self._event("response.output_item.done", output_index=0, item=item),
        ]

    def _call(self, index: int, item: dict[str, Any]) -> list[dict[str, Any]]:
        """A call comes in one piece: it can be read only once it is complete."""
        place = {"output_index": index, "item_id": item["id"]}
        begun = item | {"arguments": "", "status": "in_progress"}
        kind = "response.function_call_arguments"
        return [
            self._event("response.output_item.added", output_index=index, item=begun),
            self._event(f"{kind}.delta", **place, delta=item["arguments"]),
            self._event(f"{kind}.done", **place, name=item["name"], arguments=item["arguments"]),
            self._event("response.output_item.done", output_index=index, item=item),
        ]

    def _in_text(self, kind: str, **more: Any) -> dict[str, Any]:
        return self._event(kind, item_id=self._message_id, output_index=0, content_index=0, **more)

    def _event(self, kind: str, **more: Any) -> dict[str, Any]:
        self._num_events += 1
        return {"type": kind, "sequence_number": self._num_events - 1, **more}

    def _status(self) -> str:
        if not self.is_complete:
            return "in_progress"
        return "incomplete" if self.steps[-1].stop_reason in _OUT_OF_ROOM else "completed"

    def _output(self) -> list[dict[str, Any]]:
        calls = self._calls()
        return [*([self._message(self._status())] if self._said or not calls else []), *calls]

    def _message(self, status: str) -> dict[str, Any]:
        content = [_text_part(self._said)]
        return {
            "type": "message",
            "id": self._message_id,
            "role": "assistant",
            "status": status,
            "content": content,
        }

    def _calls(self) -> list[dict[str, Any]]:
        """The calls that the client is to run."""
        last = self.steps[-1]
        if last.stop_reason is not StopReason.CLIENT_TOOLS or not isinstance(last.action, ToolCalls):
            return []
        return [
            {
                "type": "function_call",
                "id": f"fc_{call['id']}",
                "call_id": call["id"],
                "status": "completed",
                **call["function"],
            }
            for call in action_message(last.action)["tool_calls"]
        ]

    def _usage(self) -> dict[str, Any]:
        """Tokens of every step that was taken for this answer."""
        prompt = sum(len(step.prompt_token_ids) for step in self.steps)
        completion = sum(len(step.completion_token_ids) for step in self.steps)
        return {
            "input_tokens": prompt,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": completion,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": prompt + completion,
        }


def _text_part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _echo(request: ResponsesRequest) -> dict[str, Any]:
    """What a response repeats of its request."""
    asked = request.model_dump(
        mode="json",
        by_alias=True,
        include={
            "model", "instructions", "previous_response_id", "temperature", "top_p", "max_output_tokens", "text",
        },
    )  # fmt: skip
    choice = request.tool_choice
    return asked | {
        "text": {"format": _shown_format(request)},
        "tools": [tool.model_dump() | {"strict": bool(tool.strict)} for tool in request.tools or ()],
        "tool_choice": "auto" if choice is None else choice if isinstance(choice, str) else choice.model_dump(),
        "metadata": {key: str(value) for key, value in request.metadata.model_dump(exclude_none=True).items()},
        "parallel_tool_calls": True,
        "truncation": "disabled",
        "store": True,
    }


def _shown_format(request: ResponsesRequest) -> dict[str, Any]:
    wanted = request.text.format
    if wanted.type != "json_schema":
        return {"type": wanted.type}
    return {"type": wanted.type, "name": wanted.name, "schema": wanted.json_schema}
