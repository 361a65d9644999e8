"""What a world is: tasks by split, tools to act with, an outcome, and an expert where there is one.

A world speaks OpenAI's message dicts and langchain-core's tools, nothing of ours, so that the server, a client and the
learner can each open the same task. An episode is rebuilt by opening its task again and replaying what the agent did;
snapshots of a state were refused, because they would have to travel through logs and processes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:  # a second of import that a simulator's process does without
    from langchain_core.tools import BaseTool

Message = dict[str, Any]
"""One chat message in OpenAI's form; a tool call's `arguments` are JSON text."""

SPLITS = ("train", "validation", "heldout")
"""What is learned from, what the gate tries, and what reporting is done on. No task is in two of them."""

_TASK_ID = re.compile(r"([^/]+)/([^/]+)/(0|[1-9][0-9]{0,9})")


_ROLES = ("system", "developer", "user", "assistant", "tool")


def require_messages(said: object) -> None:
    """Raises ValueError for what no conversation can begin with."""
    form = "a conversation begins with messages, such as ({'role': 'user', 'content': 'Light the hall.'},)"
    if not isinstance(said, list | tuple) or not said:
        raise ValueError(f"{form}; not with {said!r:.300}")
    for message in said:
        _require_message(message, form, _ROLES)
    if not any(message["role"] == "user" for message in said):
        raise ValueError(f"{form}; there is none of the user's")


def require_told(told: object) -> None:
    """Raises ValueError for what a world cannot say to an assistant message."""
    form = "a world says a list of messages, perhaps an empty one: of tools, or of the user"
    if not isinstance(told, list | tuple):
        raise ValueError(f"{form}; not {told!r:.300}")
    for message in told:
        _require_message(message, form, ("tool", "user"))


def require_action(said: object) -> None:
    """Raises ValueError for what no assistant can say or call."""
    form = "an expert gives an assistant message, such as {'role': 'assistant', 'content': 'Done.'}, or None"
    if isinstance(said, dict) and said.get("tool_calls") and said.get("content") is None:
        said = {**said, "content": ""}
    _require_message(said, form, ("assistant",))


def _require_message(message: object, form: str, roles: Sequence[str]) -> None:
    is_message = isinstance(message, dict) and message.get("role") in roles
    if not is_message or not isinstance(message.get("content"), str | list):
        raise ValueError(f"{form}; not {message!r:.300}")
    try:
        json.dumps(message, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{form}; {message!r:.300} cannot be written as JSON: {error}") from error


@dataclass(frozen=True, slots=True)
class TaskId:
    """The name of a task, written `world/split/index`."""

    world: str
    split: str
    index: int
    """Its place in the split, from 0."""

    @classmethod
    def parse(cls, text: str) -> TaskId:
        """Read `order_desk/train/17`. Raises ValueError for any other form."""
        found = _TASK_ID.fullmatch(text)
        if found is None:
            raise ValueError(f"{text!r} is no task id; one is world/split/index, such as order_desk/train/17")
        return cls(found[1], found[2], int(found[3]))

    def __str__(self) -> str:
        return f"{self.world}/{self.split}/{self.index}"


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
        return str(TaskId(self.world, self.split, self.index))


class WorldEpisode(Protocol):
    """One attempt at a task. The same actions always lead to the same state and the same observations."""

    @property
    def tools(self) -> list[BaseTool]:
        """The tools that act on this episode now. A call they cannot read gives an error text and changes nothing."""
        ...

    @property
    def is_done(self) -> bool:
        """No call can change the outcome any more; the agent may still say its final answer."""
        ...

    def outcome(self) -> float:
        """1.0 for success, 0.0 for failure or for what is not finished; between them where a world counts parts."""
        ...

    def play(self, message: Message) -> list[Message]:
        """Take an assistant message, and give back what the world says to it.

        For tool calls: their tool messages, in order. For a final answer: the user's next message, or nothing where
        the user has no more to say.
        """
        ...

    def expert_action(self) -> Message | None:
        """The assistant message of an expert in this state: one tool call, or the final answer.

        None where the world has no expert, and where its expert does not know the way from here.
        """
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
        """How many tasks each of `SPLITS` has."""
        ...

    def task(self, split: str, index: int) -> Task:
        """One task, always the same. Raises KeyError for an unknown split, IndexError for an index beyond its end."""
        ...

    def find_task(self, messages: Sequence[Message]) -> Task | None:
        """The task that a conversation is about, told by its first user message alone; None for anything else."""
        ...

    def open(self, task: Task) -> WorldEpisode:
        """A fresh attempt at a task; any number of attempts at one task do not touch each other."""
        ...


def text_of(message: Message) -> str:
    """A message's text, whether it came as a string, as content parts, or not at all."""
    content = message.get("content")
    if isinstance(content, list):
        return "".join(str(part.get("text") or "") for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""


def opening_of(messages: Sequence[Message]) -> str:
    """What the user says first, spaces aside; empty where no user says anything."""
    return next((" ".join(text_of(message).split()) for message in messages if message.get("role") == "user"), "")


class WorldFailed(Exception):
    """A world cannot open a task now: its simulator does not start, or hangs."""


MAX_STEPS = 16
"""Of an attempt, where the world has no `max_steps` of its own."""


def max_steps_of(world: World | None) -> int:
    """Steps after which an attempt at a task is given up."""
    return getattr(world, "max_steps", MAX_STEPS)


class UnknownTask(ValueError):
    """A task id that names no task of the world."""


def is_of_world(task_id: str, world: World) -> bool:
    """Whether the id names this world, be there such a task or not."""
    return task_id.partition("/")[0] == world.name


def task_named(world: World, task_id: str) -> Task:
    """The world's task of that id. Raises UnknownTask where there is none."""
    try:
        parsed = TaskId.parse(task_id)
    except ValueError:
        parsed = None
    if parsed is not None and parsed.world == world.name and parsed.index < world.splits.get(parsed.split, 0):
        return world.task(parsed.split, parsed.index)
    splits = ", ".join(f"{name} 0..{size - 1}" for name, size in world.splits.items())
    raise UnknownTask(f"there is no task {task_id!r}; {world.name} has {splits}")
