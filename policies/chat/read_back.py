"""The one check that an action, written in tokens, is read back as itself.

What is read otherwise teaches what nobody meant: a text with marks of a call in it would teach the call. Imports,
corrections, promotions and what an expert says in a cycle all go through here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from policies.chat.chat_protocol import ChatProtocol
from policies.types import Action, MalformedAction, TokenIds, ToolCalls, ToolSchema


def misreading(protocol: ChatProtocol, completion: TokenIds, action: Action, tools: Sequence[ToolSchema]) -> str | None:
    """What is wrong with an action's tokens, as the end of a sentence about its message; None where they say it.

    Type, calls, text and thinking are compared; of text and thinking not the white space at their ends, which no chat
    template keeps. Text beside calls may be lost whole: some templates have no place for it.
    """
    if any(token_id in protocol.stop_token_ids for token_id in completion[:-1]):
        return "holds the mark that ends a turn in the midst of its text"
    read = protocol.parse(completion, tools=tools)
    if type(read) is not type(action) or _calls_of(read) != _calls_of(action) or not _says_the_same(read, action):
        return (
            "is read back as another action when it is written in the model's own form; its text may hold marks of it"
        )
    return None


def _calls_of(action: Action) -> list[tuple[str, dict[str, Any]]]:
    return [(call.name, call.arguments) for call in action.calls] if isinstance(action, ToolCalls) else []


def _says_the_same(read: Action, action: Action) -> bool:
    if isinstance(read, MalformedAction) or isinstance(action, MalformedAction):
        return False
    is_lost_beside_calls = isinstance(read, ToolCalls) and not read.text
    return (is_lost_beside_calls or read.text.strip() == action.text.strip()) and (
        not read.reasoning or read.reasoning.strip() == action.reasoning.strip()
    )
