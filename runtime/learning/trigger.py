"""Starts a learning cycle whenever enough new episodes have come."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time

from runtime.background import keep_doing
from runtime.learning.process import LearnerBusy, LearnerProcess
from runtime.store.learning_log import LearningReader
from runtime.store.step_log import StepLog

_log = logging.getLogger(__name__)


class CycleTrigger:
    """Starts a cycle whenever enough episodes have come since the last one began."""

    EVERY_S = 2.0
    FIRST_PAUSE_S, LONGEST_PAUSE_S = 60.0, 3600.0
    """After a learner that ended without a word in the log: they double, else it would be started for ever."""

    def __init__(self, learner: LearnerProcess, log: StepLog, cycles: LearningReader, every_episodes: int) -> None:
        self._learner = learner
        self._log = log
        self._cycles = cycles
        self.every_episodes = every_episodes
        """0: never by itself."""
        self._started: str | None = None
        """The cycle that we started last."""
        self._newest_seen: str | None = None
        self._seen_at = 0
        """How many episodes there were when the newest cycle was seen first."""
        self._pause_s = 0.0
        self._not_before = 0.0
        """time.monotonic()"""

    async def keep_watching(self) -> None:
        """For ever: the server's background task."""
        if self.every_episodes:
            await keep_doing("the start of a learning cycle", self.look, self.EVERY_S)

    async def look(self) -> None:
        """Start a cycle if one is due."""
        if self._learner.running is None and await asyncio.to_thread(self._is_due):
            with contextlib.suppress(LearnerBusy):
                self._started = await self._learner.start()

    def _is_due(self) -> bool:
        newest = self._cycles.cycles(limit=1)
        cycle = newest[0].cycle if newest else None
        self._back_off(cycle)
        if cycle != self._newest_seen:
            self._newest_seen, self._seen_at = cycle, self._log.num_episodes()
        if time.monotonic() < self._not_before:
            return False
        since = newest[0].started_at if newest else 0.0
        most = self.every_episodes
        if self._log.num_learnable_since(since, most) >= most:
            return True
        # A clock that was set back: episodes come, and none of them is later than the last cycle.
        return self._newest_seen is not None and self._log.num_learnable_after(self._seen_at, most) >= most

    def _back_off(self, newest: str | None) -> None:
        if self._started is None:
            return
        if newest == self._started:
            self._pause_s = 0.0
        else:
            self._pause_s = min(2 * self._pause_s or self.FIRST_PAUSE_S, self.LONGEST_PAUSE_S)
            self._not_before = time.monotonic() + self._pause_s
            _log.error("%s; the next try is in %g s", self._learner.problem(self._started), self._pause_s)
        self._started = None
