"""One message of a conversation, whoever wrote it down: chat APIs, LangChain, ShareGPT, items of OpenAI's responses.

They differ in names alone: the speaker stands under `role`, `from` or `type`, the words under `content`, `parts` or
`value`. So they have one reader, which knows all the names; what it does not know refuses the record.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from learner.importing.contents import read_content, result_text, thought_text
from learner.importing.fields import PART_TYPE_NAMES, THINKING_NAMES, Fields, RefusedRecord, is_empty, is_padding, kind
from learner.importing.marks import close_message
from learner.importing.message_rows import require_oldest_first
from learner.importing.pydantic_ai import as_messages, is_pydantic_ai
from learner.importing.turns import Call, Turn
from learner.importing.written_calls import (
    CALL_ID_NAMES,
    read_call,
    read_calls_text,
    require_no_other_call,
    split_tagged_calls,
    split_thought,
    tagged_results,
)

ROLES = {
    **dict.fromkeys(("system", "developer", "systemmessage", "systemmessagechunk"), "system"),
    **dict.fromkeys(("user", "human", "humanmessage", "humanmessagechunk", "usermessage"), "user"),
    "exit": "user",  # mini-swe-agent's, which says how the run ended, behind its last action
    **dict.fromkeys(
        ("assistant", "ai", "gpt", "model", "chatgpt", "chatbot", "bot", "agent", "aimessage", "aimessagechunk",
         "assistantmessage"),
        "assistant",
    ),
    **dict.fromkeys(
        (
            "tool", "function", "observation", "tool_response", "tool-response", "function_response", "toolresult",
            "tool_result", "ipython", "toolmessage", "toolmessagechunk", "functionmessage", "tool_output",
            "functionexecutionresultmessage",
        ),
        "tool",
    ),
    **dict.fromkeys(("function_call", "tool_call", "tool-call"), "calls"),
}  # fmt: skip
"""Who speaks, by all their names in small letters; `calls` is the assistant whose text is its calls."""
_WORDS = ("content", "value", "text")
_PARTS = ("parts", "content_blocks", "blocks", "items", "contents")
"""The parts of what is said: Gemini's and Vercel's, LangChain's, LlamaIndex's, Semantic Kernel's, Agent Framework's."""
_LANGCHAIN_TYPES = frozenset("human ai system tool function aimessagechunk humanmessagechunk".split())
_ITEM_TYPES = tuple(
    "function_call function_call_output reasoning custom_tool_call custom_tool_call_output local_shell_call "
    "local_shell_call_output computer_call computer_call_output web_search_call file_search_call code_interpreter_call "
    "image_generation_call mcp_call mcp_list_tools mcp_approval_request item_reference compaction handoff_call "
    "handoff_output hosted_tool_call shell_call apply_patch_call ghost_snapshot".split()
)
_HARMLESS = frozenset(
    "name type annotations citations cache_control providerOptions provider_options providerMetadata example "
    "usage_metadata experimental_providerMetadata experimental_attachments metadata response_metadata artifact "
    "tool_call_chunks chunk_position revisionId createdAt source model phase provider_specific_fields stop_details "
    "is_error isError view perf context_management container internal working_start refusal_score prefix "
    "provider_data models_usage content_type author_name message_id ai_model_id encoding additional_properties "
    "raw_representation".split()
)
_OF_KWARGS = frozenset("name id role type parsed usage citations search_results annotations prefix documents".split())
"""LangChain's `additional_kwargs`, in what providers put there and no model is told."""


def is_message(value: Any) -> bool:
    """Whether a JSON value is one message of a conversation, and not a record of its own."""
    if not isinstance(value, dict):
        return False
    has_words = any(name in value for name in (*_WORDS, *_PARTS, "tool_calls", "data"))
    return (
        is_langchain(value)
        or value.get("type") in _ITEM_TYPES
        or (any(isinstance(value.get(name), str) for name in ("role", "from")) and has_words)
    )


def is_langchain(value: Any) -> bool:
    """Whether a message is LangChain's: a constructor's dump, `type` and `data`, or a model's dump."""
    if not isinstance(value, dict) or "role" in value or "from" in value:
        return False
    has_type = isinstance(value.get("type"), str)
    return (
        "lc" in value
        or (has_type and "data" in value)
        or (has_type and value["type"].lower() in _LANGCHAIN_TYPES and "content" in value)
    )


def read_turns(messages: Any, name: str) -> tuple[list[Turn], list[Any]]:
    """(turns, tools that stand within messages) of a list of messages. Raises RefusedRecord."""
    if not isinstance(messages, list):
        raise RefusedRecord(f"{name} is {kind(messages)}, not a list")
    if not messages:
        raise RefusedRecord(f"{name} is empty")
    if len(messages) == 1 and isinstance(messages[0], list):  # LangSmith's: a batch of one conversation
        messages = messages[0]
    require_oldest_first(messages)
    turns: list[Turn] = []
    tools: list[Any] = []
    for number, message in enumerate(messages, 1):
        where = f"message {number}"
        for each in as_messages(message, where) if is_pydantic_ai(message) else [message]:
            turns += read_message(each, where, tools)
    if any(isinstance(message, dict) and (is_item(message) or "channel" in message) for message in messages):
        turns = merge_items(turns)
    return turns, tools


def read_message(message: Any, where: str, tools: list[Any]) -> list[Turn]:
    """The turns of one message: several where it holds results of tools. Raises RefusedRecord."""
    if isinstance(message, dict) and "lc" in message:
        message = _from_constructor(message, where)
    elif isinstance(message, dict) and isinstance(message.get("data"), dict) and is_langchain(message):
        message = {**message["data"], "type": message.get("type")}
    if isinstance(message, dict) and is_item(message):
        return _read_item(message, where)
    if isinstance(message, dict) and isinstance(message.get("channel"), str):
        return _read_harmony(message, where)
    if isinstance(message, dict) and {"agent", "message_type"} <= set(message):  # SWE-agent's, of one agent
        message = {key: held for key, held in message.items() if key not in ("agent", "message_type")}
    fields = Fields(message, where)
    role = _role(fields)
    if (given := fields.take("tools", "functions")) is not None:
        tools.append(given)
    if role == "tool":
        return _read_result(fields)
    if role in ("assistant", "calls"):
        return _read_assistant(fields, is_calls_text=role == "calls")
    content = _content(fields)
    if content is None and role == "user":
        raise RefusedRecord(f"{where} is the user's, and has no words")
    if fields.take("tool_calls", "function_call"):
        raise RefusedRecord(f"{where} is the {role}'s, and has tool calls")
    speech = read_content(content, role, where)
    close_message(fields, is_assistant=False, harmless=_HARMLESS | {"additional_kwargs"})
    if role == "user" and (results := tagged_results(speech.text)):  # Qwen's template says results as the user
        return [Turn("tool", text) for text in results]
    if speech.calls or speech.thinking or speech.hides_thinking:
        raise RefusedRecord(f"{where} is the {role}'s, and has calls or thinking among its parts")
    if not speech.results and not speech.turns:
        return [Turn(role, speech.text)]
    speech.end_turn()
    return speech.turns


def _role(fields: Fields) -> str:
    written = fields.take("role", "from", "speaker")
    if written is None:
        written = fields.take("type")
    if written is None:
        raise RefusedRecord(f"{fields.where} has no role")
    role = ROLES.get(written.lower()) if isinstance(written, str) else None
    if role is None and isinstance(written, str) and written.lower() in ("chat", "chatmessage"):
        return _role(fields)  # LangChain's: its role stands beside
    if role is None:
        raise RefusedRecord(f"{fields.where}: the role {written!r} is not known")
    return role


def _content(fields: Fields) -> Any:
    """The words of a message, whatever they are called."""
    parts = fields.take("parts")
    if parts is not None:  # Vercel repeats them as content
        for repeated in ("content", "toolInvocations", "reasoning"):
            if repeated != "reasoning" or _hold_reasoning(parts):
                fields.take(repeated)
        return parts
    blocks = fields.take(*_PARTS)
    content = fields.take(*_WORDS)
    if isinstance(content, dict) and content.get("format") == 2:  # Mastra's, which holds one of Vercel's
        inner = Fields({key: held for key, held in content.items() if key != "format"}, fields.where)
        content = _content(inner)
        inner.close(_HARMLESS)
    return content if blocks is None or not is_empty(content) else blocks


def _hold_reasoning(parts: Any) -> bool:
    return isinstance(parts, list) and any(isinstance(p, dict) and p.get("type") == "reasoning" for p in parts)


def _from_constructor(message: dict[str, Any], where: str) -> dict[str, Any]:
    """A message of LangChain's `dumpd`, flat."""
    path, kwargs = message.get("id"), message.get("kwargs")
    name = path[-1] if isinstance(path, list) and path else None
    if message.get("type") != "constructor" or not isinstance(kwargs, dict) or not isinstance(name, str):
        raise RefusedRecord(f"{where} is no message of LangChain's")
    if not name.endswith(("Message", "MessageChunk")):
        raise RefusedRecord(f"{where} is LangChain's {name}, no message")
    return {"role": kwargs["role"], **kwargs} if "role" in kwargs else {**kwargs, "type": name}


# --------------------------------------------------------------------------------------------- the assistant


def _read_assistant(fields: Fields, is_calls_text: bool) -> list[Turn]:
    where = fields.where
    _take_repeated_thought(fields)
    extra_calls, extra_thinking, is_learned_inside = _read_kwargs(fields)
    if _hold_reasoning(dict(fields.left()).get("parts")):  # again
        fields.take("reasoning")
    thinking, hides_thinking = _thinking(fields, extra_thinking)
    calls = _calls(fields) or extra_calls
    invocations = None if "parts" in fields else fields.take("toolInvocations")
    content = _content(fields)
    if fields.take("invalid_tool_calls"):
        raise RefusedRecord(f"{where} has a tool call that its source could not read")
    if fields.take("refusal", "audio", "images", "image"):
        raise RefusedRecord(f"{where} has a refusal, sound or images; only text is read")
    is_learned = close_message(fields, is_assistant=True, harmless=_HARMLESS) and is_learned_inside
    if is_calls_text and isinstance(content, str):
        thought, content = split_thought(content, where)
        turns = [Turn("assistant", thinking=thought, calls=read_calls_text(content, where))]
    elif invocations:
        turns = _read_invocations(content, invocations, where)
    else:
        speech = read_content(content, "assistant", where)
        speech.end_turn()
        turns = speech.turns or [Turn("assistant")]
    return [
        turn if turn.role != "assistant" else replace(turn, is_learned=is_learned)
        for turn in _completed(turns, calls, thinking, hides_thinking, where)
    ]


def _read_harmony(message: dict[str, Any], where: str) -> list[Turn]:
    """gpt-oss's messages: thoughts, calls and answers stand apart, by their channel and by whom they are for."""
    fields = Fields(message, where)
    channel, recipient = fields.take("channel"), fields.take("recipient") or "all"
    fields.take("content_type")
    rest = dict(fields.left())
    if _role(Fields(message, where)) == "tool":
        name = str(rest.pop("name", "")).removeprefix(_FUNCTIONS)
        return [replace(turn, tool_name=name or None) for turn in read_message(rest, where, [])]
    turns = read_message(rest, where, [])
    if channel == "final" or _role(Fields(message, where)) != "assistant":
        return turns
    if len(turns) != 1 or turns[0].calls or turns[0].thinking:
        raise RefusedRecord(f"{where} has a channel, and more than text")
    if recipient not in ("all", "user"):
        if not str(recipient).startswith(_FUNCTIONS):
            raise RefusedRecord(f"{where} is for {recipient!r}; only calls of functions are read")
        name = str(recipient).removeprefix(_FUNCTIONS)
        return [replace(turns[0], text="", calls=(Call(name, turns[0].text),))]
    if channel not in ("analysis", "commentary"):
        raise RefusedRecord(f"{where}: the channel {channel!r} is not known")
    return [replace(turns[0], text="", thinking=turns[0].text)] if channel == "analysis" else turns


_FUNCTIONS = "functions."
"""What gpt-oss writes before the names of the tools that it is given."""


def _take_repeated_thought(fields: Fields) -> None:
    """SWE-agent says again, in two parts, what the message says: its thought, and its action."""
    left = dict(fields.left())
    thought, action, content = left.get("thought"), left.get("action"), left.get("content")
    if isinstance(action, str) and isinstance(content, str) and str(thought or "").strip() in content:
        fields.take("thought")
        fields.take("action")


def _completed(
    turns: list[Turn], calls: tuple[Call, ...], thinking: str, hides_thinking: bool, where: str
) -> list[Turn]:
    """The turns of a content with what stands beside it, and with what is written out in its text."""
    first = turns[0] if turns[0].role == "assistant" else None
    if first is None:
        raise RefusedRecord(f"{where} begins with a result")
    written_thinking, text = split_thought(first.text, where)
    text, written_calls = split_tagged_calls(text, where)
    require_no_other_call(text, where)
    thoughts = {thought for thought in (thinking, first.thinking, written_thinking) if thought.strip()}
    if len({thought.strip() for thought in thoughts}) > 1:
        raise RefusedRecord(f"{where} has different thinking in different places")
    found = _agreed([calls, first.calls, written_calls], where)
    thought = min(thoughts, default="")
    hides = (hides_thinking or first.hides_thinking) and not thought
    return [replace(first, text=text, thinking=thought, calls=found, hides_thinking=hides), *turns[1:]]


def _agreed(places: Sequence[tuple[Call, ...]], where: str) -> tuple[Call, ...]:
    """The calls that several places tell: LangChain repeats those of the content beside it."""
    told = [calls for calls in places if calls]
    for other in told[1:]:
        if [(call.id, call.name) for call in other] != [(call.id, call.name) for call in told[0]]:
            raise RefusedRecord(f"{where} has different calls in different places")
    return told[0] if told else ()


def _calls(fields: Fields) -> tuple[Call, ...]:
    given = fields.take("tool_calls", "toolCalls")
    old = fields.take("function_call")
    if isinstance(given, str):
        given = list(read_calls_text(given, fields.where)) if given.strip() else []
    if not isinstance(given, list | None):
        raise RefusedRecord(f"{fields.where}: tool_calls is not a list")
    calls = tuple(
        call if isinstance(call, Call) else read_call(call, fields.where)
        for call in given or ()
        if not is_padding(call)
    )
    return calls or ((read_call(old, fields.where),) if old else ())


def _thinking(fields: Fields, extra: list[Any]) -> tuple[str, bool]:
    """(thinking, whether some is hidden) of what stands beside a message's content."""
    given = [fields.take(name) for name in THINKING_NAMES]
    texts = [thought_text(value, fields.where).strip() for value in (*given, *extra)]
    told = sorted({text for text in texts if text}, key=len)
    if len(told) > 1:
        raise RefusedRecord(f"{fields.where} has different thinking in different places")
    is_hidden = not told and any(not is_empty(value) for value in given)
    return (told[0] if told else ""), is_hidden


def _read_kwargs(fields: Fields) -> tuple[tuple[Call, ...], list[Any], bool]:
    """(calls, thinking, whether it is to be learned) of what LangChain and LiteLLM keep beside a message."""
    calls: tuple[Call, ...] = ()
    thinking: list[Any] = []
    is_learned = True
    for name in ("additional_kwargs", "provider_specific_fields"):
        kwargs = fields.take(name)
        if not isinstance(kwargs, dict):
            continue
        inner = Fields({key: held for key, held in kwargs.items() if not key.startswith("__")}, fields.where)
        calls = _calls(inner) or calls
        thinking += [inner.take(name) for name in THINKING_NAMES]
        if inner.take("refusal", "audio", "tool_outputs"):
            raise RefusedRecord(f"{fields.where} has a refusal, sound or a server's tools; only text is read")
        is_learned &= close_message(inner, is_assistant=True, harmless=_OF_KWARGS)
    return calls, thinking, is_learned


def _read_invocations(content: Any, invocations: Any, where: str) -> list[Turn]:
    """Vercel's older messages: calls and their results in one."""
    if not isinstance(invocations, list):
        raise RefusedRecord(f"{where}: toolInvocations is {kind(invocations)}, not a list")
    if not is_empty(content):
        raise RefusedRecord(f"{where} has toolInvocations and text, and nothing tells which came first")
    parts = []
    for each in invocations:
        part = Fields(each, where)
        part.take("step")
        parts.append({"type": "dynamic-tool", **dict(part.left())})
    speech = read_content(parts, "assistant", where)
    speech.end_turn()
    return speech.turns


# -------------------------------------------------------------------------------------------------- results


def _read_result(fields: Fields) -> list[Turn]:
    where = fields.where
    if responses := fields.take_list("tool_responses"):  # AutoGen's: its content has them all in one
        fields.take("content")
        return [turn for each in responses for turn in read_message(each, where, [])]
    call_id = fields.take(*CALL_ID_NAMES)
    name = fields.take("tool_name", "toolName", "name", "function")
    if isinstance(kwargs := fields.take("additional_kwargs"), dict):  # LlamaIndex's
        call_id, name = call_id or kwargs.get("tool_call_id"), name or kwargs.get("name")
    if isinstance(ids := fields.take("tool_call_ids"), list) and len(ids) == 1:  # SWE-agent's
        call_id = call_id or ids[0]
    content, error = _content(fields), fields.take("error")
    close_message(fields, is_assistant=False, harmless=_HARMLESS | {"additional_kwargs"})
    if isinstance(error, dict):
        error = error.get("message")
    if is_empty(content) and isinstance(error, str):
        content = error
    speech_turns = _results_among_parts(content, where)
    if speech_turns is not None:
        if call_id is not None and len(speech_turns) == 1 and speech_turns[0].result_of is None:
            return [replace(speech_turns[0], result_of=str(call_id))]
        return speech_turns
    texts = tagged_results(content) or [content] if isinstance(content, str) else [result_text(content, where)]
    found = None if call_id in (None, "") else str(call_id)
    return [Turn("tool", text, result_of=found, tool_name=name if isinstance(name, str) else None) for text in texts]


def _results_among_parts(content: Any, where: str) -> list[Turn] | None:
    """The results of a content whose parts are results; None where they are not."""
    if not isinstance(content, list) or not any(isinstance(part, dict) and _is_result(part) for part in content):
        return None
    speech = read_content(content, "tool", where)
    if speech.text.strip() or speech.calls or speech.turns:
        raise RefusedRecord(f"{where} is a tool's, and has more than results among its parts")
    return speech.results


def _is_result(part: dict[str, Any]) -> bool:
    written = next((part[name] for name in PART_TYPE_NAMES if name in part), None)
    return (isinstance(written, str) and ("result" in written or "response" in written)) or bool(
        {"functionResponse", "function_response", "toolResult", "tool_call_result", "call_id"} & set(part)
    )


# ---------------------------------------------------------------------------------------------------- items


def is_item(message: dict[str, Any]) -> bool:
    """Whether a message is an item of OpenAI's responses."""
    return "role" not in message and "from" not in message and message.get("type") in _ITEM_TYPES


def _read_item(item: dict[str, Any], where: str) -> list[Turn]:
    fields = Fields(item, where)
    name = fields.take("type")
    if name == "reasoning":
        speech = read_content([item], "assistant", where)
        speech.end_turn()
        return speech.turns
    if name == "ghost_snapshot":  # Codex's, of the files
        return []
    if name in ("function_call", "custom_tool_call"):
        is_learned = fields.take("status") in (None, "completed")
        call = read_call({key: value for key, value in item.items() if key != "status"}, where)
        if name == "custom_tool_call":  # takes text; as a function, Codex calls that text its input
            call = replace(call, arguments={"input": call.arguments})
        return [Turn("assistant", calls=(call,), is_learned=is_learned)]
    if name in ("function_call_output", "custom_tool_call_output"):
        call_id, output = fields.take("call_id"), fields.take("output")
        fields.close(frozenset({"id", "status", "name"}))
        return [
            Turn("tool", result_text(_unwrapped(output), where), result_of=None if call_id is None else str(call_id))
        ]
    raise RefusedRecord(f"{where} is of type {name!r}, which no server of ours runs")


def _unwrapped(output: Any) -> Any:
    """What Codex wraps as `content` and `success` is the content."""
    if isinstance(output, dict) and "content" in output and set(output) <= {"content", "success"}:
        return output["content"]
    return output


def merge_items(turns: Iterable[Turn]) -> list[Turn]:
    """The assistant's turns as it took them: thinking, text and calls are items of their own in what they come from.

    Text behind text, or thinking behind text, stays apart: the check of the conversation refuses it.
    """
    merged: list[Turn] = []
    for turn in turns:
        last = merged[-1] if merged else None
        if last is not None and last.role == turn.role == "assistant" and _may_follow(last, turn):
            merged[-1] = Turn(
                "assistant",
                last.text or turn.text,
                "\n\n".join(thought for thought in (last.thinking, turn.thinking) if thought),
                (*last.calls, *turn.calls),
                is_learned=last.is_learned and turn.is_learned,
                hides_thinking=(last.hides_thinking or turn.hides_thinking) and not (last.thinking or turn.thinking),
            )
        else:
            merged.append(turn)
    return merged


def _may_follow(last: Turn, turn: Turn) -> bool:
    has_thought = bool(turn.thinking or turn.hides_thinking)
    return not (turn.text and (last.text or last.calls)) and not (has_thought and (last.text or last.calls))
