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

    def tick_off(self, call: Call) -> bool:
        """Whether a call that is made now is one of those left; it is then made."""
        if call not in self._left:
            return False
        self._left.remove(call)
        return True

    def lose(self) -> None:
        """A call that is not right has changed the world."""
        self.is_lost = True
