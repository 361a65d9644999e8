"""Response templates of well-known model families, for tokenizers that bring none.

A response template is the inverse of a chat template: it reads thinking, tool calls and text back from what the model
wrote (transformers.utils.chat_parsing). Few checkpoints carry one yet. Which of these fits is told by the marks that
the chat template itself writes, not by a model's name: a fine-tuned model keeps its base's marks under a name of its
own. transformers has a table too, but a private one of its server, by model type, for Qwen and Gemma 4 alone.

Not covered: Llama's built-in tools (`<|python_tag|>brave_search.call(...)`), which are never offered here, and Gemma
3's calls where its chat template has no marks for them: they are read as text.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ResponseTemplate = dict[str, Any]
Field = dict[str, Any]

ONE_CALL = {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}}
"""A call whose name stands in its opening mark and whose arguments are what follows."""


def _until(close_pattern: str) -> Field:
    """The text that no mark opens, up to the end of the turn, to the character."""
    return {"close_pattern": close_pattern, "content": "text", "content_args": {"strip": False}}


def _template(start_anchor: str, text: Field, **fields: Field) -> ResponseTemplate:
    return {"defaults": {"role": "assistant"}, "start_anchor": start_anchor, "fields": {**fields, "content": text}}


_THINKING: Field = {"open": "<think>", "close": "</think>", "content": "text"}

_CHATML_TURN = "<|im_start|>assistant\n"
# The newline after a turn's end is the next turn's: as text of its own it would be shown.
_CHATML_END = _until(r"(?:<\|im_end\|>|<\|endoftext\|>)\s*")

CHATML = _template(_CHATML_TURN, _CHATML_END, thinking=_THINKING)

_JSON_CALLS: Field = {
    "open_pattern": r"\s*<tool_call>",
    # What is no JSON's end before it stands inside an argument's text, and ends nothing.
    "close_pattern": r"(?<=[\s}])</tool_call>",
    "repeats": True,
    "content": "json",
    "transform": {"type": "function", "function": "{content}"},
}

CHATML_JSON_CALLS = _template(_CHATML_TURN, _CHATML_END, thinking=_THINKING, tool_calls=_JSON_CALLS)

CHATML_XML_CALLS = _template(
    _CHATML_TURN,
    _CHATML_END,
    thinking=_THINKING,
    tool_calls={
        "open_pattern": r"\s*<tool_call>\s*<function=(?P<name>[^>\n]+)>",
        # Behind anything but an argument, or no argument at all, the closing tags stand within an argument's text.
        "close_pattern": r"(?<=</parameter>\s*|<function=[^>\n]+>\s*)</function>\s*</tool_call>",
        "repeats": True,
        "content": "xml-inline",
        # An argument goes on to the last of its closing tags before the next argument.
        "content_args": {
            "tag_pattern": r"<parameter=(?P<key>[^>\n]+)>\n?(?P<value>.*?)\n?</parameter>"
            r"(?=\s*(?:<parameter=[^>\n]+>|\Z))"
        },
        "transform": ONE_CALL,
    },
)

LLAMA_3 = _template(
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    _until(r"<\|eot_id\|>|<\|eom_id\|>|<\|end_of_text\|>"),
    tool_calls={
        # A call is the whole turn: the same object after other words is an answer that shows one.
        "open_pattern": r'\A\s*(?:<\|python_tag\|>\s*(?=\{)|(?=\{\s*(?:"type"\s*:\s*"function"\s*,\s*)?'
        r'"name"\s*:\s*"[^"]+"\s*,\s*"(?:parameters|arguments)"\s*:))',
        "close_pattern": r"\s*(?:<\|eot_id\|>|<\|eom_id\|>)",
        "content": "json",
        "transform": {"type": "function", "function": "{content}"},
    },
)

_MISTRAL_THINKING: Field = {"open": "[THINK]", "close": "[/THINK]", "content": "text"}

MISTRAL_LIST_OF_CALLS = _template(
    "[/INST]",
    _until("</s>"),
    thinking=_MISTRAL_THINKING,
    tool_calls={
        "open": "[TOOL_CALLS]",
        "close": "</s>",
        "content": "json",
    },
)

MISTRAL_CALL_BY_CALL = _template(
    "[/INST]",
    _until("</s>"),
    thinking=_MISTRAL_THINKING,
    tool_calls={
        "open_pattern": r"\[TOOL_CALLS\](?P<name>[^\[\s]+)(?:\[CALL_ID\][^\[]*)?\[ARGS\]",
        "close_pattern": r"(?=\[TOOL_CALLS\])|</s>",
        "repeats": True,
        "content": "json",
        "transform": ONE_CALL,
    },
)

_GEMMA_TURN, _GEMMA_END = "<start_of_turn>model\n", _until(r"(?:<end_of_turn>|<eos>)\s*")

GEMMA = _template(_GEMMA_TURN, _GEMMA_END)

GEMMA_JSON_CALLS = _template(_GEMMA_TURN, _GEMMA_END, tool_calls=_JSON_CALLS)


def thinking_begins_the_turn(template: ResponseTemplate) -> ResponseTemplate:
    """The template, but a plain mark of thinking opens it at the turn's beginning alone.

    Elsewhere it is a word of the answer: "The tag <think> opens thoughts."
    """
    fields = template.get("fields")
    if not isinstance(fields, dict):
        return template  # transformers says what is wrong with it
    return {**template, "fields": {name: _at_the_beginning(name, field) for name, field in fields.items()}}


def _at_the_beginning(name: str, field: Any) -> Any:
    if name == "content" or not isinstance(field, dict) or field.get("content", "text") != "text":
        return field
    mark = field.get("open")
    if not isinstance(mark, str) or not re.fullmatch(r"\s*[<\[]\w+[>\]]\s*", mark):
        return field
    others = {key: value for key, value in field.items() if key != "open"}
    return {**others, "open_pattern": r"\A\s*" + re.escape(mark)}


@dataclass(frozen=True, slots=True)
class Family:
    """Models that write their turns alike."""

    name: str
    marks: tuple[str, ...]
    """All of them stand in the family's chat templates."""
    template: ResponseTemplate


FAMILIES = (
    Family("ChatML with calls in XML (Qwen3-Coder)", ("<|im_start|>", "<tool_call>", "<function="), CHATML_XML_CALLS),
    Family("ChatML with calls in JSON (Qwen2.5, Qwen3, Hermes)", ("<|im_start|>", "<tool_call>"), CHATML_JSON_CALLS),
    Family("ChatML without calls", ("<|im_start|>", "<|im_end|>"), CHATML),
    Family("Llama 3", ("<|start_header_id|>", "<|eot_id|>"), LLAMA_3),
    Family("Mistral with [ARGS]", ("[INST]", "[TOOL_CALLS]", "[ARGS]"), MISTRAL_CALL_BY_CALL),
    Family("Mistral", ("[INST]", "[/INST]"), MISTRAL_LIST_OF_CALLS),
    Family("Gemma with calls in JSON", ("<start_of_turn>", "<end_of_turn>", "<tool_call>"), GEMMA_JSON_CALLS),
    Family("Gemma 2 and 3", ("<start_of_turn>", "<end_of_turn>"), GEMMA),
)
"""The first whose marks are all there is taken: what has more marks stands before what has fewer."""


def known_response_template(chat_template: str | dict[str, str]) -> ResponseTemplate | None:
    """The response template that goes with a chat template; None where its marks are those of no family here.

    `chat_template` is the tokenizer's: one Jinja text, or several by name.
    """
    text = chat_template if isinstance(chat_template, str) else "".join(chat_template.values())
    return next((family.template for family in FAMILIES if all(mark in text for mark in family.marks)), None)


def read_response_template(file: Path) -> ResponseTemplate:
    """A response template from a JSON file. Raises ValueError, or OSError, where there is none in it."""
    template = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(template, dict):
        raise ValueError(f"{file} holds no response template: it is no JSON object")
    return template
