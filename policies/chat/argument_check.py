"""Whether a call's arguments fit its tool's JSON schema, in words that a person can act on.

Objects that list their properties are closed, as in `closed_schemas`. Covered: `type`, `enum`, `const`, `nullable`,
`properties`, `required`, `additionalProperties`, `items`, `prefixItems`, the bounds of numbers, of lengths and of
lists, `anyOf`, `oneOf` (as `anyOf`), `allOf`, and `$ref` into the same schema. Not covered, and let through:
conditions, `not`, `pattern`, `format` and `multipleOf`. A library was refused: a client's schema must not make the
server match patterns or fetch references.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from policies.chat.argument_types import resolved
from policies.chat.closed_schemas import SchemaMaze, closed

_MOST_LOOKS = 10_000
"""So many pairs of a value and a schema are compared for one call."""

_KINDS: dict[str, type | tuple[type, ...]] = {
    "string": str, "integer": int, "number": (int, float), "boolean": bool, "object": dict, "array": list,
    "null": type(None),
}  # fmt: skip

_BOUNDS = (
    ("minimum", lambda value, bound: value >= bound, "must be at least"),
    ("maximum", lambda value, bound: value <= bound, "must be at most"),
    ("exclusiveMinimum", lambda value, bound: value > bound, "must be above"),
    ("exclusiveMaximum", lambda value, bound: value < bound, "must be below"),
)


def argument_problem(arguments: dict[str, Any], parameters: Any) -> str | None:
    """What is wrong with a call's arguments; None where they fit. `parameters` is the tool's JSON schema."""
    try:
        schema = closed(parameters, is_bounded=False)
        return next(_Check(schema).problems(arguments, schema, ""), None)
    except (RecursionError, TypeError, SchemaMaze):  # a maze, or no JSON schema: it says nothing
        return None


class _Check:
    def __init__(self, root: Any) -> None:
        self._root = root
        self._looks_left = _MOST_LOOKS

    def problems(self, value: Any, schema: Any, where: str) -> Iterator[str]:
        """What is wrong with a value; `where` is its path of names and places, empty for the arguments as a whole."""
        self._looks_left -= 1
        if self._looks_left < 0:
            raise SchemaMaze("the schema's parts refer to each other over and over")
        if schema is False:
            yield f"{_named(where)} is not taken"
        if not isinstance(schema, dict) or (value is None and schema.get("nullable")):
            return
        if "$ref" in schema:
            yield from self.problems(value, resolved(schema, self._root), where)
        yield from _of_kind(value, schema, where)
        yield from self._of_parts(value, schema, where)
        match value:
            case dict():
                yield from self._of_object(value, schema, where)
            case list():
                yield from self._of_list(value, schema, where)

    def _of_parts(self, value: Any, schema: dict[str, Any], where: str) -> Iterator[str]:
        for part in _list_in(schema, "allOf"):
            yield from self.problems(value, part, where)
        for union in ("anyOf", "oneOf"):
            found = [next(self.problems(value, part, where), None) for part in _list_in(schema, union)]
            if found and None not in found:
                yield str(found[0]) if len(found) == 1 else f"{found[0]} (or: {found[-1]})"

    def _of_object(self, value: dict[str, Any], schema: dict[str, Any], where: str) -> Iterator[str]:
        properties = schema.get("properties")
        properties = properties if isinstance(properties, dict) else {}
        for name in _list_in(schema, "required"):
            if name not in value:
                yield f"{_named(_within(where, name))} is missing"
        others = schema.get("additionalProperties", True) if "patternProperties" not in schema else True
        for name, each in value.items():
            if name not in properties and others is False:
                yield f"{_named(_within(where, name))} is not taken: there are {', '.join(properties) or 'none'}"
            yield from self.problems(each, properties.get(name, others), _within(where, name))

    def _of_list(self, value: list[Any], schema: dict[str, Any], where: str) -> Iterator[str]:
        first = _list_in(schema, "prefixItems")
        for place, each in enumerate(value):
            part = first[place] if place < len(first) else schema.get("items", True)
            yield from self.problems(each, part, _within(where, place))


def _of_kind(value: Any, schema: dict[str, Any], where: str) -> Iterator[str]:
    kinds = schema.get("type")
    kinds = [
        kind for kind in (kinds if isinstance(kinds, list) else [kinds]) if isinstance(kind, str) and kind in _KINDS
    ]
    if kinds and not any(_is(value, kind) for kind in kinds):
        yield f"{_named(where)} must be {' or '.join(kinds)}, not {_kind_of(value)}"
    values = [schema["const"]] if "const" in schema else _list_in(schema, "enum")
    if values and not any(_equal(value, each) for each in values):
        yield f"{_named(where)} must be {' or '.join(map(repr, values))}, not {value!r:.100}"
    for name, fits, words in _BOUNDS:
        if _is(value, "number") and _is(bound := schema.get(name), "number") and not fits(value, bound):
            yield f"{_named(where)} {words} {bound}, not {value}"
    what = ("minLength", "maxLength") if isinstance(value, str) else ("minItems", "maxItems")
    if isinstance(value, str | list):
        least, most = (bound if _is(bound := schema.get(name), "integer") else None for name in what)
        if (least is not None and len(value) < least) or (most is not None and len(value) > most):
            yield f"{_named(where)} has the length {len(value)}, outside its bounds"


def _is(value: Any, kind: str) -> bool:
    """By JSON's types: true is no number, and 2.0 is an integer."""
    if kind in ("integer", "number") and isinstance(value, bool):
        return False
    return isinstance(value, _KINDS[kind]) or (kind == "integer" and isinstance(value, float) and value.is_integer())


def _kind_of(value: Any) -> str:
    return next(kind for kind in ("null", "boolean", *_KINDS) if _is(value, kind))


def _equal(one: Any, other: Any) -> bool:
    return one == other and isinstance(one, bool) == isinstance(other, bool)


def _list_in(schema: dict[str, Any], key: str) -> list[Any]:
    value = schema.get(key)
    return value if isinstance(value, list) else []


def _within(where: str, name: Any) -> str:
    return f"{where}.{name}" if where else f"{name}"


def _named(where: str) -> str:
    return f"argument {where!r}" if where else "the whole of the arguments"
