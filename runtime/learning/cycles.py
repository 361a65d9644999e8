"""Cycles as users see them: what the learner has logged, and what only its process can tell yet."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from runtime.learning.process import LearnerProcess
from runtime.store.damage import Damaged
from runtime.store.learning_log import CycleStatus, LearningReader


class Cycles:
    """Reads from disk: not for the event loop."""

    def __init__(self, log: LearningReader, process: LearnerProcess) -> None:
        self._log = log
        self._process = process

    def newest(
        self, limit: int, damaged: list[Damaged] | None = None, agent: str | None = None
    ) -> list[dict[str, Any]]:
        """Newest first, of all agents or of one, what was started and has logged nothing among them. Those whose rows
        are damaged are added to `damaged` instead."""
        unlogged = self._process.unlogged()  # before the log is read: one that begins meanwhile is found in either
        logged = [self._shown(status) for status in self._log.cycles(limit, damaged, agent)]
        known = {cycle["id"] for cycle in logged}
        waiting = [cycle for cycle in unlogged if cycle["id"] not in known and agent in (None, cycle["agent"])]
        for cycle in waiting:
            place = next((number for number, each in enumerate(logged) if each["id"] < cycle["id"]), len(logged))
            logged.insert(place, cycle)
        return logged[:limit]

    def cycle(self, name: str) -> dict[str, Any] | None:
        """One cycle, with the gate's decisions and a summary of its step rewards; None for one nobody started."""
        unlogged = self._process.unlogged()
        status = self._log.status(name)
        if status is None:
            return next((cycle for cycle in unlogged if cycle["id"] == name), None)
        details = {"decisions": self._log.decisions(name), "rewards": self._log.reward_summary(name)}
        return self._shown(status) | details

    def _shown(self, status: CycleStatus) -> dict[str, Any]:
        status = self._log.as_of_now(status)
        shown = asdict(status)
        return {"object": "learner.cycle", "id": shown.pop("cycle"), **shown}
