"""Retrains, one after the other, the agents that have learned from what was erased.

What acts and has learned from it is rolled back at once, for every agent: a cycle goes on from what acts. Their cycles
follow one by one, since one learner works at a time, and before any cycle that is due for another reason. Who still
waits stands in the erasure's report, so that a restart goes on with it. One cycle of an agent makes good all erasures
before it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from policies.types import adapter_name
from runtime.adapters.swap import Swap
from runtime.learning.learning import Learning
from runtime.learning.process import LearnerBusy
from runtime.store.adapter_registry import AdapterRegistry
from runtime.store.erasure import Eraser, Erasure, Event

WAITING = "agents_to_retrain"
"""In the report: the agents whose cycles are still to be started."""


class Retraining:
    """Wired once, with the learner that works beside the server."""

    def __init__(self, eraser: Eraser, registry: AdapterRegistry, swap: Swap, learning: Learning) -> None:
        self._eraser = eraser
        self._registry = registry
        self._swap = swap
        self._process = learning.process
        self._changing = asyncio.Lock()
        self._waiting: list[str] | None = None
        """Erasures with agents that wait, oldest first; None: not read yet."""
        learning.trigger.before_others.append(self.start_next)

    async def ask(self, erasure: Erasure, taught: Sequence[str], key: str = "") -> Erasure:
        """Roll back what acts of these adapters, and have their agents retrained; the first begins now if it can.

        Without any, the server's own agent is retrained: it may have learned from the episodes before this release.
        """
        agents = sorted({self._registry.adapter(name).agent for name in taught} & {*self._swap.agents}) or [""]
        why, rolled_back = f"it has learned from what was erased ({erasure.id})", dict[str, str]()
        for agent in agents:
            acting = self._registry.acting(agent)
            if acting is not None and acting.name in taught:
                now = await self._swap.rollback(why, key=key, past=set(taught), agent=agent)
                rolled_back[acting.name] = adapter_name(now)
        report: dict[str, Any] = {"cycles": {}, WAITING: agents, "rolled_back": rolled_back}
        async with self._changing:
            await self._note(erasure.id, report)
            self._waiting = None
        await self.start_next()
        return await asyncio.to_thread(self._eraser.erasure, erasure.id)

    async def start_next(self) -> bool:
        """Start the cycle of the agent that has waited longest; whether one was started. None starts beside another."""
        async with self._changing:
            if self._waiting is None:
                self._waiting = await asyncio.to_thread(self._eraser.retrainings_with, WAITING)
            if not self._waiting or self._process.running is not None:
                return False
            reports = {id: await self._report_of(id) for id in self._waiting}
            agent = next((each for report in reports.values() for each in self._served(report)), None)
            if agent is None:  # of agents that are not served now
                return False
            try:
                cycle = await self._process.start(agent=agent)
            except LearnerBusy:
                return False
            for erasure_id, report in reports.items():
                if agent in report[WAITING]:
                    rest = [each for each in report[WAITING] if each != agent]
                    started = {**report["cycles"], agent: cycle}
                    await self._note(erasure_id, {**report, "cycles": started, WAITING: rest})
            self._waiting = None
            return True

    def _served(self, report: dict[str, Any]) -> list[str]:
        return [agent for agent in report[WAITING] if agent in self._swap.agents]

    async def _report_of(self, erasure_id: str) -> dict[str, Any]:
        return (await asyncio.to_thread(self._eraser.erasure, erasure_id)).report["retraining"]

    async def _note(self, erasure_id: str, report: dict[str, Any]) -> None:
        await asyncio.to_thread(self._eraser.note, erasure_id, Event.RETRAINING, {"retraining": report})
