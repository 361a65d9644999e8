"""What commands print: whoever wrote what is in it, and whatever reads it."""

from __future__ import annotations

import io
import os
import shutil
import sys
import unicodedata
from collections.abc import Callable


def plain(text: str) -> str:
    """In one line, and without what a terminal obeys: policies, users and tools write escape codes too."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def width(text: str) -> int:
    """Columns that plain text takes: Chinese and Japanese letters two, combining marks none."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def padded(text: str, num_columns: int) -> str:
    return text + " " * (num_columns - width(text))


def cut(text: str, num_columns: int) -> str:
    """The text, or as much of it as fits the columns with three dots behind it."""
    if width(text) <= num_columns:
        return text
    while width(text) > num_columns - 3:
        text = text[:-1]
    return f"{text}..."


def columns() -> int:
    """Of the terminal; what is read by a program may be as wide as it likes."""
    return shutil.get_terminal_size((10_000, 24)).columns


def printing(run: Callable[[], int]) -> int:
    """The exit code of what prints: letters that the reader's encoding lacks are escaped, and a reader who has had
    enough (`| head`) is no error to tell of."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = run()
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left is flushed at the exit
        return 1
