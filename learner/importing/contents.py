"""What a message says, whether its content is text or parts, and whichever API's parts they are."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from learner.importing.exact_json import dumps, holds_rounded
from learner.importing.fields import CACHE_MARK, PART_TYPE_NAMES, Fields, RefusedRecord, is_empty, kind
from learner.importing.turns import Call, Turn
from learner.importing.written_calls import CALL_ID_NAMES, CALL_NAMES, read_call

_TEXTS = tuple("text input_text output_text plain_text markdown".split())
_THOUGHTS = frozenset(
    "thinking reasoning think thought reasoning_text reasoning_content redacted_thinking reasoning.text "
    "reasoning.summary reasoning.encrypted summary_text".split()
)
_CALLS = frozenset("tool_use tool-call tool_call function_call toolCall toolUse functionCall".split())
_RESULTS = frozenset(
    "tool_result tool-result tool_call_response tool_response function_call_output toolResult function_result "
    "functionResponse function_response tool_call_result".split()
)
_STEP_STARTS = frozenset("step-start step_start finish-step step-finish".split())
_SHOWN_ALONE = ("source-url", "source-document")
"""Vercel's parts for the screen, as are those whose type begins with `data-`: no model is sent them."""
_UNTYPED = (
    "functionCall", "function_call", "functionResponse", "function_response", "toolUse", "toolResult",
    "tool_call", "tool_call_result", "reasoning",
)  # fmt: skip
"""Gemini's, Bedrock's and Haystack's parts: the key tells the type."""

_HARMLESS = frozenset(
    "annotations citations cache_control logprobs phase providerMetadata providerOptions provider_options extras "
    "signature thoughtSignature thought_signature state callProviderMetadata resultProviderMetadata preliminary "
    "is_error isError structuredContent _meta format internal status title summary_index toolMetadata "
    "provider_data details extra additional_information num_tokens metadata inner_content ai_model_id "
    "raw_representation additional_properties".split()
)


@dataclass(slots=True)
class Speech:
    """What one message says, in its order, part by part."""

    where: str
    role: str
    turns: list[Turn] = field(default_factory=list)
    """What is complete: the assistant's turns, each with its results behind it."""
    text: str = ""
    thinking: str = ""
    calls: list[Call] = field(default_factory=list)
    hides_thinking: bool = False

    results: list[Turn] = field(default_factory=list)
    """Of the calls so far; they follow when the assistant's turn is complete."""

    def say(self, text: str) -> None:
        if self.results and text.strip():
            self.end_turn()
        if self.calls and text.strip():
            raise RefusedRecord(f"{self.where} has text behind its calls: a call ends what the assistant says")
        self.text += text

    def think(self, text: str, is_hidden: bool = False) -> None:
        if self.results:
            self.end_turn()
        if (self.text.strip() or self.calls) and (text or is_hidden):
            raise RefusedRecord(f"{self.where} thinks again behind what it said: no chat template writes that")
        self.thinking += ("\n\n" if self.thinking and text else "") + text
        self.hides_thinking |= is_hidden

    def end_turn(self) -> None:
        """What comes next was said after the results."""
        if self.text or self.thinking or self.calls or self.hides_thinking:
            hidden = self.hides_thinking and not self.thinking
            self.turns.append(Turn(self.role, self.text, self.thinking, tuple(self.calls), hides_thinking=hidden))
        self.turns += self.results
        self.text, self.thinking, self.calls, self.results, self.hides_thinking = "", "", [], [], False


def read_content(content: Any, role: str, where: str) -> Speech:
    """What a content says. Raises RefusedRecord for a part that is no text, thought, call or result."""
    speech = Speech(where, role)
    if isinstance(content, str):
        speech.text = content
    elif isinstance(content, list | dict):
        for part in content if isinstance(content, list) else [content]:
            _read_part(part, speech)
    elif content is not None:
        raise RefusedRecord(f"{where}: its content is {kind(content)}, neither text nor a list of parts")
    return speech


def plain_text(content: Any, where: str) -> str:
    """The text of a content that holds text alone: a system's, or a tool's result."""
    if isinstance(content, dict) and "parts" in content:
        content = content["parts"]
    speech = read_content(content, "system", where)
    if speech.turns or speech.results or speech.calls or speech.thinking or speech.hides_thinking:
        raise RefusedRecord(f"{where} holds more than text")
    return speech.text


def _read_part(part: Any, speech: Speech) -> None:
    if isinstance(part, str):
        speech.say(part)
        return
    if isinstance(part, dict) and set(part) == CACHE_MARK:
        return
    part = _with_plugins_name(part)
    fields = Fields(part, f"a part of {speech.where}")
    name = fields.take(*PART_TYPE_NAMES)
    if part.get("state") == "streaming":  # Vercel's
        raise RefusedRecord(f"{speech.where} has a part in the state 'streaming': it was cut off before its end")
    if name is None:
        name = next((key for key in _UNTYPED if key in fields), None)
        part = fields.take(name) if name else part
        if name is not None:
            fields.close(_HARMLESS)
        elif "reasoningContent" in fields:
            inner = fields.take("reasoningContent")
            part, name = inner.get("reasoningText", inner) if isinstance(inner, dict) else inner, "reasoning"
        elif {"name", "arguments"} <= set(part):  # AutoGen's
            name = "tool_call"
        elif {"content", "call_id"} <= set(part):
            name = "tool_result"
        else:
            name = "thinking" if fields.take("thought") is True else "text"
    if not isinstance(name, str):
        raise RefusedRecord(f"{speech.where}: its content has a part of type {name!r}; only text is read")
    if name in _TEXTS:
        if isinstance(part, dict) and fields.take("thought") is True:
            _think(Fields(part, fields.where), "thinking", speech)
        else:
            speech.say(fields.take_text("text", "content", "value"))
            fields.close(_HARMLESS)
    elif name in _THOUGHTS:
        _think(Fields(part, fields.where), name, speech)
    elif name in _CALLS:
        if speech.results:
            speech.end_turn()
        speech.calls.append(read_call(part, speech.where))
    elif name in _RESULTS:
        if speech.text.strip() and not speech.calls:
            speech.end_turn()
        speech.results.append(_result(part, speech.where))
    elif name == "tool-invocation":  # Vercel's, until version 4
        invocation = Fields(fields.take("toolInvocation"), fields.where)
        invocation.take("step")
        fields.close(_HARMLESS)
        _read_ui_tool(invocation, name, speech)
    elif name == "dynamic-tool" or (name.startswith("tool-") and "state" in fields):
        _read_ui_tool(fields, name, speech)
    elif name in _STEP_STARTS:
        speech.end_turn()
    elif name in _SHOWN_ALONE or name.startswith("data-"):
        return
    else:
        raise RefusedRecord(f"{speech.where}: its content has a part of type {name!r}; only text is read")


def _with_plugins_name(part: Any) -> Any:
    """Semantic Kernel tells a function's name whole, as the model was told it, and in its two halves."""
    if not isinstance(part, dict) or not {"name", "plugin_name"} <= set(part):
        return part
    return {key: held for key, held in part.items() if key not in ("plugin_name", "function_name")}


# ------------------------------------------------------------------------------------------------- thoughts


_THOUGHT_TEXTS = ("thinking", "reasoning", "text", "content", "reasoning_content", "reasoning_text")


def _think(fields: Fields, name: str, speech: Speech) -> None:
    fields.take(*PART_TYPE_NAMES)
    fields.take("thought")
    is_redacted = fields.take("redacted") is True or name in ("redacted_thinking", "reasoning.encrypted")
    hidden = fields.take("encrypted_content", "data", "redactedContent", "signature", "thoughtSignature")
    summary = thought_text(fields.take("summary"), speech.where)
    full = thought_text(fields.take(*_THOUGHT_TEXTS), speech.where)
    if fields.take("closed") is False:  # Mistral's
        raise RefusedRecord(f"{speech.where} ends within its thinking: it is not closed")
    text = summary if is_redacted else full or summary
    fields.close(_HARMLESS)
    speech.think(text, is_hidden=not text and (is_redacted or not is_empty(hidden)))


def thought_text(value: Any, where: str) -> str:
    """The text of a thought, which comes as text or as a list of texts. Raises RefusedRecord."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise RefusedRecord(f"the thinking of {where} is {kind(value)}, not text")
    texts = []
    for part in value:
        if isinstance(part, str):
            texts.append(part)
            continue
        fields = Fields(part, f"the thinking of {where}")
        name = fields.take("type")
        text = fields.take("text", "thinking", "summary", "content", "reasoning")
        if name not in ("reasoning.encrypted", "redacted_thinking"):
            texts.append(thought_text(text, where))
    return "\n\n".join(text for text in texts if text)


# -------------------------------------------------------------------------------------------------- results

_RESULT_NAMES = ("content", "output", "result", "response", "tool_result", "value")


def _result(part: Any, where: str) -> Turn:
    fields = Fields(part, f"a result of {where}")
    fields.take(*PART_TYPE_NAMES)
    origin = Fields(fields.take("origin") or {}, fields.where)  # Haystack's: the call again
    call_id = fields.take(*CALL_ID_NAMES) or origin.take("id")
    if isinstance(dict(fields.left()).get("error"), bool):  # Haystack's: whether the result tells of an error
        fields.take("error")
    own_id = fields.take("id")
    name = fields.take(*CALL_NAMES) or origin.take("tool_name")
    has_parts = "content" in fields
    given = fields.take(*_RESULT_NAMES)
    text = "" if has_parts and given == [] else result_text(given, where)  # no parts, and not an empty list as JSON
    for unread in ("input", "args"):  # of the call, repeated
        fields.take(unread)
    fields.close(_HARMLESS)
    found = call_id if call_id is not None else own_id
    return Turn("tool", text, result_of=None if found in (None, "") else str(found), tool_name=_name(name))


def _name(name: Any) -> str | None:
    return name if isinstance(name, str) and name else None


def result_text(value: Any, where: str) -> str:
    """What a tool gave back as text: text and parts of text as they are, anything else as its JSON text."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    is_typed = isinstance(value, dict) and value.get("type") in ("text", "json", "content", "error-text", "error-json")
    if is_typed and "value" in value:  # Vercel's
        return result_text(value["value"], where)
    if isinstance(value, dict) and value.get("type") == "execution-denied":
        return value.get("reason") or "Tool execution denied."
    parts = value.get("content") if isinstance(value, dict) and set(value) <= {"content", "isError", "_meta"} else value
    if isinstance(parts, list) and parts and all(_is_part(part) for part in parts):
        return _joined(parts, where)
    if holds_rounded(value):
        raise RefusedRecord(f"{where} has a result with more digits than can be kept: write it as text")
    try:
        return dumps(value)
    except (ValueError, RecursionError) as error:
        raise RefusedRecord(f"{where} has a result that is no JSON: {error}") from error


def _is_part(part: Any) -> bool:
    return isinstance(part, dict) and (
        any(part.get(name) in _TEXTS for name in PART_TYPE_NAMES)
        or set(part) in ({"text"}, {"json"})
        or _is_other_part(part)
    )


def _is_other_part(part: dict[str, Any]) -> bool:
    return isinstance(part.get("type"), str) and part["type"].split("_")[-1] in (
        "image",
        "url",
        "audio",
        "file",
        "document",
    )


def _joined(parts: list[dict[str, Any]], where: str) -> str:
    return "".join(_text_of_part(part, where) for part in parts)


def _text_of_part(part: dict[str, Any], where: str) -> str:
    if set(part) == {"json"}:
        return dumps(part["json"])
    document = part.get("document")
    if part.get("type") == "document" and isinstance(document, dict) and set(document) <= {"data", "id"}:  # Cohere's
        return result_text(document.get("data"), where)
    return plain_text([part], where)


def _read_ui_tool(fields: Fields, name: str, speech: Speech) -> None:
    """A part of Vercel's interface messages: the call, and its result once there is one."""
    state = fields.take("state")
    call_id = fields.take("toolCallId")
    tool = fields.take("toolName") or name.removeprefix("tool-")
    speech.calls.append(Call(tool, fields.take("input", "args"), call_id))
    output, error = fields.take("output", "result"), fields.take("errorText")
    fields.close(_HARMLESS | {"approval"})
    if state in ("output-available", "result", "output-error"):
        text = result_text(output, speech.where) if error is None else str(error)
        speech.results.append(Turn("tool", text, result_of=call_id, tool_name=tool))
    elif state not in ("input-available", "call"):
        raise RefusedRecord(f"{speech.where} has a call in the state {state!r}: it was never complete")
