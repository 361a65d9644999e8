"""What a world is: tasks by split, tools to act with, an outcome, and an expert who knows what to do in every state.

A world speaks OpenAI's message dicts and langchain-core's tools, nothing of ours, so that the server, a client and the
learner can each open the same task. An episode is rebuilt by opening its task again and replaying its calls; snapshots
of a state were refused, because they would have to travel through logs and processes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from langchain_core.tools import BaseTool

Message = dict[str, Any]
"""One chat message in OpenAI's form; a tool call's `arguments` are JSON text."""


@dataclass(frozen=True, slots=True)
class Task:
    """One thing to be done in a world."""

    world: str
    split: str
    index: int
    """Its place in the split, from 0."""
    messages: tuple[Message, ...]
    """How the conversation begins: perhaps a system message, then the user's."""

    @property
    def id(self) -> str:
        """`order_desk/train/17`."""
        return f"{self.world}/{self.split}/{self.index}"


class WorldEpisode(Protocol):
    """One attempt at a task. The same calls always lead to the same state and the same observations."""

    @property
    def tools(self) -> list[BaseTool]:
        """The tools that act on this episode. A call they cannot read gives an error text and changes nothing."""
        ...

    @property
    def is_done(self) -> bool:
        """No call can change the outcome any more; the agent may still say its final answer."""
        ...

    @property
    def can_still_succeed(self) -> bool:
        """From here the expert reaches outcome 1."""
        ...

    def outcome(self) -> float:
        """1.0 for success, 0.0 for failure or for what is not finished."""
        ...

    def play(self, message: Message) -> list[Message]:
        """Run an assistant message's tool calls in order and give back their tool messages; none for an answer."""
        ...

    def expert_action(self) -> Message:
        """The assistant message of an expert in this state: one tool call, or the final answer. Defined everywhere."""
        ...

    def expert_skill(self) -> str:
        """The skill that `expert_action` exercises here."""
        ...

    def same_effect(self, message_a: Message, message_b: Message) -> bool:
        """Whether two assistant messages, each played in this state, lead to the same place."""
        ...


class World(Protocol):
    """Tasks, and how to open them."""

    @property
    def name(self) -> str: ...

    @property
    def splits(self) -> Mapping[str, int]:
        """How many tasks each split has: `train`, `validation` and `heldout`, with no task in common."""
        ...

    def task(self, split: str, index: int) -> Task:
        """One task, always the same. Raises KeyError for an unknown split, IndexError for an index beyond its end."""
        ...

    def find_task(self, messages: Sequence[Message]) -> Task | None:
        """The task that a conversation is about, told by its first user message alone; None for anything else."""
        ...

    def open(self, task: Task) -> WorldEpisode:
        """A fresh attempt at a task."""
        ...
