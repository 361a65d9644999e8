"""Files that a user brings, as they are published: a JSON list or a JSON object a line, each row of a declared shape.

Every refusal is a ValueError of one sentence: it names the file, the row (from 1; its id if it has one) and the field.
"""

from __future__ import annotations

import json
import re
from codecs import BOM_UTF8
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from tools.json_text import JsonText, NotJson, NotText, chunks_of, whole_number

_HELP = "docs/WORLDS.md names the files that can be read"
_MAX_CHARACTERS = 2**30
"""Of one value: all instructions of WebShop are one object of 150 MB."""
_DECODER = json.JSONDecoder(parse_int=whole_number)
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

    told_by: ClassVar[str] = ""
    """A key that rows of this shape alone have; empty for the shape of all others."""


Row = TypeVar("Row", bound=Published)


def read_rows(named: Path, *shapes: type[Row]) -> Iterator[Row]:
    """The rows of a file in its order: those of a JSON list, or objects that follow each other. The last of the shapes
    is that of any row.

    Where a folder is named, or a name with `*` stands for several files: those of one file after the other.
    """
    for file in _files(named):
        for number, row in enumerate(_values(file), start=1):
            shape = next((each for each in shapes if isinstance(row, dict) and each.told_by in row), shapes[-1])
            yield checked(f"{file}, row {number}", row, shape)


BESIDE_ROWS = frozenset({"id_aliases.json"})
"""Published in the folder of the rows, and none."""


def _files(named: Path) -> list[Path]:
    """`train_2.json` before `train_10.json`."""
    try:
        if "*" in named.name:
            found = list(named.parent.glob(named.name))
        elif named.is_dir():
            found = [file for file in named.iterdir() if file.suffix in (".json", ".jsonl")]
        else:
            return [named]
    except OSError as error:
        raise ValueError(f"{named} cannot be read: {error.strerror}") from error
    found = [file for file in found if file.name not in BESIDE_ROWS and not file.name.startswith(".")]
    if not found:
        raise ValueError(f"{named} stands for no file: a folder needs some that end in .json or .jsonl; {_HELP}")
    return sorted(found, key=_by_numbers)


def _by_numbers(file: Path) -> list[str | int]:
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", file.name)]


def checked(place: str, row: Any, shape: type[Row]) -> Row:
    """A row in its shape. Raises ValueError where it has another; `place` says where the row stands."""
    if not isinstance(row, dict):
        raise ValueError(f"{place} must be a JSON object, not {_kind(row)}; {_HELP}")
    try:
        return shape.model_validate(row)
    except ValidationError as error:
        id = next(
            (
                row[key]
                for key in ("_id", "id", "question_id", "asin", "annotation_id")
                if isinstance(row.get(key), str)
            ),
            None,
        )
        named = f" (id {json.dumps(id)})" if id else ""
        raise ValueError(f"{place}{named}: {_problem(error)}; correct the row or take it out: {_HELP}") from error


def read_object(file: Path) -> dict[str, Any]:
    """A file that is one JSON object."""
    found = list(_values(file))
    if len(found) != 1 or not isinstance(found[0], dict):
        raise ValueError(f"{file} must be one JSON object; {_HELP}")
    return found[0]


def _values(file: Path) -> Iterator[Any]:
    """One after the other: a file may be larger than the memory."""
    try:
        with file.open("rb") as stream:
            stream.seek(len(BOM_UTF8) if stream.read(len(BOM_UTF8)) == BOM_UTF8 else 0)
            for read in JsonText(chunks_of(stream), 1, _DECODER, _MAX_CHARACTERS).values():
                yield read.value
    except NotText as error:
        raise ValueError(f"{file} is {error}: unpack an archive, save a table as JSON; {_HELP}") from error
    except NotJson as error:
        raise ValueError(f"{file} cannot be read as JSON: {error}; {_HELP}") from error
    except RecursionError as error:
        raise ValueError(f"{file} cannot be read as JSON: it is nested too deeply; {_HELP}") from error
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from error


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
