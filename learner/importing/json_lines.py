"""Reads JSON values from a file one at a time: JSONL, a JSON array, or values that are written over many lines.

Memory is bounded by one value, whatever the size of the file. A line that cannot be read costs itself only; in an array
nobody can tell where the next value begins, so that reading ends there.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from itertools import chain, islice
from typing import Any, BinaryIO

from learner.importing.exact_json import DECODER, loads

MAX_RECORD_BYTES = 8 * 2**20
"""A value that is longer is refused; demonstrations of a hundred steps have some hundred kilobytes."""
_CHUNK_BYTES = 2**16
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
        yield from _read_written_out(chain(_chunks(BytesIO(first[1])), _chunks(stream)), first[0])
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
        if number == 1:
            text = text.removeprefix(_UTF8_MARK)
        if text.strip():
            yield number, text
        while text and not text.endswith(b"\n"):
            text = stream.readline(_CHUNK_BYTES)


def _is_written_out(first_line: bytes) -> bool:
    """Whether a file that begins with this line holds an array, or values written over many lines."""
    text = first_line.strip()
    if len(first_line) > MAX_RECORD_BYTES:
        return text.startswith(b"[")
    return text.startswith(b"[") or (text.startswith(b"{") and text.endswith((b"{", b"[", b",", b":")))


def _read_line(line: int, text: bytes) -> Record | Refusal:
    if len(text) > MAX_RECORD_BYTES:
        return Refusal(line, too_long())
    try:
        return Record(line, loads(text))
    except UnicodeDecodeError as fault:
        return Refusal(line, f"it is not UTF-8 text: byte {fault.start + 1} is 0x{text[fault.start]:02x}")
    except RecursionError:
        return Refusal(line, "it is nested too deeply")
    except ValueError as error:
        cut_off = "" if text.endswith(b"\n") else "the file ends within this record, or "
        return Refusal(line, f"{cut_off}it is not JSON: {error}")


def too_long() -> str:
    return f"the record has more than {MAX_RECORD_BYTES:,} bytes"


# ----------------------------------------------------------------------------------- values over many lines


def _read_written_out(chunks: Iterator[bytes], line: int) -> Iterator[Record | Refusal]:
    """The values of an array, or values one after the other, as far as they can be read."""
    text = _Text(chunks, line)
    try:
        in_array = text.skip("[")
        while (in_array and not text.skip("]")) or (not in_array and text.has_more()):
            yield text.read_value()
            if not text.skip(",") and in_array and text.begins_with("]") is False:
                raise ValueError("a comma is missing")
        if in_array and text.has_more():
            raise ValueError("something follows the array")
    except UnicodeDecodeError:
        yield Refusal(text.line, "it is not UTF-8 text; what follows is not read")
    except RecursionError:
        yield Refusal(text.line, "it is nested too deeply; what follows is not read")
    except ValueError as error:
        end = "the file ends within this record, or " if text.is_at_end else ""
        yield Refusal(text.line, f"{end}it is not JSON: {error}; what follows is not read")


class _Text:
    """A file's text as far as it is needed: grows by chunks, and forgets what was read."""

    def __init__(self, chunks: Iterator[bytes], line: int) -> None:
        self.line = line
        """Where the text that is not read yet begins."""
        self.is_at_end = False
        self._chunks = chunks
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._text = ""

    def skip(self, mark: str) -> bool:
        """Step over blanks, and over this mark where it comes next; whether it did."""
        if not self.begins_with(mark):
            return False
        self._drop(1)
        return True

    def has_more(self) -> bool:
        """Whether something follows but blanks."""
        while not (self._skip_blanks() or self.is_at_end):
            self._grow(1)
        return bool(self._text)

    def begins_with(self, mark: str) -> bool:
        return self.has_more() and self._text[0] == mark

    def read_value(self) -> Record:
        """The next value. Raises ValueError where there is none, or where it is too long."""
        self.has_more()
        wanted = _CHUNK_BYTES
        while True:
            try:
                value, end = DECODER.raw_decode(self._text)
            except json.JSONDecodeError as error:
                if self.is_at_end or not self._may_go_on(error):
                    raise
            else:
                # A number may go on behind the end of what is here.
                if self.is_at_end or end < len(self._text):
                    record = Record(self.line, value)
                    self._drop(end)
                    return record
            if len(self._text) > MAX_RECORD_BYTES:
                raise ValueError(too_long())
            self._grow(wanted)
            wanted = len(self._text)  # by doubling, so that a long value is not read over and over

    def _may_go_on(self, error: json.JSONDecodeError) -> bool:
        """Whether what could not be read may only be cut off at the end of what is here."""
        longest_mark = 12  # -Infinity, or an escaped pair of surrogates
        return error.msg.startswith("Unterminated string") or error.pos >= len(self._text) - longest_mark

    def _skip_blanks(self) -> bool:
        self._drop(len(self._text) - len(self._text.lstrip(" \t\r\n")))
        return bool(self._text)

    def _drop(self, length: int) -> None:
        self.line += self._text.count("\n", 0, length)
        self._text = self._text[length:]

    def _grow(self, length: int) -> None:
        pieces, num_read = [self._text], 0
        while num_read < length and not self.is_at_end:
            chunk = next(self._chunks, b"")
            self.is_at_end = not chunk
            pieces.append(self._decoder.decode(chunk, final=self.is_at_end))
            num_read += len(chunk)
        self._text = "".join(pieces)


def _chunks(stream: BinaryIO) -> Iterator[bytes]:
    while chunk := stream.read(_CHUNK_BYTES):
        yield chunk
