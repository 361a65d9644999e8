"""Runs learner cycles beside the server: one process a cycle, at low priority, which dies with the server.

A process a cycle, and not one that stays: what a cycle leaves behind in memory is gone with it, and a crash is over
with it too. The runtime knows nothing of what the learner does; it starts it, and reads in the log what came of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from runtime.background import keep_doing
from runtime.store.cycle_log import ENDINGS, CycleLog
from runtime.store.episodes import new_id
from runtime.store.step_log import StepLog

_log = logging.getLogger(__name__)

LOG_FILE = "learner.log"
"""In the state folder: what the learner prints."""
GRACE_S = 5.0
"""How long a learner may take to end when the server ends, or when its cycle has."""


class LearnerBusy(Exception):
    """A cycle runs already, and which."""


class LearnerProcess:
    """Starts cycles. `url` is where the server answers; it is known only once the server listens."""

    def __init__(
        self, state: Path, arguments: Sequence[str] = (), environment: Mapping[str, str] | None = None, url: str = ""
    ) -> None:
        self.url = url
        self._state = state
        self._arguments = tuple(arguments)
        """Options of `python -m learner`, beyond where the server is."""
        self._environment = dict(environment or {})
        self._cycles = CycleLog(state)
        self._process: asyncio.subprocess.Process | None = None
        self._running: str | None = None
        self._starting = asyncio.Lock()
        self._started: set[str] = set()
        """Every cycle we have started."""

    @property
    def running(self) -> str | None:
        """The cycle that runs in our process now."""
        return self._running if self._process is not None and self._process.returncode is None else None

    @property
    def pid(self) -> int | None:
        """Of the process that runs a cycle now."""
        return self._process.pid if self._process is not None and self.running else None

    async def start(self, options: Sequence[str] = ()) -> str:
        """Start a cycle; returns its name. Raises LearnerBusy beside another one, ours or not."""
        async with self._starting:  # two who ask at once: the second finds the first one's process
            return await self._start(options)

    async def _start(self, options: Sequence[str]) -> str:
        await self._see_off()
        if self.running is not None:
            raise LearnerBusy(f"cycle {self.running} runs already; wait for its end")
        if self._cycles.is_learner_alive():
            raise LearnerBusy("a learner that was started by hand runs a cycle already; wait for its end")
        cycle = self._running = new_id("cycle")
        self._started.add(cycle)
        where = ("--url", f"{self.url}/v1", "--state", str(self._state), "--server-pid", str(os.getpid()))
        command = (sys.executable, "-m", "learner", "once", "--cycle", cycle, *where, *self._arguments, *options)
        with (self._state / LOG_FILE).open("ab") as output:
            self._process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, **self._environment},
            )
        return cycle

    async def _see_off(self) -> None:
        """Where our cycle has ended, wait for the end of its process, which takes a moment more."""
        if self._process is None or (cycle := self.running) is None:
            return
        told = await asyncio.to_thread(self._cycles.cycle, cycle)
        if told is not None and told["stage"] in ENDINGS:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), GRACE_S)

    def status(self, cycle: str) -> dict[str, object] | None:
        """What is known of one of our cycles that has not written a line yet."""
        if cycle not in self._started:
            return None
        is_running = cycle == self.running
        code = self._process.returncode if self._process is not None and cycle == self._running else None
        message = "" if is_running else f"the learner ended before its cycle began (exit code {code}): see {LOG_FILE}"
        return {"cycle": cycle, "stage": "starting" if is_running else "failed", "message": message, "report": {}}

    async def close(self) -> None:
        """End the learner; its cycle is marked as failed by the next one."""
        if self._process is None or self._process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()
        try:
            await asyncio.wait_for(self._process.wait(), GRACE_S)
        except TimeoutError:
            self._process.kill()
            await self._process.wait()


class CycleTrigger:
    """Starts a cycle whenever enough episodes have come since the last one began."""

    EVERY_S = 2.0
    FIRST_PAUSE_S, LONGEST_PAUSE_S = 60.0, 3600.0
    """After a learner that ended without a word in the log: they double, else it would be started for ever."""

    def __init__(self, learner: LearnerProcess, log: StepLog, cycles: CycleLog, every_episodes: int) -> None:
        self._learner = learner
        self._log = log
        self._cycles = cycles
        self.every_episodes = every_episodes
        """0: never by itself."""
        self._started: str | None = None
        """The cycle that we started last."""
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
        self._back_off(newest[0]["cycle"] if newest else None)
        since = newest[0]["started_at"] if newest else 0.0
        return time.monotonic() >= self._not_before and self._log.num_learnable_since(since) >= self.every_episodes

    def _back_off(self, newest: str | None) -> None:
        if self._started is None:
            return
        if newest == self._started:
            self._pause_s = 0.0
        else:
            self._pause_s = min(2 * self._pause_s or self.FIRST_PAUSE_S, self.LONGEST_PAUSE_S)
            self._not_before = time.monotonic() + self._pause_s
            problem = self._learner.status(self._started)
            _log.error("%s; the next try is in %g s", problem["message"] if problem else "no cycle", self._pause_s)
        self._started = None
