"""Types of parameters as Python, xLAM, Gemini and ToolBench write them, as JSON schemas."""

from __future__ import annotations

from typing import Any

TYPES = {
    "str": "string", "string": "string", "text": "string", "int": "integer", "integer": "integer", "long": "integer",
    "float": "number", "double": "number", "number": "number", "bool": "boolean", "boolean": "boolean",
    "list": "array", "array": "array", "tuple": "array", "set": "array", "sequence": "array", "dict": "object",
    "object": "object", "mapping": "object", "null": "null", "none": "null", "nonetype": "null",
}  # fmt: skip
"""JSON schema's types by their names in small letters."""


def schema_of_type(written: str) -> dict[str, Any]:
    """A JSON schema of a type's text: `List[List[int]]`, `Union[str, int]`, `Optional[str]`, `str, optional`, `STRING`.

    A text of none of these forms stays what it was written as; `Any` is a schema that allows anything.
    """
    plain = written.strip()
    if plain.lower().endswith("optional"):
        plain = plain[: -len("optional")].strip().rstrip(",").strip()
    if plain.lower() in ("any", "type_unspecified"):
        return {}
    alternatives = _split(plain, "|")
    if len(alternatives) > 1:
        return _one_of(alternatives, written)
    base, inner = _parted(plain)
    if base == "optional" and inner:
        return schema_of_type(inner)
    if base == "union" and inner:
        return _one_of(_split(inner, ","), written)
    json_type = TYPES.get(base)
    if json_type is None:
        return {"type": written}
    within = [schema_of_type(each) for each in _split(inner, ",") if each.strip() != "..."]
    if json_type == "array" and within and all(each == within[0] for each in within):
        return {"type": "array", "items": within[0]}
    if json_type == "object" and len(within) == 2:
        return {"type": "object", "additionalProperties": within[1]}
    return {"type": json_type}


def _one_of(written: list[str], whole: str) -> dict[str, Any]:
    schemas = [schema_of_type(each) for each in written]
    if any(set(schema) != {"type"} or schema["type"] not in TYPES.values() for schema in schemas):
        known = all(schema.get("type") in TYPES.values() for schema in schemas)
        return {"anyOf": schemas} if known else {"type": whole}
    types = list(dict.fromkeys(schema["type"] for schema in schemas))
    return {"type": types[0] if len(types) == 1 else types}


def _parted(plain: str) -> tuple[str, str]:
    """(`list`, `int`) of `List[int]`; the second is empty where nothing stands in brackets."""
    base, bracket, inner = plain.partition("[")
    return base.strip().lower().removeprefix("typing."), inner.strip().removesuffix("]") if bracket else ""


def _split(text: str, mark: str) -> list[str]:
    """The parts between a mark, where it stands outside of brackets."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter == "[") - (letter == "]")
        if letter == mark and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts if part.strip()]
