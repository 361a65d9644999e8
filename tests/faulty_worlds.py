"""A small world whose methods tests replace by ones that misbehave."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from tools.worlds.calls import ToolEpisode, ToolSchema
from tools.worlds.listed import ListedWorld, split_by_fives
from tools.worlds.world import SPLITS, Message, Task, WorldEpisode, WorldFailed

NUMBERS = split_by_fives(range(10))
COUNT = {"name": "count", "description": "Counts.", "parameters": {"type": "object", "properties": {}}}


class NumbersEpisode(ToolEpisode):
    """Success is to answer at all."""

    def __init__(self, item: int) -> None:
        super().__init__()
        self.item, self.num_calls, self.is_answered = item, 0, False

    def schemas(self) -> Sequence[ToolSchema]:
        return [COUNT]

    def run(self, name: str, arguments: dict[str, Any]) -> str:
        self.num_calls += 1
        return str(self.num_calls)

    def answer(self, text: str) -> str | None:
        self.is_answered = True
        return None

    def outcome(self) -> float:
        return float(self.is_answered)

    def reopened(self) -> ToolEpisode:
        return type(self)(self.item)

    def is_where(self, other: Any) -> bool:
        return self.num_calls == other.num_calls


class Numbers(ListedWorld[int]):
    """Ten tasks."""

    name = "numbers"
    episode: type[NumbersEpisode] = NumbersEpisode

    def __init__(self) -> None:
        super().__init__(NUMBERS)

    def messages_of(self, item: int) -> tuple[Message, ...]:
        return ({"role": "user", "content": f"Count to {item}."},)

    def open_item(self, item: int) -> WorldEpisode:
        return self.episode(item)


def numbers(**methods: Callable[..., Any]) -> Numbers:
    """The world with other methods; those that no world has are an episode's."""
    of_world = {name: method for name, method in methods.items() if hasattr(Numbers, name)}
    of_episode = {name: method for name, method in methods.items() if name not in of_world}
    episode = type("Episode", (NumbersEpisode,), of_episode)
    return type("World", (Numbers,), {"episode": episode, **of_world})()


def raising(error: BaseException) -> Callable[..., Any]:
    def method(*_: Any) -> Any:
        raise error

    return method


# ---------------------------------------------------------------------- what `module:Class` may be by mistake


class NeedsArguments(Numbers):
    def __init__(self, path: str) -> None:
        super().__init__()


class ConstructorRaises(Numbers):
    def __init__(self) -> None:
        raise RuntimeError("kaput")


class ConstructorEnds(Numbers):
    def __init__(self) -> None:
        raise SystemExit(2)


class Abstract(ListedWorld[int]):
    name = "numbers"


class NoName(Numbers):
    name: Any = None


class SlashInName(Numbers):
    name = "my/world"


class SplitsAreAList(Numbers):
    splits: ClassVar[Any] = ["train"]  # type: ignore[assignment]


class SplitsAreTasks(Numbers):
    splits: ClassVar[Any] = {"train": [1], "validation": [], "heldout": []}  # type: ignore[assignment]


class TwoSplits(Numbers):
    def __init__(self) -> None:
        ListedWorld.__init__(self, {"train": [1], "validation": [2]})


class NothingCalled(Numbers):
    def __init__(self) -> None:
        pass


class MessagesAreText(Numbers):
    def messages_of(self, item: int) -> Any:
        return f"Count to {item}."


class MessagesWithoutRole(Numbers):
    def messages_of(self, item: int) -> Any:
        return ({"content": f"Count to {item}."},)


class MessagesAreNoText(Numbers):
    def messages_of(self, item: int) -> Any:
        return ({"role": "user", "content": "Count to \ud800."},)


class OtherTask(Numbers):
    def task(self, split: str, index: int) -> Task:
        return Task("other", split, index, ({"role": "user", "content": "Hello."},))


class TaskRaises(Numbers):
    def task(self, split: str, index: int) -> Task:
        raise WorldFailed("its simulator does not start")


class RunsAnEventLoop(Numbers):
    def __init__(self) -> None:
        asyncio.run(asyncio.sleep(0))
        super().__init__()

    def task(self, split: str, index: int) -> Task:
        asyncio.run(asyncio.sleep(0))
        return super().task(split, index)


class ChangesFolder(Numbers):
    def __init__(self) -> None:
        os.chdir(os.sep)
        super().__init__()


class NoSteps(Numbers):
    max_steps = 0


class NoTasks(Numbers):
    def __init__(self) -> None:
        ListedWorld.__init__(self, dict.fromkeys(SPLITS, ()))


class NoneHeldOut(Numbers):
    def __init__(self) -> None:
        ListedWorld.__init__(self, {"train": [1], "validation": [], "heldout": []})
