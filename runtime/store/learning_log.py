"""The learner's own tables in agent.db: how its cycles went, the rewards it gave, what its gate decided.

Facts are appended and never edited, as in the step log: a cycle is a row for each stage it reaches, and the view
`cycle_status` shows the newest of each. One writer: the learner.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from sqlite_utils import Database, Migrations

from runtime.store.transaction import write_transaction


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
    NOTHING_TO_LEARN = "no_lesson"  # ended: nothing to learn from, and why
    FAILED = "failed"  # ended: something broke, and what


ENDINGS = frozenset({
    CycleStage.PROMOTED, CycleStage.PROPOSED, CycleStage.REFUSED, CycleStage.NOTHING_TO_LEARN, CycleStage.FAILED
})  # fmt: skip


class RewardSource(StrEnum):
    """Who computed a step's reward."""

    EXPERT_AGREEMENT = "expert_agreement"  # 1 where the step does what the expert does there, else 0
    IMPLICIT = "implicit"  # beta times the log ratio of the trained policy to its reference
    DISCRIMINATOR = "discriminator"  # expert logit of the discriminator, length-controlled


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
    started_at: float
    """Unix seconds."""
    created_at: float
    """Unix seconds."""


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
    for table in ("cycles", "step_rewards", "gate_decisions"):
        for verb in ("UPDATE", "DELETE"):
            db.execute(
                f"CREATE TRIGGER {table}_no_{verb.lower()} BEFORE {verb} ON {table} "
                f"BEGIN SELECT RAISE(ABORT, '{table} is append-only'); END"
            )
    db.create_view(
        "cycle_status",
        "SELECT newest.cycle, stage, done, total, message, report, started_at, created_at FROM cycles JOIN "
        "(SELECT cycle, max(id) AS id, min(created_at) AS started_at FROM cycles GROUP BY cycle) AS newest "
        "ON newest.id = cycles.id ORDER BY cycles.id DESC",
    )


@migrations()
def index_rewards_by_cycle(db: Database) -> None:
    db.execute("CREATE INDEX step_rewards_by_cycle ON step_rewards(cycle, source)")


@dataclass(slots=True)
class LearningLog:
    """The store. Constructing migrates. Used from one thread."""

    path: Path
    db: Database = field(init=False)

    def __post_init__(self) -> None:
        self.db = Database(sqlite3.connect(self.path, timeout=30.0))
        self.db.enable_wal()
        migrations.apply(self.db)

    def close(self) -> None:
        self.db.close()

    # ---------------------------------------------------------------------------------------------- write

    def note(
        self,
        cycle: str,
        stage: CycleStage,
        message: str = "",
        done: int = 0,
        total: int = 0,
        report: dict[str, Any] | None = None,
    ) -> None:
        """Append where a cycle is now. Raises ValueError for a cycle that has ended."""
        status = self.status(cycle)
        if status is not None and status.stage in ENDINGS:
            raise ValueError(f"cycle {cycle} ended as {status.stage}; it cannot go on to {stage}")
        self._insert("cycles", {
            "cycle": cycle, "stage": stage, "done": done, "total": total, "message": message,
            "report": json.dumps(report or {}),
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
            "evidence": json.dumps(evidence),
        })  # fmt: skip

    def fail_unfinished(self) -> list[str]:
        """Mark the cycles of a learner that was killed as failed; returns them. For a learner that starts."""
        unfinished = [status for status in self.cycles(limit=1000) if status.stage not in ENDINGS]
        for status in unfinished:
            self.note(status.cycle, CycleStage.FAILED, f"the learner ended while it was in stage {status.stage}")
        return [status.cycle for status in unfinished]

    def _insert(self, table: str, row: dict[str, Any]) -> None:
        with write_transaction(self.db):
            self.db.table(table).insert({**row, "created_at": time.time()})

    # ----------------------------------------------------------------------------------------------- read

    def status(self, cycle: str) -> CycleStatus | None:
        return next(iter(self._statuses("WHERE cycle = ? LIMIT 1", [cycle])), None)

    def cycles(self, limit: int = 50) -> list[CycleStatus]:
        """Newest first."""
        return self._statuses("LIMIT ?", [limit])

    def last_step_seen(self) -> str | None:
        """The step that the last cycle which learned from the log read up to."""
        for status in self.cycles(limit=1000):
            if status.stage in (CycleStage.PROMOTED, CycleStage.PROPOSED, CycleStage.REFUSED) and (
                last := status.report.get("last_step_id")
            ):
                return last
        return None

    def rewards(self, cycle: str) -> list[StepReward]:
        rows = self.db.query("SELECT step_id, cycle, source, value FROM step_rewards WHERE cycle = ?", [cycle])
        return [StepReward(r["step_id"], r["cycle"], RewardSource(r["source"]), r["value"]) for r in rows]

    def decisions(self, cycle: str) -> list[dict[str, Any]]:
        rows = self.db.query("SELECT * FROM gate_decisions WHERE cycle = ? ORDER BY id", [cycle])
        return [{**row, "promote": bool(row["promote"]), "evidence": json.loads(row["evidence"])} for row in rows]

    def _statuses(self, rest: str, values: list[Any]) -> list[CycleStatus]:
        rows = self.db.query(f"SELECT * FROM cycle_status {rest}", values)
        return [
            CycleStatus(**{**row, "stage": CycleStage(row["stage"]), "report": json.loads(row["report"])})
            for row in rows
        ]
