"""Recognises a conversation: which logged step a request continues, and all that was said before it.

A client sends its whole conversation each time. Its longest beginning that ends with a logged answer is where the
request goes on; an unknown one begins an episode. The log's own version of the history is the one that counts: it
also holds the calls and results of tools that the server ran, which the client never saw.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import orjson

from policies.chat_protocol import action_message, text_of
from policies.types import Action, MalformedAction, Message
from runtime.store.episodes import Step, ToolResult
from runtime.store.step_log import StepLog


@dataclass(frozen=True, slots=True)
class Place:
    """Where a request stands in the log."""

    path: tuple[Step, ...]
    """The logged steps it continues, first to last; empty for a new conversation."""
    history: tuple[Message, ...]
    """The conversation of that path, up to and including its last action."""
    new_messages: tuple[Message, ...]
    """What the client added."""


def locate(log: StepLog, messages: Sequence[Message], episode_id: str | None) -> Place:
    """The longest logged beginning of a conversation, in the named episode if one is named."""
    digests = digests_of(messages)
    # Equal conversations in other episodes are newer, perhaps: a named episode is searched by itself, oldest first.
    named = None if episode_id is None else {step.conversation_digest: step for step in log.steps(episode_id)}
    for length in range(len(messages), 0, -1):
        if messages[length - 1]["role"] != "assistant":
            continue
        digest = digests[length - 1]
        if step := log.find_step(digest) if named is None else named.get(digest):
            path = tuple(log.path_to(step.id))
            return Place(path, history_of(path), tuple(messages[length:]))
    return Place((), (), tuple(messages))


def continued(log: StepLog, messages: Sequence[Message], previous: Step) -> Place:
    """The place right after a logged step; the conversation begins with that step's whole history."""
    path = tuple(log.path_to(previous.id))
    history = history_of(path)
    return Place(path, history, tuple(messages[len(history) :]))


def messages_after(action: Action, tool_results: Sequence[ToolResult]) -> tuple[Message, ...]:
    """What the server itself tells the policy after an action: tool results, or what was wrong with the action."""
    if isinstance(action, MalformedAction):
        advice = f"Your last message could not be read as an action: {action.problem}. Try again."
        return ({"role": "user", "content": advice},)
    return tuple({"role": "tool", "tool_call_id": r.tool_call_id, "content": r.content} for r in tool_results)


def history_of(path: Sequence[Step]) -> tuple[Message, ...]:
    """The whole conversation behind a path of logged steps, up to and including the last action."""
    return tuple(message for step in path for message in (*step.new_messages, action_message(step.action)))


def digests_of(messages: Sequence[Message]) -> list[str]:
    """One digest for each beginning of a conversation: the k-th covers messages[: k + 1].

    Covers what a client sends back unchanged: roles, texts, tool calls with their ids, and nothing of formatting.
    """
    digests, chain = [], hashlib.sha256()
    for message in messages:
        chain.update(orjson.dumps(_essence(message), option=orjson.OPT_SORT_KEYS) + b"\n")
        digests.append(chain.copy().hexdigest())
    return digests


def _essence(message: Message) -> list[object]:
    calls = [
        [call.get("id"), call["function"]["name"], _canonical(call["function"].get("arguments"))]
        for call in message.get("tool_calls") or []
    ]
    return [message["role"], text_of(message), message.get("tool_call_id"), calls]


def _canonical(arguments: object) -> object:
    try:
        return orjson.loads(arguments) if isinstance(arguments, str) else arguments
    except orjson.JSONDecodeError:
        return arguments
