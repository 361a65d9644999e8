"""What taught what: which episodes an adapter learned from, and which adapters learned from an episode.

Read from what the learner notes before it trains (the episodes of each candidate) and before it hands a candidate over
(the digest of its weights, which the registry keeps too). An adapter also knows what its parent was taught: that is
told apart as inherited. Adapters that were not made by a learner here have no lessons on record.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Collection, Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.store.erasure_schema import source_in_metadata
from runtime.store.learning_log import LessonRole

_ROLES = frozenset(LessonRole)
"""What is none of them is damaged."""


class UnknownName(KeyError):
    """No adapter, or no episode, has this name."""


@dataclass(frozen=True, slots=True)
class TaughtAdapter:
    """An adapter that knows something of some episodes."""

    name: str
    state: str
    is_acting: bool
    """For its agent."""
    learned: list[str]
    """Those of the episodes that it was trained on; empty where it only goes on from an adapter that was."""
    inherited_from: str | None
    """The nearest of its ancestors that was trained on some; None where it was itself."""


@dataclass(frozen=True, slots=True)
class Lessons:
    """What an adapter was trained on."""

    adapter: str
    cycle: str
    """That made it; empty: no learner here did."""
    title: str
    """The candidate that it was in the cycle."""
    demonstrations: list[str]
    own_episodes: list[str]
    erased: list[str]
    """Those of both that were erased since."""


@dataclass(frozen=True, slots=True)
class AdapterLineage:
    """An adapter's lessons, and those of its ancestors, the nearest first."""

    own: Lessons
    inherited: list[Lessons]


@dataclass(frozen=True, slots=True)
class CycleUse:
    """What a cycle read an episode for."""

    cycle: str
    role: LessonRole
    title: str
    """The candidate that was trained on it; empty: none was, or the cycle did not get that far."""


@dataclass(frozen=True, slots=True)
class EpisodeLineage:
    """What was made of an episode."""

    episode: str
    is_erased: bool
    promoted_from: str | None
    """The episode that this demonstration was made of."""
    demonstrations: list[str]
    """That were made of it."""
    num_trials: int
    """Of learners, at its states: they begin with the same conversation."""
    cycles: list[CycleUse]
    adapters: list[TaughtAdapter]


class Lineage:
    """Reads a state folder, also beside a running server and learner. May be used from any thread."""

    def __init__(self, state: Path) -> None:
        self._path = state / "agent.db"

    def of_adapter(self, name: str) -> AdapterLineage:
        """Raises UnknownName."""
        parents = {row["name"]: row["parent"] for row in self._rows("SELECT name, parent FROM adapters")}
        if name not in parents:
            raise UnknownName(f"there is no adapter {name!r}")
        chain, parent = list[str](), parents[name]
        while parent is not None:
            chain.append(parent)
            parent = parents[parent]
        return AdapterLineage(self._lessons(name), [self._lessons(each) for each in chain])

    def of_episode(self, episode_id: str) -> EpisodeLineage:
        """Also of an erased one. Raises UnknownName."""
        said = source_in_metadata("promoted_from")
        known = self._rows(f"SELECT {said} AS promoted_from FROM episodes WHERE id = ?", episode_id)
        erased = self._rows("SELECT cause, source FROM erased_episodes WHERE id = ?", episode_id)
        if not known and not erased:
            raise UnknownName(f"there is no episode {episode_id!r}")
        source = [row["source"] for row in erased if row["cause"] == "promoted"]
        uses = self._rows(
            "SELECT cycle, role, title FROM cycle_episodes WHERE episode_id = ? ORDER BY cycle", episode_id
        )
        copied = f"SELECT count(*) AS number FROM episodes WHERE {source_in_metadata('copied_from')} = ?"
        made = self._rows(f"SELECT id FROM episodes WHERE {said} = ?", episode_id)
        made += self._rows("SELECT id FROM erased_episodes WHERE cause = 'promoted' AND source = ?", episode_id)
        demonstrations = [row["id"] for row in made]
        return EpisodeLineage(
            episode_id,
            bool(erased),
            next(iter(source), known[0]["promoted_from"] if known else None),
            demonstrations,
            self._rows(copied, episode_id)[0]["number"],
            [CycleUse(row["cycle"], LessonRole(row["role"]), row["title"]) for row in uses if row["role"] in _ROLES],
            self.adapters_taught_by([episode_id, *demonstrations]),
        )

    def adapters_taught_by(self, episode_ids: Collection[str]) -> list[TaughtAdapter]:
        """Those that were trained on one of these episodes, and those that go on from them; oldest first."""
        learned: dict[str, set[str]] = {}
        for row in self._rows(
            "SELECT DISTINCT adapters.name, cycle_episodes.episode_id FROM cycle_episodes "
            "JOIN trained_weights ON trained_weights.cycle = cycle_episodes.cycle "
            "AND trained_weights.title = cycle_episodes.title "
            "JOIN adapters ON adapters.digest = trained_weights.digest "
            "WHERE cycle_episodes.role <> 'tried' AND episode_id IN (SELECT value FROM json_each(?))",
            json.dumps(list(episode_ids)),
        ):
            learned.setdefault(row["name"], set()).add(row["episode_id"])
        if not learned:
            return []
        newest = "SELECT max(id) FROM acting GROUP BY agent"
        acting = {row["adapter"] for row in self._rows(f"SELECT adapter FROM acting WHERE id IN ({newest})")}
        found, origin = list[TaughtAdapter](), dict[str, str]()
        for row in self._rows(
            "SELECT name, parent, (SELECT state FROM adapter_events WHERE adapter = adapters.name ORDER BY id DESC "
            "LIMIT 1) AS state FROM adapters ORDER BY version"
        ):
            name = row["name"]
            if name in learned:
                origin[name] = name
            elif row["parent"] in origin:
                origin[name] = origin[row["parent"]]
            if name in origin:
                inherited = None if name in learned else origin[name]
                episodes = sorted(learned.get(name, ()))
                found.append(TaughtAdapter(name, row["state"], name in acting, episodes, inherited))
        return found

    def erased_lessons_of(self, adapter: str) -> list[str]:
        """The erased episodes that an adapter itself was trained on."""
        return self._lessons(adapter).erased

    def reward_models_of(self, cycles: Collection[str]) -> list[str]:
        """The adapters beside which a reward model of one of these cycles lies: it learned from all that they read."""
        query = "SELECT DISTINCT adapter FROM reward_models WHERE cycle IN (SELECT value FROM json_each(?))"
        return [row["adapter"] for row in self._rows(f"{query} ORDER BY adapter", json.dumps(list(cycles)))]

    def cycles_of(self, episode_ids: Iterable[str]) -> list[str]:
        """The cycles that read one of these episodes, oldest first."""
        query = "SELECT DISTINCT cycle FROM cycle_episodes WHERE episode_id IN (SELECT value FROM json_each(?))"
        return [row["cycle"] for row in self._rows(f"{query} ORDER BY cycle", json.dumps(list(episode_ids)))]

    def _lessons(self, adapter: str) -> Lessons:
        rows = self._rows(
            "SELECT DISTINCT cycle_episodes.cycle, cycle_episodes.title, role, episode_id, "
            "episode_id IN (SELECT id FROM erased_episodes) AS is_erased FROM adapters "
            "JOIN trained_weights ON trained_weights.digest = adapters.digest "
            "JOIN cycle_episodes ON cycle_episodes.cycle = trained_weights.cycle "
            "AND cycle_episodes.title = trained_weights.title WHERE adapters.name = ? ORDER BY episode_id",
            adapter,
        )
        by_role = {role: [row["episode_id"] for row in rows if row["role"] == role] for role in LessonRole}
        return Lessons(
            adapter,
            rows[0]["cycle"] if rows else "",
            rows[0]["title"] if rows else "",
            by_role[LessonRole.DEMONSTRATION],
            by_role[LessonRole.OWN],
            [row["episode_id"] for row in rows if row["is_erased"]],
        )

    def _rows(self, query: str, *values: object) -> list[dict[str, Any]]:
        uri = self._path.absolute().as_uri() + "?mode=ro"
        try:
            with closing(sqlite3.connect(uri, uri=True, timeout=10.0)) as connection:
                connection.row_factory = sqlite3.Row
                return [dict(row) for row in connection.execute(query, values).fetchall()]
        except sqlite3.OperationalError as error:
            if "no such table" in str(error):  # no learner of this release has run
                return []
            raise
