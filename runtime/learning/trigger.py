"""The learning side of a running server: cycles as the log tells them, the process that runs them, and the watch."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from runtime.adapters.live_guard import Watch
from runtime.adapters.swap import Swap
from runtime.learning.process import CycleTrigger, LearnerProcess
from runtime.store.adapter_registry import AdapterRegistry
from runtime.store.cycle_log import CycleLog
from runtime.store.step_log import StepLog


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
