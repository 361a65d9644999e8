"""The tool calls of a completion while they are being written: each call's name, then its arguments piece by piece.

Reads the JSON that a response template's region of calls holds, letter by letter: one call as an object, several as a
list, or the arguments alone where the call's opening mark has its name. It judges nothing and never raises: whether
the calls are good is known when they are complete.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from policies.chat.messages import ARGUMENT_KEYS


@dataclass(slots=True)
class WrittenCall:
    """One call as far as it was written."""

    name: str = ""
    has_name: bool = False
    """The name is complete."""
    arguments: str = ""
    """JSON text, as it was spelled; empty where none came yet."""
    num_taken: int = 0
    """Letters of `arguments` that were given out."""
    is_name_taken: bool = False

    def take(self) -> tuple[str, str]:
        """The name and the letters of the arguments that were not given out yet; empty where there are none."""
        if not self.has_name:
            return "", ""
        name, piece = "" if self.is_name_taken else self.name, self.arguments[self.num_taken :]
        self.is_name_taken, self.num_taken = True, len(self.arguments)
        return name, piece


@dataclass(slots=True)
class CallStream:
    """The calls in one region, fed with its text."""

    calls: list[WrittenCall] = field(default_factory=list)
    _closers: list[str] = field(default_factory=list)
    """What closes each open bracket, innermost last."""
    _in_string: bool = False
    _is_escaped: bool = False
    _key: str | None = None
    """Of the call's own entry that is being read; None between entries."""
    _text: str = ""
    """Of the key or the value that is being read."""
    _is_value: bool = False

    @classmethod
    def of_arguments(cls, name: str) -> CallStream:
        """A region that holds nothing but the arguments of one call."""
        stream = cls([WrittenCall(name, has_name=True)], _closers=["}"])
        stream._key, stream._is_value = ARGUMENT_KEYS[0], True
        return stream

    def feed(self, text: str) -> None:
        for letter in text:
            self._read(letter)

    def _read(self, letter: str) -> None:
        if self._is_value and self._takes(letter):
            self._text += letter
            self._tell_call(letter)
        if self._in_string:
            self._read_in_string(letter)
        elif letter == '"':
            self._in_string = True
            if self._is_in_call and not self._is_value:
                self._text = ""
        elif letter in "{[":
            if letter == "{" and self._closers in ([], ["]"]):
                self.calls.append(WrittenCall())
            self._closers.append("}" if letter == "{" else "]")
        elif letter in "}]":
            if self._is_in_call:
                self._end_value()
            if self._closers:
                self._closers.pop()
        elif letter == "," and self._is_in_call:
            self._end_value()
        elif letter == ":" and self._is_in_call and not self._is_value:
            self._key, self._text, self._is_value = self._text, "", True

    def _read_in_string(self, letter: str) -> None:
        if self._is_escaped:
            self._is_escaped = False
        elif letter == "\\":
            self._is_escaped = True
        elif letter == '"':
            self._in_string = False
            return
        if self._is_in_call and not self._is_value:
            self._text += letter

    @property
    def _is_in_call(self) -> bool:
        """Directly in a call's object, which stands alone or in one list."""
        return self._closers in (["}"], ["]", "}"])

    def _takes(self, letter: str) -> bool:
        """Whether the letter belongs to the value that is being read, and not to what ends it."""
        ends = not self._in_string and self._is_in_call and letter in ",}]"
        return not ends and bool(self._text or not letter.isspace())

    def _tell_call(self, letter: str) -> None:
        """Hand a value on as far as that can be done before its end."""
        call = self.calls[-1]
        if self._key in ARGUMENT_KEYS and self._text.startswith("{"):
            call.arguments += letter
        elif self._key == "name" and self._text.startswith('"') and not call.has_name:
            call.has_name = self._in_string and letter == '"' and not self._is_escaped
            call.name = _string(self._text) if call.has_name else self._text[1:]

    def _end_value(self) -> None:
        call = self.calls[-1] if self.calls else None
        if call is not None and self._is_value and self._key in ARGUMENT_KEYS and self._text.startswith('"'):
            call.arguments = _string(self._text)  # an object's JSON text in a string
        self._key, self._text, self._is_value = None, "", False


def _string(text: str) -> str:
    """What a JSON string says; the letters themselves where it is none."""
    try:
        value = json.loads(text)
    except ValueError:
        return text.strip('"')
    return value if isinstance(value, str) else ""
