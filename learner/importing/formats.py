"""Tells a record's format and reads it as turns: messages in OpenAI's form, each with whether it is to be learned.

What is read:
- OpenAI fine-tuning: `messages`, `tools`, and `weight` 0 or 1 by message; also the older `functions`, `function_call`.
- ShareGPT and ETO: `conversations` of `from` and `value`, `tools` and `system` beside them. The text of a
  `function_call` is JSON, a call or a list of calls; Hermes's `<tool_call>` tags in the assistant's text are calls too.
- AgentGym: the same, with `item_id` and `loss` by message.
- LangChain: a list of `messages_to_dict` or `dumpd`, on its own or as `messages`.
- TRL preferences: `prompt`, `chosen`, `rejected`, as messages or plain text; the chosen side is the demonstration.

What is not: actions written out as text (ReAct's Thought and Action lines) stay text, an answer and not a tool call,
because every data set writes them its own way; and images and sound are refused. The whole checking of a conversation
is done elsewhere, once for all formats.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import orjson

from policies.types import Message


class SourceFormat(StrEnum):
    """How a demonstration was written down."""

    OPENAI = "openai"  # `messages` of `role` and `content`
    SHAREGPT = "sharegpt"  # `conversations` of `from` and `value`; ETO's too
    AGENTGYM = "agentgym"  # the same with `item_id`, and `loss` by message
    LANGCHAIN = "langchain"  # messages_to_dict, dumpd
    PREFERENCE = "preference"  # TRL's `prompt`, `chosen`, `rejected`


class RefusedRecord(ValueError):
    """A record that is no demonstration; its text says why, in plain words."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One message, in OpenAI's form but not yet checked."""

    message: Message
    is_learned: bool = True
    """Of use for the assistant's messages alone."""


@dataclass(frozen=True, slots=True)
class Draft:
    """A record as its format says it, before its conversation is checked."""

    format: SourceFormat
    turns: list[Turn]
    tools: Any = None
    """As it came: a list, the JSON text of one, or None."""
    item_id: str | None = None
    rejected: list[Turn] | None = None
    """The whole conversation that was not chosen."""


def read_draft(record: Any) -> Draft:
    """Read one JSON value. Raises RefusedRecord where it is of no known format."""
    if isinstance(record, list):
        record = {"messages": record}
    if not isinstance(record, dict):
        raise RefusedRecord(f"it is {_kind(record)}, not a JSON object")
    if "chosen" in record:
        return _read_preference(record)
    if "messages" in record:
        return _read_openai(record)
    if "conversations" in record:
        return _read_sharegpt(record)
    keys = ", ".join(map(repr, list(record)[:8])) or "none"
    raise RefusedRecord(f"no known format: it has no messages, conversations or chosen; its keys are {keys}")


def is_message(value: Any) -> bool:
    """Whether a JSON value is one message of a conversation, and not a record of its own."""
    return isinstance(value, dict) and ("role" in value or "from" in value or _is_langchain(value))


# ------------------------------------------------------------------------------------------------- formats


def _read_openai(record: dict[str, Any]) -> Draft:
    messages = record["messages"]
    is_langchain = isinstance(messages, list) and any(_is_langchain(message) for message in messages)
    return Draft(
        format=SourceFormat.LANGCHAIN if is_langchain else SourceFormat.OPENAI,
        turns=_read_turns(messages, "messages"),
        tools=record.get("tools") or record.get("functions"),
        item_id=_item_id(record),
    )


def _read_sharegpt(record: dict[str, Any]) -> Draft:
    turns = _read_turns(record["conversations"], "conversations")
    if record.get("system"):
        turns.insert(0, Turn({"role": "system", "content": record["system"]}))
    return Draft(
        format=SourceFormat.AGENTGYM if "item_id" in record else SourceFormat.SHAREGPT,
        turns=turns,
        tools=record.get("tools"),
        item_id=_item_id(record),
    )


def _read_preference(record: dict[str, Any]) -> Draft:
    prompt = _read_side(record["prompt"], "prompt", role="user") if record.get("prompt") else []
    if isinstance(record["chosen"], str) and not prompt:
        raise RefusedRecord("chosen is plain text without a prompt: nothing tells where the answer begins")
    chosen = _with_prompt(prompt, _read_side(record["chosen"], "chosen", role="assistant"))
    rejected = None
    if record.get("rejected"):
        rejected = _with_prompt(prompt, _read_side(record["rejected"], "rejected", role="assistant"))
        if rejected == chosen:
            raise RefusedRecord("chosen and rejected are the same")
    # Without a prompt of its own, TRL takes what both sides begin with for it.
    num_shared = len(prompt) or _num_equal(chosen, rejected or [])
    return Draft(
        format=SourceFormat.PREFERENCE,
        turns=[Turn(turn.message, turn.is_learned and number >= num_shared) for number, turn in enumerate(chosen)],
        tools=record.get("tools"),
        item_id=_item_id(record),
        rejected=rejected,
    )


def _read_side(side: Any, name: str, role: str) -> list[Turn]:
    return [Turn({"role": role, "content": side})] if isinstance(side, str) else _read_turns(side, name)


def _with_prompt(prompt: list[Turn], side: list[Turn]) -> list[Turn]:
    """Some data sets repeat the prompt in each side, some do not."""
    return side if _num_equal(prompt, side) == len(prompt) else [*prompt, *side]


def _num_equal(left: list[Turn], right: list[Turn]) -> int:
    """How many turns two conversations share from their beginning on."""
    pairs = zip(left, right, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a.message != b.message), min(len(left), len(right)))


def _item_id(record: dict[str, Any]) -> str | None:
    """What the data set calls the record."""
    found = next((record[key] for key in ("item_id", "id", "prompt_id") if record.get(key) is not None), None)
    return str(found) if isinstance(found, str | int) else None


# --------------------------------------------------------------------------------------------------- turns


def _read_turns(messages: Any, name: str) -> list[Turn]:
    if not isinstance(messages, list):
        raise RefusedRecord(f"{name} is {_kind(messages)}, not a list")
    if not messages:
        raise RefusedRecord(f"{name} is empty")
    if any(_is_langchain(message) for message in messages):
        messages = _from_langchain(messages)
    return [turn for number, message in enumerate(messages, 1) for turn in _read_message(message, number)]


def _read_message(message: Any, number: int) -> Iterator[Turn]:
    if not isinstance(message, dict):
        raise RefusedRecord(f"message {number} is {_kind(message)}, not an object")
    if "from" in message:
        yield from _read_sharegpt_message(message, number)
    elif "role" in message:
        yield _read_openai_message(message, number)
    else:
        raise RefusedRecord(f"message {number} has no role")


def _is_learned(message: dict[str, Any], number: int) -> bool:
    """OpenAI's `weight` is 0 or 1, AgentGym's `loss` true or false; null and nothing say nothing."""
    for key in ("weight", "loss"):
        value = message.get(key)
        if value is not None and value not in (0, 1):
            raise RefusedRecord(f"message {number}: {key} must be 0 or 1, not {value!r}")
        if value is not None and not value:
            return False
    return True


def _read_openai_message(message: dict[str, Any], number: int) -> Turn:
    if message.get("function_call"):
        message = {**message, "tool_calls": [{"type": "function", "function": message["function_call"]}]}
    return Turn(message, _is_learned(message, number))


_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
_HERMES_CALL = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)
_HERMES_RESULT = re.compile(r"<tool_response>\s*(.*?)\s*</tool_response>", re.DOTALL)


def _read_sharegpt_message(message: dict[str, Any], number: int) -> Iterator[Turn]:
    speaker, text = message["from"], message.get("value")
    role = _SHAREGPT_ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        raise RefusedRecord(f"message {number} is from {speaker!r}; known are {', '.join(_SHAREGPT_ROLES)}")
    if not isinstance(text, str):
        raise RefusedRecord(f"message {number} has {_kind(text)} as its value, not text")
    is_learned = _is_learned(message, number)
    if speaker == "function_call":
        yield Turn({"role": role, "content": "", "tool_calls": _read_calls(text, number)}, is_learned)
    elif role == "assistant" and (tagged := _HERMES_CALL.findall(text)):
        calls = [call for written in tagged for call in _read_calls(written, number)]
        yield Turn({"role": role, "content": _HERMES_CALL.sub("", text), "tool_calls": calls}, is_learned)
    else:
        results = (_HERMES_RESULT.findall(text) if role == "tool" else []) or [text]
        yield from (Turn({"role": role, "content": result}, is_learned) for result in results)


def _read_calls(text: str, number: int) -> list[dict[str, Any]]:
    try:
        calls = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise RefusedRecord(f"message {number}: the call is not JSON: {error}") from error
    return [{"type": "function", "function": call} for call in (calls if isinstance(calls, list) else [calls])]


# ----------------------------------------------------------------------------------------------- LangChain


def _is_langchain(message: Any) -> bool:
    return isinstance(message, dict) and ("lc" in message or ("type" in message and "data" in message))


def _from_langchain(dumps: list[Any]) -> list[Message]:
    # Imported late: only few files need it, and it takes half a second.
    from langchain_core.load import load
    from langchain_core.messages import AIMessage, BaseMessage, convert_to_openai_messages, messages_from_dict

    messages: list[Message] = []
    for number, dump in enumerate(dumps, 1):
        if not _is_langchain(dump):
            raise RefusedRecord(f"message {number} is no LangChain message, but others are")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # `load` is in beta and says so each time
                loaded = load(dump, allowed_objects="messages") if "lc" in dump else messages_from_dict([dump])[0]
            converted = convert_to_openai_messages([loaded]) if isinstance(loaded, BaseMessage) else []
        except Exception as error:  # pydantic, KeyError, TypeError, NotImplementedError: as the dump may have it
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise RefusedRecord(f"message {number} is refused by LangChain: {reason}") from error
        if isinstance(loaded, AIMessage) and loaded.invalid_tool_calls:
            raise RefusedRecord(f"message {number} has a tool call that LangChain could not read")
        messages.extend(converted)
    return messages


def _kind(value: Any) -> str:
    """What a JSON value is, in words."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
