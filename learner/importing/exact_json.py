"""JSON that is read whole: no number changes, and no key hides another.

Integers of any size stay, and a decimal number that no float holds is marked. A key that stands twice in one object is
no JSON here: Python would keep the last one, without a word. orjson was refused: it makes 24 digits a float.
"""

from __future__ import annotations

import json
from decimal import Decimal
from typing import Any

from tools.json_text import whole_number


class RoundedFloat(float):
    """A number that the file writes with more digits than a float holds, or too large for one."""


def loads(text: str | bytes) -> Any:
    """Raises ValueError (json.JSONDecodeError, UnicodeDecodeError) or RecursionError for what is no JSON."""
    return DECODER.decode(text.decode("utf-8") if isinstance(text, bytes) else text)


def dumps(value: Any) -> str:
    """Raises ValueError for NaN, infinity and half a character, and RecursionError."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    text.encode()  # half of a surrogate pair has no UTF-8
    return text


def holds_rounded(value: Any) -> bool:
    """Whether a number in this value is not the one that the file has."""
    if isinstance(value, dict):
        return any(map(holds_rounded, value.values()))
    return any(map(holds_rounded, value)) if isinstance(value, list) else isinstance(value, RoundedFloat)


def _read_float(text: str) -> float:
    read = float(text)
    return read if Decimal(repr(read)) == Decimal(text) else RoundedFloat(read)


def _read_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    read = dict(pairs)
    if len(read) < len(pairs):
        twice = next(key for n, (key, _) in enumerate(pairs) if any(key == other for other, _ in pairs[:n]))
        raise ValueError(f"the key {twice!r} stands twice in one object")
    return read


DECODER = json.JSONDecoder(parse_int=whole_number, parse_float=_read_float, object_pairs_hook=_read_object)
