"""Steps and tokens as chat completions: whole, and as the chunks of a stream.

Bodies are plain dicts in the shape of openai's `ChatCompletion` and `ChatCompletionChunk` (the tests hold them to
those types); building the types themselves for every token costs more than the rest of the answer. What OpenAI's form
has no place for stands under one extra key, `stepagent`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from policies.chat.chat_protocol import CallDelta, ChatProtocol, action_message
from policies.types import MalformedAction
from runtime.agent.loop import RunEvent
from runtime.agent.shown import Shown
from runtime.agent.step import Progress
from runtime.http.logprobs import Logprobs
from runtime.store.episodes import Step, StopReason

_FINISH = {
    StopReason.FINAL_ANSWER: "stop",
    StopReason.MALFORMED: "stop",
    StopReason.CLIENT_TOOLS: "tool_calls",
    StopReason.TOKEN_LIMIT: "length",
    StopReason.STEP_LIMIT: "length",
    StopReason.DEADLINE: "length",
}


class Choice:
    """One choice of an answer, gathered as it happens."""

    def __init__(self, index: int, protocol: ChatProtocol, with_logprobs: bool, is_older_form: bool = False) -> None:
        """`is_older_form`: a call is told as `function_call`."""
        self.index = index
        self.steps: list[Step] = []
        self._is_older_form = is_older_form
        self._protocol = protocol
        self._shown = Shown()
        self._logprobs = Logprobs(protocol) if with_logprobs else None

    @property
    def is_complete(self) -> bool:
        return bool(self.steps) and self.steps[-1].stop_reason is not None

    @property
    def num_hidden_tokens(self) -> int:
        """Sampled tokens that the client does not see: thoughts, and steps whose tools the server ran."""
        return num_hidden_tokens(self.steps, self._protocol)

    def add(self, event: RunEvent) -> list[dict[str, Any]]:
        """Take what happened; returns it as the `choices` entries of stream chunks."""
        return self._add_progress(event) if isinstance(event, Progress) else self._add_step(event.step)

    def whole(self) -> dict[str, Any]:
        """The `choices` entry of an answer that is not streamed."""
        message: dict[str, Any] = {"role": "assistant", "content": self._shown.text, "refusal": None}
        if self._shown.reasoning:
            message["reasoning_content"] = self._shown.reasoning
        if self._shown.calls:  # else the server ran them, as the last of its steps that a limit ended
            calls = self._shown.tool_calls(self.steps[-1].action)
            message |= {"content": message["content"] or None, **self._in_its_form(calls)}
        logprobs = {"content": self._logprobs.told, "refusal": None} if self._logprobs else None
        return {"index": self.index, "message": message, "finish_reason": self._finish(), "logprobs": logprobs}

    def _add_progress(self, progress: Progress) -> list[dict[str, Any]]:
        self._shown.add(progress)
        delta: dict[str, Any] = {}
        for piece in progress.deltas:
            if isinstance(piece, CallDelta):
                delta = _with_call(delta, piece, self._is_older_form)
            else:
                key = "content" if piece.kind == "text" else "reasoning_content"
                delta[key] = delta.get(key, "") + piece.text
        logprobs = self._logprobs.take(progress) if self._logprobs else []
        return [self._entry(delta, None, logprobs)] if delta or logprobs else []

    def _add_step(self, step: Step) -> list[dict[str, Any]]:
        self.steps.append(step)
        if self._logprobs:
            self._logprobs.end_step()
        return [self._entry({}, None if step.stop_reason is None else self._finish())]

    def _in_its_form(self, calls: list[dict[str, Any]]) -> dict[str, Any]:
        return {"function_call": calls[0]["function"]} if self._is_older_form else {"tool_calls": calls}

    def _finish(self) -> str:
        reason = self.steps[-1].stop_reason
        assert reason is not None, "a run ends with a reason"
        if reason is StopReason.MALFORMED and self._shown.calls:
            reason = StopReason.CLIENT_TOOLS  # a call was told that cannot be read: its client finds that out, too
        finish = _FINISH[reason]
        return "function_call" if finish == "tool_calls" and self._is_older_form else finish

    def _entry(
        self, delta: dict[str, Any], finish: str | None, logprobs: Sequence[dict[str, Any]] = ()
    ) -> dict[str, Any]:
        entry: dict[str, Any] = {"index": self.index, "delta": delta, "finish_reason": finish, "logprobs": None}
        if logprobs:
            entry["logprobs"] = {"content": list(logprobs), "refusal": None}
        return entry


def _with_call(delta: dict[str, Any], piece: CallDelta, is_older_form: bool) -> dict[str, Any]:
    """A chunk's delta and a piece of a call: id and name in the first one, arguments in all."""
    function = {"name": piece.name} if piece.name else {}
    function["arguments"] = piece.arguments_piece
    if is_older_form:
        told = delta.get("function_call", {"arguments": ""})
        return delta | {"function_call": {**told, **function, "arguments": told["arguments"] + piece.arguments_piece}}
    opening = {"id": piece.id, "type": "function"} if piece.name else {}
    calls = delta.get("tool_calls", [])
    return delta | {"tool_calls": [*calls, {"index": piece.index, **opening, "function": function}]}


class ChatAnswer:
    """A whole answer: its choices, and what is said of them together."""

    def __init__(self, request_model: str, choices: Sequence[Choice], first_step_id: str) -> None:
        self.choices = list(choices)
        self._head = {"id": f"chatcmpl-{first_step_id}", "created": int(time.time()), "model": request_model}

    @property
    def is_complete(self) -> bool:
        """Every choice has ended."""
        return all(choice.is_complete for choice in self.choices)

    def add(self, event: RunEvent) -> list[dict[str, Any]]:
        """Take what happened; returns it as the `choices` entries of stream chunks."""
        return self.choices[event.choice].add(event)

    def whole(self) -> dict[str, Any]:
        return {
            **self._head,
            "object": "chat.completion",
            "choices": [choice.whole() for choice in self.choices],
            "usage": self.usage(),
            "stepagent": {"choices": [[step_summary(step) for step in choice.steps] for choice in self.choices]},
        }

    def chunk(self, entries: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        return {**self._head, "object": "chat.completion.chunk", "choices": entries, **more}

    def opening(self) -> dict[str, Any]:
        """The first chunk: whose turn it is."""
        delta = {"role": "assistant", "content": ""}
        return self.chunk(
            [{"index": c.index, "delta": delta, "finish_reason": None, "logprobs": None} for c in self.choices]
        )

    def usage(self) -> dict[str, Any]:
        """Tokens of every step that was taken for this answer."""
        steps = [step for choice in self.choices for step in choice.steps]
        prompt = sum(len(step.prompt_token_ids) for step in steps)
        completion = sum(len(step.completion_token_ids) for step in steps)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "completion_tokens_details": {"reasoning_tokens": sum(choice.num_hidden_tokens for choice in self.choices)},
        }


def num_hidden_tokens(steps: Sequence[Step], protocol: ChatProtocol) -> int:
    """Sampled tokens that a client does not see: thoughts, and steps that said nothing while the server ran tools."""
    hidden = 0
    for step in steps:
        if step.stop_reason is None and not getattr(step.action, "text", ""):
            hidden += len(step.completion_token_ids)
        elif reasoning := getattr(step.action, "reasoning", ""):
            hidden += min(len(protocol.encode_plain(reasoning)), len(step.completion_token_ids))
    return hidden


def step_summary(step: Step) -> dict[str, Any]:
    """One step as it is shown to clients, without its tokens."""
    summary: dict[str, Any] = {
        "id": step.id,
        "episode_id": step.episode_id,
        "index": step.index,
        "adapter": step.adapter,
        "action": action_message(step.action),
        "tool_results": [
            {"tool_call_id": r.tool_call_id, "name": r.name, "content": r.content, "is_error": r.is_error}
            for r in step.tool_results
        ],
        "stop_reason": step.stop_reason,
    }
    if isinstance(step.action, MalformedAction):
        summary["problem"] = step.action.problem
    return summary
