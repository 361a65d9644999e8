"""Grammars that hold a completion to a JSON schema, or to a call of one of the tools on offer.

They are written in llguidance's Lark dialect, which both engines take. How a tool call is spelled is read off the
chat template by rendering one, so nothing here knows any model's marks.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from llguidance import LLMatcher

from policies.chat_protocol import ChatProtocol
from policies.types import FinalAnswer, ToolCall, ToolCalls, ToolSchema


class GrammarError(ValueError):
    """A schema that no grammar can be made of, or a model whose tool calls are not written as JSON."""


def json_grammar(schema: dict[str, Any]) -> str:
    """The answer is one JSON value that fits the schema. Raises GrammarError for an invalid or unsupported schema."""
    return _checked("start: " + _json_rule(schema))


def tool_call_grammar(protocol: ChatProtocol, tools: Sequence[ToolSchema]) -> str:
    """The answer is exactly one call of one of the tools, with arguments that fit its parameters."""
    before, after = _call_marks(protocol)
    rules = [f"start: {_terminals(protocol, before)} call {_terminals(protocol, after)}"]
    rules.append("call: " + " | ".join(f"call_{number}" for number in range(len(tools))))
    for number, tool in enumerate(tools):
        name, parameters = tool["function"]["name"], tool["function"].get("parameters") or {"type": "object"}
        opening = json.dumps(f'{{"name": {json.dumps(name)}, "arguments": ')
        rules.append(f'call_{number}: {opening} arguments_{number} "}}"')
        # A rule of its own, so that `#/$defs/...` in the tool's parameters still points into them.
        rules.append(f"arguments_{number}: {_json_rule(parameters)}")
    return _checked("\n".join(rules))


def _json_rule(schema: dict[str, Any]) -> str:
    # One spelling of white space, the one that chat templates' `tojson` writes and the policy has learned.
    spelling = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
    return "%json " + json.dumps({**schema, "x-guidance": spelling})


def _checked(grammar: str) -> str:
    if problem := LLMatcher.validate_grammar(grammar):
        raise GrammarError(problem.splitlines()[0])
    return grammar


def _call_marks(protocol: ChatProtocol) -> tuple[str, str]:
    """What the template writes before and after the JSON object of a call."""
    question = [{"role": "user", "content": "?"}]
    _, completion = protocol.completion_of(question, ToolCalls((ToolCall("call_0", "a_tool", {}),)))
    _, nothing = protocol.completion_of(question, FinalAnswer(""))
    written = protocol.decode(completion).removesuffix(protocol.decode(nothing))
    spelled = '{"name": "a_tool", "arguments": {}}'
    before, found, after = written.partition(spelled)
    if not found:
        raise GrammarError("this model does not write tool calls as JSON objects, so a call cannot be required of it")
    return before, after


def _terminals(protocol: ChatProtocol, text: str) -> str:
    """Text as Lark terminals: special tokens by id, since their text would be matched as plain bytes."""
    special = set(protocol.tokenizer.all_special_ids)
    terminals: list[str] = []
    plain: list[int] = []
    for token_id in (*protocol.encode(text), None):
        if token_id is not None and token_id not in special:
            plain.append(token_id)
            continue
        if plain:
            terminals.append(json.dumps(protocol.decode(plain)))
            plain = []
        if token_id is not None:
            terminals.append(f"<[{token_id}]>")
    return " ".join(terminals)
