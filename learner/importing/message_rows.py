"""Messages one by one, as tables keep them: which lines are one conversation, and whether they stand in their order."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

from learner.importing.fields import RefusedRecord, snake_case
from learner.importing.json_lines import Record, Refusal

_CONVERSATIONS = frozenset(
    f"{what}{end}"
    for what in (
        "conversation", "conv", "session", "thread", "chat", "dialog", "dialogue", "episode", "trajectory", "ticket",
        "interaction", "sample",
    )
    for end in ("_id", "_uuid", "_key", "_hash", "")
)  # fmt: skip
"""Keys by which a table tells conversations apart. Ids of runs, traces and requests may change within one."""
_PLACES = frozenset(
    "created_at created timestamp ts time date turn turn_index turn_idx turn_number message_index message_number seq "
    "sequence position order index idx".split()
)
"""Keys that say when, or at which place, a message was said."""
_OPENERS = frozenset({"user", "human", "system", "developer"})
"""Who says the first message of a conversation."""


def by_conversation(lines: Iterable[Record | Refusal]) -> list[list[Record | Refusal]]:
    """The lines of each conversation, in their order. A line that cannot be read is a hole in those around it.

    Where a line does not say whose it is, all are one: a system prompt stands before the others without an id.
    """
    lines = list(lines)
    if not all(_name_of(line.value) for line in lines if isinstance(line, Record)):
        return [lines]
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
    # A column of numbers with a gap is one of floats: 1.0 is 1.
    return tuple(
        f"{key} {int(value) if isinstance(value, float) and value.is_integer() else value}"
        for key, value in keys
        if snake_case(key) in _CONVERSATIONS and isinstance(value, str | int | float)
    )


def require_oldest_first(messages: Sequence[Any]) -> None:
    """Raises RefusedRecord where each message says that it is older than the one before it: some APIs and tables list
    the newest first. The last one then opens the conversation; where an answer is the last, some clock was wrong."""
    if len(messages) < 2 or not all(isinstance(message, dict) for message in messages) or not _opens(messages[-1]):
        return
    for name in messages[0]:
        if snake_case(name) not in _PLACES:
            continue
        places = [place for message in messages if (place := _place(name, message.get(name))) is not None]
        is_told = len(places) == len(messages) and places[0] != places[-1]
        if is_told and places == sorted(places, reverse=True):
            raise RefusedRecord(f"its messages stand newest first, by their {name!r}: turn them round")


def _opens(message: dict[str, Any]) -> bool:
    """Whether a conversation may begin with it."""
    return any(str(message.get(key)).lower() in _OPENERS for key in ("role", "type", "from", "author", "sender"))


def _place(name: str, value: Any) -> float | None:
    """A number that grows with the conversation: of a date its seconds; None for anything else."""
    if isinstance(value, str):
        try:
            told = datetime.fromisoformat(value)
        except ValueError:
            return None
        return (told if told.tzinfo else told.replace(tzinfo=UTC)).timestamp()
    is_duration = snake_case(name) == "time"
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and not is_duration else None
