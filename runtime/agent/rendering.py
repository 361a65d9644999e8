"""A turn's prompt in tokens: made beside the event loop where it is long, refused early where it is far too long."""

from __future__ import annotations

from collections.abc import Iterable

import orjson

from policies.chat.chat_protocol import ChatProtocol, text_of
from policies.types import EngineLimits, Message, TokenIds, ToolSchema
from runtime.agent.step import ContextFull
from runtime.agent.turn import Policy, Turn
from runtime.off_loop import off_loop

SMALL_LETTERS = 2000
"""Of a conversation that is rendered on the event loop: about a millisecond."""
MANY_MESSAGES = 100
SMALL_TOOLS_BYTES = 8000
"""Of tools' schemas that are rendered on the event loop."""
_PIECE = 16 * 1024
_LETTERS_PER_TOKEN = 16
"""A conversation with fewer for each place in the context is rendered, and then said to be too long if it is."""


def num_letters(messages: Iterable[Message]) -> int:
    """What a conversation says, roughly: enough to tell a large one."""
    return sum(len(message.get("content") or "") + 100 * len(message.get("tool_calls") or ()) for message in messages)


async def rendered(turn: Turn, policy: Policy, is_first: bool = True) -> TokenIds:
    """The turn's prompt. `is_first`: nothing was done yet that a refusal would lose. Raises ContextFull where it is far
    longer than the context, and ChatProtocolError."""
    # Many messages are large by their number: going through them all would take its time here.
    many = len(turn.messages) > MANY_MESSAGES
    letters = await off_loop(many, num_letters, turn.messages) + 200 * len(turn.messages)
    is_large = letters > SMALL_LETTERS or are_large(turn.tools)
    return await off_loop(is_large, _render, turn, policy, letters if is_first else 0)


def are_large(tools: Iterable[ToolSchema]) -> bool:
    """Whether tools take their time to be read and rendered: such requests leave the event loop."""
    num_bytes = 0
    for tool in tools:
        num_bytes += len(orjson.dumps(tool))
        if num_bytes > SMALL_TOOLS_BYTES:
            return True
    return False


def _render(turn: Turn, policy: Policy, letters: int) -> TokenIds:
    limits = policy.engine.limits
    if letters > limits.max_context_tokens * _LETTERS_PER_TOKEN:
        _require_not_far_too_long(turn.messages, policy.protocol, limits)
    return turn.prompt(policy.protocol)


def _require_not_far_too_long(messages: Iterable[Message], protocol: ChatProtocol, limits: EngineLimits) -> None:
    """Count tokens until there are too many: of what templates keep, whatever else they drop (an answer's thinking)."""
    num_tokens = 0
    for message in messages:
        text = "" if message["role"] == "assistant" else text_of(message)
        for start in range(0, len(text), _PIECE):
            num_tokens += len(protocol.encode(text[start : start + _PIECE]))
            if num_tokens > limits.max_context_tokens:
                raise ContextFull(
                    f"the conversation is more than {num_tokens} tokens long and {limits.context}; shorten it"
                )
