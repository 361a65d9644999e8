"""What an action says, without how it is said."""

from __future__ import annotations

import json
import unicodedata
from typing import Any

from policies.types import FinalAnswer, ToolCalls


def meaning(action: ToolCalls | FinalAnswer) -> tuple[str, ...]:
    """What an action says, without how it is said: equal for two actions that are the same decision.

    Of calls: names and arguments as JSON values, in no order, since the calls of one step may run side by side. Text
    beside calls, reasoning and ids are of no account. Strings within arguments count as they stand: whether a tool
    minds their case or spaces, only a world can say.
    """
    if isinstance(action, FinalAnswer):
        return ("answer", normal_text(action.text))
    return ("calls", *sorted(f"{call.name} {canonical_json(call.arguments)}" for call in action.calls))


def canonical_json(value: Any) -> str:
    """One spelling for equal JSON values: keys sorted, 1.0 written as 1. True and 1 stay apart."""
    return json.dumps(json.loads(json.dumps(value), parse_float=_number), sort_keys=True, separators=(",", ":"))


def _number(spelled: str) -> int | float:
    number = float(spelled)
    return int(number) if number.is_integer() else number


def normal_text(text: str) -> str:
    """Text without case, outer and repeated white space, and variants of Unicode spelling."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(folded.split())
