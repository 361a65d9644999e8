"""Which of an agent's own episodes a cycle learns from, read off indexes: its cost does not grow with the log.

*Fresh* are episodes with a step that was logged after a given one; the others are *old*. Where a number would have to
be counted through the whole log, it is counted up to MOST_COUNTED.
"""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Sequence

from runtime.store.episodes import Episode
from runtime.store.step_log import LEARNABLE, StepLog

MOST_COUNTED = 1000
_PAGE = 2000
_TRIES = 20
"""Random places in the log for each old episode that is wanted, before the oldest are taken."""

_ADAPTERS = """
WITH RECURSIVE named (adapter) AS (
    SELECT min(adapter) FROM episodes WHERE agent = ?1
    UNION ALL SELECT (SELECT min(adapter) FROM episodes WHERE agent = ?1 AND adapter > named.adapter) FROM named
    WHERE named.adapter IS NOT NULL)
SELECT adapter FROM named WHERE adapter IS NOT NULL"""
"""Jumps from name to name in an index: DISTINCT would read all of it."""

_LAST_OLD = """
SELECT max(episodes.rowid) FROM steps CROSS JOIN episodes ON episodes.id = steps.episode_id
WHERE steps.rowid BETWEEN ? AND ?"""

_TOLD_SINCE = """
SELECT episode_id FROM (SELECT * FROM outcomes ORDER BY rowid DESC LIMIT ?) AS told
WHERE created_at > (SELECT created_at FROM steps WHERE rowid <= ? ORDER BY rowid DESC LIMIT 1)
AND NOT EXISTS (SELECT 1 FROM steps WHERE steps.episode_id = told.episode_id AND steps.rowid > ?)
ORDER BY created_at DESC"""

_IS_OLD = "NOT EXISTS (SELECT 1 FROM steps WHERE steps.episode_id = episodes.id AND steps.rowid > ?)"


class OwnEpisodes:
    """Those of an agent with these adapters, as they stand in the log; `after_step` is the last step that was read
    before. The base network serves other agents, too: its episodes with them are not among them."""

    def __init__(self, log: StepLog, adapters: Sequence[str], after_step: str | None, agent: str = "") -> None:
        self._log = log
        self._agent = agent
        self._adapters = list(adapters)
        self._places = ", ".join("?" * len(adapters))
        self._cursor = log.number_of_step(after_step)
        rows = log.sound_rows(_LAST_OLD, self._cursor - _PAGE, self._cursor)
        self._last_old: int = rows[0][0] or 0 if rows else 0
        """No episode with a later number is old: it was logged with a fresh step."""

    def last_step_id(self) -> str | None:
        """The newest step there is."""
        rows = self._log.sound_rows("SELECT id FROM steps ORDER BY rowid DESC LIMIT 1")
        return rows[0][0] if rows else None

    def fresh(self, limit: int) -> list[Episode]:
        """Newest step first."""
        found: list[Episode] = []
        seen: set[str] = set()
        below = 2**62
        query = "SELECT rowid, episode_id FROM steps WHERE rowid BETWEEN ? AND ? ORDER BY rowid DESC"
        while len(found) < limit and (rows := self._log.rows_down(query, self._cursor + 1, below - 1, _PAGE)):
            below = rows[-1][0]
            new = list(dict.fromkeys(row[1] for row in rows if row[1] not in seen))
            seen.update(new)
            found += self._own(new)
        return found[:limit]

    def num_too_old(self) -> int:
        """Learnable episodes of other adapters; MOST_COUNTED where there are more."""
        names = [row[0] for row in self._log.sound_rows(_ADAPTERS, self._agent)]
        wanted = f"{LEARNABLE} AND agent = ? AND adapter = ?"
        query = f"SELECT count(*) FROM (SELECT 1 FROM episodes WHERE {wanted} LIMIT ?)"
        others = [name for name in names if name not in self._adapters]
        counts = [row[0] for name in others for row in self._log.sound_rows(query, self._agent, name, MOST_COUNTED)]
        return min(sum(counts), MOST_COUNTED)

    def old(self, limit: int, draw: random.Random) -> list[Episode]:
        """So many of the old ones, drawn at random."""
        oldest = self._oldest(4 * limit + 1)
        if len(oldest) <= 4 * limit:
            return draw.sample(sorted(oldest, key=lambda episode: episode.id), min(limit, len(oldest)))
        drawn = {episode.id: episode for episode in self._drawn(limit, draw)}
        for episode in oldest:
            if len(drawn) < limit:
                drawn.setdefault(episode.id, episode)
        return list(drawn.values())

    def told_since(self, limit: int) -> list[Episode]:
        """Old ones of which somebody has said since how they ended, the newest said first; found among the last
        MOST_COUNTED outcomes."""
        rows = self._log.sound_rows(_TOLD_SINCE, MOST_COUNTED, self._cursor, self._cursor)
        ids = list(dict.fromkeys(row["episode_id"] for row in rows))
        return self._own(ids)[:limit] if ids else []

    def _oldest(self, limit: int) -> list[Episode]:
        wanted = f"{LEARNABLE} AND agent = ? AND adapter = ? AND rowid <= ? AND {_IS_OLD}"
        query = f"SELECT * FROM episodes WHERE {wanted} ORDER BY id LIMIT ?"
        return [
            episode
            for adapter in (self._adapters if self._last_old else ())
            for episode in self._log.sound_episodes(
                self._log.sound_rows(query, self._agent, adapter, self._last_old, self._cursor, limit)
            )
        ]

    def _drawn(self, limit: int, draw: random.Random) -> list[Episode]:
        wanted = f"{LEARNABLE} AND +agent = ? AND adapter IN ({self._places}) AND {_IS_OLD}"
        query = f"SELECT * FROM episodes WHERE rowid = ? AND {wanted}"
        found: dict[str, Episode] = {}
        for _ in range(_TRIES * limit):
            if len(found) == limit:
                break
            drawn = draw.randint(1, self._last_old)
            rows = self._log.sound_rows(query, drawn, self._agent, *self._adapters, self._cursor)
            found |= {episode.id: episode for episode in self._log.sound_episodes(rows)}
        return list(found.values())

    def _own(self, ids: Sequence[str]) -> list[Episode]:
        """Those of these episodes that are learnable, and of this agent and these adapters, in the order of the ids."""
        rows = self._those(ids)
        if not rows and len(ids) > 1:  # perhaps for a damaged page alone, which must not hide the others
            rows = [row for each in ids for row in self._those([each])]
        found = {episode.id: episode for episode in self._log.sound_episodes(rows)}
        return [found[each] for each in ids if each in found]

    def _those(self, ids: Sequence[str]) -> list[sqlite3.Row]:
        chosen = f"id IN ({', '.join('?' * len(ids))})"
        query = f"SELECT * FROM episodes WHERE {chosen} AND +actor = 'policy' AND purpose <> 'evaluation'"
        query += f" AND +agent = ? AND +adapter IN ({self._places})"
        return self._log.sound_rows(query, *ids, self._agent, *self._adapters)
