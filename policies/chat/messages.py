"""Actions as messages, and messages as actions: pure functions on OpenAI's form of a conversation."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from policies.types import Action, FinalAnswer, MalformedAction, Message, ToolCall, ToolCalls

ARGUMENT_KEYS = ("arguments", "parameters")
"""What models and clients name the arguments of a call: OpenAI's word, and Llama's."""

MAX_DEPTH = 100
"""Of objects and lists within each other. Schemas and metadata need ten or so; a few hundred cannot be written into the
log, a thousand overflow Python's stack."""

_BESIDE_ARGUMENTS = {"name", "id", "type", "index", "description", "strict"}
"""What may stand in a call beside its arguments, and says nothing of them."""


def action_message(action: Action) -> Message:
    """An action as the assistant message that it adds to its conversation."""
    match action:
        case ToolCalls(calls, text, reasoning):
            message: Message = {"role": "assistant", "content": text, "tool_calls": [_call_entry(c) for c in calls]}
        case FinalAnswer(text, reasoning):
            message = {"role": "assistant", "content": text}
        case MalformedAction(text, _):
            return {"role": "assistant", "content": text}
    if reasoning:
        message["reasoning_content"] = reasoning
    return message


def message_action(message: Message) -> ToolCalls | FinalAnswer:
    """The action that an assistant message is. Raises ValueError for a call that cannot be read."""
    reasoning = message.get("reasoning_content") or ""
    calls = message.get("tool_calls") or []
    if not calls:
        return FinalAnswer(text_of(message), reasoning)
    return ToolCalls(tuple(tool_call_of(call, n) for n, call in enumerate(calls)), text_of(message), reasoning)


def text_of(message: Message) -> str:
    """A message's text, whether it came as a string, as content parts, or not at all."""
    content = message.get("content")
    if isinstance(content, list):
        return "".join(part.get("text", "") for part in content if isinstance(part, dict))
    return content or ""


def is_deeper(value: Any, depth: int = MAX_DEPTH) -> bool:
    """Whether objects and lists are nested more than so deep."""
    level = [value]
    for _ in range(depth + 1):
        if not level:
            break
        lists = (each.values() if isinstance(each, dict) else each for each in level if isinstance(each, dict | list))
        level = [inner for each in lists for inner in each]
    return bool(level)


def _call_entry(call: ToolCall) -> dict[str, Any]:
    arguments = json.dumps(call.arguments, ensure_ascii=False)
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": arguments}}


def tool_call_of(entry: Any, number: int, needs_arguments: Mapping[str, bool] | None = None) -> ToolCall:
    """A call in OpenAI's form, checked. Raises ValueError in words that a policy can act on.

    A call without arguments is one with none. But where `needs_arguments` is given, only of a tool that it has as
    False: what a policy left out must not look as if it had meant to.
    """
    function = entry.get("function") if isinstance(entry, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(function, dict) or not isinstance(name, str) or not name or not name.isprintable():
        raise ValueError(f"tool call {number + 1} has no name")
    arguments = _written_arguments(function, name)
    if arguments is None:
        if needs_arguments is not None and needs_arguments.get(name, True):
            raise ValueError(f"the call of {name} has no arguments")
        arguments = {}
    if not isinstance(arguments, dict):
        raise ValueError(f"the arguments of {name} must be a JSON object, not {type(arguments).__name__}")
    if not _is_sound(arguments):
        raise ValueError(f"the arguments of {name} hold NaN, infinity, half a character, or are nested too deeply")
    return ToolCall(str(entry.get("id") or ""), name, arguments)


def _written_arguments(function: dict[str, Any], name: str) -> Any:
    """The arguments as an object, where they are one, also where they came as its JSON text; None: there are none."""
    keys = [key for key in ARGUMENT_KEYS if key in function]
    if len(keys) > 1:
        raise ValueError(f"the call of {name} has `arguments` and `parameters`: one of them is enough")
    if not keys:
        if others := sorted(str(key) for key in function.keys() - _BESIDE_ARGUMENTS):
            raise ValueError(f"the call of {name} has no `arguments`, but `{others[0]}`")
        return None
    arguments = function[keys[0]]
    if arguments is None:
        raise ValueError(f"the arguments of {name} must be a JSON object, not NoneType")
    if not isinstance(arguments, str):
        return arguments
    try:
        return json.loads(arguments) if arguments.strip() else None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the arguments of {name} are not JSON: {error}") from error


def _is_sound(arguments: dict[str, Any]) -> bool:
    """Whether they can be logged, sent and rendered: Python's JSON reader lets more through than JSON text can hold."""
    try:
        json.dumps(arguments, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError):
        return False
    return not is_deeper(arguments)
