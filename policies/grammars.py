"""Grammars that hold a completion to a JSON schema, or to a call of one of the tools on offer.

They are written in llguidance's Lark dialect, which both engines take. How a tool call is spelled is read off the
chat template by rendering one, so nothing here knows any model's marks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from llguidance import LLMatcher

from policies.chat_protocol import ChatProtocol
from policies.types import FinalAnswer, ToolCall, ToolCalls, ToolSchema

_A_THOUGHT, _AN_ANSWER = "A thought.", "An answer."
"""Are written by the template, to see what it writes around them."""

_THOUGHT = r"THOUGHT: /(.|\n)*/"


class GrammarError(ValueError):
    """A schema that no grammar can be made of, or a model whose tool calls are not written as JSON."""


def json_grammar(protocol: ChatProtocol, schema: dict[str, Any]) -> str:
    """The answer is one JSON value that fits the schema. Raises GrammarError for an invalid or unsupported schema."""
    before, _ = _around(protocol, FinalAnswer(_AN_ANSWER, _A_THOUGHT), _AN_ANSWER)
    return _checked(
        "\n".join([f"start: {_terminals(protocol, before)} answer", "answer: " + _json_rule(schema), _THOUGHT])
    )


def tool_call_grammar(protocol: ChatProtocol, tools: Sequence[ToolSchema]) -> str:
    """The answer is exactly one call of one of the tools, with arguments that fit its parameters.

    Raises GrammarError where the model does not write a call's arguments as a JSON object.
    """
    call = ToolCall("call00000", "a_tool", {})
    before, rest = _around(protocol, ToolCalls((call,), reasoning=_A_THOUGHT), call.name)
    between, found, after = rest.partition("{}")
    if not found:
        raise GrammarError("this model does not write tool calls as JSON objects, so a call cannot be required of it")
    after = after.replace(f', "id": "{call.id}"', "")  # its reader numbers the calls
    rules = [f"start: {_terminals(protocol, before)} call", _THOUGHT]
    rules.append("call: " + " | ".join(f"call_{number}" for number in range(len(tools))))
    for number, tool in enumerate(tools):
        name, parameters = tool["function"]["name"], tool["function"].get("parameters") or {"type": "object"}
        spelled = json.dumps(name)[1:-1] if before.endswith('"') else name
        middle, closing = _terminals(protocol, between), _terminals(protocol, after)
        rules.append(f"call_{number}: {json.dumps(spelled)} {middle} arguments_{number} {closing}")
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


def _around(protocol: ChatProtocol, action: ToolCalls | FinalAnswer, part: str) -> tuple[str, str]:
    """What the template writes before and after a part of an action, up to the turn's end."""
    written = protocol.written([{"role": "user", "content": "?"}], action).removesuffix(protocol.turn_end)
    before, _, after = written.partition(part)
    return before, after


def _terminals(protocol: ChatProtocol, text: str) -> str:
    """Text as Lark terminals: special tokens by id, since their text would be matched as plain bytes.

    Where the text holds the thought, any text may stand, up to the special token that ends thinking.
    llguidance takes an added token in angle brackets for special even where the tokenizer does not: Qwen's <tool_call>.
    """
    added = protocol.tokenizer.added_tokens_decoder.items()
    special = {t.content: id for id, t in added if t.special or (t.content[0], t.content[-1]) == ("<", ">")}
    pieces = re.split("(" + "|".join(map(re.escape, sorted(special, key=len, reverse=True))) + ")", text)
    return " ".join(_terminal(piece, special) for piece in pieces if piece)


def _terminal(piece: str, special: dict[str, int]) -> str:
    if piece in special:
        return f"<[{special[piece]}]>"
    return "THOUGHT" if _A_THOUGHT in piece else json.dumps(piece)
