"""JSON schemas as a grammar should hold a small model to them: closed and bounded, unless they say otherwise.

By the letter, an object without `additionalProperties` takes any further key, and a number any number of digits: a
small model then invents keys, or writes digits, up to its token limit. Who writes `{"properties": {...}}` means those
keys; so here an object that lists its properties takes no others. It stays open where the schema opens it:
`additionalProperties`, `unevaluatedProperties`, `patternProperties`, or no list of properties at all.
"""

from __future__ import annotations

import re
from typing import Any

from policies.chat.argument_types import resolved

_OPENERS = ("additionalProperties", "unevaluatedProperties", "patternProperties")
_COMPOSERS = ("allOf", "anyOf", "oneOf")
_CONDITIONS = ("if", "then", "else", "not", "dependentSchemas")
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
_MAX_DEPTH = 40
"""References that lead deeper are left as they are: they go in a circle."""
_MOST_LOOKS = 50_000
"""So many parts are looked at: two references in each of forty parts make a billion."""

LARGEST_INTEGER = 10**18
LARGEST_NUMBER = 1e15
SMALLEST_FRACTION = 1e-9
"""A number whose schema bounds it in no way lies within these."""


class SchemaMaze(ValueError):
    """A schema whose parts refer to each other over and over: to follow them all would take for ever."""


def closed(schema: Any, *, is_bounded: bool = True) -> Any:
    """The schema, closed and bounded throughout; with `is_bounded` False, closed alone. Raises SchemaMaze."""
    return _Closing(schema, is_bounded).close(schema) if isinstance(schema, dict) else schema


class _Closing:
    def __init__(self, root: dict[str, Any], is_bounded: bool) -> None:
        self._root = root
        self._is_bounded = is_bounded
        self._looks_left = _MOST_LOOKS

    def close(self, schema: Any) -> Any:
        if not isinstance(schema, dict):
            return schema
        self._look()
        schema = {key: value for key, value in schema.items() if not _says_nothing_more(key, value, schema)}
        inner = {key: self._inner(key, value) for key, value in schema.items()}
        return self._with_own_keys(schema, _bounded(inner) if self._is_bounded else inner)

    def _inner(self, key: str, value: Any) -> Any:
        match key, value:
            case (("properties" | "$defs" | "definitions"), dict()):
                return {name: self.close(part) for name, part in value.items()}
            case (("items" | "contains" | "additionalProperties"), dict()):
                return self.close(value)
            case "patternProperties", dict():
                return {pattern: self.close(part) for pattern, part in value.items()}
            case "prefixItems", list():
                return [self.close(part) for part in value]
        return value

    def _with_own_keys(self, schema: dict[str, Any], inner: dict[str, Any]) -> dict[str, Any]:
        """Close an object's own keys. Parts that are put together, as by `allOf`, are closed as the whole they make."""
        parts = [key for key in (*_COMPOSERS, *_CONDITIONS) if key in schema]
        if "$ref" in schema and not parts and "properties" not in schema:
            return inner  # the target is closed where it is defined
        is_union_alone = set(parts) <= {"anyOf", "oneOf"} and "properties" not in schema
        if is_union_alone:
            return {**inner, **{key: [self.close(part) for part in _list_in(schema, key)] for key in parts}}
        names = self._names(schema, _MAX_DEPTH)
        if names is None:
            return inner
        open_parts = {key: [self._open(part) for part in schema[key]] for key in parts if isinstance(schema[key], list)}
        if "$ref" in schema:
            open_parts["allOf"] = [*open_parts.get("allOf", ()), self._open({"$ref": schema["$ref"]})]
            inner = {key: value for key, value in inner.items() if key != "$ref"}
        properties = {**{name: {} for name in names}, **inner.get("properties", {})}
        return {**inner, **open_parts, "properties": properties, "additionalProperties": False}

    def _open(self, part: Any) -> Any:
        """A part of a composed schema: its reference is put in its place, for the target stands closed elsewhere."""
        if not isinstance(part, dict):
            return part
        target = resolved(part, self._root) if "$ref" in part else part
        return {key: self._inner(key, value) for key, value in target.items()}

    def _look(self) -> None:
        self._looks_left -= 1
        if self._looks_left < 0:
            raise SchemaMaze("the schema's parts refer to each other over and over")

    def _names(self, schema: Any, depth: int) -> list[str] | None:
        """The keys that a schema and its parts name; None where one of them is open, or none names any."""
        self._look()
        if depth <= 0 or not isinstance(schema, dict):
            return None
        if any(key in schema for key in _OPENERS):
            return None
        is_listed = isinstance(schema.get("properties"), dict)
        names = [*(schema["properties"] if is_listed else ()), *_list_in(schema, "required")]
        parts = [part for key in _COMPOSERS for part in _list_in(schema, key)]
        parts += [resolved(schema, self._root)] if "$ref" in schema else []
        parts += [schema[key] for key in ("if", "then", "else") if isinstance(schema.get(key), dict)]
        for part in parts:
            if isinstance(part, dict) and any(key in resolved(part, self._root) for key in _OPENERS):
                return None
            if (inner := self._names(part, depth - 1)) is not None:
                names, is_listed = names + inner, True
        return list(dict.fromkeys(names)) if is_listed else None


def _says_nothing_more(key: str, value: Any, schema: dict[str, Any]) -> bool:
    """Whether a keyword that no grammar holds to asks for what is so anyhow: Zod writes such of records and mails."""
    match key:
        case "propertyNames":
            return value in (True, {}, {"type": "string"})
        case "uniqueItems":
            return value is False
        case "pattern":  # of a format that stands beside it
            return "format" in schema and looks_around(value)
    return False


def looks_around(pattern: Any) -> bool:
    """Whether a pattern looks ahead or behind, which no grammar can."""
    return isinstance(pattern, str) and re.search(r"\(\?<?[=!]", pattern) is not None


def _list_in(schema: dict[str, Any], key: str) -> list[Any]:
    """The list under a key; empty where the schema is wrong there, which llguidance says."""
    value = schema.get(key)
    return value if isinstance(value, list) else []


def _bounded(schema: dict[str, Any]) -> dict[str, Any]:
    kind = schema.get("type")
    kinds = kind if isinstance(kind, list) else [kind]
    if not {"integer", "number"} & {*map(str, kinds)} or any(key in schema for key in (*_BOUNDS, "enum", "const")):
        return schema
    if "number" not in kinds:
        return {**schema, "minimum": -LARGEST_INTEGER, "maximum": LARGEST_INTEGER}
    return {**schema, "minimum": -LARGEST_NUMBER, "maximum": LARGEST_NUMBER, "multipleOf": SMALLEST_FRACTION}
