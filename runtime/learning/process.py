"""Runs learner cycles beside the server: one process a cycle, at low priority, which dies with the server.

A process a cycle, and not one that stays: what a cycle leaves behind in memory is gone with it, and a crash is over
with it too. The runtime knows nothing of what the learner does; it starts it, and reads in the log what came of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from runtime.store.episodes import new_id
from runtime.store.learning_log import LearningReader

LOG_FILE = "learner.log"
"""In the state folder: what the learner prints."""
GRACE_S = 5.0
"""How long a learner may take to end when the server ends."""
FAREWELL_S = 30.0
"""How long its process may take to end once its cycle has: seconds, on a busy machine."""


class LearnerBusy(Exception):
    """A cycle runs already, and which."""


class LearnerProcess:
    """Starts cycles. `url` is where the server answers; it is known only once the server listens."""

    def __init__(
        self,
        state: Path,
        arguments: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        url: str = "",
        of_agents: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self.url = url
        self._state = state
        self._arguments = tuple(arguments)
        """Options of `python -m learner`, beyond where the server is."""
        self._of_agents = dict(of_agents or {})
        """By agent, more of them: they go before the others."""
        self._environment = dict(environment or {})
        self._cycles = LearningReader(state)
        self._process: asyncio.subprocess.Process | None = None
        self._running: str | None = None
        self._starting = asyncio.Lock()
        self._started: deque[tuple[str, str]] = deque(maxlen=50)
        """The cycles that we started last, oldest first, each with its agent."""
        self._exit_codes: dict[str, int | None] = {}
        """Of the processes before the present one, by their cycle."""

    @property
    def running(self) -> str | None:
        """The cycle that runs in our process now."""
        return self._running if self._process is not None and self._process.returncode is None else None

    @property
    def pid(self) -> int | None:
        """Of the process that runs a cycle now."""
        return self._process.pid if self._process is not None and self.running else None

    async def start(self, options: Sequence[str] = (), agent: str = "") -> str:
        """Start a cycle for an agent; returns its name. Raises LearnerBusy beside another one, ours or not."""
        async with self._starting:  # two who ask at once: the second finds the first one's process
            return await self._start(options, agent)

    async def _start(self, options: Sequence[str], agent: str) -> str:
        await self._see_off()
        if self.running is not None:
            raise LearnerBusy(f"cycle {self.running} runs already; wait for its end")
        if self._cycles.is_learner_alive():
            raise LearnerBusy("a learner that was started by hand runs a cycle already; wait for its end")
        if self._process is not None and self._running is not None:
            self._exit_codes[self._running] = self._process.returncode
        cycle = self._running = new_id("cycle")
        self._started.append((cycle, agent))
        where = ("--url", f"{self.url}/v1", "--state", str(self._state), "--server-pid", str(os.getpid()))
        whose = ("--agent", agent) if agent else ()
        said = (*self._arguments, *self._of_agents.get(agent, ()), *options)
        command = (sys.executable, "-m", "learner", "once", "--cycle", cycle, *where, *whose, *said)
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
        status = await asyncio.to_thread(self._cycles.status, cycle)
        if status is not None and status.has_ended:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), FAREWELL_S)

    def problem(self, cycle: str) -> str:
        """Why a cycle of ours has ended without a line in the log; empty while its process runs."""
        if cycle == self.running:
            return ""
        is_last = self._process is not None and cycle == self._running
        code = self._process.returncode if self._process is not None and is_last else self._exit_codes.get(cycle)
        return f"the learner ended before its cycle began (exit code {code}): see {LOG_FILE}"

    def unlogged(self) -> list[dict[str, Any]]:
        """Our cycles that have logged nothing yet, newest first."""
        started = [each for each in reversed(self._started) if self._cycles.status(each[0]) is None]
        waiting = [(cycle, agent, self.problem(cycle)) for cycle, agent in started]
        return [
            {
                "object": "learner.cycle",
                "id": cycle,
                "agent": agent,
                "stage": "failed" if problem else "starting",
                "message": problem,
                "report": {},
            }
            for cycle, agent, problem in waiting
        ]

    async def close(self) -> None:
        """End the cycle that runs in our process, if one does; it is marked as failed by the next one."""
        if self._process is None or self._process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()
        try:
            await asyncio.wait_for(self._process.wait(), GRACE_S)
        except TimeoutError:
            self._process.kill()
            await self._process.wait()
