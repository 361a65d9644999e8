"""Reads JSON records from a stream one at a time: JSONL, a JSON array however it is wrapped, or one record on its own.

Memory is bounded by one record, whatever the size of the file; a record that cannot be read is refused with its line
and the reading goes on behind it. A streaming JSON parser from elsewhere was refused: those give up at the first fault.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any, BinaryIO

import orjson

MAX_RECORD_BYTES = 8 * 2**20
"""A record that is longer is refused; demonstrations of a hundred steps have some hundred kilobytes."""
_TOO_LONG = f"the record has more than {MAX_RECORD_BYTES:,} bytes"
_CHUNK_BYTES = 2**16
_UTF8_MARK = b"\xef\xbb\xbf"
_OTHER_TYPES = {
    b"\x1f\x8b": "gzip-compressed; unpack it first",
    b"\x28\xb5\x2f\xfd": "zstd-compressed; unpack it first",
    b"PK\x03\x04": "a zip archive; unpack it first",
    b"PAR1": "a Parquet file; write it out as JSONL first",
    b"\xff\xfe": "UTF-16 text; save it as UTF-8",
    b"\xfe\xff": "UTF-16 text; save it as UTF-8",
}
"""How files begin that are often taken for JSON."""


@dataclass(frozen=True, slots=True)
class Record:
    """One JSON value of the file."""

    line: int
    """Where it begins, from 1."""
    value: Any
    num_bytes: int
    """Of its text; an element of an array in one line counts as the whole line."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """What was not imported, and why."""

    line: int
    """Where the record begins, from 1; 0: the file as a whole."""
    reason: str


@dataclass(frozen=True, slots=True)
class _Piece:
    """The bytes of what should be one record."""

    line: int
    text: bytes
    """Cut to one byte more than a record may have."""
    is_whole: bool
    """False where the file ended within it."""


def read_records(stream: BinaryIO, is_message: Callable[[Any], bool]) -> Iterator[Record | Refusal]:
    """The records of a file in their order, and what cannot be read of it. Raises OSError where the stream does.

    An array holds records, or is itself one: a conversation, told by `is_message` of its first element.
    """
    lines = _written_lines(stream)
    first = next(lines, None)
    if first is None:
        yield Refusal(0, "the file is empty")
    elif problem := _other_type(first.text):
        yield Refusal(0, f"the file is {problem}")
    elif first.text.lstrip().startswith(b"[") and isinstance(_parse(first), Refusal):
        records = _records_of_array(chain([first.text], _chunks(stream)), first.line)
        yield from _whole_if_conversation(records, is_message)
    elif first.text.strip() == b"{":
        text = first.text + stream.read(MAX_RECORD_BYTES + 1)
        yield _parse(_Piece(first.line, text, is_whole=False))
    else:
        for piece in chain([first], lines):
            yield from _records_of_line(_parse(piece), is_message)


def _parse(piece: _Piece) -> Record | Refusal:
    if len(piece.text) > MAX_RECORD_BYTES:
        return Refusal(piece.line, _TOO_LONG)
    try:
        return Record(piece.line, orjson.loads(piece.text), len(piece.text))
    except orjson.JSONDecodeError as error:
        return Refusal(piece.line, _problem(piece, error))


def _problem(piece: _Piece, error: orjson.JSONDecodeError) -> str:
    try:
        piece.text.decode("utf-8")
    except UnicodeDecodeError as fault:
        return f"it is not UTF-8 text: byte {fault.start + 1} is 0x{piece.text[fault.start]:02x}"
    if not piece.is_whole:
        return f"the file ends within this record, or it is not JSON: {error}"
    return f"it is not JSON: {error}"


def _other_type(text: bytes) -> str | None:
    for beginning, name in _OTHER_TYPES.items():
        if text.startswith(beginning):
            return name
    return "binary, not text" if b"\0" in text else None


# --------------------------------------------------------------------------------------------------- lines


def _written_lines(stream: BinaryIO) -> Iterator[_Piece]:
    """The lines that are not blank. The rest of a line that is too long is skipped when the next one is asked for."""
    number = 0
    while text := stream.readline(MAX_RECORD_BYTES + 1):
        number += 1
        if number == 1:
            text = text.removeprefix(_UTF8_MARK)
        if text.strip():
            yield _Piece(number, text, is_whole=text.endswith(b"\n"))
        while text and not text.endswith(b"\n"):
            text = stream.readline(_CHUNK_BYTES)


def _records_of_line(read: Record | Refusal, is_message: Callable[[Any], bool]) -> Iterator[Record | Refusal]:
    """A line is a record, or an array of records."""
    if isinstance(read, Record) and isinstance(read.value, list) and not (read.value and is_message(read.value[0])):
        yield from (Record(read.line, value, read.num_bytes) for value in read.value)
    else:
        yield read


# --------------------------------------------------------------------------------------------------- array

_OUTSIDE_STRING = re.compile(rb'["\[\]{},]')
_INSIDE_STRING = re.compile(rb'["\\]')


class _ArraySplitter:
    """Cuts the text of JSON arrays into their elements, as it comes, at the marks of the outermost level."""

    def __init__(self, line: int) -> None:
        self.is_open = False
        """Within an array."""
        self._depth = 0
        self._in_string = False
        self._num_escaped = 0
        """How many bytes at the next chunk's beginning a backslash has robbed of their meaning: 0 or 1."""
        self._element = bytearray()
        self._line = line
        """Where the element begins."""
        self._num_line_ends = 0
        """In the element, what was cut off included."""

    def feed(self, chunk: bytes) -> Iterator[_Piece]:
        """The elements that end in this chunk."""
        begin, at = 0, self._num_escaped
        while mark := (_INSIDE_STRING if self._in_string else _OUTSIDE_STRING).search(chunk, at):
            at = mark.end()
            if mark[0] == b"\\":
                at += 1
            elif mark[0] == b'"':
                self._in_string = not self._in_string
            elif self._is_boundary(mark[0]):
                self._keep(chunk[begin : mark.start()])
                yield from self.cut(is_whole=True)
                begin = at
        self._num_escaped = max(0, at - len(chunk))
        self._keep(chunk[begin:])

    def cut(self, is_whole: bool) -> Iterator[_Piece]:
        """The element so far, if there is anything of it."""
        text = bytes(self._element)
        num_blank_lines = text.count(b"\n", 0, len(text) - len(text.lstrip()))
        if text.strip():
            yield _Piece(self._line + num_blank_lines, text, is_whole)
        self._line += self._num_line_ends
        self._num_line_ends = 0
        self._element.clear()

    def _is_boundary(self, mark: bytes) -> bool:
        """Whether an element ends at this comma or bracket; steps in or out of the bracket."""
        if mark == b",":
            return self._depth == 1
        if mark in b"[{":
            self._depth += 1
            is_boundary = self._depth == 1
        else:
            self._depth = max(0, self._depth - 1)
            is_boundary = self._depth == 0
        self.is_open = self._depth > 0
        return is_boundary

    def _keep(self, text: bytes) -> None:
        self._element += text[: MAX_RECORD_BYTES + 1 - len(self._element)]
        self._num_line_ends += text.count(b"\n")


def _records_of_array(chunks: Iterable[bytes], line: int) -> Iterator[Record | Refusal]:
    splitter = _ArraySplitter(line)
    read: Record | Refusal | None = None
    for chunk in chunks:
        for piece in splitter.feed(chunk):
            read = _parse(piece)
            yield read
    for piece in splitter.cut(is_whole=False):
        read = _parse(piece)
        yield read
    if splitter.is_open and not isinstance(read, Refusal):
        yield Refusal(read.line if read else line, "the file ends before its array is closed: was it cut off?")


def _whole_if_conversation(
    records: Iterator[Record | Refusal], is_message: Callable[[Any], bool]
) -> Iterator[Record | Refusal]:
    """The records, or one where they are the messages of one conversation."""
    first = next(records, None)
    if isinstance(first, Record) and is_message(first.value):
        yield _gather(first, records)
    elif first is not None:
        yield first
        yield from records


def _gather(first: Record, rest: Iterator[Record | Refusal]) -> Record | Refusal:
    messages, num_bytes = [first.value], 0
    for read in rest:
        if isinstance(read, Refusal):
            return read
        num_bytes += read.num_bytes
        if num_bytes > MAX_RECORD_BYTES:
            return Refusal(first.line, _TOO_LONG)
        messages.append(read.value)
    return Record(first.line, messages, num_bytes)


def _chunks(stream: BinaryIO) -> Iterator[bytes]:
    while chunk := stream.read(_CHUNK_BYTES):
        yield chunk
