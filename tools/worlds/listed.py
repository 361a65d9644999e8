"""A world whose tasks are a list: a package's own, or those of a file."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import Generic, TypeVar

from tools.worlds.world import SPLITS, Message, Task, WorldEpisode, opening_of, require_messages

Item = TypeVar("Item")
MOST_ALIKE = 100
"""Tasks that begin with the same words are held against so many of them."""


class ListedWorld(ABC, Generic[Item]):
    """Tasks by split, each made from one item of a list."""

    name: str

    def __init__(self, items: Mapping[str, Sequence[Item]]) -> None:
        if missing := [split for split in SPLITS if not isinstance(items, Mapping) or split not in items]:
            raise ValueError(
                f"a ListedWorld wants a list of tasks, perhaps empty, for each of {', '.join(SPLITS)}; it was given "
                f"none for {', '.join(missing)}"
            )
        for split in SPLITS:
            if not isinstance(items[split], Iterable) or isinstance(items[split], Set | Mapping | str | bytes):
                raise ValueError(
                    f"a ListedWorld wants its tasks in an order that is always the same: a list for {split}, perhaps "
                    f"empty; not {items[split]!r:.200}"
                )
        self._items = {split: tuple(items[split]) for split in SPLITS}
        self._places = defaultdict[str, list[tuple[str, int]]](list)
        for split, listed in self._items.items():
            for index, item in enumerate(listed):
                messages = self.messages_of(item)
                require_messages(messages)
                places = self._places[opening_of(messages)]
                self._require_in_one_split(item, split, index, places)
                places.append((split, index))

    def _require_in_one_split(self, item: Item, split: str, index: int, alike: Sequence[tuple[str, int]]) -> None:
        for known, place in alike[:MOST_ALIKE]:
            if known != split and _is_same(self.item(known, place), item):
                raise ValueError(
                    f"task {index} of {split} is task {place} of {known} once more: what is learned from one would be "
                    "judged by the other. Each task belongs to one split"
                )

    @abstractmethod
    def messages_of(self, item: Item) -> tuple[Message, ...]:
        """How the conversation about an item begins."""

    @abstractmethod
    def open_item(self, item: Item) -> WorldEpisode:
        """A fresh attempt at an item."""

    @property
    def splits(self) -> Mapping[str, int]:
        return {split: len(listed) for split, listed in self._items.items()}

    def task(self, split: str, index: int) -> Task:
        """One task. Raises KeyError for an unknown split, IndexError for an index beyond its end."""
        return Task(self.name, split, index, tuple(self.messages_of(self.item(split, index))))

    def item(self, split: str, index: int) -> Item:
        """The item that a task is made of; raises as `task` does."""
        listed = self._items[split]
        if not 0 <= index < len(listed):
            raise IndexError(f"{self.name}/{split} has {len(listed)} tasks from 0 on, not {index}")
        return listed[index]

    def find_task(self, messages: Sequence[Message]) -> Task | None:
        """The first task that begins with the same user message, spaces aside; None for any other text."""
        places = self._places.get(opening_of(messages) or "\n")
        return self.task(*places[0]) if places else None

    def open(self, task: Task) -> WorldEpisode:
        return self.open_item(self.item(task.split, task.index))


def _is_same(item: object, other: object) -> bool:
    """Arrays do not say it in one word: what holds some is a task of its own."""
    try:
        return bool(item == other)
    except (ValueError, RuntimeError):  # numpy's, torch's
        return False


def split_by_fives(items: Sequence[Item]) -> dict[str, list[Item]]:
    """Three fifths to train on, a fifth to validate, a fifth held out, mixed over the list: for one without splits."""
    splits: dict[str, list[Item]] = {split: [] for split in SPLITS}
    for number, item in enumerate(items):
        splits[("train", "train", "train", "validation", "heldout")[number % 5]].append(item)
    return splits


def split_of_file(file: Path, items: Iterable[Item], told_by: Callable[[Item], Hashable]) -> dict[str, list[Item]]:
    """The same for what a user's file holds; of items that `told_by` does not tell apart the first alone is a task.

    Raises ValueError where that is too little.
    """
    tasks: dict[Hashable, Item] = {}
    for item in items:
        tasks.setdefault(told_by(item), item)
    if len(tasks) < 5:
        raise ValueError(f"{file} holds {len(tasks)} different tasks that can be done; three splits need five or more")
    return split_by_fives(list(tasks.values()))


def some_for_validation(train: Sequence[Item], held_out: Sequence[Item]) -> dict[str, list[Item]]:
    """A published train and test split; every fifth of the former becomes validation, the latter stays held out."""
    return {
        "train": [item for number, item in enumerate(train) if number % 5 != 4],
        "validation": list(train[4::5]),
        "heldout": list(held_out),
    }
