"""An expert that knows a task's right calls: which of them are still to be made, and whether they still lead there."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

Call = tuple[str, dict[str, Any]]
"""A tool's name and its arguments."""


class RightCalls:
    """The right calls of a task, ticked off as they are made.

    Looking around is free. A call that changes the world and is not among the right ones leads where no right call is
    known: from there on the expert is lost.
    """

    def __init__(self, calls: Iterable[Call]) -> None:
        self._left = list(calls)
        self.is_lost = False

    @property
    def next(self) -> Call | None:
        """The next one to make; None when all are made."""
        return self._left[0] if self._left else None

    def note(self, call: Call, has_changed: bool) -> None:
        """A call was made; `has_changed` says whether it changed the world."""
        if call in self._left:
            self._left.remove(call)
        elif has_changed:
            self.is_lost = True
