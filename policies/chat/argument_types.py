"""The value that an argument's bare text stands for, by the schema of its tool.

Models that write calls in XML write every argument as bare text: `2` may be a number or a string. Only the tool's JSON
schema tells which. Where several types are allowed, the first that fits is taken; a text that none of them fits stays
the text that it is, for the tool to refuse. Covered: `type`, `enum`, `const`, `nullable`, `anyOf`, `oneOf`, `allOf`
and `$ref` into the same schema.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

_MAX_REFERENCES = 20
"""A chain of references longer than this is a circle."""

_WORDS = {"true": True, "false": False, "null": None, "none": None}
"""As JSON and as Python write them: chat templates do either."""


def typed_arguments(arguments: dict[str, Any], parameters: Any) -> dict[str, Any]:
    """Arguments whose bare texts became values. `parameters` is the JSON schema of the tool's arguments."""
    properties = resolved(parameters, parameters).get("properties")
    if not isinstance(properties, dict):
        return arguments
    return {
        key: typed(value, properties[key], parameters) if isinstance(value, str) and key in properties else value
        for key, value in arguments.items()
    }


def typed(text: str, schema: Any, root: Any) -> Any:
    """The value that `text` stands for. `root` is the schema that references point into."""
    choices = list(_choices(schema, root, _MAX_REFERENCES))
    if not choices:  # anything goes: what can be read as JSON is no string
        return _json_or_text(text)
    # A missing value comes first: "null" is no good string, where both are allowed.
    for choice in sorted(choices, key=lambda choice: choice != "null"):
        fits, value = _as(text, choice)
        if fits:
            return value
    return text


def resolved(schema: Any, root: Any) -> dict[str, Any]:
    """A schema with its own reference followed; empty where there is none, or it leads nowhere."""
    for _ in range(_MAX_REFERENCES):
        if not isinstance(schema, dict):
            return {}
        if "$ref" not in schema:
            return schema
        schema = _target(schema["$ref"], root)
    return {}


def _target(reference: Any, root: Any) -> Any:
    if not isinstance(reference, str) or not reference.startswith("#"):
        return None
    place = root
    for step in reference[1:].strip("/").split("/") if reference != "#" else ():
        key = step.replace("~1", "/").replace("~0", "~")
        place = place.get(key) if isinstance(place, dict) else None
    return place


def _choices(schema: Any, root: Any, depth: int) -> Iterator[str | list[Any]]:
    """The types that a schema allows, in its order: names of JSON types, or the list of an enum's values."""
    schema = resolved(schema, root)
    if depth <= 0:
        return
    if "const" in schema:
        yield [schema["const"]]
    elif isinstance(schema.get("enum"), list):
        yield schema["enum"]
    elif declared := schema.get("type"):
        yield from (declared if isinstance(declared, list) else [declared])
    else:
        for union in ("anyOf", "oneOf"):
            for choice in schema.get(union) or ():
                yield from _choices(choice, root, depth - 1)
        for part in schema.get("allOf") or ():
            if choices := list(_choices(part, root, depth - 1)):
                yield from choices
                break
    if schema.get("nullable"):
        yield "null"


def _as(text: str, choice: str | list[Any]) -> tuple[bool, Any]:
    """Whether the text stands for a value of this type, and the value."""
    if isinstance(choice, list):
        values = [value for value in choice if _spells(text, value)]
        return bool(values), values[0] if values else None
    if choice == "string":
        return True, text
    value = _json_or_text(text)
    kinds: dict[str, type | tuple[type, ...]] = {
        "integer": int, "number": (int, float), "boolean": bool, "object": dict, "array": list, "null": type(None),
    }  # fmt: skip
    is_bool = isinstance(value, bool)
    fits = isinstance(value, kinds.get(choice, ())) and (is_bool == (choice == "boolean"))
    return fits, value


def _spells(text: str, value: Any) -> bool:
    if isinstance(value, str):
        return text == value
    read = _json_or_text(text)
    return type(read) is type(value) and read == value


def _json_or_text(text: str) -> Any:
    """The text read as JSON, or as a word of Python's; the text itself where it is neither."""
    word = text.strip()
    if word.lower() in _WORDS:
        return _WORDS[word.lower()]
    try:
        return json.loads(word, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return text


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON")
