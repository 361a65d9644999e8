"""ScienceWorld: experiments of primary school in a text simulator (package `scienceworld`, which needs Java).

Tasks, splits, observations, scores and gold paths are the package's own; the types are those that it solves in some 25
actions. The simulators run in one JVM, in a process of its own.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib.util import find_spec
from itertools import accumulate
from typing import Any, ClassVar

from pydantic import Field

from tools.worlds.reading import Arguments
from tools.worlds.simulators.episode import SimulatedEpisode
from tools.worlds.simulators.pool import SimulatorPool
from tools.worlds.world import SPLITS, Message, Task

TASK_TYPES = {
    "chemistry-mix": (16, 8, 8),
    "chemistry-mix-paint-secondary-color": (18, 9, 9),
    "find-animal": (150, 75, 75),
    "find-living-thing": (150, 75, 75),
    "find-non-living-thing": (150, 75, 75),
    "find-plant": (150, 75, 75),
    "identify-life-stages-2": (4, 2, 4),
    "lifespan-longest-lived": (62, 31, 32),
    "lifespan-longest-lived-then-shortest-lived": (62, 31, 32),
    "lifespan-shortest-lived": (62, 31, 32),
    "power-component": (10, 5, 5),
    "use-thermometer": (270, 135, 135),
}
"""How many variations the package gives to training, development and test, one range after the other."""
JAVA_OPTIONS = "-Xmx512m -XX:+UseSerialGC -XX:+UnlockExperimentalVMOptions -XX:hashCode=2"
"""The package lists things in the order of Java's identity hashes, which are drawn by chance; with hashCode=2 they are
all the same, and the order is that of their making: the same actions lead to the same words."""


class Act(Arguments):
    """Do one thing in the laboratory and the rooms around it.

    Such as: look around, inventory, open door to kitchen, go to kitchen, pick up thermometer, focus on red wire,
    move egg to red box, pour X into Y, mix X, use thermometer on X, connect X to Y, activate X, wait.
    """

    action: str = Field(description="What to do.", min_length=1, max_length=200)


@lru_cache(maxsize=1)
def _pool() -> SimulatorPool:
    host = "tools.worlds.simulators.scienceworld:ScienceWorldHost"
    return SimulatorPool(host, num_processes=1, timeout_s=60.0, environment={"JDK_JAVA_OPTIONS": JAVA_OPTIONS})


class ScienceWorldEpisode(SimulatedEpisode):
    """One attempt at one variation of a task."""

    readers: ClassVar = {"act": Act}
    max_calls = 50


def _variations(split: str) -> list[dict[str, Any]]:
    """A split's tasks, the types taking turns."""
    place = SPLITS.index(split)
    listed = []
    for number, (task, sizes) in enumerate(TASK_TYPES.items()):
        first = [0, *accumulate(sizes)][place]
        listed += [(index, number, {"task": task, "variation": first + index}) for index in range(sizes[place])]
    return [settings for _, _, settings in sorted(listed, key=lambda entry: entry[:2])]


class ScienceWorld:
    """The world of ScienceWorld's short tasks."""

    name = "scienceworld"
    max_steps = ScienceWorldEpisode.max_calls + 1

    def __init__(self) -> None:
        if find_spec("scienceworld") is None:
            raise ModuleNotFoundError("No module named 'scienceworld'", name="scienceworld")
        if shutil.which("java") is None:
            raise ValueError("the world scienceworld needs Java 17: install Debian's package default-jre-headless")
        self._tasks = {split: _variations(split) for split in SPLITS}

    @property
    def splits(self) -> Mapping[str, int]:
        return {split: len(tasks) for split, tasks in self._tasks.items()}

    def task(self, split: str, index: int) -> Task:
        """One variation. Raises KeyError for an unknown split, IndexError for an index beyond its end."""
        opening = _pool().frame(self._settings(split, index), ()).observation
        return Task(self.name, split, index, ({"role": "user", "content": opening},))

    def find_task(self, messages: Sequence[Message]) -> Task | None:
        """None: variations have the same text. A request has to name its task."""
        return None

    def open(self, task: Task) -> ScienceWorldEpisode:
        """A fresh attempt at a variation."""
        return ScienceWorldEpisode(_pool(), self._settings(task.split, task.index))

    def _settings(self, split: str, index: int) -> dict[str, Any]:
        tasks = self._tasks[split]
        if not 0 <= index < len(tasks):
            raise IndexError(f"{self.name}/{split} has tasks 0 to {len(tasks) - 1}, not {index}")
        return tasks[index]
