"""Watches how adapters do live, and takes back what turns out to be worse: no gate sees everything.

An agent's acting adapter is held against its parent, a canary against the acting adapter: by the outcomes that were
reported of their episodes, and by how often experts agree with their steps. What is worse by more than the noise is
rolled back or refused; a canary that has done as well for long enough acts. No learner is needed for any of it.

Outcomes are what clients say, and a client may lie. So only episodes count that the server itself gave to an adapter,
each once, and what a key says that is trusted to give feedback and no more counts a few times; see
`StepLog.live_outcomes`. Whoever does not trust the evidence pauses the watch.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import fmean, variance

from policies.types import BASE_ADAPTER
from runtime.adapters.swap import Swap
from runtime.background import keep_doing
from runtime.store.adapter_registry import AdapterRegistry, AdapterState
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


@dataclass(frozen=True, slots=True)
class Evidence:
    """How an adapter does beside another one, by one measure."""

    measure: str
    adapter: str
    against: str
    values: Sequence[float]
    others: Sequence[float]
    by_key: Mapping[str, int]
    """How many of `values` each key has given."""
    is_worse: bool
    """By more than the noise."""

    def in_words(self) -> str:
        return (
            f"its {self.measure} is {fmean(self.values):.3f} over {len(self.values)}, "
            f"against {fmean(self.others):.3f} over {len(self.others)} of {self.against}"
        )


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
        self._turns: dict[str, tuple[float, int]] = {}

    async def keep_watching(self) -> None:
        """For ever: the server's background task."""
        await keep_doing("the watch over live adapters", self.look, self._options.every_s)

    async def look(self) -> str | None:
        """Look once; says what was done, None where nothing was."""
        done = [said for agent in self._swap.agents if (said := await self._look_at(agent))]
        return "; ".join(done) or None

    async def _look_at(self, agent: str) -> str | None:
        if self._registry.watch(agent).is_paused:
            return None
        if canary := self._swap.canary_of(agent):
            return await self._judge_canary(agent, canary)
        acting = self._registry.acting(agent)
        if acting is None:
            return None
        worse = await asyncio.to_thread(self._why_worse, agent)
        if worse is None:
            return None
        await self._swap.rollback(worse, expected_acting=acting.name, agent=agent)
        _log.error("%s was rolled back: %s", acting.name, worse)
        return worse

    def evidence(self, agent: str = "") -> list[Evidence]:
        """What is known of an agent's canary, or else of what acts; empty where the base network acts alone.

        What was said before an adapter began to act this time does not count: who promotes again what was rolled back
        has seen it.
        """
        acting = self._registry.acting(agent)
        acting_name = acting.name if acting else BASE_ADAPTER
        if canary := self._swap.canary_of(agent):
            since = self._registry.state_since(canary, AdapterState.CANARY)
            return self._compare(agent, canary, acting_name, since)
        if acting is None:
            return []
        return self._compare(agent, acting.name, acting.parent or BASE_ADAPTER, self._registry.acting_since(agent))

    async def _judge_canary(self, agent: str, canary: str) -> str | None:
        if worse := await asyncio.to_thread(self._why_worse, agent):
            await self._swap.refuse(canary, worse)
            return worse
        acting = self._registry.acting(agent)
        [live, *_] = await asyncio.to_thread(self.evidence, agent)
        if len(live.values) < self._options.canary_values or len(live.others) < self._options.least_values:
            return None
        reason = f"as a canary it was not worse over {len(live.values)} episodes"
        await self._swap.promote(canary, reason, acting.name if acting else BASE_ADAPTER)
        return reason

    def _why_worse(self, agent: str) -> str | None:
        """In words, how it is worse than the other one by more than the noise; None where it is not."""
        return next((evidence.in_words() for evidence in self.evidence(agent) if evidence.is_worse), None)

    def _number_at(self, adapter: str, since: float) -> int:
        """Of the newest episode when this turn of the adapter was seen first: its episodes count from there on, also
        where a clock that is set back makes them look older."""
        if adapter not in self._turns or self._turns[adapter][0] != since:
            self._turns[adapter] = (since, self._log.num_episodes())
        return self._turns[adapter][1]

    def _compare(self, agent: str, adapter: str, against: str, since: float) -> list[Evidence]:
        """All of one agent: the base network serves others, too."""
        most = self._options.most_values
        said = self._log.live_outcomes(adapter, most, since, self._number_at(adapter, since), agent)
        others = [outcome.value for outcome in self._log.live_outcomes(against, most, agent=agent)]
        agrees, others_agree = (self._cycles.agreement(name, agent)[:most] for name in (adapter, against))
        values, by_key = [outcome.value for outcome in said], Counter(outcome.key for outcome in said)
        return [
            self._evidence("live outcome", adapter, against, values, others, by_key),
            self._evidence("step reward", adapter, against, agrees, others_agree, {}),
        ]

    def _evidence(
        self,
        measure: str,
        adapter: str,
        against: str,
        values: Sequence[float],
        others: Sequence[float],
        by_key: Mapping[str, int],
    ) -> Evidence:
        worse = is_worse(values, others, self._options)
        return Evidence(measure, adapter, against, values, others, by_key, worse)


def is_worse(values: Sequence[float], others: Sequence[float], options: WatchOptions) -> bool:
    """Whether the mean of `values` lies below that of `others` by more than the noise (Welch's standard error)."""
    if min(len(values), len(others)) < options.least_values:
        return False
    # A run of equal outcomes has no spread of its own, which does not make it certain: one other is thought to it.
    noise = sqrt(sum(max(variance(side), 1 / len(side)) / len(side) for side in (values, others)))
    return fmean(values) < fmean(others) - options.z * noise
