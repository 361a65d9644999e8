"""Files that a user brings, as they are published: a JSON list or a JSON object a line, each row of one declared shape.

Every refusal is a ValueError of one sentence: it names the file, the row (from 1; its id if it has one) and the field.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

_HELP = "docs/WORLDS.md names the files that can be read"
_WORDS = {
    "string_type": "a text",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a JSON object",
    "model_type": "a JSON object",
    "int_type": "a whole number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "json_type": "a text of JSON",
    "json_invalid": "a text of JSON",
}
"""What pydantic's error types ask for."""


def _writable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("has half a character (a lone surrogate)") from None
    return text


Text = Annotated[str, AfterValidator(_writable)]
"""A text that UTF-8 can write; JSON can hold others."""


class Published(BaseModel):
    """One row. Types are strict, and keys that are not declared are ignored."""

    model_config = ConfigDict(strict=True, frozen=True)


Row = TypeVar("Row", bound=Published)


def read_rows(file: Path, shape: type[Row]) -> Iterator[Row]:
    """The rows of a file in its order. A file that begins with `[` is a JSON list; any other has an object a line."""
    for number, row in _rows(file):
        yield checked(f"{file}, row {number}", row, shape)


def checked(place: str, row: Any, shape: type[Row]) -> Row:
    """A row in its shape. Raises ValueError where it has another; `place` says where the row stands."""
    if not isinstance(row, dict):
        raise ValueError(f"{place} must be a JSON object, not {_kind(row)}; {_HELP}")
    try:
        return shape.model_validate(row)
    except ValidationError as error:
        id = next((row[key] for key in ("_id", "id", "asin", "annotation_id") if isinstance(row.get(key), str)), None)
        named = f" (id {json.dumps(id)})" if id else ""
        raise ValueError(f"{place}{named}: {_problem(error)}; correct the row or take it out: {_HELP}") from error


def read_object(file: Path) -> dict[str, Any]:
    """A file that is one JSON object."""
    found = _parsed(str(file), _read_text(file))
    if not isinstance(found, dict):
        raise ValueError(f"{file} must be a JSON object, not {_kind(found)}; {_HELP}")
    return found


def _rows(file: Path) -> Iterator[tuple[int, Any]]:
    text = _read_text(file)
    if text.lstrip().startswith("["):
        yield from enumerate(_parsed(str(file), text), start=1)
        return
    for number, line in enumerate(text.split("\n"), start=1):  # splitlines would split at U+2028, within a text
        if line.strip():
            yield number, _parsed(f"{file}, row {number}", line)


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text from byte {error.start} on; {_HELP}") from error
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from error


def _parsed(place: str, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise ValueError(f"{place} cannot be read as JSON from {where} on; {_HELP}") from error
    except RecursionError as error:
        raise ValueError(f"{place} cannot be read as JSON: it is nested too deeply; {_HELP}") from error
    except ValueError as error:  # Python reads no integer of more than 4300 digits
        raise ValueError(f"{place} cannot be read as JSON: it has a number of thousands of digits; {_HELP}") from error


def _problem(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    field = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
    if first["type"] == "missing":
        return f"`{field}` is missing"
    if first["type"] == "value_error":
        return (f"`{field}` " if field else "") + first["msg"].removeprefix("Value error, ")
    asked = _WORDS.get(first["type"]) or first["msg"].removeprefix("Input should be ")
    return f"`{field}` must be {asked}, not {_kind(first['input'])}"


def _kind(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case str():
            return f"the text {json.dumps(value[:40])}"
        case int() | float():
            return "a number"
        case list() | tuple():
            return f"a list of {len(value)}"
    return "a JSON object"
