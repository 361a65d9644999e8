"""Starts a learning cycle whenever enough new episodes have come."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from runtime.background import keep_doing
from runtime.learning.process import LearnerBusy, LearnerProcess
from runtime.store.learning_log import LearningReader
from runtime.store.step_log import StepLog

_log = logging.getLogger(__name__)


class CycleTrigger:
    """Starts a cycle for each agent whenever enough episodes of it have come since its last one began.

    Cycles run one at a time: of the agents whose turn it is, the one whose last cycle is longest ago comes first.
    """

    EVERY_S = 2.0
    FIRST_PAUSE_S, LONGEST_PAUSE_S = 60.0, 3600.0
    """After a learner that ended without a word in the log: they double, else it would be started for ever."""

    def __init__(
        self,
        learner: LearnerProcess,
        log: StepLog,
        cycles: LearningReader,
        every_episodes: int,
        of_agents: Mapping[str, int] | None = None,
    ) -> None:
        """`every_episodes` of the server's own agent, and `of_agents` of the others; 0: never by itself."""
        self._learner = learner
        self._log = log
        self._cycles = cycles
        self.every_episodes = {"": every_episodes, **(of_agents or {})}
        """By agent."""
        self._turns = [_Turn(agent) for agent in self.every_episodes]
        self.before_others: list[Callable[[], Awaitable[bool]]] = []
        """Asked first, whenever no cycle runs; one that has started a cycle says so."""

    async def keep_watching(self) -> None:
        """For ever: the server's background task."""
        if any(self.every_episodes.values()) or self.before_others:
            await keep_doing("the start of a learning cycle", self.look, self.EVERY_S)

    async def look(self) -> None:
        """Start a cycle if one is due."""
        if self._learner.running is not None:
            return
        for starts in self.before_others:
            if await starts():
                return
        if (turn := await asyncio.to_thread(self._due)) is not None:
            with contextlib.suppress(LearnerBusy):
                turn.started = await self._learner.start(agent=turn.agent)

    def _due(self) -> _Turn | None:
        due = [(began_at, turn) for turn in self._turns if (began_at := self._due_since(turn)) is not None]
        return min(due, key=lambda each: each[0])[1] if due else None

    def _due_since(self, turn: _Turn) -> float | None:
        """When the agent's last cycle began (Unix seconds; 0: there was none), if it is time for another one."""
        if not (most := self.every_episodes[turn.agent]):
            return None
        newest = self._cycles.cycles(limit=1, agent=turn.agent)
        cycle = newest[0].cycle if newest else None
        self._back_off(turn, cycle)
        if cycle != turn.newest_seen:
            turn.newest_seen, turn.seen_at = cycle, self._log.num_episodes()
        if time.monotonic() < turn.not_before:
            return None
        since = newest[0].started_at if newest else 0.0
        if self._log.num_learnable_since(since, most, turn.agent) >= most:
            return since
        # A clock that was set back: episodes come, and none of them is later than the last cycle.
        is_due = turn.newest_seen and self._log.num_learnable_after(turn.seen_at, most, turn.agent) >= most
        return since if is_due else None

    def _back_off(self, turn: _Turn, newest: str | None) -> None:
        if turn.started is None:
            return
        if newest == turn.started:
            turn.pause_s = 0.0
        else:
            turn.pause_s = min(2 * turn.pause_s or self.FIRST_PAUSE_S, self.LONGEST_PAUSE_S)
            turn.not_before = time.monotonic() + turn.pause_s
            _log.error("%s; the next try is in %g s", self._learner.problem(turn.started), turn.pause_s)
        turn.started = None


@dataclass(slots=True)
class _Turn:
    """An agent, and what has become of the cycles that were started for it."""

    agent: str
    started: str | None = None
    """The cycle that we started last."""
    newest_seen: str | None = None
    seen_at: int = 0
    """How many episodes there were when the newest cycle was seen first."""
    pause_s: float = 0.0
    not_before: float = 0.0
    """time.monotonic()"""
