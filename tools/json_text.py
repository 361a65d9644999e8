"""Reads the JSON values of a file one at a time: those of an array, or values one after the other.

Memory is bounded by the longest value, whatever the size of the file.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from dataclasses import dataclass
from json import JSONDecodeError, JSONDecoder
from typing import Any, BinaryIO

CHUNK_BYTES = 2**16
_MAX_DIGITS = 4300
"""Of a whole number; Python reads no longer one."""
_LONGEST_MARK = 12
"""-Infinity, or an escaped pair of surrogates."""


class NotText(ValueError):
    """Bytes that are no UTF-8."""


class NotJson(ValueError):
    """What cannot be read as JSON, and where in the file it stands."""


@dataclass(frozen=True, slots=True)
class Value:
    """One JSON value of a file."""

    line: int
    """Where it begins, from 1."""
    value: Any


def whole_number(text: str) -> int:
    """For a decoder's `parse_int`. Raises ValueError where it has too many digits."""
    if len(text) > _MAX_DIGITS:
        raise ValueError("it has a number of thousands of digits")
    return int(text)


class JsonText:
    """A file's text as far as it is needed: grows by chunks, and forgets what was read."""

    def __init__(self, chunks: Iterator[bytes], line: int, decoder: JSONDecoder, max_characters: int) -> None:
        self.line, self._column = line, 1
        """Where the text that is not read yet begins."""
        self.is_at_end = False
        self._chunks, self._decoder, self._max_characters = chunks, decoder, max_characters
        self._of_bytes = codecs.getincrementaldecoder("utf-8")()
        self._num_bytes = 0
        self._text = ""

    def values(self) -> Iterator[Value]:
        """Those of an array, a comma behind the last allowed, or those that follow each other.

        Raises NotText, NotJson, or RecursionError for what is nested too deeply.
        """
        in_array = self._skip("[")
        while (in_array and not self._skip("]")) or (not in_array and self._has_more()):
            yield self._read_value()
            if in_array and not self._skip(",") and self._has_more() and not self._begins_with("]"):
                raise self._fault("a comma is missing", 0)
        if in_array and self._has_more():
            raise self._fault("something follows the array", 0)

    def _skip(self, mark: str) -> bool:
        """Step over blanks, and over this mark where it comes next; whether it did."""
        if not self._begins_with(mark):
            return False
        self._drop(1)
        return True

    def _has_more(self) -> bool:
        """Whether something follows but blanks."""
        while not (self._skip_blanks() or self.is_at_end):
            self._grow(1)
        return bool(self._text)

    def _begins_with(self, mark: str) -> bool:
        return self._has_more() and self._text[0] == mark

    def _read_value(self) -> Value:
        self._has_more()
        wanted = CHUNK_BYTES
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text)
            except JSONDecodeError as error:
                if self.is_at_end or not self._may_go_on(error):
                    raise self._fault(error.msg, error.pos) from error
            except ValueError as error:  # of the decoder's own hooks
                raise self._fault(str(error), 0) from error
            else:
                # A number may go on behind the end of what is here.
                if self.is_at_end or end < len(self._text):
                    read = Value(self.line, value)
                    self._drop(end)
                    return read
            if len(self._text) > self._max_characters:
                raise self._fault(f"it has more than {self._max_characters:,} characters", 0)
            self._grow(wanted)
            wanted = len(self._text)  # by doubling, so that a long value is not read over and over

    def _may_go_on(self, error: JSONDecodeError) -> bool:
        """Whether what could not be read may only be cut off at the end of what is here."""
        return error.msg.startswith("Unterminated string") or error.pos >= len(self._text) - _LONGEST_MARK

    def _skip_blanks(self) -> bool:
        self._drop(len(self._text) - len(self._text.lstrip(" \t\r\n")))
        return bool(self._text)

    def _drop(self, length: int) -> None:
        self.line, self._column = self._place(length)
        self._text = self._text[length:]

    def _place(self, at: int) -> tuple[int, int]:
        """Line and column in the file of what stands there in the text, both from 1."""
        lines = self._text.count("\n", 0, at)
        return (self.line + lines, at - self._text.rindex("\n", 0, at)) if lines else (self.line, self._column + at)

    def _fault(self, reason: str, at: int) -> NotJson:
        line, column = self._place(at)
        return NotJson(f"{reason} at line {line}, column {column}")

    def _grow(self, length: int) -> None:
        pieces, num_read = [self._text], 0
        while num_read < length and not self.is_at_end:
            chunk = next(self._chunks, b"")
            self.is_at_end = not chunk
            pieces.append(self._decoded(chunk))
            num_read += len(chunk)
        self._text = "".join(pieces)

    def _decoded(self, chunk: bytes) -> str:
        try:
            text = self._of_bytes.decode(chunk, final=self.is_at_end)
        except UnicodeDecodeError as error:
            at = self._num_bytes + len(chunk) - len(error.object) + error.start
            raise NotText(f"not UTF-8 text from byte {at} on") from error
        self._num_bytes += len(chunk)
        return text


def chunks_of(stream: BinaryIO) -> Iterator[bytes]:
    """The rest of a file, piece by piece."""
    while chunk := stream.read(CHUNK_BYTES):
        yield chunk
