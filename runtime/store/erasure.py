"""Erases episodes: their texts and tokens, and what was made of them, from every table and from the file itself.

An erasure begins with tombstones, in one transaction: from then on nothing more is logged of its episodes, and no cycle
may use them. The rows go in small transactions, so that running answers do not wait; a kill in between is made good at
the next start, since the tombstones say what is still to go. What stays of an episode is its tombstone: who erased it,
when, why, how many steps it had, which adapter acted.

Deleted content is overwritten (`secure_delete`), the write-ahead log is emptied, and a small file is rewritten: SQLite
leaves copies of rows in unused parts of its pages when it balances a tree, about one row in ten thousand.

Not covered: backups, exports and copies that others made; blocks of the disk that the file system gave free; in a large
file the copies named above, until it is rewritten (`VACUUM`).
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from policies.chat.messages import action_message, text_of
from policies.types import Message
from runtime.store.damage import Damaged, Query, json_object, problems_in, record_of
from runtime.store.episodes import Actor, Purpose, Step, new_id, new_messages_along
from runtime.store.erasure_schema import (
    ERASURE_COLUMNS,
    ERASURE_EVENT_COLUMNS,
    TOMBSTONE_COLUMNS,
    source_in_metadata,
)
from runtime.store.learning_log import LearningLog
from runtime.store.lineage import Lineage, TaughtAdapter
from runtime.store.probe_scrubbing import forget_prompts
from runtime.store.step_log import LOCK_TIMEOUT_S, StepLog

STEPS_AT_ONCE = 200
"""Steps that one transaction deletes: some milliseconds in which no answer can be logged."""
PAUSE_S = 0.005
"""Between two of them, for those who wait to write."""
REWRITE_BYTES = 64 * 2**20
"""Of a file that is rewritten at once: no answer can be logged meanwhile."""
CHECKPOINT_PATIENCE_S = 20.0
"""How long the emptying of the write-ahead log waits for those who read an older state of the file."""


class Scope(StrEnum):
    """What was asked to be erased."""

    EPISODE = "episode"  # one, by its id
    USER = "user"  # all episodes for a user
    KEY = "key"  # all episodes of a key
    RETENTION = "retention"  # what was kept long enough


class Cause(StrEnum):
    """Why an episode is in an erasure."""

    NAMED = "named"  # it was asked for
    PROMOTED = "promoted"  # a demonstration that was made of one
    COPIED = "copied"  # a learner's trial at a state of one: it begins with the same conversation
    CONTINUED = "continued"  # its tokens stand on those of one


class Event(StrEnum):
    """What happened in an erasure; it begins with its row."""

    CYCLE_ENDED = "cycle_ended"  # the cycle that ran had read one of its episodes
    RETRAINING = "retraining"  # which agents are to learn anew without them, and which cycles were started for it
    ROWS = "rows"  # nothing of it is in a table any more
    FINISHED = "finished"  # nor in the file


@dataclass(frozen=True, slots=True)
class Tombstone:
    """What stays of an erased episode."""

    id: str
    erasure_id: str
    cause: Cause
    source: str
    """The episode it was made of; empty where it was named itself."""
    actor: Actor
    purpose: Purpose
    adapter: str
    owner: str
    began_at: float
    """Unix seconds."""
    num_steps: int


@dataclass(frozen=True, slots=True)
class Erasure:
    """One request to erase, and how far it is."""

    id: str
    scope: Scope
    reason: str
    key: str
    """Name of the key that asked for it; empty: the server itself, or somebody who was asked for none."""
    created_at: float
    """Unix seconds."""
    state: str
    """`running`, `rows` (gone from every table, the file is still to be cleaned), or `finished`."""
    num_episodes: int
    num_steps: int
    report: dict[str, Any] = field(default_factory=dict)
    """Of its events: how many rows went from each table, which cycle was ended ..."""


@dataclass(frozen=True, slots=True)
class Consequences:
    """What was made of the erased episodes."""

    demonstrations: list[str]
    """Erased with them."""
    adapters: list[TaughtAdapter]
    reward_models: list[str]
    """Beside which adapters one lies that learned from them: it chooses among draws (`best of`)."""
    cycles: list[str]
    """That read one of them."""


class Eraser:
    """Erases in one state folder. May be used from any thread; one erasure works at a time."""

    def __init__(self, state: Path, log: StepLog) -> None:
        self._state = state
        self._log = log
        self._lineage = Lineage(state)
        self._lock = threading.Lock()

    # ----------------------------------------------------------------------------------------------- what

    def episodes_of(self, user: str | None = None, owner: str | None = None) -> list[str]:
        """Ids of the episodes for a user, of a key, or both; demonstrations that the key imported are among them."""
        wanted = {"user = ?": user, "owner = ?": owner}
        given = {condition: value for condition, value in wanted.items() if value is not None}
        assert given, "an erasure names a user or a key"
        rows = self._log.query(f"SELECT id FROM episodes WHERE {' AND '.join(given)} ORDER BY id", *given.values())
        return [row["id"] for row in rows]

    def begin(self, episode_ids: Sequence[str], scope: Scope, reason: str, key: str = "") -> Erasure:
        """Put up the tombstones, of these and of what was made of them. Durable when it returns."""
        with self._lock:
            erasure_id = new_id("erase")
            causes = self._with_derived(episode_ids, is_retention=scope is Scope.RETENTION)
            with self._connected() as connection, _transaction(connection):
                connection.execute(
                    "INSERT INTO erasures (id, scope, reason, key, created_at) VALUES (?, ?, ?, ?, ?)",
                    (erasure_id, scope.value, reason, key, time.time()),
                )
                connection.executemany(
                    "INSERT OR IGNORE INTO erased_episodes SELECT id, ?, ?, ?, actor, purpose, adapter, owner, "
                    "created_at, (SELECT count(*) FROM steps WHERE episode_id = episodes.id) FROM episodes "
                    "WHERE id = ?",
                    [(erasure_id, cause.value, source, id) for id, (cause, source) in causes.items()],
                )
            return self.erasure(erasure_id)

    def work(self, erasure_id: str, stopping: Callable[[], bool] = lambda: False) -> Erasure:
        """Delete its rows, clean the file, and say how far it got. May be called again for one that was cut off."""
        with self._lock:
            erasure = self.erasure(erasure_id)
            if erasure.state == "running":
                counts = self._delete_rows(erasure_id, stopping)
                if stopping():
                    return self.erasure(erasure_id)
                self.note(erasure_id, Event.ROWS, {"rows": counts})
            if self.erasure(erasure_id).state == "rows":
                is_asked_for = erasure.num_episodes > 0 and erasure.scope is not Scope.RETENTION
                self._clean_file(erasure_id, may_rewrite=is_asked_for)
            return self.erasure(erasure_id)

    def note(self, erasure_id: str, event: Event, report: dict[str, Any]) -> None:
        """Append what happened in an erasure."""
        with self._connected() as connection, _transaction(connection):
            connection.execute(
                "INSERT INTO erasure_events (erasure_id, event, report, created_at) VALUES (?, ?, ?, ?)",
                (erasure_id, event.value, json.dumps(report), time.time()),
            )

    # ------------------------------------------------------------------------------------------------ read

    def erasure(self, erasure_id: str) -> Erasure:
        """Raises KeyError for one that is not known."""
        found = self._erasures("WHERE erasures.id = ?", erasure_id)
        if not found:
            raise KeyError(erasure_id)
        return found[0]

    def erasure_of(self, episode_id: str) -> Erasure | None:
        """The one that an episode was erased in."""
        tombstone = self.tombstone(episode_id)
        return None if tombstone is None else self.erasure(tombstone.erasure_id)

    def erasures(self, limit: int = 100, damaged: list[Damaged] | None = None) -> list[Erasure]:
        """Newest first; those whose rows are damaged are added to `damaged` instead."""
        return self._erasures("ORDER BY erasures.id DESC LIMIT ?", limit, damaged=damaged)

    def unfinished(self) -> list[str]:
        """Oldest first: a server that starts goes on with them."""
        finished = "SELECT erasure_id FROM erasure_events WHERE event = 'finished'"
        return [
            row["id"] for row in self._log.query(f"SELECT id FROM erasures WHERE id NOT IN ({finished}) ORDER BY id")
        ]

    def retrainings_with(self, field: str) -> list[str]:
        """Oldest first: erasures in whose newest report of a retraining this list is not empty."""
        newest = "SELECT max(id) FROM erasure_events WHERE event = 'retraining' GROUP BY erasure_id"
        said = f"CASE WHEN json_valid(report) THEN json_array_length(report, '$.retraining.{field}') END"
        rows = self._log.query(
            f"SELECT erasure_id FROM erasure_events WHERE id IN ({newest}) AND {said} > 0 ORDER BY id"
        )
        return [row["erasure_id"] for row in rows]

    def tombstones(self, erasure_id: str) -> list[Tombstone]:
        rows = self._log.query("SELECT * FROM erased_episodes WHERE erasure_id = ? ORDER BY id", erasure_id)
        return list(self._log.damage.sound(rows, _tombstone))

    def tombstone(self, episode_id: str) -> Tombstone | None:
        rows = self._log.query("SELECT * FROM erased_episodes WHERE id = ?", episode_id)
        return _tombstone(rows[0]) if rows else None

    def consequences(self, erasure_id: str) -> Consequences:
        """What was made of its episodes, as far as it is known now."""
        tombstones = self.tombstones(erasure_id)
        episodes = [tombstone.id for tombstone in tombstones]
        experts = [tombstone.id for tombstone in tombstones if tombstone.actor is Actor.EXPERT]
        adapters, cycles = self._lineage.adapters_taught_by(episodes), self._lineage.cycles_of(episodes)
        return Consequences(experts, adapters, self._lineage.reward_models_of(cycles), cycles)

    def _erasures(self, rest: str, *values: object, damaged: list[Damaged] | None = None) -> list[Erasure]:
        rows = self._log.query(
            "SELECT erasures.*, (SELECT count(*) FROM erased_episodes WHERE erasure_id = erasures.id) AS num_episodes, "
            "(SELECT coalesce(sum(num_steps), 0) FROM erased_episodes WHERE erasure_id = erasures.id) AS num_steps "
            f"FROM erasures {rest}",
            *values,
        )
        return list(self._log.damage.sound(rows, self._as_erasure, damaged))

    def _as_erasure(self, row: sqlite3.Row) -> Erasure:
        query = "SELECT * FROM erasure_events WHERE erasure_id = ? ORDER BY id"
        report: dict[str, Any] = {}
        state = "running"
        for event, told in self._log.damage.sound(self._log.query(query, row["id"]), _event_from_row):
            report |= told
            state = event if event in (Event.ROWS, Event.FINISHED) else state
        return Erasure(**_erasure_from_row(row), state=state, report=report)

    # --------------------------------------------------------------------------------- what was made of it

    def _with_derived(self, episode_ids: Sequence[str], is_retention: bool) -> dict[str, tuple[Cause, str]]:
        """By episode, why it goes and what it was made of: the named ones, and all that stems from them.

        What is merely old takes no demonstration with it, and no trial that does not say what it is of: those have an
        age of their own.
        """
        found: dict[str, tuple[Cause, str]] = dict.fromkeys(episode_ids, (Cause.NAMED, ""))
        waiting = list(found)
        while waiting:
            made = [*self._said_to_be_made_of(waiting), *(() if is_retention else self._copies_by_content(waiting))]
            if is_retention:
                made = [each for each in made if each[1] is not Cause.PROMOTED]
            more = [each for each in made if each[0] not in found]
            found |= {id: (cause, source) for id, cause, source in more}
            waiting = list(dict.fromkeys(id for id, _, _ in more))
        return found

    def _said_to_be_made_of(self, sources: Sequence[str]) -> Iterator[tuple[str, Cause, str]]:
        """(episode, how, of which)."""
        wanted = json.dumps(list(sources))
        of = "IN (SELECT value FROM json_each(?))"
        for name, cause in (("promoted_from", Cause.PROMOTED), ("copied_from", Cause.COPIED)):
            said = source_in_metadata(name)
            for row in self._log.query(f"SELECT id, {said} AS source FROM episodes WHERE {said} {of}", wanted):
                yield row["id"], cause, row["source"]
        for row in self._log.query(
            "SELECT DISTINCT child.episode_id AS id, parent.episode_id AS source FROM steps AS parent "
            f"JOIN steps AS child ON child.parent_id = parent.id WHERE parent.episode_id {of} "
            "AND child.episode_id <> parent.episode_id",
            wanted,
        ):
            yield row["id"], Cause.CONTINUED, row["source"]

    def _copies_by_content(self, sources: Sequence[str]) -> Iterator[tuple[str, Cause, str]]:
        """Trials at the same states that do not say so: learners of older releases did not. Found by what was said."""
        unnamed = (
            "SELECT id FROM episodes WHERE purpose = 'evaluation' AND actor = 'policy' AND task IS NULL "
            f"AND {source_in_metadata('copied_from')} IS NULL"
        )
        candidates = [row["id"] for row in self._log.query(unnamed)]
        if not candidates:
            return
        begins = {_said(step.new_messages[:1]): source for source in sources if (step := self._first_step(source))}
        states: dict[str, str] = {}
        for candidate in candidates:
            step = self._first_step(candidate)
            begin = None if step is None else begins.get(_said(step.new_messages[:1]))
            if step is None or begin is None or candidate in sources:
                continue
            states = states or {state: source for source in sources for state in self._states(source)}
            if source := states.get(_said(step.new_messages)):
                yield candidate, Cause.COPIED, source

    def _first_step(self, episode_id: str) -> Step | None:
        return next(self._log.steps_after(episode_id, None, 1), None)

    def _states(self, episode_id: str) -> Iterator[str]:
        """Of each of its steps, what had been said before."""
        for step in self._log.steps(episode_id):
            path = self._log.path_to(step.id)
            messages = list[Message]()
            for each, new_messages in new_messages_along(path):
                messages += new_messages
                if each.id != step.id:
                    messages.append(action_message(each.action))
            yield _said(messages)

    # ------------------------------------------------------------------------------------------------ rows

    def _delete_rows(self, erasure_id: str, stopping: Callable[[], bool]) -> dict[str, int]:
        """In small transactions; returns how many rows of each table went."""
        counts: dict[str, int] = {}
        tombstones = self.tombstones(erasure_id)
        self._clean_learning_log(erasure_id, self._lineage.cycles_of([tombstone.id for tombstone in tombstones]))
        episode_ids = [tombstone.id for tombstone in tombstones]
        num_forgotten = forget_prompts(self._state, self._log, episode_ids)  # while all prompts can be rebuilt
        with self._connected() as connection:
            for tombstone in tombstones:
                with _transaction(connection):  # first, so that nobody finds half an episode
                    _count(counts, "episodes", connection.execute("DELETE FROM episodes WHERE id = ?", (tombstone.id,)))
                while steps := self._next_steps(connection, tombstone.id):
                    if stopping():
                        return counts
                    with _transaction(connection):
                        _delete_steps(connection, steps, counts)
                    self._log.forget(steps)
                    time.sleep(PAUSE_S)
                with _transaction(connection):
                    _delete_rest(connection, tombstone.id, counts)
        return counts | {"probe_prompts": num_forgotten}

    def _next_steps(self, connection: sqlite3.Connection, episode_id: str) -> list[str]:
        """The newest ones: what stands on a step goes before it."""
        query = "SELECT id FROM steps WHERE episode_id = ? ORDER BY created_at DESC LIMIT ?"
        return [row["id"] for row in connection.execute(query, (episode_id, STEPS_AT_ONCE))]

    def _clean_learning_log(self, erasure_id: str, cycles: Collection[str]) -> None:
        """Take out of the learner's reports what other programs said, which may quote; figures and ids stay."""
        if not cycles:
            return
        log = LearningLog(self._state)  # migrates: the table may be of an older release
        try:
            log.forget_words(cycles, erasure_id)
        finally:
            log.close()
        log_file = self._state / "learner.log"
        if log_file.exists():
            with log_file.open("r+b") as file:
                file.truncate(0)

    # ------------------------------------------------------------------------------------------------ file

    def _clean_file(self, erasure_id: str, may_rewrite: bool) -> None:
        """Empty the write-ahead log, and rewrite the file where it is small."""
        size = (self._state / "agent.db").stat().st_size
        with self._connected() as connection:
            rewrites = may_rewrite and size <= REWRITE_BYTES
            if rewrites:
                connection.execute("PRAGMA temp_store = MEMORY")  # what lives stays in the state folder
                connection.execute("VACUUM")
            deadline = time.monotonic() + CHECKPOINT_PATIENCE_S
            while connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]:
                if time.monotonic() > deadline:
                    return  # somebody reads an older state: it is tried again
                time.sleep(0.05)
        self.note(erasure_id, Event.FINISHED, {"file_was_rewritten": rewrites})

    @contextmanager
    def _connected(self) -> Iterator[sqlite3.Connection]:
        """A connection that may delete parents before children: the episode goes first, so that nobody sees it half."""
        connection = sqlite3.connect(
            self._state / "agent.db", timeout=LOCK_TIMEOUT_S, isolation_level=None, check_same_thread=False
        )
        try:
            connection.row_factory = sqlite3.Row
            for pragma in ("foreign_keys = OFF", "secure_delete = ON", "synchronous = FULL"):
                connection.execute(f"PRAGMA {pragma}")
            yield connection
        finally:
            connection.close()


def _delete_steps(connection: sqlite3.Connection, step_ids: Sequence[str], counts: dict[str, int]) -> None:
    """With all that hangs on them."""
    of = "IN (SELECT value FROM json_each(?))"
    wanted = (json.dumps(list(step_ids)),)
    tool_sets = [row[0] for row in connection.execute(f"SELECT DISTINCT tools_digest FROM steps WHERE id {of}", wanted)]
    last = connection.execute(f"SELECT max(rowid) FROM steps WHERE id {of}", wanted).fetchone()[0]
    cursor_ids = _cursors_among(connection, step_ids)
    corrections = f"SELECT id FROM corrections WHERE step_id {of}"
    connection.execute(f"DELETE FROM withdrawals WHERE fact_id IN ({corrections})", wanted)
    _count(counts, "corrections", connection.execute(f"DELETE FROM corrections WHERE step_id {of}", wanted))
    calls = (  # by the calls' ids, which an index finds; a row of theirs is found by its step nowhere else
        "SELECT json_extract(call.value, '$.id') FROM steps, json_each(CASE WHEN json_valid(action) THEN action ELSE "
        f"'null' END, '$.calls') AS call WHERE steps.id {of}"
    )
    connection.execute(f"DELETE FROM step_calls WHERE call_id IN ({calls}) AND step_id {of}", wanted * 2)
    drawn = connection.execute(f"DELETE FROM step_candidates WHERE step_id {of}", wanted)
    _count(counts, "step_candidates", drawn)
    _count(counts, "steps", connection.execute(f"DELETE FROM steps WHERE id {of}", wanted))
    for digest in tool_sets:
        same = "substr(tools_digest, 1, 8) = substr(?1, 1, 8) AND tools_digest = ?1"
        unused = f"DELETE FROM tool_sets WHERE digest = ?1 AND NOT EXISTS (SELECT 1 FROM steps WHERE {same})"
        _count(counts, "tool_sets", connection.execute(unused, (digest,)))
    _move_cursors(connection, cursor_ids, last)


def _cursors_among(connection: sqlite3.Connection, step_ids: Sequence[str]) -> list[str]:
    """Those up to which a cycle has read the log, or may have just now: the newest of all."""
    newest = connection.execute("SELECT id FROM steps ORDER BY rowid DESC LIMIT 1").fetchone()
    found = {newest[0]} if newest else set()
    if connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'cycles'").fetchone():
        found |= {row[0] for row in connection.execute("SELECT DISTINCT last_step_id FROM cycles")}
    return [step_id for step_id in step_ids if step_id in found]


def _move_cursors(connection: sqlite3.Connection, step_ids: Sequence[str], last: int) -> None:
    """Readers that had got to one of these steps go on behind the last one before it that is left. Numbers of steps are
    given again once the newest is gone: no cursor may lie beyond the newest that is left."""
    before = "SELECT coalesce(max(rowid), 0) FROM steps WHERE rowid <= ?"
    connection.executemany(
        f"INSERT OR REPLACE INTO erased_cursors (step_id, number) VALUES (?, ({before}))",
        [(id, last) for id in step_ids],
    )
    connection.execute("UPDATE erased_cursors SET number = min(number, (SELECT coalesce(max(rowid), 0) FROM steps))")


def _delete_rest(connection: sqlite3.Connection, episode_id: str, counts: dict[str, int]) -> None:
    """What belongs to the episode and not to a step."""
    outcomes = "SELECT id FROM outcomes WHERE episode_id = ?1"
    connection.execute(f"DELETE FROM withdrawals WHERE fact_id = ?1 OR fact_id IN ({outcomes})", (episode_id,))
    responses = "SELECT id FROM responses WHERE episode_id = ?"
    connection.execute(f"DELETE FROM response_deletions WHERE id IN ({responses})", (episode_id,))
    for table in ("responses", "outcomes"):
        _count(counts, table, connection.execute(f"DELETE FROM {table} WHERE episode_id = ?", (episode_id,)))


def _count(counts: dict[str, int], table: str, deleted: sqlite3.Cursor) -> None:
    counts[table] = counts.get(table, 0) + deleted.rowcount


@contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


@record_of("erasures", ERASURE_COLUMNS)
def _erasure_from_row(row: sqlite3.Row) -> dict[str, Any]:
    return {**dict(row), "scope": Scope(row["scope"])}


@record_of("erasure_events", ERASURE_EVENT_COLUMNS)
def _event_from_row(row: sqlite3.Row) -> tuple[Event, dict[str, Any]]:
    return Event(row["event"]), json_object(row["report"])


def erasure_problems(query: Query) -> Iterator[str]:
    """What is wrong with the rows of erasures, in sentences."""
    yield from problems_in(query, "erasures", _erasure_from_row)
    yield from problems_in(query, "erasure_events", _event_from_row)
    yield from problems_in(query, "erased_episodes", _tombstone)


@record_of("erased_episodes", TOMBSTONE_COLUMNS)
def _tombstone(row: sqlite3.Row) -> Tombstone:
    fields: dict[str, Any] = dict(row)
    fields |= {"cause": Cause(row["cause"]), "actor": Actor(row["actor"]), "purpose": Purpose(row["purpose"])}
    return Tombstone(**fields)


def _said(messages: Sequence[Message]) -> str:
    """A digest of who said what."""
    said = [[message["role"], text_of(message)] for message in messages]
    return hashlib.sha256(json.dumps(said).encode("utf-8", "surrogatepass")).hexdigest()
