"""Which demonstrations are held out: never trained on, kept for the gate, and with them all that is of the same task.

A task's name alone decides, by its digest, so that the answer is the same in every process, after every restart and
whatever else was imported. A random draw written down in a table was refused: it would be one more thing to lose.

What names a task: the id that a client gave it, in the field or anywhere in its metadata; the world, which finds its
own tasks by what the user asks; what the user asks first; the episode that it was promoted from. Whoever shares one of
these names with a held-out demonstration is held out too, and so is whatever is of a world's task that no training may
see: its splits but `train`.

What the user asks first is no name where an agent is always greeted alike, or always told to take the next ticket: that
is, where demonstrations went on differently after it though the agent did the same. Then all that it was told names it.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from policies.chat.chat_protocol import message_action, text_of
from policies.chat.meaning import meaning, normal_text
from policies.types import FinalAnswer, Message
from tools.worlds.blame import blaming
from tools.worlds.threads import patiently
from tools.worlds.world import TaskId, World

TRAINED_SPLIT = "train"
"""Of a world; the gate and reports try the others."""
NUM_REPLIES_OF_A_GREETING = 3
"""Two different replies to the same action may still be one task, told twice."""
_HEX_DIGITS = 13  # 52 bits: what a float holds exactly


def is_held_out(name: str, share: float) -> bool:
    """Whether what has that name belongs to the held-out share, a number in [0, 1].

    What is held out at one share is held out at every greater one. Raises ValueError for a share outside [0, 1].
    """
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"the held-out share must lie in [0, 1], got {share}")
    return place_of(f"held out {name}") < share


def place_of(name: str) -> float:
    """Where a name falls in [0, 1), the same for ever.

    Hashed again: the same place in a name's own digest may already decide something else, such as a canary's share.
    """
    return int(hashlib.sha256(name.encode()).hexdigest()[:_HEX_DIGITS], 16) / 16**_HEX_DIGITS


@dataclass(frozen=True, slots=True)
class Conversation:
    """What an episode was about, as far as it can be told."""

    id: str
    """The episode's."""
    task: str | None
    """As it was named."""
    metadata: dict[str, Any]
    messages: tuple[Message, ...]
    """From the first to the last action."""
    created_at: float
    """Unix seconds."""

    @property
    def opening(self) -> str:
        """What the user said first; empty where no user said anything."""
        return next((normal_text(text_of(m)) for m in self.messages if m["role"] == "user"), "")

    @property
    def told(self) -> str:
        """All that the agent was told, by users and tools; empty where nobody told it anything."""
        texts = [text_of(message) for message in self.messages if message["role"] in ("user", "tool")]
        return json.dumps(texts) if any(texts) else ""

    @property
    def first_reply(self) -> tuple[str, str] | None:
        """(what the agent did first, what it was told then); None where the conversation ends there."""
        first = next((n for n, message in enumerate(self.messages) if message["role"] == "assistant"), None)
        if first is None or first + 1 == len(self.messages):
            return None
        rest = self.messages[first + 1 :]
        next_action = next((n for n, message in enumerate(rest) if message["role"] == "assistant"), len(rest))
        return _did(self.messages[first]), json.dumps([text_of(message) for message in rest[:next_action]])


class TaskNames:
    """Names the task of conversations, so that what is of one task shares a name."""

    def __init__(self, world: World | None, demonstrations: Sequence[Conversation]) -> None:
        """Demonstrations tell which openings are mere greetings."""
        self._world = world
        replies: defaultdict[tuple[str, str], set[str]] = defaultdict(set)
        for conversation in demonstrations:
            if reply := conversation.first_reply:
                replies[conversation.opening, reply[0]].add(reply[1])
        self._greetings = {
            opening for (opening, _), said in replies.items() if len(said) >= NUM_REPLIES_OF_A_GREETING
        } | {""}

    def names(self, conversation: Conversation) -> list[str]:
        """All its names, the surest one first. Never empty."""
        names = [f"task {task}" for task in self._tasks(conversation)]
        if (opening := conversation.opening) not in self._greetings:
            names.append(f"asked {_digest(opening)}")
        if told := conversation.told:
            names.append(f"told {_digest(told)}")
        promoted_from = conversation.metadata.get("promoted_from")
        episodes = [conversation.id, *([promoted_from] if isinstance(promoted_from, str) else [])]
        return [*names, *(f"episode {episode}" for episode in episodes)]

    def is_of_untrained_split(self, conversation: Conversation) -> bool:
        """Whether it is, by any of its names, of a world's task that no training may see."""
        if self._world is None:
            return False
        kept = {split for split in self._world.splits if split != TRAINED_SPLIT}
        return any(split_of(task, self._world) in kept for task in self._tasks(conversation))

    def _tasks(self, conversation: Conversation) -> Iterator[str]:
        """Ids of tasks: the world's own finding first, which no client can make up."""
        if self._world is not None and (
            found := patiently(self._world.name, partial(_found, self._world, conversation))
        ):
            yield found
        if conversation.task is not None:
            yield conversation.task
        if self._world is not None:
            values = conversation.metadata.values()
            yield from (value for value in values if isinstance(value, str) and split_of(value, self._world))


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Which demonstrations are held out, and what else is of their tasks."""

    held_out_episodes: frozenset[str]
    """Of the demonstrations."""
    _task_names: TaskNames
    _held_out_names: frozenset[str]
    _groups_named: dict[str, str]
    """Groups of demonstrations by the names in them."""

    @classmethod
    def among(
        cls,
        demonstrations: Sequence[Conversation],
        world: World | None,
        share: float,
        anchors: Sequence[Conversation] = (),
        anchor_tasks: Sequence[str] = (),
    ) -> HeldOut:
        """`anchors`: conversations, and a world's tasks, that the gate tries lest they be forgotten."""
        task_names = TaskNames(world, demonstrations)
        names = {each.id: task_names.names(each) for each in demonstrations}
        group_of = _groups([each.id for each in sorted(demonstrations, key=lambda e: (e.created_at, e.id))], names)
        kept = {group for group in group_of.values() if is_held_out(group, share)}
        kept |= {group_of[each.id] for each in demonstrations if task_names.is_of_untrained_split(each)}
        anchor_names = {name for each in anchors for name in task_names.names(each)}
        anchor_names |= {f"task {task}" for task in anchor_tasks}
        kept |= {group for episode, group in group_of.items() if not anchor_names.isdisjoint(names[episode])}
        episodes = frozenset(episode for episode, group in group_of.items() if group in kept)
        held_out_names = {name for episode in episodes for name in names[episode]}
        groups_named = {name: group for episode, group in group_of.items() for name in names[episode]}
        return cls(episodes, task_names, frozenset(held_out_names | anchor_names), groups_named)

    def covers(self, conversation: Conversation) -> bool:
        """Whether a conversation must not be trained on: it is of a held-out task, whatever names it."""
        if self._task_names.is_of_untrained_split(conversation):
            return True
        return not self._held_out_names.isdisjoint(self._task_names.names(conversation))

    def groups(self, conversation: Conversation) -> frozenset[str]:
        """The demonstrated tasks that a conversation is of, by the names that decide for them; one, mostly, or none."""
        names = self._task_names.names(conversation)
        return frozenset(self._groups_named[name] for name in names if name in self._groups_named)


def _groups(oldest_first: Sequence[str], names: dict[str, list[str]]) -> dict[str, str]:
    """By episode, the surest name of the oldest that it is connected with through shared names.

    The oldest, so that what is imported later moves nothing that was there.
    """
    sharing: defaultdict[str, list[str]] = defaultdict(list)
    for episode in oldest_first:
        for name in names[episode]:
            sharing[name].append(episode)
    group_of: dict[str, str] = {}
    for oldest in oldest_first:
        waiting = [oldest] if oldest not in group_of else []
        while waiting:
            episode = waiting.pop()
            if episode not in group_of:
                group_of[episode] = names[oldest][0]
                waiting += [other for name in names[episode] for other in sharing[name]]
    return group_of


def _found(world: World, conversation: Conversation) -> str | None:
    """The id of the world's task that a conversation is about. Raises WorldFailed."""
    with blaming(world.name, "find_task"):
        task = world.find_task(conversation.messages)
        return task.id if task else None


def split_of(task: str, world: World) -> str | None:
    """The split of a world's task id; None for anything else."""
    try:
        found = TaskId.parse(task)
    except ValueError:
        return None
    return found.split if found.world == world.name and found.split in world.splits else None


def _did(message: Message) -> str:
    """What an assistant's message does; all that is merely said counts as one."""
    try:
        action = message_action(message)
    except ValueError:
        return ""
    return "answer" if isinstance(action, FinalAnswer) else json.dumps(meaning(action))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
