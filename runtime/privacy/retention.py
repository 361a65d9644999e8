"""Erases what was kept long enough, or what no longer fits: by the same path as a person's erasure, under the reason
`retention`.

The oldest goes first. An agent may have limits of its own. What stays whatever its age: demonstrations, imported or
promoted, and the episodes that they were promoted from; anchors; episodes in progress; what a running cycle has read,
and any learner's trials while one runs. Size is what the rows of the database take: the file itself does not shrink,
its free pages are filled again. Of one agent it is what the texts and tokens of its own episodes take.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sqlite3
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from runtime.background import keep_doing
from runtime.privacy.erasing import Erasing
from runtime.store.agent_sizes import AgentSizes
from runtime.store.erasure import Scope
from runtime.store.erasure_schema import source_in_metadata
from runtime.store.learning_log import LearningReader
from runtime.store.step_log import StepLog

_log = logging.getLogger(__name__)

AT_ONCE = 100
"""Episodes of one erasure."""
_PAGE = 1000
_REST_S = 3600.0
"""An episode with a newer step is in progress, whatever its lease says."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How much is kept; None: no bound."""

    days: float | None = None
    """After an episode's last step."""
    num_bytes: int | None = None
    """Of the whole log, or of one agent's own episodes."""

    @property
    def is_any(self) -> bool:
        return self.days is not None or self.num_bytes is not None


@dataclass(frozen=True, slots=True)
class _Whose:
    """Which agents: those that are, or are not, among these."""

    is_among: bool
    agents: tuple[str, ...]


_ALL = _Whose(False, ())


class Retention:
    """Sweeps one state folder beside the requests of a server."""

    EVERY_S = 300.0

    def __init__(
        self,
        state: Path,
        log: StepLog,
        erasing: Erasing,
        limits: Limits,
        is_in_progress: Callable[[str], bool] = lambda _: False,
        spared: Collection[str] = (),
        of_agents: Mapping[str, Limits] | None = None,
    ) -> None:
        """`of_agents`: those with limits of their own, which go before `limits.days`. The bound on the whole log holds
        for all."""
        self._path = state / "agent.db"
        self._log = log
        self._erasing = erasing
        self._learning = LearningReader(state)
        self.limits = limits
        self._is_in_progress = is_in_progress
        self._spared = frozenset(spared)
        self.of_agents = dict(of_agents or {})
        self._sizes = AgentSizes(log)
        self._going: Collection[str] = ()
        erasing.on_erased.append(self._note_erased)

    async def keep_sweeping(self) -> None:
        """For ever: the server's background task."""
        if any(limits.is_any for limits in (self.limits, *self.of_agents.values())):
            await keep_doing("the retention's sweep", self.sweep, self.EVERY_S)

    async def sweep(self) -> int:
        """Erase what is beyond the limits; returns how many episodes were named for it."""
        number = 0
        while chosen := await asyncio.to_thread(self._next):
            sizes = await asyncio.to_thread(self._sizes.of_episodes, chosen)
            self._going = frozenset(chosen)
            try:
                await self._erasing.erase(chosen, Scope.RETENTION, "retention")
            finally:
                self._going = ()
            self._sizes.subtract(sizes)
            number += len(chosen)
        for whose in await asyncio.to_thread(self._too_large):
            _log.warning("%s holds more than its limit allows, and nothing in it may go", whose)
        return number

    def num_bytes(self) -> int:
        """What the rows of the database take."""
        uri = self._path.absolute().as_uri() + "?mode=ro"
        with closing(sqlite3.connect(uri, uri=True, timeout=10.0)) as connection:
            pages, free, size = (
                connection.execute(f"PRAGMA {name}").fetchone()[0]
                for name in ("page_count", "freelist_count", "page_size")
            )
        return (pages - free) * size

    def _is_too_large(self) -> bool:
        return self.limits.num_bytes is not None and self.num_bytes() > self.limits.num_bytes

    def _note_erased(self, episode_ids: Collection[str]) -> None:
        if frozenset(episode_ids) != self._going:  # somebody else's, or more than was named
            self._sizes.begin_anew()

    def _agents_too_large(self) -> list[str]:
        bounds = {agent: limits.num_bytes for agent, limits in self.of_agents.items() if limits.num_bytes is not None}
        sizes = self._sizes.now() if bounds else {}
        return [agent for agent, most in bounds.items() if sizes.get(agent, 0) > most]

    def _too_large(self) -> list[str]:
        whole = ["agent.db"] if self._is_too_large() else []
        return [*whole, *(f"the log of the agent {agent!r}" for agent in self._agents_too_large())]

    def _next(self) -> list[str]:
        """The oldest that may go and must, AT_ONCE at most."""
        rested = time.time() - _REST_S
        if self._is_too_large():
            return self._chosen(rested, _ALL)
        for agent in self._agents_too_large():
            if chosen := self._chosen(rested, _Whose(True, (agent,))):
                return chosen
        others = _Whose(False, tuple(self.of_agents))
        ages = [(others, self.limits.days)]
        ages += [(_Whose(True, (agent,)), limits.days) for agent, limits in self.of_agents.items()]
        for whose, days in ages:
            if days is not None and (chosen := self._chosen(time.time() - days * 86400, whose)):
                return chosen
        return []

    def _chosen(self, before: float, whose: _Whose) -> list[str]:
        """The oldest of these agents that may go and have rested since, AT_ONCE at most."""
        chosen = list[str]()
        kept = self._kept()
        for episode_id in self._quiet_since(before, whose):
            if episode_id not in kept and not self._is_in_progress(episode_id):
                chosen.append(episode_id)
                if len(chosen) == AT_ONCE:
                    break
        return chosen

    def _kept(self) -> Collection[str]:
        """By name: what a running cycle has read, and what the user said is to stay."""
        running = [cycle.cycle for cycle in self._learning.cycles(limit=5) if not cycle.has_ended]
        if not running or not self._learning.is_learner_alive():
            return self._spared
        return self._spared | {episode for cycle in running for episode in self._learning.episodes_of(cycle)}

    def _quiet_since(self, before: float, whose: _Whose) -> Iterator[str]:
        """Ids of these agents' own episodes whose last step is older, oldest first, page by page: it ends at the first
        page in which all are younger."""
        promoted = source_in_metadata("promoted_from")
        trials = "AND purpose <> 'evaluation'" if self._learning.is_learner_alive() else ""
        made_of_it = f"SELECT 1 FROM (SELECT {promoted} AS source FROM episodes) WHERE source = episodes.id"
        last_step = "coalesce((SELECT max(created_at) FROM steps WHERE episode_id = episodes.id), created_at)"
        query = (
            f"SELECT rowid, id, created_at, actor = 'policy' {trials} AND {last_step} < ? "
            f"AND NOT EXISTS ({made_of_it}) AS may_go FROM episodes WHERE rowid > ? "
            "AND (agent IN (SELECT value FROM json_each(?))) = ? ORDER BY rowid LIMIT ?"
        )
        last, agents = 0, json.dumps(whose.agents)
        while page := self._log.query(query, before, last, agents, whose.is_among, _PAGE):
            last = page[-1]["rowid"]
            yield from (row["id"] for row in page if row["may_go"])
            if all(row["created_at"] >= before for row in page):
                return
