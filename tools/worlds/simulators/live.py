"""What a simulator is to the process that hosts it, and what one observation of it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

Settings = Mapping[str, Any]
"""What opens a task, as JSON; the same settings always open the same task."""
RawCall = tuple[str, Mapping[str, Any]]
"""A tool's name and its arguments, as JSON."""


@dataclass(frozen=True, slots=True)
class Frame:
    """What is there after the opening or after a call."""

    observation: str
    is_done: bool = False
    outcome: float = 0.0
    state: str = ""
    """Tells this state from others."""
    failure: str = ""
    """Why the simulator could not go on; empty where it could."""


class Live(Protocol):
    """One episode in a package's own environment."""

    frame: Frame

    def do(self, name: str, arguments: Mapping[str, Any]) -> None:
        """Make a call; `frame` is then what came of it."""
        ...

    def expert(self) -> RawCall | None:
        """The expert's next call; None where no expert knows this state."""
        ...

    def close(self) -> None: ...


class Host(Protocol):
    """What a process starts once: a JVM, a browser."""

    def open(self, settings: Settings) -> Live: ...
