"""Messages one by one, as tables keep them: which lines are one conversation, and whether they stand in their order."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from learner.importing.fields import RefusedRecord, snake_case
from learner.importing.json_lines import Record, Refusal

_CONVERSATIONS = frozenset(
    f"{what}{end}"
    for what in ("conversation", "conv", "session", "thread", "chat", "dialog", "dialogue", "episode", "trajectory")
    for end in ("_id", "_uuid", "_key", "")
)
"""Keys by which a table tells conversations apart. Ids of runs, traces and requests may change within one."""
_PLACES = frozenset(
    "created_at created timestamp ts time date turn turn_index turn_idx turn_number message_index message_number seq "
    "sequence position order index idx".split()
)
"""Keys that say when, or at which place, a message was said."""
_DAY = re.compile(r"\d{4}-\d\d-\d\d")


def by_conversation(lines: Iterable[Record | Refusal]) -> list[list[Record | Refusal]]:
    """The lines of each conversation, in their order. A line that cannot be read is a hole in those around it."""
    found: dict[tuple[str, ...], list[Record | Refusal]] = {}
    last, holes = list[Record | Refusal](), list[Refusal]()
    for line in lines:
        if isinstance(line, Refusal):
            holes.append(line)
            last.append(line)
            continue
        conversation = found.setdefault(_name_of(line.value), [])
        conversation += [] if conversation is last else holes
        conversation.append(line)
        last, holes = conversation, []
    return list(found.values())


def _name_of(message: Any) -> tuple[str, ...]:
    """What tells a message's conversation from others; empty where nothing does."""
    keys = message.items() if isinstance(message, dict) else ()
    return tuple(
        f"{key} {value}" for key, value in keys if snake_case(key) in _CONVERSATIONS and isinstance(value, str | int)
    )


def require_oldest_first(messages: Sequence[Any]) -> None:
    """Raises RefusedRecord where each message says that it is older than the one before it: some APIs and tables list
    the newest first."""
    if len(messages) < 2 or not all(isinstance(message, dict) for message in messages):
        return
    for name in messages[0]:
        if snake_case(name) not in _PLACES:
            continue
        places = [place for message in messages if (place := _place(message.get(name))) is not None]
        is_told = len(places) == len(messages) and places[0] != places[-1]
        if is_told and places == sorted(places, reverse=True):
            raise RefusedRecord(f"its messages stand newest first, by their {name!r}: turn them round")


def _place(value: Any) -> tuple[float, str] | None:
    """A number, or a date, which sorts as text; None for anything else."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value), ""
    return (0.0, value) if isinstance(value, str) and _DAY.match(value) else None
