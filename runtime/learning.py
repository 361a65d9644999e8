"""The learning side of a running server: cycles as the log tells them, the process that runs them, and the watch."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from policies.registry import AdapterRegistry
from runtime.cycle_log import CycleLog
from runtime.learner_process import CycleTrigger, LearnerProcess
from runtime.step_log import StepLog
from runtime.swap import Swap
from runtime.watch import Watch


@dataclass(frozen=True, slots=True)
class Learning:
    """Wired once; the server runs `keep_watching` beside its requests."""

    cycles: CycleLog
    process: LearnerProcess
    trigger: CycleTrigger
    watch: Watch

    @classmethod
    def beside(
        cls,
        state: Path,
        log: StepLog,
        registry: AdapterRegistry,
        swap: Swap,
        *,
        arguments: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        every_episodes: int = 0,
    ) -> Learning:
        """`arguments` and `environment` are the learner's; `every_episodes` 0 starts no cycle without being asked."""
        cycles = CycleLog(state)
        process = LearnerProcess(state, arguments, environment)
        trigger = CycleTrigger(process, log, cycles, every_episodes)
        return cls(cycles, process, trigger, Watch(log, cycles, registry, swap))

    async def keep_watching(self) -> None:
        """For ever: the server's background task."""
        await asyncio.gather(self.trigger.keep_watching(), self.watch.keep_watching())
