"""A schema closes what it does not open: which keys and numbers a grammar lets through."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from typing import Any

import pytest

from policies.chat.closed_schemas import SchemaMaze, closed
from policies.chat.grammars import GrammarError, json_grammar
from tests.families import protocol_of
from tests.grammar_checks import admits

INT: dict[str, Any] = {"type": "integer"}
A, B = {"properties": {"a": INT}, "required": ["a"]}, {"properties": {"b": {"type": "string"}}}


def is_admitted(schema: dict[str, Any], text: str) -> bool:
    protocol = protocol_of("smollm2")
    return admits(protocol, json_grammar(protocol, schema), protocol.encode(text))


@pytest.mark.parametrize(
    ("schema", "fits", "does_not"),
    [
        (A, {"a": 1}, {"a": 1, "z": 1}),
        ({"type": "object", "properties": {}}, {}, {"z": 1}),
        ({"type": "object", "properties": {"in": A}}, {"in": {"a": 1}}, {"in": {"a": 1, "z": 1}}),
        ({"type": "array", "items": A}, [{"a": 1}], [{"a": 1, "z": 1}]),
        ({"$ref": "#/$defs/A", "$defs": {"A": A}}, {"a": 1}, {"a": 1, "z": 1}),
        ({"properties": {"in": {"$ref": "#/$defs/A"}}, "$defs": {"A": A}}, {"in": {"a": 1}}, {"in": {"a": 1, "z": 1}}),
        ({"anyOf": [A, B]}, {"b": "x"}, {"z": 1}),
        ({"properties": {"in": {"anyOf": [A, {"type": "null"}]}}}, {"in": {"a": 1}}, {"in": {"a": 1, "z": 1}}),
        ({"allOf": [A, B]}, {"a": 1, "b": "x"}, {"a": 1, "b": "x", "z": 1}),
        ({"allOf": [{"$ref": "#/$defs/A"}, B], "$defs": {"A": A}}, {"a": 1, "b": "x"}, {"a": 1, "z": 1}),
        ({"properties": {"k": INT}, "anyOf": [A, {**B, "required": ["b"]}]}, {"k": 1, "b": "x"}, {"a": 1, "z": 1}),
        ({"properties": {"a": INT}, "required": ["q"]}, {"a": 1, "q": 2}, {"a": 1, "q": 2, "z": 3}),
        ({"properties": {"next": {"$ref": "#"}}}, {"next": {"next": {}}}, {"next": {"z": 1}}),
    ],
)
def test_an_object_takes_the_keys_it_lists_and_no_others(schema: dict[str, Any], fits: Any, does_not: Any) -> None:
    assert is_admitted(schema, json.dumps(fits))
    assert not is_admitted(schema, json.dumps(does_not))


@pytest.mark.parametrize(
    "schema",
    [
        {**A, "additionalProperties": True},
        {**A, "additionalProperties": INT},
        {**A, "patternProperties": {"^z": INT}},
        {"type": "object"},
        {},
        {"allOf": [A, {**B, "additionalProperties": True}]},
    ],
)
def test_a_schema_that_is_open_stays_open(schema: dict[str, Any]) -> None:
    assert is_admitted(schema, '{"a": 1, "z": 1}')


@pytest.mark.parametrize(
    ("schema", "fits", "does_not"),
    [
        (INT, "-123456789", "1" * 40),
        ({"type": "number"}, "3.25", "1." + "3" * 40),
        ({"type": "number"}, "-12345678.000001", "1" * 40),
        ({"type": ["integer", "null"]}, "null", "1" * 40),
        ({**INT, "maximum": 10**15}, "1" * 15, "1" * 40),
    ],
)
def test_a_number_ends_some_time(schema: dict[str, Any], fits: str, does_not: str) -> None:
    assert is_admitted(schema, fits)
    assert not is_admitted(schema, does_not)


@pytest.mark.parametrize("schema", [{"properties": 3}, {"anyOf": 3}, {"required": "a", "properties": {}}, {"$ref": 7}])
def test_a_schema_that_is_wrong_is_left_to_whoever_says_so(schema: dict[str, Any]) -> None:
    closed(schema)


def _diamonds(number: int) -> dict[str, Any]:
    """Each part is put together of the next one, twice."""
    parts = {f"d{n}": {"allOf": [{"$ref": f"#/$defs/d{n + 1}"}] * 2} for n in range(number)}
    return {"allOf": [{"$ref": "#/$defs/d0"}], "$defs": {**parts, f"d{number}": {"properties": {"a": {}}}}}


@pytest.mark.parametrize(
    "maze",
    [{"allOf": [{"$ref": "#"}] * 3}, _diamonds(25), {"anyOf": [{"$ref": "#"}] * 4, "properties": {"a": {}}}],
    ids=["circle", "diamonds", "union"],
)
def test_a_maze_is_given_up_soon(maze: dict[str, Any]) -> None:
    began = time.process_time()
    with suppress(SchemaMaze):
        closed(maze)
    assert time.process_time() - began < 5.0
    with pytest.raises(SchemaMaze):
        closed({"allOf": [{"$ref": "#"}] * 3})


def test_a_part_that_holds_itself_in_a_whole_is_a_schema_that_no_grammar_is_made_of() -> None:
    circle = {"properties": {"a": {"allOf": [{"$ref": "#"}, {"$ref": "#"}], "properties": {}}}}
    with pytest.raises(GrammarError, match="refer to each other"):
        json_grammar(protocol_of("smollm2"), circle)
