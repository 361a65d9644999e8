"""The learner's tables in agent.db: how its cycles went, the rewards it gave, what its gate decided.

Facts are appended and never edited, as in the step log: a cycle is a row for each stage it reaches, and the view
`cycle_status` shows the newest of each. The learner writes; the server reads, from any thread.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from sqlite_utils import Database, Migrations

from runtime.store.damage import (
    Damaged,
    DamageNotes,
    Query,
    Row,
    damaged_file,
    is_damage,
    json_object,
    problems_in,
    record_of,
    text_or_bytes,
)
from runtime.store.learner_lock import is_learner_alive
from runtime.store.transaction import make_append_only, write_transaction


class CycleStage(StrEnum):
    """Where a cycle is, or how it ended."""

    COLLECT = "collect"  # reads the log and the demonstrations
    INSPECT = "inspect"  # samples the acting policy where an expert has acted
    REWARD = "reward"  # compares, and gives every step its rewards
    TRAIN = "train"  # trains the candidates
    GATE = "gate"  # holds the candidates against the acting adapter
    PROMOTE = "promote"  # hands the best one to the runtime
    PROMOTED = "promoted"  # ended: a better adapter acts
    PROPOSED = "proposed"  # ended: a better adapter waits for somebody's yes
    REFUSED = "refused"  # ended: no candidate was better
    NOTHING_TO_LEARN = "no_lesson"  # ended: nothing to learn from, and why; the stored word is that of older logs
    FAILED = "failed"  # ended: something broke, and what


ENDINGS = frozenset({
    CycleStage.PROMOTED, CycleStage.PROPOSED, CycleStage.REFUSED, CycleStage.NOTHING_TO_LEARN, CycleStage.FAILED
})  # fmt: skip


class RewardSource(StrEnum):
    """Who computed a step's reward."""

    EXPERT_AGREEMENT = "expert_agreement"  # 1 where the step does what the expert does there, else 0
    IMPLICIT = "implicit"  # beta times the log ratio of the trained policy to its reference
    DISCRIMINATOR = "discriminator"  # expert logit of the discriminator, length-controlled
    JUDGE = "judge"  # a judge model's score of the whole episode, in [0, 1]


@dataclass(frozen=True, slots=True)
class StepReward:
    """The reward that one cycle gives one logged step."""

    step_id: str
    cycle: str
    source: RewardSource
    value: float
    """Larger is more expert-like; comparable within one cycle and source only."""


@dataclass(frozen=True, slots=True)
class CycleStatus:
    """The newest row of a cycle."""

    cycle: str
    stage: CycleStage
    done: int
    """Units of the stage's work that are done, of `total`."""
    total: int
    message: str
    report: dict[str, Any]
    """What is known so far; complete when the cycle has ended."""
    last_step_id: str | None
    """The step up to which the cycle has read the log; None before it has."""
    started_at: float
    """Unix seconds."""
    created_at: float
    """Unix seconds. Of a cycle that was cut off: when its learner wrote the last row; it ran so long at the least."""
    agent: str = ""
    """The agent that it is for; empty: the server's own."""

    @property
    def has_ended(self) -> bool:
        return self.stage in ENDINGS


migrations = Migrations("learning_log")


@migrations()
def create_tables(db: Database) -> None:
    db.execute(
        "CREATE TABLE cycles (id INTEGER PRIMARY KEY, cycle TEXT NOT NULL, stage TEXT NOT NULL, done INTEGER NOT NULL, "
        "total INTEGER NOT NULL, message TEXT NOT NULL, report TEXT NOT NULL, created_at REAL NOT NULL)"
    )
    db.execute("CREATE INDEX cycles_by_cycle ON cycles(cycle, id)")
    db.execute(
        "CREATE TABLE step_rewards (step_id TEXT NOT NULL, cycle TEXT NOT NULL, source TEXT NOT NULL, "
        "value REAL NOT NULL, created_at REAL NOT NULL, PRIMARY KEY (step_id, cycle, source)) WITHOUT ROWID"
    )
    db.execute(
        "CREATE TABLE gate_decisions (id INTEGER PRIMARY KEY, cycle TEXT NOT NULL, candidate TEXT NOT NULL, "
        "against TEXT NOT NULL, promote INTEGER NOT NULL, reason TEXT NOT NULL, evidence TEXT NOT NULL, "
        "created_at REAL NOT NULL)"
    )
    make_append_only(db, "cycles", "step_rewards", "gate_decisions")
    _create_status_view(db, "")


@migrations()
def index_rewards_by_cycle(db: Database) -> None:
    db.execute("CREATE INDEX step_rewards_by_cycle ON step_rewards(cycle, source)")


@migrations()
def keep_the_last_step_in_a_column(db: Database) -> None:
    """Where a cycle has read to was a key of its report; old rows keep it there and are read as having no cursor."""
    db.execute("ALTER TABLE cycles ADD COLUMN last_step_id TEXT")
    db.execute("DROP VIEW cycle_status")
    _create_status_view(db, "last_step_id, ")


@migrations()
def note_who_taught_what(db: Database) -> None:
    """Which episodes a cycle read and what for, and which weights came of it; and of which cycles words were erased."""
    db.execute(
        "CREATE TABLE cycle_episodes (cycle TEXT NOT NULL, title TEXT NOT NULL, role TEXT NOT NULL, "
        "episode_id TEXT NOT NULL, PRIMARY KEY (cycle, title, role, episode_id)) STRICT, WITHOUT ROWID"
    )
    db.execute("CREATE INDEX cycle_episodes_by_episode ON cycle_episodes(episode_id)")
    db.execute(
        "CREATE TABLE trained_weights (digest TEXT NOT NULL, cycle TEXT NOT NULL, title TEXT NOT NULL, "
        "created_at REAL NOT NULL, PRIMARY KEY (digest, cycle, title)) STRICT, WITHOUT ROWID"
    )
    db.execute(
        "CREATE TABLE erased_cycles (cycle TEXT NOT NULL, erasure_id TEXT NOT NULL, "
        "PRIMARY KEY (cycle, erasure_id)) STRICT, WITHOUT ROWID"
    )
    db.execute("DROP TRIGGER cycles_no_update")
    db.execute(
        "CREATE TRIGGER cycles_no_update BEFORE UPDATE ON cycles WHEN NOT EXISTS "
        "(SELECT 1 FROM erased_cycles WHERE cycle = OLD.cycle) "
        "BEGIN SELECT RAISE(ABORT, 'cycles is append-only, but for words that were erased'); END"
    )
    make_append_only(db, "cycle_episodes", "trained_weights", "erased_cycles")


@migrations()
def say_whose(db: Database) -> None:
    """The agent that each cycle is for."""
    db.execute("ALTER TABLE cycles ADD COLUMN agent TEXT NOT NULL DEFAULT ''")
    db.execute("CREATE INDEX cycles_by_agent ON cycles(agent, id)")
    db.execute("DROP VIEW cycle_status")
    _create_status_view(db, "last_step_id, agent, ")


def _create_status_view(db: Database, more_columns: str) -> None:
    db.create_view(
        "cycle_status",
        f"SELECT newest.cycle, stage, done, total, message, report, {more_columns}started_at, created_at FROM cycles "
        "JOIN (SELECT cycle, max(id) AS id, min(created_at) AS started_at FROM cycles GROUP BY cycle) AS newest "
        "ON newest.id = cycles.id ORDER BY cycles.id DESC",
    )


class LessonRole(StrEnum):
    """What a cycle read an episode for."""

    DEMONSTRATION = "demonstration"  # trained on, as an expert's
    OWN = "own"  # trained on, as the policy's own
    TRIED = "tried"  # the gate's: held out, or an anchor; not trained on


_WORDS = ("doubts", "judge", "no_reward_model", "expert_problems", "not_trained", "not_registered", "no_discriminator")
"""Parts of a report that quote episodes, or in which other programs speak."""


# ---------------------------------------------------------------------------------------------------- rows

_CYCLE = {
    "cycle": str,
    "agent": str,
    "stage": str,
    "done": int,
    "total": int,
    "message": str,
    "report": str,
    "created_at": float,
}
_DECISION = {"cycle": str, "candidate": str, "against": str, "promote": int, "reason": str, "evidence": str}
_REWARD = {"step_id": str, "cycle": str, "source": str, "value": float}


@record_of("cycles", {**_CYCLE, "last_step_id": str, "started_at": float}, may_be_null={"last_step_id"}, key="cycle")
def _status_from_row(row: Row) -> CycleStatus:
    fields = dict(row) | {"stage": CycleStage(row["stage"]), "report": json_object(row["report"])}
    return CycleStatus(**fields)


@record_of("cycles", {**_CYCLE, "last_step_id": str}, may_be_null={"last_step_id"})
def _check_cycle(row: Row) -> None:
    CycleStage(row["stage"])
    json_object(row["report"])


@record_of("gate_decisions", _DECISION)
def _decision_from_row(row: Row) -> dict[str, Any]:
    shown = {name: row[name] for name in _DECISION}
    return shown | {"promote": bool(row["promote"]), "evidence": json_object(row["evidence"])}


@record_of("step_rewards", _REWARD, key="step_id")
def _reward_from_row(row: Row) -> StepReward:
    return StepReward(row["step_id"], row["cycle"], RewardSource(row["source"]), row["value"])


@record_of("cycle_episodes", {"cycle": str, "title": str, "role": str, "episode_id": str}, key="cycle")
def _check_read(row: Row) -> None:
    LessonRole(row["role"])


def learning_problems(query: Query) -> Iterator[str]:
    """What is wrong with the learner's rows, in sentences; none where no learner ever ran."""
    yield from problems_in(query, "cycles", _check_cycle)
    yield from problems_in(query, "gate_decisions", _decision_from_row)
    yield from problems_in(query, "step_rewards", _reward_from_row)
    yield from problems_in(query, "cycle_episodes", _check_read)


class LearningReader:
    """What the learner has written in a state folder. May be used from any thread, also while it writes.

    A learner that never ran, or that died in the midst of a cycle, is a fact like any other.
    """

    def __init__(self, state: Path) -> None:
        self.state = state
        self.damage = DamageNotes()
        """What could not be read."""

    def status(self, cycle: str) -> CycleStatus | None:
        return next(iter(self._statuses("WHERE cycle = ? LIMIT 1", [cycle])), None)

    def cycles(
        self, limit: int = 50, damaged: list[Damaged] | None = None, agent: str | None = None
    ) -> list[CycleStatus]:
        """Newest first; None: of all agents. Those whose rows are damaged are added to `damaged` instead."""
        if agent is None:
            return self._statuses("LIMIT ?", [limit], damaged)
        return self._statuses("WHERE agent = ? LIMIT ?", [agent, limit], damaged)

    def last_step_seen(self, agent: str = "") -> str | None:
        """The step that the agent's last cycle which learned from the log read up to."""
        rows = self._rows(
            "SELECT last_step_id FROM cycles WHERE stage IN (?, ?, ?) AND last_step_id IS NOT NULL AND agent = ? "
            "ORDER BY id DESC LIMIT 1",
            [CycleStage.PROMOTED, CycleStage.PROPOSED, CycleStage.REFUSED, agent],
        )
        return rows[0]["last_step_id"] if rows else None

    def decisions(self, cycle: str) -> list[dict[str, Any]]:
        """What the gate decided in a cycle, and on what evidence."""
        rows = self._rows("SELECT * FROM gate_decisions WHERE cycle = ? ORDER BY id", [cycle])
        return [_without(row, "cycle") for row in self.damage.sound(rows, _decision_from_row)]

    def evidence_against(self, acting: str, agent: str = "") -> list[dict[str, Any]]:
        """On what evidence an agent's candidates were held against an adapter, newest first."""
        rows = self._rows(
            "SELECT * FROM gate_decisions WHERE against = ? AND "
            "EXISTS (SELECT 1 FROM cycles WHERE cycles.cycle = gate_decisions.cycle AND agent = ?) ORDER BY id DESC",
            [acting, agent],
        )
        return [row["evidence"] for row in self.damage.sound(rows, _decision_from_row)]

    def decisions_on(self, candidate: str) -> list[dict[str, Any]]:
        """What gates decided on an adapter, and on what evidence; oldest first."""
        rows = self._rows("SELECT * FROM gate_decisions WHERE candidate = ? ORDER BY id", [candidate])
        return [_without(row, "candidate") for row in self.damage.sound(rows, _decision_from_row)]

    def rewards(self, cycle: str) -> list[StepReward]:
        rows = self._rows("SELECT step_id, cycle, source, value FROM step_rewards WHERE cycle = ?", [cycle])
        return list(self.damage.sound(rows, _reward_from_row))

    def reward_summary(self, cycle: str) -> dict[str, dict[str, float]]:
        """By source: how many steps a cycle rewarded, and how."""
        rows = self._rows(
            "SELECT source, count(*) AS num_steps, avg(value) AS mean, min(value) AS least, max(value) AS most "
            "FROM step_rewards WHERE cycle = ? AND source IN (SELECT value FROM json_each(?)) "
            "AND typeof(value) = 'real' GROUP BY source",
            [cycle, json.dumps(list(RewardSource))],
        )
        return {row.pop("source"): row for row in rows}

    def rewards_of(self, episode_id: str) -> list[StepReward]:
        """The step rewards of an episode, from every cycle, oldest first."""
        rows = self._rows(
            "SELECT step_id, cycle, source, value FROM step_rewards JOIN steps ON steps.id = step_id "
            "WHERE episode_id = ? ORDER BY step_rewards.created_at, source",
            [episode_id],
        )
        return list(self.damage.sound(rows, _reward_from_row))

    def newest_rewards_of(self, episode_id: str) -> dict[str, dict[RewardSource, StepReward]]:
        """Of each rewarded step of an episode, by source, what the newest cycle that judged it gave."""
        newest = dict[str, dict[RewardSource, StepReward]]()
        for reward in self.rewards_of(episode_id):
            newest.setdefault(reward.step_id, {})[reward.source] = reward
        return newest

    def num_endings(self) -> dict[tuple[str, CycleStage], int]:
        """How many cycles of each agent ended how."""
        rows = self._rows("SELECT agent, stage, count(*) AS num FROM cycle_status GROUP BY agent, stage", [])
        return {
            (row["agent"], CycleStage(row["stage"])): row["num"]
            for row in rows
            if row["stage"] in ENDINGS
            and isinstance(row["agent"], str)  # not of a damaged row, which is named elsewhere
        }

    def agents(self) -> list[str]:
        """Those that ever had a cycle."""
        rows = self._rows("SELECT DISTINCT agent FROM cycles ORDER BY agent", [])
        return [row["agent"] for row in rows if isinstance(row["agent"], str)]

    def diagnostics(self, agent: str = "") -> dict[str, dict[str, float]]:
        """What the agent's newest cycle that measured anything did, by what it was of: an objective, the discriminator,
        the training data."""
        reports = (status.report.get("diagnostics") for status in self.cycles(limit=50, agent=agent))
        return next((measured for measured in map(_numbers_in, reports) if measured), {})

    def agreement(self, adapter: str, agent: str = "") -> list[float]:
        """Expert agreement of an adapter's own steps with an agent, in that agent's newest cycle that judged any: 1 or
        0, newest step first."""
        rows = self._rows(
            "SELECT value FROM step_rewards JOIN steps ON steps.id = step_id JOIN episodes ON episodes.id = episode_id "
            "WHERE source = 'expert_agreement' AND episodes.purpose <> 'evaluation' AND episodes.is_assigned "
            "AND steps.adapter = ? AND episodes.agent = ? "
            "AND cycle = (SELECT cycle FROM cycles WHERE agent = ? AND EXISTS (SELECT 1 FROM step_rewards WHERE "
            "step_rewards.cycle = cycles.cycle AND source = 'expert_agreement') ORDER BY id DESC LIMIT 1) "
            "ORDER BY steps.created_at DESC",
            [adapter, agent, agent],
        )
        return [row["value"] for row in rows]

    def episodes_of(self, cycle: str) -> list[str]:
        """The episodes that a cycle has read."""
        rows = self._rows("SELECT DISTINCT episode_id FROM cycle_episodes WHERE cycle = ?", [cycle])
        return [row["episode_id"] for row in rows]

    def judged_since(self, adapter: str) -> str | None:
        """`acting`, `canary` or `refused`: what an adapter that waited for somebody's yes is since; None: it waits."""
        rows = self._rows(
            "SELECT state FROM adapter_events WHERE adapter = ? AND state IN ('acting', 'canary', 'refused') "
            "ORDER BY id DESC LIMIT 1",
            [adapter],
        )
        return rows[0]["state"] if rows else None

    def as_of_now(self, status: CycleStatus) -> CycleStatus:
        """What became of it: a cycle without an ending and without a learner was cut off, and the next learner will
        write that down."""
        if status.has_ended or self.is_learner_alive():
            return status
        newest = self.status(status.cycle) or status  # its learner may have written an ending and gone meanwhile
        if newest.has_ended:
            return newest
        return replace(newest, stage=CycleStage.FAILED, message=self._cut_off_message(newest))

    def _cut_off_message(self, status: CycleStatus) -> str:
        """What is said of a cycle whose learner has ended without an ending."""
        ended = f"the learner ended while it was in stage {status.stage}"
        erasures = self._rows(
            "SELECT erasure_id FROM erasure_events WHERE event = 'cycle_ended' "
            "AND CASE WHEN json_valid(report) THEN json_extract(report, '$.ended_cycle') END = ?",
            [status.cycle],
        )
        if not erasures:
            return ended
        return f"{ended}: it had read what was erased ({erasures[0]['erasure_id']}), so start another cycle"

    def is_learner_alive(self) -> bool:
        """Whether a learner works on this state folder now, whoever started it."""
        return is_learner_alive(self.state)

    def _statuses(self, rest: str, values: Sequence[object], damaged: list[Damaged] | None = None) -> list[CycleStatus]:
        rows = self._rows(f"SELECT * FROM cycle_status {rest}", values)
        return list(self.damage.sound(rows, _status_from_row, damaged))

    def _rows(self, query: str, values: Sequence[object]) -> list[dict[str, Any]]:
        uri = (self.state / "agent.db").absolute().as_uri() + "?mode=ro"
        try:
            with closing(sqlite3.connect(uri, uri=True, timeout=10.0)) as connection:
                connection.row_factory, connection.text_factory = sqlite3.Row, text_or_bytes
                return [dict(row) for row in connection.execute(query, values).fetchall()]
        except sqlite3.OperationalError as error:
            if "no such table" in str(error) or "no such column" in str(error):  # no learner of this release has run
                return []
            raise
        except sqlite3.DatabaseError as error:
            if is_damage(error):
                raise damaged_file(error, self.state / "agent.db") from error
            raise


def _without(row: dict[str, Any], name: str) -> dict[str, Any]:
    return {each: value for each, value in row.items() if each != name}


def _numbers_in(diagnostics: object) -> dict[str, dict[str, float]]:
    """The measures of a report, without what a damaged one holds in their place."""
    found = diagnostics if isinstance(diagnostics, dict) else {}
    return {
        of: {name: value for name, value in measures.items() if isinstance(value, int | float)}
        for of, measures in found.items()
        if isinstance(measures, dict)
    }


class LearningLog(LearningReader):
    """The learner's side: constructing migrates. Used from one thread."""

    def __init__(self, state: Path) -> None:
        super().__init__(state)
        self.db = Database(sqlite3.connect(state / "agent.db", timeout=30.0))
        self.db.enable_wal()
        self.db.execute("PRAGMA secure_delete=ON")
        migrations.apply(self.db)

    def close(self) -> None:
        self.db.close()

    def note_episodes(self, cycle: str, title: str, episodes: Iterable[tuple[LessonRole, str]]) -> None:
        """Append what a cycle reads, before it uses it. `title`: the candidate that is trained on it, as its folder is
        called; empty where it is for none. Twice adds nothing."""
        rows = [(cycle, title, role.value, episode_id) for role, episode_id in episodes]
        with write_transaction(self.db):
            self.db.conn.executemany("INSERT OR IGNORE INTO cycle_episodes VALUES (?, ?, ?, ?)", rows)

    def note_weights(self, cycle: str, title: str, digest: str) -> None:
        """Append what weights a candidate has, before the runtime hears of them."""
        with write_transaction(self.db):
            self.db.execute(
                "INSERT OR IGNORE INTO trained_weights VALUES (?, ?, ?, ?)", [digest, cycle, title, time.time()]
            )

    def forget_words(self, cycles: Iterable[str], erasure_id: str) -> None:
        """Take out of the rows of cycles what may quote an erased episode: words of other programs, and of errors."""
        parts = ", ".join(f"'$.{name}'" for name in _WORDS)
        with write_transaction(self.db):
            for cycle in cycles:
                self.db.execute("INSERT OR IGNORE INTO erased_cycles VALUES (?, ?)", [cycle, erasure_id])
                self.db.execute(
                    "UPDATE cycles SET report = "
                    f"CASE WHEN json_valid(report) THEN json_remove(report, {parts}) ELSE '{{}}' END, "
                    "message = CASE stage WHEN 'failed' "
                    f"THEN 'what it said of its failure was erased ({erasure_id})' ELSE message END WHERE cycle = ?",
                    [cycle],
                )

    def note(
        self,
        cycle: str,
        stage: CycleStage,
        message: str = "",
        done: int = 0,
        total: int = 0,
        report: dict[str, Any] | None = None,
        last_step_id: str | None = None,
        agent: str = "",
        created_at: float | None = None,
    ) -> None:
        """Append where a cycle is, or was at `created_at` (None: now). Raises ValueError for a cycle that has ended."""
        status = self.status(cycle)
        if status is not None and status.has_ended:
            raise ValueError(f"cycle {cycle} ended as {status.stage}; it cannot go on to {stage}")
        self._insert("cycles", {
            "cycle": cycle, "stage": stage, "done": done, "total": total, "message": message,
            "report": json.dumps(report or {}), "last_step_id": last_step_id, "agent": agent,
            "created_at": time.time() if created_at is None else created_at,
        })  # fmt: skip

    def add_rewards(self, rewards: Iterable[StepReward]) -> None:
        """Append the rewards of a cycle, all or none."""
        now = time.time()
        rows = [(r.step_id, r.cycle, r.source, r.value, now) for r in rewards]
        with write_transaction(self.db):
            self.db.conn.executemany("INSERT INTO step_rewards VALUES (?, ?, ?, ?, ?)", rows)

    def add_decision(
        self, cycle: str, candidate: str, against: str, promote: bool, reason: str, evidence: dict[str, Any]
    ) -> None:
        """Append what the gate decided on a candidate, and on what evidence."""
        self._insert("gate_decisions", {
            "cycle": cycle, "candidate": candidate, "against": against, "promote": int(promote), "reason": reason,
            "evidence": json.dumps(evidence), "created_at": time.time(),
        })  # fmt: skip

    def fail_unfinished(self) -> list[str]:
        """Mark the cycles of a learner that was killed as failed; returns them. For a learner that starts.

        What was known of them stays known, and they have ended when they were last heard of: days may lie between.
        """
        unfinished = [status for status in self.cycles(limit=1000) if not status.has_ended]
        for each in unfinished:
            self.note(
                each.cycle, CycleStage.FAILED, self._cut_off_message(each), report=each.report, agent=each.agent,
                last_step_id=each.last_step_id, created_at=each.created_at,
            )  # fmt: skip
        return [status.cycle for status in unfinished]

    def _insert(self, table: str, record: dict[str, Any]) -> None:
        with write_transaction(self.db):
            self.db.table(table).insert(record)


def migrate_learning_log(state: Path) -> None:
    """Bring the learner's tables to this release: a server reads them also where no learner has run since."""
    LearningLog(state).close()
