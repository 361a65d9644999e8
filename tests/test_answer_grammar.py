"""Grammars made from schemas and tools: what they admit, what they refuse, and which schemas cannot become one."""

from __future__ import annotations

import json
from typing import Any

import pytest

from policies.chat.chat_protocol import ChatProtocol
from policies.chat.grammars import (
    GrammarError,
    call_or_answer_grammar,
    json_grammar,
    no_call_grammar,
    tool_call_grammar,
)
from policies.novice.tokenizer import CHAT_TEMPLATE, build_tokenizer
from policies.types import FinalAnswer, ToolCall, ToolCalls, ToolSchema
from tests.families import FAMILIES, WITH_JSON_CALLS, WITH_TOOLS, protocol_of
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


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "array", "uniqueItems": True}, 'Unimplemented keys: ["uniqueItems"]'),
        ({"type": "string", "pattern": "^(?!x)"}, "look-around, including look-ahead and look-behind"),
        ({"type": "object", "required": None}, "Expected array for 'required', got null"),
    ],
)
def test_what_no_answer_can_be_held_to_is_named(protocol: ChatProtocol, schema: dict[str, Any], words: str) -> None:
    with pytest.raises(GrammarError, match="no answer can be held to this schema") as caught:
        json_grammar(protocol, schema)
    assert words in str(caught.value)
    assert "%json" not in str(caught.value)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "propertyNames": {"type": "string"}, "additionalProperties": {"type": "integer"}},
        {"type": "object", "properties": {"a": {"type": "array", "items": {"type": "integer"}, "uniqueItems": False}}},
        {"type": "object", "properties": {"a": {"type": "string", "format": "email", "pattern": r"^(?!\.).+@.+$"}}},
    ],
)
def test_what_asks_for_nothing_more_is_no_obstacle(protocol: ChatProtocol, schema: dict[str, Any]) -> None:
    """Zod's records and mail addresses made every structured answer a 400."""
    assert json_grammar(protocol, schema)


@pytest.mark.parametrize(
    "more",
    [
        {"uniqueItems": True, "type": "array"},
        {"type": "object", "propertyNames": {"pattern": "^x"}},
        {"not": {"type": "string"}},
        {"type": "string", "pattern": "^(?!x)"},
        {"if": {"type": "string"}, "then": {"minLength": 2}},
    ],
)
def test_a_call_is_required_of_tools_whose_parameters_say_what_no_grammar_can(
    protocol: ChatProtocol, more: dict[str, Any]
) -> None:
    """smolagents requires a call of every step: a set in one tool's parameters stopped the whole agent."""
    parameters = {"type": "object", "properties": {"at": {"enum": ["door"]}, "more": more}, "required": ["at"]}
    function = {"name": "look", "description": "", "parameters": parameters}
    grammar = tool_call_grammar(protocol, ({"type": "function", "function": function},))
    assert '"door"' in grammar


def test_a_tool_whose_parameters_are_no_schema_is_named(protocol: ChatProtocol) -> None:
    function = {"name": "look", "description": "", "parameters": {"type": "circle"}}
    with pytest.raises(GrammarError, match="no call of look can be held to its parameters: Invalid type: circle"):
        tool_call_grammar(protocol, ({"type": "function", "function": function},))


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


# ------------------------------------------------------------------------- every family's way of writing turns

CITY: dict[str, Any] = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}


def says(name: str, action: ToolCalls | FinalAnswer) -> tuple[int, ...]:
    """What a family's policy would write, without the stop token."""
    protocol = protocol_of(name)
    text = protocol.written([{"role": "user", "content": "?"}], action).removesuffix(protocol.turn_end)
    return protocol.encode(text.replace(', "id": "abcdefghi"', ""))


def call_of(name: str, *arguments: dict[str, Any], text: str = "") -> ToolCalls:
    thought = "Hm." if FAMILIES[name].thinks else ""
    return ToolCalls(tuple(ToolCall("abcdefghi", "look", a) for a in arguments), text, thought)


def answer_of(name: str, text: str) -> FinalAnswer:
    return FinalAnswer(text, "Hm." if FAMILIES[name].thinks else "")


@pytest.mark.parametrize("name", WITH_JSON_CALLS)
def test_with_tools_and_a_schema_it_is_a_call_or_an_answer_that_fits(name: str) -> None:
    protocol = protocol_of(name)
    grammar = call_or_answer_grammar(protocol, (LOOK, WAIT), CITY)
    assert grammar is not None
    assert admits(protocol, grammar, says(name, call_of(name, {"at": "é", "times": 2})))
    assert admits(protocol, grammar, says(name, answer_of(name, '{"city": "Oslo"}')))
    assert not admits(protocol, grammar, says(name, answer_of(name, '{"town": "Oslo"}')))
    assert not admits(protocol, grammar, says(name, answer_of(name, "Oslo.")))
    assert not admits(protocol, grammar, says(name, call_of(name, {"on": "x"})))


@pytest.mark.parametrize("name", WITH_JSON_CALLS)
def test_without_a_schema_it_is_any_answer_or_at_most_one_call(name: str) -> None:
    protocol, family = protocol_of(name), FAMILIES[name]
    grammar = call_or_answer_grammar(protocol, (LOOK, WAIT))
    if grammar is None:
        assert family.max_calls == 1
        return
    assert admits(protocol, grammar, says(name, answer_of(name, "Oslo.\nOr not? {}")))
    assert admits(protocol, grammar, says(name, call_of(name, {"at": "x"})))
    if family.max_calls > 1:
        assert not admits(protocol, grammar, says(name, call_of(name, {"at": "x"}, {"at": "y"})))
    if family.has_text_beside_calls and family.has_call_tokens:
        assert admits(protocol, grammar, says(name, call_of(name, {"at": "x"}, text="Let me look.")))


@pytest.mark.parametrize("name", WITH_TOOLS)
def test_a_call_can_be_forbidden_though_tools_are_told(name: str) -> None:
    protocol = protocol_of(name)
    grammar = no_call_grammar(protocol)
    assert grammar is not None
    for text in ("Oslo.", "", "a < b, [1] {2}\n\n3", '{"name": "Bob", "age": 3}', "<tool"):
        assert admits(protocol, grammar, says(name, answer_of(name, text))), text
    assert not admits(protocol, grammar, says(name, call_of(name, {"at": "x"})))
    if FAMILIES[name].has_text_beside_calls:
        assert not admits(protocol, grammar, says(name, call_of(name, {"at": "x"}, text="Let me look.")))


@pytest.mark.parametrize("name", WITH_TOOLS)
def test_what_is_admitted_where_calls_are_forbidden_is_read_as_no_call(name: str) -> None:
    """Not even one that is spelled in its own way."""
    protocol = protocol_of(name)
    grammar = no_call_grammar(protocol)
    assert grammar is not None
    template = protocol.decode(says(name, call_of(name, {"at": "x"})))
    for text in (template, template.replace(" ", ""), template.replace(": ", " : "), f"Well.{template}"):
        token_ids = protocol.encode(text)
        if isinstance(protocol.parse(token_ids, tools=(LOOK,)), ToolCalls):
            assert not admits(protocol, grammar, token_ids), text


def test_where_call_and_answer_are_one_json_value_their_definitions_stay_apart() -> None:
    protocol = protocol_of("llama")
    parameters = {"type": "object", "properties": {"at": {"$ref": "#/$defs/place"}}, "required": ["at"]}
    tool: ToolSchema = {
        "type": "function",
        "function": {"name": "look", "parameters": {**parameters, "$defs": {"place": {"enum": ["shelf"]}}}},
    }
    schema = {**parameters, "$defs": {"place": {"enum": ["moon"]}}}
    grammar = call_or_answer_grammar(protocol, (tool,), schema)
    assert grammar is not None
    assert admits(protocol, grammar, says("llama", call_of("llama", {"at": "shelf"})))
    assert not admits(protocol, grammar, says("llama", call_of("llama", {"at": "moon"})))
    assert admits(protocol, grammar, says("llama", FinalAnswer('{"at": "moon"}')))
    assert not admits(protocol, grammar, says("llama", FinalAnswer('{"at": "shelf"}')))


def test_a_model_without_words_for_calls_needs_no_grammar_against_them() -> None:
    assert no_call_grammar(protocol_of("gemma3")) is None


def test_calls_in_xml_can_be_forbidden_but_not_required() -> None:
    with pytest.raises(GrammarError, match="does not write tool calls as JSON objects"):
        call_or_answer_grammar(protocol_of("qwen3-coder"), (LOOK,))


def test_a_tool_without_parameters_takes_none(protocol: ChatProtocol) -> None:
    tool: ToolSchema = {"type": "function", "function": {"name": "go"}}
    grammar = tool_call_grammar(protocol, (tool,))
    assert admits(protocol, grammar, written(protocol, ToolCall("c", "go", {})))
    assert not admits(protocol, grammar, written(protocol, ToolCall("c", "go", {"fast": True})))
