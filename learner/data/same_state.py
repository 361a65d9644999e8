"""Which logged states are the same: the same conversation by meaning, with the same tools on offer."""

from __future__ import annotations

import json

from learner.data.collect import LoggedState
from policies.chat.chat_protocol import text_of
from policies.chat.meaning import canonical_json, normal_text
from policies.types import Message


def state_key(state: LoggedState) -> str:
    """One key for conversations that say the same: without the ids of calls, and however texts are spaced."""
    said = [_said(message) for message in state.messages]
    return json.dumps([said, sorted(tool["function"]["name"] for tool in state.step.tools)])


def _said(message: Message) -> list[str]:
    calls = [
        f"{call['function']['name']} {_arguments(call['function']['arguments'])}"
        for call in message.get("tool_calls") or ()
    ]
    return [message["role"], normal_text(text_of(message)), *sorted(calls)]


def _arguments(written: str) -> str:
    try:
        return canonical_json(json.loads(written))
    except (ValueError, RecursionError):
        return str(written)
