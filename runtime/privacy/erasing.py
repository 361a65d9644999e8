"""Erasures of a running server: whoever holds something of the episodes lets go of it, then the store erases.

A cycle that has read one of them is ended, and what it has registered is refused: nothing acts tomorrow that was made
of what was erased today. What acts already is named and goes on, until an operator rolls it back or asks for a
retraining: a cycle goes on from what acts, so that a retraining begins with what acted before and has not learned from
them.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter

from runtime.adapters.swap import Swap
from runtime.background import keep_doing
from runtime.learning.learning import Learning
from runtime.privacy.retraining import Retraining
from runtime.store.adapter_registry import AdapterRegistry, AdapterState, RegistryError
from runtime.store.erasure import Consequences, Eraser, Erasure, Event, Scope
from runtime.store.lineage import Lineage
from runtime.store.step_log import StepLog

_log = logging.getLogger(__name__)

UNJUDGED = frozenset({
    AdapterState.REGISTERED, AdapterState.VALIDATED, AdapterState.LOADED, AdapterState.VERIFIED, AdapterState.UNLOADED
})  # fmt: skip
"""States of an adapter that has never served and was not refused."""


class Erasing:
    """Wired once; the server runs `keep_finishing` beside its requests."""

    EVERY_S = 30.0

    def __init__(
        self,
        state: Path,
        log: StepLog,
        registry: AdapterRegistry,
        swap: Swap,
        learning: Learning | None = None,
        metrics: CollectorRegistry | None = None,
    ) -> None:
        self.eraser = Eraser(state, log)
        self.on_erased: list[Callable[[Collection[str]], object]] = []
        """Called with the ids of episodes before their rows go: for those who hold some in memory."""
        self.lineage = Lineage(state)
        self._state = state
        self._registry = registry
        self._swap = swap
        self._learning = learning
        self._retraining = Retraining(self.eraser, registry, swap, learning) if learning is not None else None
        self._is_stopping = False
        self._num_erased = Counter("stepagent_erased_episodes", "Erased episodes.", ["scope"], registry=metrics)

    async def erase(self, episode_ids: Sequence[str], scope: Scope, reason: str, key: str = "") -> Erasure:
        """Erase these episodes and what was made of them. Where whoever asked goes away, it goes on all the same."""
        erasure = await asyncio.to_thread(self.eraser.begin, episode_ids, scope, reason, key)
        return await asyncio.shield(asyncio.ensure_future(self._carry_out(erasure)))

    async def retrain(self, erasure: Erasure, key: str = "") -> Erasure:
        """Roll back what has learned from it, and start the cycles without it, one after the other."""
        assert self._retraining is not None
        taught = [adapter.name for adapter in (await self.consequences(erasure)).adapters]
        return await self._retraining.ask(erasure, taught, key)

    async def consequences(self, erasure: Erasure) -> Consequences:
        return await asyncio.to_thread(self.eraser.consequences, erasure.id)

    async def keep_finishing(self) -> None:
        """Go on with what a kill, or a reader of the file, has cut off; for ever: the server's background task."""
        try:
            await self.finish()
            await keep_doing("the finishing of erasures", self.finish, self.EVERY_S)
        finally:
            self._is_stopping = True  # a thread that deletes ends at its next transaction

    async def finish(self) -> None:
        """Go on with all erasures that are not finished."""
        for erasure_id in await asyncio.to_thread(self.eraser.unfinished):
            await self._carry_out(await asyncio.to_thread(self.eraser.erasure, erasure_id))

    async def _carry_out(self, erasure: Erasure) -> Erasure:
        if erasure.state == "running":
            tombstones = await asyncio.to_thread(self.eraser.tombstones, erasure.id)
            episode_ids = [tombstone.id for tombstone in tombstones]
            await self._end_cycle(erasure)
            for episode_id in episode_ids:
                self._swap.finish(episode_id)
            for forget in self.on_erased:
                forget(episode_ids)
        begun = erasure.state == "running"
        erasure = await asyncio.to_thread(self.eraser.work, erasure.id, lambda: self._is_stopping)
        if begun and erasure.state != "running":
            self._num_erased.labels(erasure.scope.value).inc(erasure.num_episodes)
        return erasure

    async def _end_cycle(self, erasure: Erasure) -> None:
        """End the cycle that runs in our process if it has read one of the episodes. Any other learner sees the
        tombstones itself, before it trains and before it hands anything over."""
        if self._learning is None or (cycle := self._learning.process.running) is None:
            return
        if cycle not in (await self.consequences(erasure)).cycles:
            return
        await self._learning.process.close()
        await asyncio.to_thread(shutil.rmtree, self._state / "candidates", True)
        refused = list[str]()
        for adapter in self._registry.adapters():
            is_of_it = self._registry.cycle_of(adapter.name) == cycle
            if is_of_it and self._registry.state(adapter.name) in UNJUDGED:
                try:
                    await self._swap.refuse(adapter.name, f"its cycle had read what was erased ({erasure.id})")
                    refused.append(adapter.name)
                except RegistryError as problem:
                    _log.warning("%s could not be refused: %s", adapter.name, problem)
        report = {"ended_cycle": cycle, "refused_adapters": refused}
        await asyncio.to_thread(self.eraser.note, erasure.id, Event.CYCLE_ENDED, report)
