"""An agent as it is served: what it is told before its client speaks, its tools, and how it samples unless told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from policies.types import Message
from runtime.agent.scorers import NOTHING_ASKED, ChoosingAsked
from runtime.agent.tools import Toolbox


@dataclass(frozen=True, slots=True)
class ServedAgent:
    """One of the agents that stand on the base model. Its adapters are the registry's business, by its name."""

    name: str
    """Empty: the server's own."""
    model: str
    """The model name that chooses it."""
    toolbox: Toolbox
    system: str = ""
    """Its system prompt; empty: it has none."""
    sampling: Mapping[str, float | int] = field(default_factory=dict)
    """By the names of a chat request: what counts where the request does not say."""
    choosing: ChoosingAsked = NOTHING_ASKED
    """How many actions are drawn at each step where the request does not say, and what chooses; None: as the server."""

    @property
    def opening(self) -> tuple[Message, ...]:
        """What it is told before all else."""
        return ({"role": "system", "content": self.system},) if self.system else ()

    def told(self, messages: Sequence[Message]) -> tuple[Message, ...]:
        """A client's conversation as the agent sees it: a client that brings a system prompt replaces the agent's."""
        if not self.system or has_system(messages):
            return tuple(messages)
        return (*self.opening, *messages)

    def untold(self, messages: Sequence[Message]) -> tuple[Message, ...]:
        """The conversation without the agent's own prompt."""
        own = len(self.opening)
        return tuple(messages[own:] if tuple(messages[:own]) == self.opening else messages)


def has_system(messages: Sequence[Message]) -> bool:
    return any(message["role"] == "system" for message in messages)
