"""MiniWoB++: small web pages with a task each, in Debian's Chromium (package `miniwob`; `playwright` drives it).

Pages, tasks and rewards are the package's own. What the agent sees is the browser's accessibility tree; it clicks and
types. The expert is scripted (`simulators/miniwob_expert.py`). The browser runs in a process of its own.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib.util import find_spec
from typing import Any, ClassVar

from pydantic import Field

from tools.worlds.reading import Arguments
from tools.worlds.simulators.episode import SimulatedEpisode
from tools.worlds.simulators.miniwob_expert import SCRIPTS
from tools.worlds.simulators.pool import SimulatorPool
from tools.worlds.world import Message, Task

PAGES = tuple(SCRIPTS)
"""A task's index says its page."""


class Click(Arguments):
    """Click an element."""

    ref: str = Field(
        description="The element's ref in the accessibility tree, such as e7.", pattern=r"^[a-z0-9]{1,12}$"
    )


class Type(Arguments):
    """Put text into a text box, in place of what it holds, or choose the option of that name from a combobox.

    A date is written 2016-10-29, a time 14:05.
    """

    ref: str = Field(
        description="The element's ref in the accessibility tree, such as e7.", pattern=r"^[a-z0-9]{1,12}$"
    )
    text: str = Field(description="The text.", max_length=1000)


@lru_cache(maxsize=1)
def _pool() -> SimulatorPool:
    return SimulatorPool("tools.worlds.simulators.miniwob:MiniWobHost", num_processes=1, timeout_s=60.0)


class MiniWobEpisode(SimulatedEpisode):
    """One attempt at one page's task."""

    readers: ClassVar = {"click": Click, "type": Type}
    max_calls = 30


class MiniWob:
    """The world of MiniWoB++ pages for which there is a scripted expert."""

    name = "miniwob"
    max_steps = MiniWobEpisode.max_calls + 1
    splits: Mapping[str, int] = {"train": 40 * len(PAGES), "validation": 10 * len(PAGES), "heldout": 20 * len(PAGES)}

    def __init__(self) -> None:
        for package in ("miniwob", "playwright"):
            if find_spec(package) is None:
                raise ModuleNotFoundError(f"No module named {package!r}", name=package)
        if shutil.which("chromium") is None:
            raise ValueError("the world miniwob needs Chromium: install Debian's package chromium")

    def task(self, split: str, index: int) -> Task:
        """One page's task. Raises KeyError for an unknown split, IndexError for an index beyond its end."""
        opening = _pool().frame(self._settings(split, index), ()).observation
        return Task(self.name, split, index, ({"role": "user", "content": opening},))

    def find_task(self, messages: Sequence[Message]) -> Task | None:
        """None: to know all tasks' texts, all pages would have to be opened. A request has to name its task."""
        return None

    def open(self, task: Task) -> MiniWobEpisode:
        """A fresh attempt at a task."""
        return MiniWobEpisode(_pool(), self._settings(task.split, task.index))

    def _settings(self, split: str, index: int) -> dict[str, Any]:
        if not 0 <= index < self.splits[split]:
            raise IndexError(f"{self.name}/{split} has tasks 0 to {self.splits[split] - 1}, not {index}")
        return {"page": PAGES[index % len(PAGES)], "split": split, "index": index}
