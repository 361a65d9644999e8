"""Worlds made harder to learn from: an expert who errs, one who has more than one right way, and tasks that begin where
somebody stopped. Each wraps a world and leaves its tasks and outcomes as they are."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any

from learner.data.comparison import compare
from policies.chat.chat_protocol import message_action, text_of
from tools.worlds.world import Message, Task, World, WorldEpisode, max_steps_of

if TYPE_CHECKING:
    from langchain_core.tools import BaseTool


@dataclass(frozen=True, slots=True)
class WrappedWorld:
    """A world with other episodes; the base of those below."""

    inner: World

    @property
    def name(self) -> str:
        return self.inner.name

    @property
    def splits(self) -> Mapping[str, int]:
        return self.inner.splits

    @property
    def max_steps(self) -> int:
        """Of the wrapped world."""
        return max_steps_of(self.inner)

    def task(self, split: str, index: int) -> Task:
        return self.inner.task(split, index)

    def find_task(self, messages: Sequence[Message]) -> Task | None:
        return self.inner.find_task(messages)

    def open(self, task: Task) -> WorldEpisode:
        return self.inner.open(task)


class WrappedEpisode:
    """An episode with another expert."""

    def __init__(self, inner: WorldEpisode, world: World, task: Task, random: Random) -> None:
        self._inner, self._world, self._task, self._random = inner, world, task, random
        self._played: list[Message] = []
        self._told = "\n".join(text_of(message) for message in task.messages)
        self._choice: Message | None = None
        self._has_chosen = False

    @property
    def tools(self) -> list[BaseTool]:
        return self._inner.tools

    @property
    def is_done(self) -> bool:
        return self._inner.is_done

    def outcome(self) -> float:
        return self._inner.outcome()

    def play(self, message: Message) -> list[Message]:
        results = self._inner.play(message)
        self._played.append(message)
        self._told += "\n" + "\n".join(text_of(result) for result in results)
        self._has_chosen = False
        return results

    def expert_action(self) -> Message | None:
        """The same until the next action is played."""
        if not self._has_chosen:
            self._choice, self._has_chosen = self._choose(self._inner.expert_action()), True
        return self._choice

    def same_effect(self, message_a: Message, message_b: Message) -> bool:
        return self._inner.same_effect(message_a, message_b)

    def _choose(self, right: Message | None) -> Message | None:
        return right

    def _after(self, *messages: Message) -> WorldEpisode:
        """The episode after further messages, on a copy."""
        episode = self._world.open(self._task)
        for message in (*self._played, *messages):
            episode.play(message)
        return episode


# ------------------------------------------------------------------------------------------------ an expert who errs


@dataclass(frozen=True, slots=True)
class ErringExpert(WrappedWorld):
    """At a share of the states the expert makes a legal but worse step: a call that experts make elsewhere."""

    share: float
    seed: int

    def open(self, task: Task) -> WorldEpisode:
        random = Random(f"erring/{self.seed}/{task.id}")
        return _ErringEpisode(self.inner.open(task), self.inner, task, random, self.share)


class _ErringEpisode(WrappedEpisode):
    def __init__(self, inner: WorldEpisode, world: World, task: Task, random: Random, share: float) -> None:
        super().__init__(inner, world, task, random)
        self._share = share

    def _choose(self, right: Message | None) -> Message | None:
        if right is None or self._random.random() >= self._share:
            return right
        others = [call for call in self._calls_of_another_task() if not self._inner.same_effect(call, right)]
        return self._random.choice(others) if others else right

    def _calls_of_another_task(self) -> list[Message]:
        index = self._random.randrange(self._world.splits["train"])
        other = self._world.open(self._world.task("train", index))
        calls = list[Message]()
        while len(calls) < 20 and (message := other.expert_action()) is not None and message.get("tool_calls"):
            calls.append(message)
            other.play(message)
        return calls


# ------------------------------------------------------------------------------------------- several right ways


@dataclass(frozen=True, slots=True)
class PermutingExpert(WrappedWorld):
    """Where the next two steps of the expert can be done in either order, it does either first, by chance."""

    seed: int

    def open(self, task: Task) -> WorldEpisode:
        return _PermutingEpisode(self.inner.open(task), self.inner, task, Random(f"permuting/{self.seed}/{task.id}"))


class _PermutingEpisode(WrappedEpisode):
    def _choose(self, right: Message | None) -> Message | None:
        if right is None or not right.get("tool_calls") or self._random.random() < 0.5:
            return right
        second = self._after(right).expert_action()
        if second is None or not second.get("tool_calls") or not self._is_known(second):
            return right
        then = self._after(second).expert_action()
        is_either = then is not None and compare(message_action(then), message_action(right)).agrees
        return second if is_either else right

    def _is_known(self, message: Message) -> bool:
        """Whether all that the calls say has been told: else the order is not free."""
        return all(value in self._told for value in _texts(message))


def _texts(message: Message) -> list[str]:
    arguments: list[dict[str, Any]] = [
        json.loads(call["function"]["arguments"]) for call in message.get("tool_calls") or []
    ]
    return [value for each in arguments for value in each.values() if isinstance(value, str)]


# ---------------------------------------------------------------------------------------- where somebody stopped


@dataclass(frozen=True, slots=True)
class Resumed(WrappedWorld):
    """Tasks whose conversation has begun: what the assistant did in it is replayed when the task is opened."""

    def open(self, task: Task) -> WorldEpisode:
        episode = self.inner.open(self.inner.task(task.split, task.index))
        for message in task.messages:
            if message["role"] == "assistant":
                episode.play(message)
        return episode
