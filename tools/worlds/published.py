"""Files that a user brings, as they are published: a JSON list or a JSON object a line, each row of one declared shape.

Every refusal is a ValueError of one sentence: it names the file, the row (from 1; its id if it has one) and the field.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from json import JSONDecodeError, JSONDecoder
from pathlib import Path
from typing import Annotated, Any, TextIO, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

_HELP = "docs/WORLDS.md names the files that can be read"
_PIECE = 1 << 20
"""Characters of a JSON list that are read at once."""
_DECODER = JSONDecoder()
_WORDS = {
    "string_type": "a text",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a JSON object",
    "model_type": "a JSON object",
    "int_type": "a whole number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
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


def from_json_text(value: Any) -> Any:
    """What a text of JSON says, which is how tables hold lists and objects; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


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
    with _opened(file) as source:
        found = _parsed(str(file), source.read())
    if not isinstance(found, dict):
        raise ValueError(f"{file} must be a JSON object, not {_kind(found)}; {_HELP}")
    return found


def _rows(file: Path) -> Iterator[tuple[int, Any]]:
    """Numbered from 1. They are read one after the other: a file may be larger than the memory."""
    with _opened(file) as source:
        while (first := source.read(1)).isspace():
            pass
        source.seek(0)
        if first == "[":
            yield from enumerate(_ListText(file, source).elements(), start=1)
            return
        for number, line in enumerate(source, start=1):
            if line.strip():
                yield number, _parsed(f"{file}, row {number}", line)


@contextmanager
def _opened(file: Path) -> Iterator[TextIOWrapper]:
    try:
        with file.open(encoding="utf-8-sig") as source:
            try:
                yield source
            except UnicodeDecodeError as error:
                at = source.buffer.tell() - len(error.object) + error.start
                raise ValueError(
                    f"{file} is not UTF-8 text from byte {at} on: unpack an archive, save a table as JSON; {_HELP}"
                ) from error
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from error


class _ListText:
    """The text of a file that is a JSON list, of which only the part that is being read is held."""

    def __init__(self, file: Path, source: TextIO) -> None:
        self._file, self._source = file, source
        self._text, self._at = "", 0
        self._has_more = True
        self._line, self._column = 1, 1
        """Where in the file `_text` begins."""

    def elements(self) -> Iterator[Any]:
        """One after the other. Raises ValueError for what is no JSON, where it stands."""
        self._pass("[")
        if self._next_character() != "]":
            yield self._element()
            while self._next_character() == ",":
                self._pass(",")
                yield self._element()
        self._pass("]")
        if self._next_character():
            raise self._refusal(JSONDecodeError("", self._text, self._at))

    def _pass(self, character: str) -> None:
        if self._next_character() != character:
            raise self._refusal(JSONDecodeError("", self._text, self._at))
        self._at += 1

    def _next_character(self) -> str:
        """After spaces; empty at the end of the file."""
        while True:
            while self._text[self._at : self._at + 1] in tuple(" \t\n\r"):
                self._at += 1
            if self._at < len(self._text) or not self._read_on():
                return self._text[self._at : self._at + 1]

    def _element(self) -> Any:
        self._next_character()
        while True:
            try:
                found, end = _DECODER.raw_decode(self._text, self._at)
            except JSONDecodeError as error:
                if self._read_on():
                    continue
                raise self._refusal(error) from error
            except (RecursionError, ValueError) as error:
                raise _unreadable(str(self._file), error) from error
            if end < len(self._text) or not self._read_on():  # a number may go on
                self._at = end
                return found

    def _read_on(self) -> bool:
        """Read more, and forget what was passed. False at the end of the file."""
        more = self._source.read(max(_PIECE, len(self._text) - self._at)) if self._has_more else ""
        self._has_more = bool(more)
        if more:
            self._line, self._column = self._place(self._text, self._at)
            self._text, self._at = self._text[self._at :] + more, 0
        return self._has_more

    def _place(self, text: str, at: int) -> tuple[int, int]:
        """Line and column in the file, both from 1."""
        lines = text.count("\n", 0, at)
        return (self._line + lines, at - text.rindex("\n", 0, at)) if lines else (self._line, self._column + at)

    def _refusal(self, error: JSONDecodeError) -> ValueError:
        return _no_json(str(self._file), *self._place(self._text, error.pos))


def _parsed(place: str, text: str) -> Any:
    try:
        return json.loads(text)
    except JSONDecodeError as error:
        raise _no_json(place, error.lineno, error.colno) from error
    except (RecursionError, ValueError) as error:
        raise _unreadable(place, error) from error


def _no_json(place: str, line: int, column: int) -> ValueError:
    return ValueError(f"{place} cannot be read as JSON from line {line}, column {column} on; {_HELP}")


def _unreadable(place: str, error: RecursionError | ValueError) -> ValueError:
    is_deep = isinstance(error, RecursionError)  # else Python, which reads no integer of more than 4300 digits
    why = "it is nested too deeply" if is_deep else "it has a number of thousands of digits"
    return ValueError(f"{place} cannot be read as JSON: {why}; {_HELP}")


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
