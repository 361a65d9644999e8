"""ALFWorld: household tasks in text, in rooms that are furnished as PDDL problems (package `alfworld`).

Engine, domain, words, goals, floor plans and expert (the package's planner, from every state) are the package's own;
which thing lies where is drawn by the task's number, because the published games cannot be had from a package registry.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib.util import find_spec
from typing import Any, ClassVar

from pydantic import Field

from tools.worlds.reading import Arguments
from tools.worlds.simulators.episode import SimulatedEpisode
from tools.worlds.simulators.pool import SimulatorPool
from tools.worlds.world import Message, Task

_ROOMS = {"kitchen": 0, "living room": 200, "bedroom": 300, "bathroom": 400}
"""Floor plans 1 to 30 of each, from these numbers on."""
_PLANS = {"train": range(10, 31), "validation": range(7, 10), "heldout": range(1, 7)}
"""The package's own training rooms are 7 to 30, its test rooms 1 to 6: what is held out are rooms never seen."""
_KINDS = (
    ("pick_and_place_simple", "kitchen"),
    ("pick_and_place_simple", "living room"),
    ("pick_and_place_simple", "bedroom"),
    ("pick_and_place_simple", "bathroom"),
    ("look_at_obj_in_light", "bedroom"),
    ("pick_clean_then_place_in_recep", "kitchen"),
    ("pick_clean_then_place_in_recep", "bathroom"),
    ("pick_heat_then_place_in_recep", "kitchen"),
    ("pick_cool_then_place_in_recep", "kitchen"),
    ("pick_two_obj_and_place", "bedroom"),
)
"""A task's index says its kind and the kind of its room."""


class Act(Arguments):
    """Do one thing in the house.

    The commands: look, inventory, go to (place), open (place), close (place), take (thing) from (place),
    move (thing) to (place), examine (something), use (thing), heat (thing) with (place), clean (thing) with (place),
    cool (thing) with (place), slice (thing) with (thing). Things and places have numbers, such as drawer 2.
    """

    command: str = Field(description="The command, such as: take mug 1 from desk 2", min_length=1, max_length=200)


@lru_cache(maxsize=1)
def _pool() -> SimulatorPool:
    return SimulatorPool("tools.worlds.simulators.alfworld:AlfWorldHost", num_processes=2, timeout_s=120.0)


class AlfWorldEpisode(SimulatedEpisode):
    """One attempt at one task in one room."""

    readers: ClassVar = {"act": Act}
    max_calls = 40


class AlfWorld:
    """The world of furnished rooms."""

    name = "alfworld"
    max_steps = AlfWorldEpisode.max_calls + 1
    splits: Mapping[str, int] = {"train": 2000, "validation": 200, "heldout": 400}

    def __init__(self) -> None:
        if find_spec("alfworld") is None:
            raise ModuleNotFoundError("No module named 'alfworld'", name="alfworld")

    def task(self, split: str, index: int) -> Task:
        """One task. Raises KeyError for an unknown split, IndexError for an index beyond its end."""
        opening = _pool().frame(self._settings(split, index), ()).observation
        return Task(self.name, split, index, ({"role": "user", "content": opening},))

    def find_task(self, messages: Sequence[Message]) -> Task | None:
        """None: two tasks may have the same text. A request has to name its task."""
        return None

    def open(self, task: Task) -> AlfWorldEpisode:
        """A fresh attempt at a task."""
        return AlfWorldEpisode(_pool(), self._settings(task.split, task.index))

    def _settings(self, split: str, index: int) -> dict[str, Any]:
        if not 0 <= index < self.splits[split]:
            raise IndexError(f"{self.name}/{split} has tasks 0 to {self.splits[split] - 1}, not {index}")
        kind, where = _KINDS[index % len(_KINDS)]
        plans = _PLANS[split]
        # The plan after the one before, so that all are used; one that has no such task gives way to the next.
        first = index // len(_KINDS) % len(plans)
        order = [_ROOMS[where] + plan for plan in (*plans[first:], *plans[:first])]
        return {"kind": kind, "rooms": order, "seed": index}
