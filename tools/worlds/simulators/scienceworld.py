"""The hosting side of ScienceWorld: one JVM, and several of the package's simulators in it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from scienceworld import ScienceWorldEnv

from tools.worlds.simulators.live import Frame, RawCall, Settings

WON = 100
"""The package's score of a task that is solved."""


class _Simulator:
    """One of the package's simulators. Its wandering animals draw from one generator for the whole JVM: that one is set
    anew before each step, so that another episode's steps change nothing here."""

    def __init__(self, jvm: Any) -> None:
        self._random = jvm.java.lang.Class.forName("scala.util.Random$").getField("MODULE$").get(None)
        self._random.setSeed(0)
        self._package = jvm.scienceworld.runtime.pythonapi.PythonInterface()

    def load(self, settings: Settings, makes_gold_path: bool = False) -> _Simulator:
        """Set a task up; the package seeds its generator with the variation."""
        self._num_steps = 0
        self._package.load(settings["task"], settings["variation"], "", makes_gold_path)
        return self

    def step(self, action: str) -> str:
        self._num_steps += 1
        self._random.setSeed(self._num_steps)
        return self._package.step(action).strip()

    @property
    def score(self) -> int:
        return round(WON * self._package.getScore())

    @property
    def is_done(self) -> bool:
        """As the package's own environment has it: completed, or spoiled."""
        return bool(self._package.getCompleted()) or self.score < 0

    @property
    def opening(self) -> str:
        return f"{self._package.getTaskDescription().strip()}\n\n{self._package.freeActionLook().strip()}"

    @property
    def gold_path(self) -> list[str]:
        return list(self._package.getGoldActionSequence())

    @property
    def surroundings(self) -> str:
        return f"{self._package.freeActionLook()}\n{self._package.freeActionInventory()}\n{self.score}"


class _Laboratory:
    """One task that is being worked on."""

    def __init__(self, host: ScienceWorldHost, settings: Settings) -> None:
        self._host, self._settings = host, settings
        self._simulator = host.take_simulator().load(settings)
        self._done: tuple[str, ...] = ()
        self.frame = Frame(self._simulator.opening, state=self._digest())

    def do(self, name: str, arguments: Mapping[str, Any]) -> None:
        self._done = (*self._done, arguments["action"])
        observation, simulator = self._simulator.step(arguments["action"]), self._simulator
        self.frame = Frame(observation, simulator.is_done, float(simulator.score >= WON), self._digest())

    def expert(self) -> RawCall | None:
        way = self._host.way(self._settings, self._done)
        return ("act", {"action": way[0]}) if way else None

    def close(self) -> None:
        self._host.free_simulators.append(self._simulator)

    def _digest(self) -> str:
        return hashlib.sha256(self._simulator.surroundings.encode()).hexdigest()[:16]


class ScienceWorldHost:
    """The JVM, and what is known of the ways through its tasks."""

    def __init__(self) -> None:
        self._environment = ScienceWorldEnv("")
        self._jvm = self._environment._gateway.jvm  # several simulators in one JVM; the environment itself has one
        self._scratch = _Simulator(self._jvm)
        # Classes draw from the generator when they are first used, and keep what they drew as long as the JVM lives:
        # all are used here, always in the same order, so that every JVM tells the same story.
        for name in self._environment.get_task_names():
            self._scratch.load({"task": name, "variation": 0})
        self._has_walked: set[str] = set()
        self.free_simulators: list[_Simulator] = []
        self._gold_paths: dict[tuple[str, int], tuple[str, ...]] = {}
        self._ways: dict[tuple[str, int, tuple[str, ...]], tuple[str, ...]] = {}

    def open(self, settings: Settings) -> _Laboratory:
        return _Laboratory(self, settings)

    def take_simulator(self) -> _Simulator:
        """One that is free, or a new one: each takes 12 MB of the JVM, so they are used again."""
        return self.free_simulators.pop() if self.free_simulators else _Simulator(self._jvm)

    def way(self, settings: Settings, done: tuple[str, ...]) -> tuple[str, ...]:
        """The actions that solve the task after those done; none where no way is known.

        The package knows one way, its gold path from the start. After a detour what is left of it is tried out.
        """
        task = (settings["task"], settings["variation"])
        if done and (before := self._ways.get((*task, done[:-1]))) and before[0] == done[-1]:
            way = before[1:]
        elif (way_here := self._ways.get((*task, done))) is not None:
            way = way_here
        else:
            way = self._tried_out(settings, done, self._left_of_gold_path(settings, done))
        if len(self._ways) > 20_000:
            self._ways.clear()
        self._ways[(*task, done)] = way
        return way

    def _left_of_gold_path(self, settings: Settings, done: Sequence[str]) -> tuple[str, ...]:
        task = (settings["task"], settings["variation"])
        if task not in self._gold_paths:
            self._gold_paths[task] = self._gold_path(settings)
        left = self._gold_paths[task]
        for action in done:
            left = left[1:] if left and action == left[0] else left
        return left

    def _gold_path(self, settings: Settings) -> tuple[str, ...]:
        if settings["task"] not in self._has_walked:  # the same holds for the classes that find the path
            self._has_walked.add(settings["task"])
            self._scratch.load({**settings, "variation": 0}, makes_gold_path=True)
        return tuple(self._scratch.load(settings, makes_gold_path=True).gold_path)

    def _tried_out(self, settings: Settings, done: Sequence[str], way: Sequence[str]) -> tuple[str, ...]:
        simulator = self._scratch.load(settings)
        for action in done:
            simulator.step(action)
        for length, action in enumerate(way, start=1):
            simulator.step(action)
            if simulator.is_done:
                return tuple(way[:length]) if simulator.score >= WON else ()
        return ()
