"""Reads JSON values from a file one at a time: JSONL, a JSON array, or values that are written over many lines.

Memory is bounded by one value, whatever the size of the file. A line that cannot be read costs itself only; in an array
nobody can tell where the next value begins, so that reading ends there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from itertools import chain, islice
from typing import Any, BinaryIO

from learner.importing.exact_json import DECODER, loads
from tools.json_text import CHUNK_BYTES, JsonText, NotJson, NotText, chunks_of

MAX_RECORD_BYTES = 8 * 2**20
"""A value that is longer is refused; demonstrations of a hundred steps have some hundred kilobytes."""
_UTF8_MARK = b"\xef\xbb\xbf"
_OTHER_TYPES = {
    b"\x1f\x8b": "gzip-compressed; unpack it first",
    b"\x28\xb5\x2f\xfd": "zstd-compressed; unpack it first",
    b"PK\x03\x04": "a zip archive; unpack it first, and an .eval log with `inspect log convert --to json`",
    b"PAR1": "a Parquet file; write it out as JSONL first",
    b"ARROW1": "an Arrow file; write it out as JSONL first",
    b"\xff\xff\xff\xff": "an Arrow stream; write it out as JSONL first",
    b"\x80\x04": "a Python pickle; write it out as JSONL first",
    b"\x80\x05": "a Python pickle; write it out as JSONL first",
    b"SQLite format 3": "an SQLite database; write its conversations out as JSONL first",
    b"BZh": "bzip2-compressed; unpack it first",
    b"\xfd7zXZ": "xz-compressed; unpack it first",
    b"7z\xbc\xaf": "a 7z archive; unpack it first",
    b"\xff\xfe": "UTF-16 or UTF-32 text; save it as UTF-8",
    b"\xfe\xff": "UTF-16 text; save it as UTF-8",
    b"{\0": "UTF-16 text; save it as UTF-8",
    b"[\0": "UTF-16 text; save it as UTF-8",
    b"\0{": "UTF-16 text; save it as UTF-8",
    b"\0[": "UTF-16 text; save it as UTF-8",
    b"version https://git-lfs": "a pointer of Git LFS and not the data: fetch it with `git lfs pull`",
}
"""How files begin that are often taken for JSON."""
_LOOKED_AT = 20
"""Lines of a file's beginning: where none of them begins as JSON does, the file is something else."""


@dataclass(frozen=True, slots=True)
class Record:
    """One JSON value of the file."""

    line: int
    """Where it begins, from 1."""
    value: Any


@dataclass(frozen=True, slots=True)
class Refusal:
    """What was not imported, and why."""

    line: int
    """Where the record begins, from 1; 0: the file as a whole."""
    reason: str


def read_values(stream: BinaryIO) -> Iterator[Record | Refusal]:
    """The values of a file in their order, an array's one by one. Raises OSError where the stream does."""
    lines = _lines(stream)
    beginning = list(islice(lines, 1))
    if not beginning:
        yield Refusal(0, "the file is empty")
        return
    first = beginning[0]
    if problem := _other_type(first[1]):
        yield Refusal(0, f"the file is {problem}")
        return
    if not _begins_as_json(first[1]):
        beginning += islice(lines, _LOOKED_AT - 1)
    lines = chain(beginning[1:], lines)
    if not any(_begins_as_json(text) for _, text in beginning):
        yield Refusal(0, "the file is text, and not JSON (CSV, YAML and Markdown are not read): write it as JSONL")
    elif _is_written_out(first[1]) and isinstance(_read_line(*first), Refusal):
        yield from _read_written_out(chain(chunks_of(BytesIO(first[1])), chunks_of(stream)), first[0])
    else:
        for line, text in chain([first], lines):
            yield _read_line(line, text)


def _begins_as_json(text: bytes) -> bool:
    return text.lstrip().startswith((b"{", b"[")) or isinstance(_read_line(0, text), Record)


def _other_type(text: bytes) -> str | None:
    for beginning, name in _OTHER_TYPES.items():
        if text.startswith(beginning):
            return name
    return "binary, not text" if b"\0" in text else None


# --------------------------------------------------------------------------------------------------- lines


def _lines(stream: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, each cut to one byte more than a value may have."""
    number = 0
    while text := stream.readline(MAX_RECORD_BYTES + 1):
        number += 1
        text = text.removeprefix(_UTF8_MARK)  # files that were put together have it at each one's beginning
        if text.strip():
            yield number, text
        while text and not text.endswith(b"\n"):
            text = stream.readline(CHUNK_BYTES)


def _is_written_out(first_line: bytes) -> bool:
    """Whether a file that begins with this line holds an array, or values written over many lines."""
    text = first_line.strip()
    if len(first_line) > MAX_RECORD_BYTES:
        return text.startswith(b"[")
    return text.startswith(b"[") or (text.startswith(b"{") and text.endswith((b"{", b"[", b",", b":")))


def _without_comma(text: bytes) -> bytes:
    """A line that is an object and a comma is one of an array whose brackets are gone. Its bytes keep their places."""
    bare = text.rstrip()
    return bare[:-1] if bare.lstrip().startswith(b"{") and bare.endswith(b",") else text


def _read_line(line: int, text: bytes) -> Record | Refusal:
    if len(text) > MAX_RECORD_BYTES:
        return Refusal(line, f"the record has more than {MAX_RECORD_BYTES:,} bytes")
    try:
        return Record(line, loads(_without_comma(text)))
    except UnicodeDecodeError as fault:
        return Refusal(line, f"it is not UTF-8 text: byte {fault.start + 1} is 0x{text[fault.start]:02x}")
    except RecursionError:
        return Refusal(line, "it is nested too deeply")
    except ValueError as error:
        cut_off = "" if text.endswith(b"\n") else "the file ends within this record, or "
        return Refusal(line, f"{cut_off}it is not JSON: {error}")


# ----------------------------------------------------------------------------------- values over many lines


def _read_written_out(chunks: Iterator[bytes], line: int) -> Iterator[Record | Refusal]:
    """The values of an array, or values one after the other, as far as they can be read."""
    text = JsonText(chunks, line, DECODER, MAX_RECORD_BYTES)
    try:
        for read in text.values():
            yield Record(read.line, read.value)
    except NotText:
        yield Refusal(text.line, "it is not UTF-8 text; what follows is not read")
    except RecursionError:
        yield Refusal(text.line, "it is nested too deeply; what follows is not read")
    except NotJson as error:
        end = "the file ends within this record, or " if text.is_at_end else ""
        yield Refusal(text.line, f"{end}it is not JSON: {error}; what follows is not read")
