"""Conversations as clients hold them: what they rewrite of their history, and what each request really continues.

Each conversation is one agent's work at one client. It knows which logged step its last answer was, so that what the
server made of a request can be held against the truth. Words come from a small vocabulary: many conversations say the
same, as many real ones do.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Message = dict[str, Any]

PLACES = ("shelf", "table", "cellar")
QUESTIONS = (
    "What is there, and how many of them are left for the order that came in this morning?",
    "Which of the three places should I look at first, and what would you expect to find there?",
    "Go on.",
    "Thanks.",
    "Please check once more whether the miniature barometer has been packed for Bruno Wilde.",
)
ANSWERS = (
    "Done.",
    "There is a brass globe, and beside it stands an old barometer that nobody has asked for yet.",
    "I have looked everywhere that you named and found nothing that fits the order.",
    "You are welcome.",
)
SYSTEMS = ("You are a clerk who finds things.", "You sell things.", "Answer briefly.")
LOOK: Any = {
    "type": "function",
    "function": {"name": "look", "parameters": {"type": "object", "properties": {"at": {"type": "string"}}}},
}


@dataclass
class Conversation:
    """One client's side of one conversation."""

    kind: str
    draw: random.Random
    user: str = ""
    system: str = ""
    episode: str | None = None
    """Named by header."""
    told: list[Message] = field(default_factory=list)
    """What was said, without the system message, as the server said it."""
    answers: list[str | None] = field(default_factory=list)
    """Of each request, the step that answered it; None where none is meant to be continued."""
    last: str | None = None
    """The step that the next request continues."""
    num_requests: int = 0
    pending: list[Message] = field(default_factory=list)

    def say(self) -> None:
        """Add what the client says next: results of the calls, or something of the user's."""
        calls = self.told[-1].get("tool_calls") if self.told else None
        if calls:
            found = [f"A globe at {json.loads(call['function']['arguments']).get('at')}." for call in calls]
            self.told += [
                {"role": "tool", "tool_call_id": call["id"], "content": text}
                for call, text in zip(calls, found, strict=True)
            ]
        else:
            self.told.append({"role": "user", "content": self.draw.choice(QUESTIONS)})

    def request(self) -> dict[str, Any]:
        """The next request's body, as its kind of client writes it."""
        self.num_requests += 1
        messages = REWRITES[self.kind](self, [dict(message) for message in self.told])
        body: dict[str, Any] = {"model": "novice", "messages": messages, "tools": [LOOK], "max_tokens": 300}
        if self.kind == "handoff" and self.num_requests > 2:
            body["tools"] = [LOOK, {"type": "function", "function": {"name": "sell"}}]
        return body | ({"user": self.user} if self.user else {})

    def heard(self, answer: Message, step_id: str) -> None:
        self.told.append({name: value for name, value in answer.items() if value is not None})
        self.last = step_id


def _with_system(self: Conversation, messages: list[Message], system: str | None = None) -> list[Message]:
    return [{"role": "system", "content": system or self.system}, *messages]


def _clock(self: Conversation, messages: list[Message]) -> list[Message]:
    return _with_system(self, messages, f"{self.system} It is {self.num_requests} minutes past {id(self) % 24}.")


def _handoff(self: Conversation, messages: list[Message]) -> list[Message]:
    return _with_system(self, messages, self.system if self.num_requests < 3 else "You sell what was found.")


def _as_text(self: Conversation, messages: list[Message]) -> list[Message]:
    """smolagents: calls as the assistant's text, results as the user's."""
    written = list[Message]()
    for message in messages:
        if calls := message.get("tool_calls"):
            text = f"{message.get('content') or ''}\nCalling tools:\n{calls}"
            written.append({"role": "assistant", "content": text})
        elif message["role"] == "tool":
            written.append({"role": "user", "content": f"Observation:\n{message['content']}"})
        else:
            written.append(message)
    return _with_system(self, written)


def _trimmed(self: Conversation, messages: list[Message]) -> list[Message]:
    """The last few messages, from one on that may stand first."""
    kept = messages[-4:]
    while kept and kept[0]["role"] == "tool":
        kept = messages[-len(kept) - 1 :]
    return _with_system(self, kept)


def _compacted(self: Conversation, messages: list[Message]) -> list[Message]:
    if len(messages) <= 5:
        return _with_system(self, messages)
    kept = messages[-3:]
    while kept[0]["role"] == "tool":
        kept = messages[-len(kept) - 1 :]
    summary = {"role": "user", "content": f"So far: {len(messages)} messages were exchanged about an order."}
    return _with_system(self, [summary, *kept])


def _spaced(self: Conversation, messages: list[Message]) -> list[Message]:
    for message in messages:
        if isinstance(message.get("content"), str):
            message["content"] = f" {message['content']}\n\n"
    return _with_system(self, messages)


def _rewrapped(self: Conversation, messages: list[Message]) -> list[Message]:
    for message in messages:
        if isinstance(message.get("content"), str):
            message["content"] = message["content"].replace(" ", "\n")
    return _with_system(self, messages)


def _foreign(self: Conversation, messages: list[Message]) -> list[Message]:
    """It brings a history that another server made."""
    before = [
        {"role": "user", "content": "What do you know of barometers, globes and other brass instruments?"},
        {"role": "assistant", "content": "They measure things, they show things, and they have to be polished often."},
    ]
    return _with_system(self, [*before, *messages])


def _judge(self: Conversation, messages: list[Message]) -> list[Message]:
    """It is shown the transcript of another conversation, ids of calls and all."""
    transcript = json.dumps(self.pending)
    return _with_system(self, [{"role": "user", "content": f"Judge this: {transcript}"}, *messages])


REWRITES: dict[str, Callable[[Conversation, list[Message]], list[Message]]] = {
    "plain": _with_system,
    "clock": _clock,
    "handoff": _handoff,
    "as_text": _as_text,
    "trimmed": _trimmed,
    "compacted": _compacted,
    "spaced": _spaced,
    "rewrapped": _rewrapped,
    "retried": _with_system,
    "branched": _with_system,
    "two_users": _with_system,
    "sub_agents": _with_system,
    "named": _clock,
    "foreign": _foreign,
    "judge": _judge,
}
