"""Watches how adapters do live, and takes back what turns out to be worse: no gate sees everything.

The acting adapter is held against its parent, a canary against the acting adapter: by the outcomes that were reported
of their episodes, and by how often experts agree with their steps. What is worse by more than the noise is rolled back
or refused; a canary that has done as well for long enough acts. No learner is needed for any of it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import fmean, variance

from policies.types import BASE_ADAPTER
from runtime.adapters.swap import Swap
from runtime.background import keep_doing
from runtime.store.adapter_registry import AdapterRegistry
from runtime.store.learning_log import LearningReader
from runtime.store.step_log import StepLog

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class WatchOptions:
    """When live evidence is enough."""

    every_s: float = 5.0
    least_values: int = 30
    """Of each adapter, before they are compared."""
    most_values: int = 500
    """Of each adapter: the newest count."""
    z: float = 3.0
    """Standard errors that count as more than noise. Three, not two: the same evidence is looked at again and again."""
    canary_values: int = 100
    """Outcomes after which a canary that is not worse acts; of what acts there must be `least_values`."""


class Watch:
    """Looks at the live evidence, again and again."""

    def __init__(
        self,
        log: StepLog,
        cycles: LearningReader,
        registry: AdapterRegistry,
        swap: Swap,
        options: WatchOptions = WatchOptions(),
    ) -> None:
        self._log = log
        self._cycles = cycles
        self._registry = registry
        self._swap = swap
        self._options = options

    async def keep_watching(self) -> None:
        """For ever: the server's background task."""
        await keep_doing("the watch over live adapters", self.look, self._options.every_s)

    async def look(self) -> str | None:
        """Look once; says what was done, None where nothing was."""
        acting = self._registry.acting()
        if canary := self._swap.canary:
            return await self._judge_canary(canary, acting.name if acting else BASE_ADAPTER)
        if acting is None:
            return None
        worse = await asyncio.to_thread(self._why_worse, acting.name, acting.parent or BASE_ADAPTER)
        if worse is None:
            return None
        await self._swap.rollback(worse, expected_acting=acting.name)
        _log.error("%s was rolled back: %s", acting.name, worse)
        return worse

    async def _judge_canary(self, canary: str, acting: str) -> str | None:
        if worse := await asyncio.to_thread(self._why_worse, canary, acting):
            await self._swap.refuse(canary, worse)
            return worse
        outcomes = await asyncio.to_thread(self._log.outcome_values, canary, self._options.canary_values)
        others = await asyncio.to_thread(self._log.outcome_values, acting, self._options.least_values)
        if len(outcomes) < self._options.canary_values or len(others) < self._options.least_values:
            return None
        reason = f"as a canary it was not worse over {len(outcomes)} episodes"
        await self._swap.promote(canary, reason, acting)
        return reason

    def _why_worse(self, adapter: str, other: str) -> str | None:
        """In words, how an adapter is worse than another one by more than the noise; None where it is not."""
        most = self._options.most_values
        evidence = {
            "live outcome": [self._log.outcome_values(name, most) for name in (adapter, other)],
            "step reward": [self._cycles.agreement(name)[:most] for name in (adapter, other)],
        }
        for what, (values, others) in evidence.items():
            if is_worse(values, others, self._options):
                return (
                    f"its {what} is {fmean(values):.3f} over {len(values)}, "
                    f"against {fmean(others):.3f} over {len(others)} of {other}"
                )
        return None


def is_worse(values: Sequence[float], others: Sequence[float], options: WatchOptions) -> bool:
    """Whether the mean of `values` lies below that of `others` by more than the noise (Welch's standard error)."""
    if min(len(values), len(others)) < options.least_values:
        return False
    # A run of equal outcomes has no spread of its own, which does not make it certain: one other is thought to it.
    noise = sqrt(sum(max(variance(side), 1 / len(side)) / len(side) for side in (values, others)))
    return fmean(values) < fmean(others) - options.z * noise
