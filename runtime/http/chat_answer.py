"""Steps and tokens as chat completions: whole, and as the chunks of a stream.

Bodies are plain dicts in the shape of openai's `ChatCompletion` and `ChatCompletionChunk` (the tests hold them to
those types); building the types themselves for every token costs more than the rest of the answer. What OpenAI's form
has no place for stands under one extra key, `stepagent`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from policies.chat_protocol import ChatProtocol, action_message
from policies.types import MalformedAction, SampledToken, ToolCalls
from runtime.agent.loop import RunEvent
from runtime.agent.step import Progress
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

    def __init__(self, index: int, protocol: ChatProtocol, with_logprobs: bool) -> None:
        self.index = index
        self.steps: list[Step] = []
        self._protocol = protocol
        self._with_logprobs = with_logprobs
        self._said = {"content": "", "reasoning_content": ""}
        self._logprobs: list[dict[str, Any]] = []

    @property
    def is_complete(self) -> bool:
        return bool(self.steps) and self.steps[-1].stop_reason is not None

    def add(self, event: RunEvent) -> list[dict[str, Any]]:
        """Take what happened; returns it as the `choices` entries of stream chunks."""
        return self._add_progress(event) if isinstance(event, Progress) else self._add_step(event.step)

    def whole(self) -> dict[str, Any]:
        """The `choices` entry of an answer that is not streamed."""
        message: dict[str, Any] = {"role": "assistant", "content": self._said["content"], "refusal": None}
        if self._said["reasoning_content"]:
            message["reasoning_content"] = self._said["reasoning_content"]
        if calls := self._calls():
            message |= {"tool_calls": calls, "content": message["content"] or None}
        logprobs = {"content": self._logprobs, "refusal": None} if self._with_logprobs else None
        return {"index": self.index, "message": message, "finish_reason": self._finish(), "logprobs": logprobs}

    def _add_progress(self, progress: Progress) -> list[dict[str, Any]]:
        delta: dict[str, Any] = {}
        for piece in progress.deltas:
            key = "content" if piece.kind == "text" else "reasoning_content"
            delta[key] = delta.get(key, "") + piece.text
            self._said[key] += piece.text
        logprobs = self._logprobs_of(progress.tokens)
        self._logprobs.extend(logprobs)
        return [self._entry(delta, None, logprobs)] if delta or logprobs else []

    def _add_step(self, step: Step) -> list[dict[str, Any]]:
        self.steps.append(step)
        calls = [{**call, "index": number} for number, call in enumerate(self._calls())]
        entries = [self._entry({"tool_calls": calls}, None)] if calls else []
        if step.stop_reason is None:
            return [self._entry({}, None)]
        return [*entries, self._entry({}, self._finish())]

    def _calls(self) -> list[dict[str, Any]]:
        """The calls that the client is to run."""
        last = self.steps[-1]
        if last.stop_reason is not StopReason.CLIENT_TOOLS or not isinstance(last.action, ToolCalls):
            return []
        return action_message(last.action)["tool_calls"]

    def _finish(self) -> str:
        reason = self.steps[-1].stop_reason
        assert reason is not None, "a run ends with a reason"
        return _FINISH[reason]

    def _entry(
        self, delta: dict[str, Any], finish: str | None, logprobs: Sequence[dict[str, Any]] = ()
    ) -> dict[str, Any]:
        entry: dict[str, Any] = {"index": self.index, "delta": delta, "finish_reason": finish, "logprobs": None}
        if logprobs:
            entry["logprobs"] = {"content": list(logprobs), "refusal": None}
        return entry

    def _logprobs_of(self, sampled: Sequence[SampledToken]) -> list[dict[str, Any]]:
        if not self._with_logprobs:
            return []
        return [
            self._sampled_logprob(token) for token in sampled if token.token_id not in self._protocol.stop_token_ids
        ]

    def _sampled_logprob(self, sampled: SampledToken) -> dict[str, Any]:
        likeliest = [self._token_logprob(token_id, logprob) for token_id, logprob in sampled.top_logprobs]
        return self._token_logprob(sampled.token_id, sampled.logprob) | {"top_logprobs": likeliest}

    def _token_logprob(self, token_id: int, logprob: float) -> dict[str, Any]:
        text = self._protocol.decode([token_id])
        # JSON has no minus infinity; this is what OpenAI sends for a token of probability zero.
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(text.encode())}


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

    def usage(self) -> dict[str, int]:
        """Tokens of every step that was taken for this answer."""
        steps = [step for choice in self.choices for step in choice.steps]
        prompt = sum(len(step.prompt_token_ids) for step in steps)
        completion = sum(len(step.completion_token_ids) for step in steps)
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


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
