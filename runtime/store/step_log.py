"""The log of every episode and step: what was seen, sampled and answered, token-exact, and what was said of it later.

Facts are appended through one writer thread and never edited. Readers have connections of their own: in WAL mode they
neither wait for the writer nor hold it up, also from another process. An append that was reported done is on disk
(`synchronous=FULL`). Refused: a log in JSON lines, which has neither transactions nor an index.

Not covered: two servers that write one file (each would be correct, but slow), and network file systems without shared
memory, on which SQLite has no WAL.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sqlite3
import tempfile
import zlib
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future
from contextlib import closing, contextmanager
from dataclasses import dataclass
from enum import Enum
from functools import partial
from pathlib import Path

from sqlite_utils import Database

from runtime.store.damage import (
    Damaged,
    DamageNotes,
    StepLogError,
    damaged_file,
    is_damage,
    last_rowid,
    rows_between,
    text_or_bytes,
)
from runtime.store.episodes import (
    Actor,
    Correction,
    Episode,
    Fact,
    KeyUsage,
    Outcome,
    Purpose,
    ResponseRecord,
    Role,
    Step,
    StepCandidate,
    Withdrawal,
)
from runtime.store.erasure_schema import MAY_GO
from runtime.store.prompt_chains import SequenceCache, sequence_of
from runtime.store.step_rows import (
    TOKEN_BYTES,
    candidate_from_row,
    correction_from_row,
    episode_from_row,
    outcome_from_row,
    response_from_row,
    step_from_row,
    tool_set_from_row,
    usage_from_row,
    withdrawal_from_row,
)
from runtime.store.step_schema import FACT_TABLES, STEP_LOG_MIGRATIONS
from runtime.store.step_writer import StepWriter, no_longer_there
from runtime.store.tables import all_rows, page_problems, reference_problems, table_problems

__all__ = ["LOCK_TIMEOUT_S", "Damaged", "Mark", "MarkedStep", "StepLog", "StepLogError", "Storage", "Whose"]

LOCK_TIMEOUT_S = 5.0
"""How long a write waits for another process that writes to the same file (the learner's tables live there too)."""

_STEPS = "SELECT steps.*, tool_sets.tools FROM steps LEFT JOIN tool_sets ON tool_sets.digest = steps.tools_digest"

_TRUST = "CASE role " + " ".join(f"WHEN '{role}' THEN {role.trust}" for role in Role) + " END"

MOST_OF_A_KEY = 10
"""Outcomes of one key that is trusted to give feedback and no more, of each adapter."""
LIVE_EPISODES = 5000
"""Of an adapter, newest first, that are looked through for outcomes."""

LEARNABLE = "actor = 'policy' AND purpose <> 'evaluation'"
"""Word for word that of two indexes."""

_NOT_TAKEN_BACK = "NOT EXISTS (SELECT 1 FROM withdrawals WHERE fact_id = {id})"

_LIVE_OUTCOMES = f"""
WITH live AS (
    SELECT id FROM episodes
    WHERE {LEARNABLE} AND agent = ? AND adapter = ? AND is_assigned = 1 AND (created_at >= ? OR rowid > ?)
    ORDER BY id DESC LIMIT ?),
said AS (
    SELECT outcomes.*, outcomes.rowid AS number, {_TRUST} AS trust, row_number() OVER (
        PARTITION BY episode_id ORDER BY {_TRUST} DESC, created_at DESC, outcomes.id DESC) AS place
    FROM live JOIN outcomes ON outcomes.episode_id = live.id
    WHERE {_NOT_TAKEN_BACK.format(id="outcomes.id")}),
counted AS (
    SELECT *, row_number() OVER (PARTITION BY key ORDER BY number DESC) AS nth_of_key FROM said WHERE place = 1)
SELECT id, episode_id, value, source, note, created_at, key, role FROM counted
WHERE trust >= {{least_trust}} OR nth_of_key <= ? ORDER BY number DESC LIMIT ?"""

# UNION, not UNION ALL: it ends where a damaged step is its own ancestor.
_ANCESTRY = """
WITH RECURSIVE ancestry (id, parent_id) AS (
    SELECT id, parent_id FROM steps WHERE id = ?
    UNION SELECT steps.id, steps.parent_id FROM steps JOIN ancestry ON steps.id = ancestry.parent_id)"""

_STAYS = "steps.episode_id NOT IN (SELECT id FROM erased_episodes)"

_MISCOUNTED = f"""
SELECT steps.id, steps.step_index FROM steps LEFT JOIN steps AS parents ON parents.id = steps.parent_id
WHERE {_STAYS} AND steps.step_index <> coalesce(parents.step_index + 1, 0)"""


LOW_SPACE_BYTES = 512 * 2**20
"""Below this the operator is told; SQLite itself goes on until nothing is left."""
_PROBE_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class Storage:
    """How the disk below the log does."""

    is_writable: bool
    """Steps can be logged, and so answers be given."""
    problem: str
    """What is wrong, or soon will be; empty: nothing."""
    free_bytes: int
    num_failed_writes: int
    """Since the start: each refused the answers of all that waited for it."""


class Mark(Enum):
    """What a step is recognised by: table and column."""

    CONVERSATION = ("steps", "conversation_digest")
    THREAD = ("steps", "thread_digest")
    TAIL = ("steps", "tail_digest")
    CALL = ("step_calls", "call_id")


@dataclass(frozen=True, slots=True)
class Whose:
    """Where a conversation is looked for: in one episode, or among those of a key's user."""

    owner: str = ""
    user: str = ""
    episode_id: str | None = None
    """Goes before the other two."""
    is_anybodys: bool = False
    """Everywhere; who asks must then be allowed to see what is found."""
    agent: str = ""
    """Of a key's user: the agent that they speak to."""


@dataclass(frozen=True, slots=True)
class MarkedStep:
    """A step that bears a mark that was looked for."""

    mark: str
    step_id: str
    episode_id: str
    is_continued: bool
    """Another step stands on it."""


class StepLog:
    """Constructing opens the file and migrates it; `read_only=True` opens what a running server writes.

    Raises StepLogError where the file cannot be opened, or was written by a newer release, or (read-only) is missing or
    not yet migrated.
    """

    def __init__(self, path: str | Path, read_only: bool = False, lock_timeout_s: float = LOCK_TIMEOUT_S) -> None:
        self._path = Path(path)
        self.damage = DamageNotes()
        """What could not be read."""
        self._cache = SequenceCache()
        self._idle_readers: deque[sqlite3.Connection] = deque()
        self._is_closed = False
        self._writer: StepWriter | None = None
        if read_only:
            self._check_readable()
        else:
            connection = _open_to_write(self._path)
            self._writer = StepWriter(connection, self._cache, self._path, lock_timeout_s)

    # ------------------------------------------------------------------------------------------ write

    def append(self, *facts: Fact) -> Future[None]:
        """Log facts, in order, together or not at all. The future resolves when they are on disk.

        It raises StepLogError where a fact names an unknown episode, step or parent, repeats an id, or holds what
        cannot be stored, and where the file cannot be written. Cancelling it does not take the facts back. Do not edit
        messages or arguments of a record that was handed over: they are written a moment later.
        """
        if self._writer is None:
            raise StepLogError(f"{self._path} was opened to read only: nothing can be appended")
        return self._writer.append(facts)

    async def commit(self, *facts: Fact) -> None:
        """`append`, and wait on the event loop."""
        await asyncio.wrap_future(self.append(*facts))

    def forget(self, step_ids: Iterable[str]) -> None:
        """Drop the tokens of steps that were erased from memory."""
        self._cache.discard(step_ids)

    def close(self) -> None:
        """Write what waits, then close the file. May be called twice."""
        self._is_closed = True
        if self._writer is not None:
            self._writer.close()
        while self._idle_readers:
            self._idle_readers.pop().close()

    # ------------------------------------------------------------------------------------------- read

    def episode(self, episode_id: str) -> Episode | None:
        """Raises Damaged, as everything that reads one record does."""
        rows = self._rows("SELECT * FROM episodes WHERE id = ?", episode_id)
        return episode_from_row(rows[0]) if rows else None

    def step(self, step_id: str) -> Step | None:
        return _first(self._steps(f"{_STEPS} WHERE steps.id = ?", step_id))

    def steps(self, episode_id: str) -> list[Step]:
        """An episode's steps by time of creation; its branches stand beside each other. Raises Damaged where one is."""
        return self._steps(f"{_STEPS} WHERE episode_id = ? ORDER BY created_at, steps.id", episode_id)

    def steps_after(
        self, episode_id: str, step_id: str | None, limit: int, damaged: list[Damaged] | None = None
    ) -> Iterator[Step]:
        """The same, page by page and read one by one: those after this step. Close the iterator where it is left.

        Damaged ones are left out, and added to `damaged`.
        """
        after = "AND (created_at, steps.id) > (SELECT created_at, id FROM steps WHERE id = ?)" if step_id else ""
        query = f"SELECT id FROM steps WHERE episode_id = ? {after} ORDER BY created_at, id LIMIT ?"
        values = (episode_id, step_id, limit) if step_id else (episode_id, limit)
        rows = self._rows(query, *values)
        yield from filter(None, self.damage.sound((row["id"] for row in rows), self.step, damaged))

    def candidates(self, step_id: str) -> list[StepCandidate]:
        """What a step was chosen among, in the order it was drawn; empty where nothing else was."""
        rows = self._rows("SELECT * FROM step_candidates WHERE step_id = ? ORDER BY number", step_id)
        return list(self.damage.sound(rows, candidate_from_row))

    def children(self, step_id: str) -> list[Step]:
        """The steps that stand on it, by time of creation."""
        return self._steps(f"{_STEPS} WHERE parent_id = ? ORDER BY created_at, steps.id", step_id)

    def path_to(self, step_id: str) -> list[Step]:
        """From the first step to this one, along the parents."""
        return self._steps(f"{_ANCESTRY} {_STEPS} JOIN ancestry ON ancestry.id = steps.id ORDER BY step_index", step_id)

    def marked_steps(self, mark: Mark, values: Iterable[str], whose: Whose) -> list[MarkedStep]:
        """The steps that bear one of these marks, newest first, in an episode or among a user's with an agent."""
        table, column = mark.value
        of: tuple[str, ...]
        if whose.episode_id is not None:
            scope, of = "episode_id = ?", (whose.episode_id,)
        elif whose.is_anybodys:
            scope, of = "TRUE", ()
        else:
            scope = "episodes.owner = ? AND episodes.user = ? AND episodes.agent = ? AND actor = 'policy'"
            of = (whose.owner, whose.user, whose.agent)
        calls = "" if table == "steps" else "JOIN step_calls ON step_calls.step_id = steps.id "
        query = (
            f"SELECT {table}.{column} AS mark, steps.id, episode_id, "
            "EXISTS (SELECT 1 FROM steps AS child WHERE child.parent_id = steps.id) AS is_continued "
            f"FROM steps {calls}JOIN episodes ON episodes.id = steps.episode_id "
            f"WHERE {table}.{column} IN (SELECT value FROM json_each(?)) AND {scope} "
            "ORDER BY steps.created_at DESC, steps.id DESC"
        )
        rows = self._rows(query, json.dumps(list(values)), *of)
        return [MarkedStep(row["mark"], row["id"], row["episode_id"], bool(row["is_continued"])) for row in rows]

    def episodes(
        self,
        after: str | None = None,
        limit: int = 50,
        purpose: Purpose | None = None,
        actor: Actor | None = None,
        adapter: str | None = None,
        task_prefix: str | None = None,
        owner: str | None = None,
        agent: str | None = None,
    ) -> list[Episode]:
        """One page, newest first. `after` is the last id of the page before, so that new arrivals shift nothing.

        Demonstrations that were taken back are not in it.
        """
        return list(self.each_episode(after, limit, purpose, actor, adapter, task_prefix, owner, agent))

    def each_episode(
        self,
        after: str | None = None,
        limit: int = 50,
        purpose: Purpose | None = None,
        actor: Actor | None = None,
        adapter: str | None = None,
        task_prefix: str | None = None,
        owner: str | None = None,
        agent: str | None = None,
        damaged: list[Damaged] | None = None,
    ) -> Generator[Episode, None, None]:
        """The same, read one by one: close the iterator where the rest is not needed.

        Damaged ones are left out, and added to `damaged`.
        """
        conditions = {"id < ?": after, "purpose = ?": purpose, "actor = ?": actor, "adapter = ?": adapter}
        conditions |= {"owner = ?": owner, "agent = ?": agent}
        if task_prefix is not None:  # a range, which an index serves; LIKE would trip over the prefix's own % and _
            conditions |= {"task >= ?": task_prefix, "task < ?": task_prefix + "\U0010ffff"}
        wanted = {condition: value for condition, value in conditions.items() if value is not None}
        where = " AND ".join([*wanted, _NOT_TAKEN_BACK.format(id="episodes.id")])
        page = f"SELECT id FROM episodes WHERE {where} ORDER BY id DESC LIMIT ?"  # sorts ids in an index, no whole rows
        query = f"SELECT * FROM episodes WHERE id IN ({page}) ORDER BY id DESC"
        values, num_read = tuple(wanted.values()), 0
        with self._reading() as connection:
            try:
                with closing(connection.execute(query, (*values, limit))) as rows:
                    for episode in self.damage.sound(rows, episode_from_row, damaged):
                        yield episode
                        num_read += 1
                return
            except sqlite3.DatabaseError as error:
                if not is_damage(error):
                    raise
            rows = self._beside_damaged_pages(connection, where, values, limit, damaged)
            for number, episode in enumerate(self.damage.sound(rows, episode_from_row, damaged)):
                if number >= num_read:
                    yield episode

    def _beside_damaged_pages(
        self,
        connection: sqlite3.Connection,
        where: str,
        values: tuple[object, ...],
        limit: int,
        damaged: list[Damaged] | None,
    ) -> Iterator[sqlite3.Row]:
        """The rows of a page of episodes, by the order of their logging: no index is asked, and each may be damaged."""
        query = f"SELECT * FROM episodes NOT INDEXED WHERE {where} AND rowid BETWEEN ? AND ? ORDER BY rowid DESC"
        high, num_found = last_rowid(connection, "episodes"), 0
        while high > 0 and num_found < limit:
            for row in rows_between(connection, query, values, max(1, high - 199), high, newest_first=True):
                if isinstance(row, int):
                    error = Damaged("episodes", f"row {row}", "it lies on a damaged page of the file")
                    self.damage.note(error)
                    if damaged is not None:
                        damaged.append(error)
                elif num_found < limit:
                    num_found += 1
                    yield row
            high -= 200

    def response(self, response_id: str) -> ResponseRecord | None:
        """None for one that is not known, or was deleted."""
        rows = self._rows(
            "SELECT * FROM responses WHERE id = ? AND id NOT IN (SELECT id FROM response_deletions)", response_id
        )
        return response_from_row(rows[0]) if rows else None

    def run_from(self, step_id: str) -> list[Step]:
        """The steps of an answer, from its first one to the one in which it ended; empty where it never did."""
        step = self.step(step_id)
        run = [] if step is None else [step]
        while run and run[-1].stop_reason is None:
            following = self.children(run[-1].id)
            if not following:
                return []
            run.append(following[0])
        return run

    def outcomes(self, episode_id: str) -> list[Outcome]:
        """Those that were not taken back. The last one counts: the newest of those who are trusted most."""
        query = f"SELECT * FROM outcomes WHERE episode_id = ? AND {_NOT_TAKEN_BACK.format(id='outcomes.id')}"
        rows = self._rows(f"{query} ORDER BY {_TRUST}, created_at, id", episode_id)
        return list(self.damage.sound(rows, outcome_from_row))

    def erased_among(self, episode_ids: Iterable[str]) -> set[str]:
        """Those of these episodes that were erased, or are being erased now."""
        query = "SELECT id FROM erased_episodes WHERE id IN (SELECT value FROM json_each(?))"
        return {row["id"] for row in self._rows(query, json.dumps(list(episode_ids)))}

    def outcome(self, outcome_id: str) -> Outcome | None:
        rows = self._rows("SELECT * FROM outcomes WHERE id = ?", outcome_id)
        return outcome_from_row(rows[0]) if rows else None

    def correction(self, correction_id: str) -> Correction | None:
        rows = self._rows("SELECT * FROM corrections WHERE id = ?", correction_id)
        return correction_from_row(rows[0]) if rows else None

    def withdrawals(self, fact_id: str) -> list[Withdrawal]:
        """Oldest first; the fact no longer counts where there is one."""
        rows = self._rows("SELECT * FROM withdrawals WHERE fact_id = ? ORDER BY created_at, id", fact_id)
        return list(self.damage.sound(rows, withdrawal_from_row))

    def num_learnable_since(self, created_at: float, most: int, agent: str = "") -> int:
        """How many of an agent's own episodes, evaluations not counted, began after that moment; at most `most`."""
        # Told which index: the planner would rather read all episodes of this actor.
        by_time, wanted = "episodes INDEXED BY learnable_episodes_by_time", f"{LEARNABLE} AND agent = ?"
        query = f"SELECT count(*) FROM (SELECT 1 FROM {by_time} WHERE {wanted} AND created_at > ? LIMIT ?)"
        return self._rows(query, agent, created_at, most)[0][0]

    def num_learnable_after(self, number: int, most: int, agent: str = "") -> int:
        """The same, of those that were logged after the episode with this number: clocks may be set back."""
        wanted = f"{LEARNABLE} AND agent = ? AND rowid > ?"
        query = f"SELECT count(*) FROM (SELECT 1 FROM episodes NOT INDEXED WHERE {wanted} LIMIT ?)"
        return self._rows(query, agent, number, most)[0][0]

    def num_episodes(self) -> int:
        """The number of the newest episode."""
        return self._rows("SELECT coalesce(max(rowid), 0) FROM episodes")[0][0]

    def live_outcomes(
        self, adapter: str, limit: int, since: float = 0.0, after_number: int = 2**62, agent: str = ""
    ) -> list[Outcome]:
        """How the newest of an agent's episodes went that the server gave this adapter and that began since, or were
        logged after the episode with this number (clocks may be set back): one outcome each, the newest first.

        Neither evaluations count nor what a client pinned, and of a key that is only trusted to give feedback no more
        than MOST_OF_A_KEY: it takes several of them to be evidence. Looks at the newest LIVE_EPISODES: its cost does
        not grow with the log.
        """
        query = _LIVE_OUTCOMES.format(least_trust=Role.TEACH.trust)
        rows = self._rows(query, agent, adapter, since, after_number, LIVE_EPISODES, MOST_OF_A_KEY, limit)
        return list(self.damage.sound(rows, outcome_from_row))

    def corrections(self, step_id: str) -> list[Correction]:
        """Oldest first, without those that were taken back."""
        query = f"SELECT * FROM corrections WHERE step_id = ? AND {_NOT_TAKEN_BACK.format(id='corrections.id')}"
        rows = self._rows(f"{query} ORDER BY created_at, id", step_id)
        return list(self.damage.sound(rows, correction_from_row))

    def corrected_steps(self, agent: str = "") -> list[str]:
        """Ids of an agent's steps that have a correction, newest correction first."""
        rows = self.sound_rows(
            "SELECT step_id, max(corrections.created_at) AS newest FROM corrections "
            "JOIN steps ON steps.id = step_id JOIN episodes ON episodes.id = episode_id "
            f"WHERE episodes.agent = ? AND {_NOT_TAKEN_BACK.format(id='corrections.id')} "
            "GROUP BY step_id ORDER BY newest DESC",
            agent,
        )
        return [row["step_id"] for row in rows]

    def steps_since(self, step_id: str | None, limit: int) -> list[Step]:
        """The next steps in the order of their logging; None begins at the first. Pass on the last returned step's id.

        Not by id: an id is made when a step begins, and a slow step is logged after quicker ones that began later.
        """
        return self._steps(
            f"{_STEPS} WHERE steps.rowid > ? ORDER BY steps.rowid LIMIT ?", self.number_of_step(step_id), limit
        )

    def number_of_step(self, step_id: str | None) -> int:
        """Where a step stands in the order of logging, or stood before it was erased; 0 for an unknown one and None."""
        erased = "SELECT number FROM erased_cursors WHERE step_id = ?1"
        rows = self.sound_rows(f"SELECT rowid AS number FROM steps WHERE id = ?1 UNION ALL {erased}", step_id or "")
        return rows[0]["number"] if rows else 0

    def usage_of(self, day: int) -> list[KeyUsage]:
        """What keys with a quota have used up on a day (UTC, since 1970)."""
        rows = self._rows("SELECT * FROM key_usage WHERE day = ?", day)
        return list(self.damage.sound(rows, usage_from_row))

    def storage(self) -> Storage:
        """How the disk below the log does. Where the last write failed, another is tried: not for the event loop."""
        assert self._writer is not None, "who writes is asked"
        problem = self._writer.problem and self._problem_now()
        try:
            self._writer.require_place()
            free_bytes = shutil.disk_usage(self._path.parent).free
        except (OSError, StepLogError) as error:
            return Storage(False, str(error), 0, self._writer.num_failed)
        if not problem and free_bytes < LOW_SPACE_BYTES:
            told = f"only {free_bytes // 2**20} MiB are free where {self._path.parent} lies: make room"
            return Storage(True, told, free_bytes, self._writer.num_failed)
        return Storage(not problem, problem, free_bytes, self._writer.num_failed)

    def _problem_now(self) -> str:
        """Why a write would fail now; empty where it would not."""
        assert self._writer is not None, "who writes is asked"
        try:
            with tempfile.TemporaryFile(dir=self._path.parent) as file:
                file.write(bytes(_PROBE_BYTES))
                file.flush()
                os.fsync(file.fileno())
            self.append().result()
        except (OSError, StepLogError) as error:
            return str(error) if isinstance(error, StepLogError) else f"{self._path.parent}: {error.strerror}"
        return ""

    def counts(self) -> dict[str, int]:
        """Rows that were logged in each table, without counting them: rowids have no gaps but those of erased rows,
        which count, unless they were the last ones.
        """
        columns = ", ".join(f"(SELECT coalesce(max(rowid), 0) FROM {table}) AS {table}" for table in FACT_TABLES)
        return dict(self._rows(f"SELECT {columns}")[0])

    def verify(self) -> list[str]:
        """Read everything and return what is wrong with it, in sentences; empty when all is well.

        The file's pages and each table's types; every record can be read; every step's tokens rebuild to the checksum
        taken when they were served; its index counts its ancestors. Damage to one of them hides none of the others.
        What is being erased, and is no longer whole, is no damage.
        """
        problems: list[str] = []
        references = partial(reference_problems, may_go=MAY_GO)
        for check in (page_problems, table_problems, references, _record_problems, _step_problems):
            try:
                with self._reading() as connection:
                    problems.extend(check(connection))
            except StepLogError as error:
                problems.append(str(error))
        return list(dict.fromkeys(problems))

    # ---------------------------------------------------------------------------------------- reading

    def query(self, query: str, *values: object) -> list[sqlite3.Row]:
        """Rows of a query, for the other readers of this package."""
        return self._rows(query, *values)

    def sound_rows(self, query: str, *values: object) -> list[sqlite3.Row]:
        """The same; none, which is noted, where a page that it needs is damaged."""
        try:
            return self._rows(query, *values)
        except Damaged as error:
            self.damage.note(error)
            return []

    def rows_down(self, query: str, low: int, high: int, limit: int) -> list[sqlite3.Row]:
        """Rows of a query that ends in `rowid BETWEEN ? AND ? ORDER BY rowid DESC`, without those on damaged pages: the
        first `limit` of them."""
        try:
            return self._rows(f"{query} LIMIT ?", low, high, limit)
        except Damaged as error:
            self.damage.note(error)
        high = min(high, self.num_rows("steps"))
        found: list[sqlite3.Row] = []
        with self._reading() as connection:
            while high >= low and len(found) < limit:
                rows = rows_between(connection, query, (), max(low, high - 199), high, newest_first=True)
                found += [row for row in rows if not isinstance(row, int)]
                high -= 200
        return found[:limit]

    def num_rows(self, table: str) -> int:
        """The number of a table's newest row."""
        with self._reading() as connection:
            return last_rowid(connection, table)

    def sound_episodes(self, rows: Iterable[sqlite3.Row]) -> list[Episode]:
        """The episodes of rows that `query` has read, without those that are damaged."""
        return list(self.damage.sound(rows, episode_from_row))

    def _rows(self, query: str, *values: object) -> list[sqlite3.Row]:
        with self._reading() as connection:
            return connection.execute(query, values).fetchall()

    def _steps(self, query: str, *values: object) -> list[Step]:
        with self._reading() as connection:
            rows = connection.execute(query, values).fetchall()
            try:
                return [_rebuild(connection, self._cache, row) for row in rows]
            except Damaged as error:
                self.damage.note(error)
                raise

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        """A connection that no other thread uses meanwhile."""
        if self._is_closed:
            raise StepLogError("the step log is closed: nothing more can be read")
        connection = None
        try:
            connection = self._take_reader()
            yield connection
        except (sqlite3.Error, UnicodeDecodeError) as error:
            if is_damage(error):
                raise damaged_file(error, self._path) from error
            if not self._path.exists():
                raise StepLogError(no_longer_there(self._path)) from error
            raise StepLogError(f"{self._path} could not be read: {error}") from error
        finally:
            if connection is not None:
                self._idle_readers.append(connection)

    def _take_reader(self) -> sqlite3.Connection:
        try:
            return self._idle_readers.pop()
        except IndexError:
            return _open_to_read(self._path)

    def _check_readable(self) -> None:
        if not self._path.is_file():
            raise StepLogError(f"there is no step log at {self._path}: start the server once, or check the path")
        with self._reading() as connection:
            database = _database(connection)
            _refuse_newer_schema(database, self._path)
            if STEP_LOG_MIGRATIONS.pending(database):
                raise StepLogError(f"{self._path} is of an older release, or no step log: start the server once")


# --------------------------------------------------------------------------------------------- connections


def _open_to_write(path: Path) -> sqlite3.Connection:
    connection = None
    try:
        connection = sqlite3.connect(path, timeout=LOCK_TIMEOUT_S, isolation_level=None, check_same_thread=False)
        connection.row_factory, connection.text_factory = sqlite3.Row, text_or_bytes
        if connection.execute("PRAGMA journal_mode = WAL").fetchone()[0] != "wal":
            raise StepLogError(f"{path} lies on a file system on which SQLite has no WAL: use a local disk")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute(
            "PRAGMA secure_delete = ON"
        )  # what is erased is overwritten, and so is what trees move about
        database = _database(connection)
        _refuse_newer_schema(database, path)
        STEP_LOG_MIGRATIONS.apply(database)
        return connection
    except (sqlite3.Error, UnicodeDecodeError, StepLogError) as error:
        if connection is not None:
            connection.close()
        if isinstance(error, StepLogError):
            raise
        if is_damage(error):
            raise damaged_file(error, path) from error
        raise StepLogError(f"{path} could not be opened as a step log: {error}") from error


def _open_to_read(path: Path) -> sqlite3.Connection:
    uri = path.absolute().as_uri() + "?mode=ro"
    connection = sqlite3.connect(uri, uri=True, timeout=LOCK_TIMEOUT_S, isolation_level=None, check_same_thread=False)
    connection.row_factory, connection.text_factory = sqlite3.Row, text_or_bytes
    return connection


def _database(connection: sqlite3.Connection) -> Database:
    return Database(connection, execute_plugins=False)


def _refuse_newer_schema(database: Database, path: Path) -> None:
    with closing(sqlite3.connect(":memory:")) as empty:
        known = {migration.name for migration in STEP_LOG_MIGRATIONS.pending(_database(empty))}
    newer = [migration.name for migration in STEP_LOG_MIGRATIONS.applied(database) if migration.name not in known]
    if newer:
        raise StepLogError(f"{path} was written by a newer release (it has {', '.join(newer)}): upgrade this one")


# ----------------------------------------------------------------------------------------------- rebuilding


def _rebuild(connection: sqlite3.Connection, cache: SequenceCache, row: sqlite3.Row) -> Step:
    """The step of a row. Raises Damaged where what is stored no longer makes the step that was served."""
    try:
        prompt = _prompt_of(connection, cache, row)
        sequence = prompt + row["completion_token_ids"]
        if len(prompt) != row["num_prompt_tokens"] * TOKEN_BYTES:
            raise ValueError("its prompt rebuilds to another length")
        if zlib.crc32(sequence) != row["tokens_crc32"]:
            raise ValueError("its tokens are not those that were served")
    except (TypeError, ValueError) as error:
        raise Damaged("steps", row["id"], str(error)) from error
    step = step_from_row(row, prompt)
    cache.put(row["id"], sequence)
    return step


def _prompt_of(connection: sqlite3.Connection, cache: SequenceCache, row: sqlite3.Row) -> bytes:
    parent_id = row["parent_id"]
    parent_sequence = b"" if parent_id is None else sequence_of(connection, cache, parent_id) or b""
    return parent_sequence[: row["prefix_len"] * TOKEN_BYTES] + row["prompt_suffix"]


def _first(steps: list[Step]) -> Step | None:
    return steps[0] if steps else None


# ------------------------------------------------------------------------------------------------ verifying

_READERS = {
    "tool_sets": tool_set_from_row,
    "episodes": episode_from_row,
    "outcomes": outcome_from_row,
    "corrections": correction_from_row,
    "withdrawals": withdrawal_from_row,
    "responses": response_from_row,
    "key_usage": usage_from_row,
    "step_candidates": candidate_from_row,
}


def _record_problems(connection: sqlite3.Connection) -> Iterator[str]:
    for table, from_row in _READERS.items():
        for row in all_rows(connection, table):
            if not isinstance(row, int):  # else it was named by whoever looked at the pages
                yield from _problem(lambda row=row, read=from_row: read(row))


def _step_problems(connection: sqlite3.Connection) -> Iterator[str]:
    cache = SequenceCache()  # not the log's own: what is on disk is to be checked
    for row in all_rows(connection, "steps", f"{_STEPS} WHERE {_STAYS} AND steps.rowid BETWEEN ? AND ?"):
        if not isinstance(row, int):
            yield from _problem(lambda row=row: _rebuild(connection, cache, row))
    for row in connection.execute(_MISCOUNTED):
        yield f"steps {row['id']} is damaged: its index {row['step_index']} is not the number of its ancestors"


def _problem(read: Callable[[], object]) -> Iterator[str]:
    try:
        read()
    except Damaged as damaged:
        yield str(damaged)
    except sqlite3.DatabaseError as error:
        if not is_damage(error):
            raise  # of a step's ancestor, which is named by itself
