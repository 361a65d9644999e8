"""The learning side of a running server: its cycles, the process that runs them, and the watch over live adapters."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from runtime.adapters.live_guard import Watch
from runtime.adapters.swap import Swap
from runtime.learning.cycles import Cycles
from runtime.learning.process import LearnerProcess
from runtime.learning.trigger import CycleTrigger
from runtime.store.adapter_registry import AdapterRegistry
from runtime.store.learning_log import LearningLog, LearningReader
from runtime.store.step_log import StepLog


@dataclass(frozen=True, slots=True)
class Learning:
    """Wired once; the server runs `keep_watching` beside its requests."""

    log: LearningReader
    cycles: Cycles
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
        arguments_of: Mapping[str, Sequence[str]] | None = None,
        every_episodes_of: Mapping[str, int] | None = None,
    ) -> Learning:
        """`arguments` and `environment` are the learner's; `every_episodes` 0 starts no cycle without being asked.

        `arguments_of` and `every_episodes_of` are those of named agents.
        """
        LearningLog(state).close()  # so that what an older release has written can be read
        learning_log = LearningReader(state)
        process = LearnerProcess(state, arguments, environment, of_agents=arguments_of)
        trigger = CycleTrigger(process, log, learning_log, every_episodes, every_episodes_of)
        watch = Watch(log, learning_log, registry, swap)
        return cls(learning_log, Cycles(learning_log, process), process, trigger, watch)

    async def keep_watching(self) -> None:
        """For ever: the server's background task."""
        await asyncio.gather(self.trigger.keep_watching(), self.watch.keep_watching())
