"""Ends an answer at the client's stop texts, while it streams."""

from __future__ import annotations

from collections.abc import Iterable

from policies.chat.chat_protocol import CallDelta, TextDelta


class StopTexts:
    """Ends an answer where the stop text begins that is complete first, the longest of several; holds back what may be
    the beginning of one. So it ends alike, in whatever pieces it comes."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self.text = ""
        """The answer as far as it was let through."""
        self.is_reached = False
        self.stops = stops
        self._held = ""

    def cut(self, deltas: Iterable[TextDelta | CallDelta], is_last: bool = False) -> tuple[TextDelta | CallDelta, ...]:
        if not self.stops:
            return tuple(deltas)
        text, kept = list[str](), list[TextDelta | CallDelta]()
        for delta in deltas:
            if isinstance(delta, TextDelta) and delta.kind == "text":
                text.append(delta.text)
            else:
                kept.append(delta)
        self._held += "".join(text)
        passed = "" if self.is_reached else self._pass(is_last)
        self.text += passed
        return (*kept, TextDelta("text", passed)) if passed else tuple(kept)

    @classmethod
    def cut_whole(cls, stops: tuple[str, ...], text: str) -> tuple[str, bool]:
        """(a text up to its first stop text, whether there is one)."""
        ending = cls(stops)
        ending.cut([TextDelta("text", text)], is_last=True)
        return (ending.text if stops else text), ending.is_reached

    def _pass(self, is_last: bool) -> str:
        found = [(at + len(stop), at) for stop in self.stops if (at := self._held.find(stop)) >= 0]
        self.is_reached = bool(found)
        end = min(found)[1] if found else len(self._held) if is_last else self._first_doubtful()
        passed, self._held = self._held[:end], self._held[end:]
        return passed

    def _first_doubtful(self) -> int:
        """Where the longest tail begins that could grow into a stop text."""
        ends = range(len(self._held) - min(len(self._held), max(map(len, self.stops))), len(self._held))
        tails = (at for at in ends if any(stop.startswith(self._held[at:]) for stop in self.stops))
        return next(tails, len(self._held))
