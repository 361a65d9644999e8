"""Steps and tokens as an answer of /v1/messages: whole, and as the events of a stream, in Anthropic's form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import orjson

from policies.chat.chat_protocol import CallDelta, ChatProtocol
from policies.types import FinishReason
from runtime.agent.loop import RunEvent
from runtime.agent.step import Progress
from runtime.http.chat_answer import step_summary
from runtime.http.messages_schemas import MessagesRequest
from runtime.store.episodes import Step, StopReason

_STOP = {
    StopReason.FINAL_ANSWER: "end_turn",
    StopReason.MALFORMED: "end_turn",
    StopReason.CLIENT_TOOLS: "tool_use",
    StopReason.TOKEN_LIMIT: "max_tokens",
    StopReason.STEP_LIMIT: "max_tokens",
    StopReason.DEADLINE: "max_tokens",
}

_UNSIGNED = "unsigned"
"""Stands for the signature of a thought: clients send it back, and nobody here checks it."""


@dataclass(slots=True)
class ContentBlock:
    """One block of the content, as far as it was told."""

    kind: str
    """`thinking`, `text` or `tool_use`."""
    index: int
    text: str = ""
    """What was said or thought, or a call's arguments."""
    call_id: str = ""
    name: str = ""
    is_open: bool = True

    def shown(self) -> dict[str, Any]:
        match self.kind:
            case "text":
                return {"type": "text", "text": self.text}
            case "thinking":
                return {"type": "thinking", "thinking": self.text, "signature": _UNSIGNED if self.text else ""}
        return {"type": "tool_use", "id": self.call_id, "name": self.name, "input": _object(self.text)}

    def delta(self, piece: str) -> dict[str, Any]:
        match self.kind:
            case "text":
                return {"type": "text_delta", "text": piece}
            case "thinking":
                return {"type": "thinking_delta", "thinking": piece}
        return {"type": "input_json_delta", "partial_json": piece}


def _object(arguments: str) -> dict[str, Any]:
    """A call's arguments; empty where it was cut off, or cannot be read: this form has no place for half an object."""
    try:
        value = orjson.loads(arguments)
    except orjson.JSONDecodeError:
        return {}
    return value if isinstance(value, dict) else {}


class MessageAnswer:
    """An answer, gathered as it happens."""

    def __init__(self, request: MessagesRequest, step_id: str, protocol: ChatProtocol) -> None:
        self.steps: list[Step] = []
        self._request = request
        self._protocol = protocol
        self._id = f"msg_{step_id}"
        self._blocks: list[ContentBlock] = []

    @property
    def is_complete(self) -> bool:
        return bool(self.steps) and self.steps[-1].stop_reason is not None

    def add(self, event: RunEvent) -> list[dict[str, Any]]:
        """Take what happened; returns it as stream events."""
        if isinstance(event, Progress):
            return self._progress(event)
        self.steps.append(event.step)
        return self._closing() if self.is_complete else [{"type": "ping", "stepagent": step_summary(event.step)}]

    def opening(self) -> list[dict[str, Any]]:
        """The first event."""
        return [{"type": "message_start", "message": self.whole() | {"content": []}}]

    def whole(self) -> dict[str, Any]:
        """The message as it stands now."""
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._request.model,
            "content": [block.shown() for block in self._blocks],
            **self._ending(),
            "usage": self._usage(),
            "stepagent": {"steps": [step_summary(step) for step in self.steps]},
        }

    def _progress(self, progress: Progress) -> list[dict[str, Any]]:
        events = []
        for delta in progress.deltas:
            if isinstance(delta, CallDelta):
                known = next((block for block in self._blocks if block.call_id == delta.id), None)
                events += self._write(known, "tool_use", delta.arguments_piece, delta)
            elif delta.kind == "text":
                events += self._write(self._last_of("text"), "text", delta.text)
            elif self._shows_thinking:
                events += self._write(self._last_of("thinking"), "thinking", delta.text)
        return events

    @property
    def _shows_thinking(self) -> bool:
        """As Anthropic does: to those who asked for it, before anything is said."""
        is_first = all(block.kind == "thinking" for block in self._blocks)
        return self._request.thinking is not None and self._request.thinking.is_enabled and is_first

    def _last_of(self, kind: str) -> ContentBlock | None:
        return self._blocks[-1] if self._blocks and self._blocks[-1].kind == kind else None

    def _write(
        self, block: ContentBlock | None, kind: str, piece: str, call: CallDelta | None = None
    ) -> list[dict[str, Any]]:
        """A piece of a block, which is begun where it is not known; the one before it then ends."""
        events: list[dict[str, Any]] = []
        if block is None:
            events += self._end_last()
            block = ContentBlock(kind, len(self._blocks))
            if call is not None:
                block.call_id, block.name = call.id, call.name
            self._blocks.append(block)
            events.append({"type": "content_block_start", "index": block.index, "content_block": block.shown()})
        block.text += piece
        if piece:
            events.append({"type": "content_block_delta", "index": block.index, "delta": block.delta(piece)})
        return events

    def _end_last(self) -> list[dict[str, Any]]:
        if not self._blocks or not self._blocks[-1].is_open:
            return []
        last = self._blocks[-1]
        last.is_open = False
        signature = {"type": "signature_delta", "signature": _UNSIGNED}
        signed = [{"type": "content_block_delta", "index": last.index, "delta": signature}]
        ended = {"type": "content_block_stop", "index": last.index}
        return [*(signed if last.kind == "thinking" else []), ended]

    def _closing(self) -> list[dict[str, Any]]:
        delta = {"type": "message_delta", "delta": self._ending(), "usage": self._usage()}
        return [*self._end_last(), delta, {"type": "message_stop"}]

    def _ending(self) -> dict[str, Any]:
        if not self.is_complete:
            return {"stop_reason": None, "stop_sequence": None}
        if stop := self._stop_sequence():
            return {"stop_reason": "stop_sequence", "stop_sequence": stop}
        reason = self.steps[-1].stop_reason
        assert reason is not None, "a run ends with a reason"
        if reason is StopReason.MALFORMED and self._blocks and self._blocks[-1].kind == "tool_use":
            reason = StopReason.CLIENT_TOOLS  # a call was told that cannot be read: its client finds that out, too
        return {"stop_reason": _STOP[reason], "stop_sequence": None}

    def _stop_sequence(self) -> str | None:
        """The stop text that ended the answer: the first one in what was sampled."""
        last = self.steps[-1]
        ended_itself = last.completion_token_ids[-1] in self._protocol.stop_token_ids
        if ended_itself or last.finish_reason is FinishReason.LENGTH:
            return None
        written = self._protocol.decode(last.completion_token_ids)
        found = [(at, stop) for stop in self._request.stop_sequences if (at := written.find(stop)) >= 0]
        return min(found)[1] if found else None

    def _usage(self) -> dict[str, Any]:
        """Tokens of every step that was taken for this answer."""
        return {
            "input_tokens": sum(len(step.prompt_token_ids) for step in self.steps),
            "output_tokens": sum(len(step.completion_token_ids) for step in self.steps),
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0,
        }
