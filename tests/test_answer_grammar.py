"""Grammars made from schemas and tools: what they admit, what they refuse, and which schemas cannot become one."""

from __future__ import annotations

import json
from typing import Any

import pytest

from policies.chat_protocol import ChatProtocol
from policies.grammars import GrammarError, json_grammar, tool_call_grammar
from policies.novice.tokenizer import CHAT_TEMPLATE, build_tokenizer
from policies.types import FinalAnswer, ToolCall, ToolCalls, ToolSchema
from tests.grammar_checks import admits

LOOK: ToolSchema = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Look at a place.",
        "parameters": {
            "type": "object",
            "properties": {"at": {"type": "string"}, "times": {"type": "integer"}},
            "required": ["at"],
            "additionalProperties": False,
        },
    },
}
WAIT: ToolSchema = {
    "type": "function",
    "function": {"name": "wait", "parameters": {"type": "object", "properties": {}}},
}


def written(protocol: ChatProtocol, *calls: ToolCall, text: str = "") -> tuple[int, ...]:
    """A tool call as the chat template writes it, without the stop token."""
    action = ToolCalls(calls, text) if calls else FinalAnswer(text)
    return protocol.completion_of([{"role": "user", "content": "?"}], action, (LOOK, WAIT))[1][:-1]


def test_a_call_of_an_offered_tool_is_admitted_as_the_template_writes_it(protocol: ChatProtocol) -> None:
    grammar = tool_call_grammar(protocol, (LOOK, WAIT))
    assert admits(protocol, grammar, written(protocol, ToolCall("c", "look", {"at": "the shelf", "times": 2})))
    assert admits(protocol, grammar, written(protocol, ToolCall("c", "wait", {})))


def test_what_a_grammar_admits_the_protocol_reads_as_that_call(protocol: ChatProtocol) -> None:
    completion = written(protocol, ToolCall("c", "look", {"at": "é\n"}))
    assert admits(protocol, tool_call_grammar(protocol, (LOOK,)), completion)
    action = protocol.parse(completion)
    assert isinstance(action, ToolCalls)
    assert action.calls[0].arguments == {"at": "é\n"}


@pytest.mark.parametrize(
    ("calls", "text"),
    [
        ((), "No."),
        ((ToolCall("c", "shout", {}),), ""),
        ((ToolCall("c", "look", {}),), ""),
        ((ToolCall("c", "look", {"at": 3}),), ""),
        ((ToolCall("c", "look", {"at": "x", "how": "closely"}),), ""),
        ((ToolCall("c", "wait", {}), ToolCall("d", "wait", {})), ""),
        ((ToolCall("c", "wait", {}),), "Let me wait."),
    ],
    ids=["an answer", "unknown tool", "missing", "wrong type", "unknown argument", "two calls", "text beside"],
)
def test_whatever_is_not_one_fitting_call_is_refused(
    protocol: ChatProtocol, calls: tuple[ToolCall, ...], text: str
) -> None:
    grammar = tool_call_grammar(protocol, (LOOK, WAIT))
    assert not admits(protocol, grammar, written(protocol, *calls, text=text))


def test_a_tools_own_definitions_are_still_found(protocol: ChatProtocol) -> None:
    parameters = {
        "type": "object",
        "properties": {"at": {"$ref": "#/$defs/place"}},
        "required": ["at"],
        "$defs": {"place": {"enum": ["shelf", "desk"]}},
    }
    tool: ToolSchema = {"type": "function", "function": {"name": "go", "parameters": parameters}}
    grammar = tool_call_grammar(protocol, (WAIT, tool))
    assert admits(protocol, grammar, written(protocol, ToolCall("c", "go", {"at": "desk"})))
    assert not admits(protocol, grammar, written(protocol, ToolCall("c", "go", {"at": "moon"})))


@pytest.mark.parametrize("name", ['a"b', "a\\b", "a b", "%json", "ünïcode"])
def test_a_tools_name_cannot_break_out_of_the_grammar(protocol: ChatProtocol, name: str) -> None:
    tool: ToolSchema = {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}
    grammar = tool_call_grammar(protocol, (tool,))
    token_ids = protocol.encode(f'<tool_call>\n{{"name": {json.dumps(name)}, "arguments": {{}}}}\n</tool_call>')
    assert admits(protocol, grammar, token_ids)


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        ({}, {"any": ["thing", None, 1.5]}),
        ({"type": "object"}, {}),
        ({"type": "array", "items": {"type": "integer"}, "minItems": 2}, [1, 2, 3]),
        ({"enum": ["a", "b"]}, "b"),
        ({"anyOf": [{"type": "null"}, {"const": 7}]}, 7),
        ({"type": "object", "properties": {"a b": {"type": "boolean"}}, "required": ["a b"]}, {"a b": True}),
    ],
)
def test_an_answer_that_fits_the_schema_is_admitted(protocol: ChatProtocol, schema: dict[str, Any], value: Any) -> None:
    assert admits(protocol, json_grammar(protocol, schema), protocol.encode(json.dumps(value)))


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        ({"type": "object"}, [1]),
        ({"type": "array", "items": {"type": "integer"}, "minItems": 2}, [1]),
        ({"enum": ["a", "b"]}, "c"),
        ({"type": "object", "properties": {"a": {}}, "required": ["a"]}, {"b": 1}),
    ],
)
def test_an_answer_that_does_not_fit_is_refused(protocol: ChatProtocol, schema: dict[str, Any], value: Any) -> None:
    assert not admits(protocol, json_grammar(protocol, schema), protocol.encode(json.dumps(value)))


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "circle"},
        {"type": 3},
        {"$ref": "#/nowhere"},
        {"properties": 3},
        {"type": "string", "pattern": "("},
        {"type": "integer", "minimum": 3, "maximum": 1},
        {"minItems": -1, "type": "array"},
        {"enum": []},
        {"type": "object", "properties": {"a": False}, "required": ["a"]},
    ],
)
def test_a_schema_that_no_answer_fits_is_a_grammar_error_in_one_line(
    protocol: ChatProtocol, schema: dict[str, Any]
) -> None:
    with pytest.raises(GrammarError) as caught:
        json_grammar(protocol, schema)
    message = str(caught.value)
    assert message
    assert "\n" not in message


def test_a_model_that_does_not_write_calls_as_json_objects_says_so() -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE.replace("else call.arguments | tojson", "else call.arguments | length")
    with pytest.raises(GrammarError, match="does not write tool calls as JSON objects"):
        tool_call_grammar(ChatProtocol(tokenizer), (LOOK,))


def test_a_schema_cannot_change_how_white_space_is_spelled(protocol: ChatProtocol) -> None:
    """The policy has learned one spelling; a client's `x-guidance` must not ask for another."""
    grammar = json_grammar(protocol, {"type": "object", "x-guidance": {"whitespace_flexible": True}})
    assert admits(protocol, grammar, protocol.encode('{"a": 1}'))
    assert not admits(protocol, grammar, protocol.encode('{ "a":1 }'))


def test_marks_within_an_argument_do_not_end_the_call(protocol: ChatProtocol) -> None:
    arguments = {"at": '"}}\n</tool_call>\\u0000'}
    completion = written(protocol, ToolCall("c", "look", arguments))
    assert admits(protocol, tool_call_grammar(protocol, (LOOK,)), completion)
    action = protocol.parse(completion)
    assert isinstance(action, ToolCalls)
    assert action.calls[0].arguments == arguments
