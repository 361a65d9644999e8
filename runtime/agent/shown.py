"""What a client has been shown of one step whose tools it runs."""

from __future__ import annotations

from typing import Any

from policies.chat.chat_protocol import CallDelta, action_message
from policies.types import Action, Message, ToolCalls
from runtime.agent.conversation import LEGACY_CALL_ID
from runtime.agent.step import Progress


class Shown:
    """Text, thoughts and calls as far as they were told; an answer that is sent whole is gathered so, too."""

    def __init__(self) -> None:
        self.text = ""
        self.reasoning = ""
        self.calls: dict[int, dict[str, str]] = {}
        """By index: id, name, and the arguments' JSON text."""

    def add(self, progress: Progress) -> Progress:
        for delta in progress.deltas:
            if isinstance(delta, CallDelta):
                call = self.calls.setdefault(delta.index, {"id": delta.id, "name": "", "arguments": ""})
                call["name"] += delta.name
                call["arguments"] += delta.arguments_piece
            elif delta.kind == "text":
                self.text += delta.text
            else:
                self.reasoning += delta.text
        return progress

    def tool_calls(self, action: Action) -> list[dict[str, Any]]:
        """The calls in OpenAI's form: those of the action, or what was told of ones that could not be read."""
        if isinstance(action, ToolCalls):
            return action_message(action)["tool_calls"]
        return [
            {"id": call["id"], "type": "function", "function": {"name": call["name"], "arguments": call["arguments"]}}
            for _, call in sorted(self.calls.items())
        ]

    def message(self, action: Action, shows_call_ids: bool = True) -> Message:
        """The step's answer, as its client will send it back."""
        message: Message = {"role": "assistant", "content": self.text}
        if calls := self.tool_calls(action):
            message["tool_calls"] = calls if shows_call_ids else [{**call, "id": LEGACY_CALL_ID} for call in calls]
        return message
