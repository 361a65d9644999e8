"""What nobody should learn of an expert: calls of no tool, silence; and of a person, arguments that no tool takes."""

from __future__ import annotations

from typing import Any

import pytest

from policies.chat.argument_check import argument_problem
from policies.chat.learnable import unfit_arguments, unlearnable
from policies.types import Action, FinalAnswer, MalformedAction, ToolCall, ToolCalls, ToolSchema

ORDER: dict[str, Any] = {
    "type": "object",
    "properties": {
        "item": {"type": "string", "minLength": 1},
        "number": {"type": "integer", "minimum": 1, "maximum": 9},
        "colour": {"enum": ["red", "blue"]},
        "price": {"anyOf": [{"type": "number"}, {"type": "null"}]},
        "to": {"$ref": "#/$defs/place"},
        "notes": {"type": "array", "items": {"type": "string"}, "maxItems": 2},
        "gift": {"type": "boolean"},
        "options": {"type": "object"},
        "floor": {"type": "integer", "nullable": True},
    },
    "required": ["item"],
    "$defs": {"place": {"type": "object", "properties": {"street": {"type": "string"}}, "required": ["street"]}},
}


@pytest.mark.parametrize(
    "arguments",
    [
        {"item": "chair"},
        {"item": "chair", "number": 9, "colour": "red", "price": None, "to": {"street": "x"}, "notes": ["a", "b"]},
        {"item": "chair", "price": 2, "gift": True, "options": {"any": ["thing"]}, "floor": None, "number": 2.0},
    ],
)
def test_arguments_that_fit_are_taken(arguments: dict[str, Any]) -> None:
    assert argument_problem(arguments, ORDER) is None


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"item": None}, "argument 'item' must be string, not null"),
        ({"item": 3}, "argument 'item' must be string, not integer"),
        ({"item": ""}, "argument 'item' has the length 0, outside its bounds"),
        ({"number": "2"}, "argument 'number' must be integer, not string"),
        ({"number": True}, "argument 'number' must be integer, not boolean"),
        ({"number": 1.5}, "argument 'number' must be integer, not number"),
        ({"number": 0}, "argument 'number' must be at least 1, not 0"),
        ({"number": 10}, "argument 'number' must be at most 9, not 10"),
        ({"colour": "green"}, "argument 'colour' must be 'red' or 'blue', not 'green'"),
        ({"price": "cheap"}, "must be number, not string (or: argument 'price' must be null, not string)"),
        ({"to": {}}, "argument 'to.street' is missing"),
        ({"to": {"street": "x", "town": "y"}}, "argument 'to.town' is not taken: there are street"),
        ({"notes": ["a", 1]}, "argument 'notes.1' must be string, not integer"),
        ({"notes": ["a", "b", "c"]}, "argument 'notes' has the length 3"),
        ({"size": 3}, "argument 'size' is not taken: there are item, number"),
    ],
    ids=repr,
)
def test_arguments_that_do_not_fit_are_told_by_their_place(wrong: dict[str, Any], words: str) -> None:
    assert words in (argument_problem({"item": "chair"} | wrong, ORDER) or "")


def test_a_required_argument_that_is_left_out_is_missing() -> None:
    assert argument_problem({}, ORDER) == "argument 'item' is missing"


@pytest.mark.parametrize(
    "schema",
    [None, {}, {"$ref": "#"}, {"$ref": "https://example.org/schema"}, {"allOf": [{"$ref": "#"}, {"$ref": "#"}]},
     {"properties": "?", "required": 7, "type": {}, "enum": 3, "anyOf": {}, "minimum": "?"},
     {"type": "object", "properties": {}, "additionalProperties": True},
     {"allOf": [{"properties": {"a": {}}, "required": ["a"]}, {"properties": {"b": {}}}]}],
)  # fmt: skip
def test_a_schema_that_says_nothing_goes_in_a_circle_or_is_no_schema_refuses_nothing(schema: Any) -> None:
    assert argument_problem({"a": 1, "b": 2}, schema) is None


def test_large_numbers_are_not_bounded_as_a_grammar_bounds_them() -> None:
    schema = {"type": "object", "properties": {"id": {"type": "integer"}}}
    assert argument_problem({"id": 1_900_000_000_000_000_000}, schema) is None


TOOL: ToolSchema = {"type": "function", "function": {"name": "order", "parameters": ORDER}}


@pytest.mark.parametrize(
    ("action", "words"),
    [
        (
            ToolCalls((ToolCall("c", "order", {}), ToolCall("d", "orders", {}))),
            "calls 'orders', which is not",
        ),
        (FinalAnswer(" \n"), "says nothing and calls nothing"),
        (FinalAnswer("", "A thought."), "says nothing and calls nothing"),
        (MalformedAction("<tool_call>", "no name"), "cannot be read as an action: no name"),
        (ToolCalls((ToolCall("c", "order", {}),)), None),
        (FinalAnswer("Yes."), None),
    ],
)
def test_what_does_nothing_that_its_tools_know_is_not_learned(action: Action, words: str | None) -> None:
    told = unlearnable(action, [TOOL])
    assert told is None if words is None else words in (told or "")


def test_without_tools_nothing_tells_which_there_were() -> None:
    assert unlearnable(ToolCalls((ToolCall("c", "orders", {}),)), []) is None


def test_the_first_call_that_its_tool_would_not_take_is_named() -> None:
    calls = (ToolCall("c", "order", {"item": "a"}), ToolCall("d", "order", {"item": 1}))
    assert unfit_arguments(ToolCalls(calls), [TOOL]) == (
        "calls order wrongly: argument 'item' must be string, not integer"
    )
    assert unfit_arguments(ToolCalls(calls[:1]), [TOOL]) is None
