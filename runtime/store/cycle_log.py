"""Reads what the learner wrote of its cycles. The tables are the learner's (`learning_log.py`); nothing is
written here, and a learner that never ran, or died in the midst of a cycle, is a fact like any other.
"""

from __future__ import annotations

import fcntl
import json
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

ENDINGS = frozenset({"promoted", "refused", "no_lesson", "failed"})
LOCK_FILE = "learner.lock"
"""In the state folder; whoever runs a cycle holds a lock on it until it ends or dies."""


class CycleLog:
    """The learner's cycles, as they stand in a state folder's database. May be used from any thread."""

    def __init__(self, state: Path) -> None:
        self._state = state

    def cycles(self, limit: int = 50) -> list[dict[str, Any]]:
        """Newest first."""
        return self._statuses("LIMIT ?", [limit])

    def cycle(self, name: str) -> dict[str, Any] | None:
        """One cycle, with the gate's decisions and a summary of its step rewards."""
        found = self._statuses("WHERE cycle = ? LIMIT 1", [name])
        if not found:
            return None
        decisions = self._rows(
            "SELECT candidate, against, promote, reason, evidence FROM gate_decisions WHERE cycle = ? ORDER BY id",
            [name],
        )
        rewards = self._rows(
            "SELECT source, count(*) AS num_steps, avg(value) AS mean, min(value) AS least, max(value) AS most "
            "FROM step_rewards WHERE cycle = ? GROUP BY source",
            [name],
        )
        return {
            **found[0],
            "decisions": [
                {**d, "promote": bool(d["promote"]), "evidence": json.loads(d["evidence"])} for d in decisions
            ],
            "rewards": {reward.pop("source"): reward for reward in rewards},
        }

    def num_endings(self) -> dict[str, int]:
        """How many cycles ended how."""
        rows = self._rows("SELECT stage, count(*) AS num FROM cycle_status GROUP BY stage", [])
        return {row["stage"]: row["num"] for row in rows if row["stage"] in ENDINGS}

    def diagnostics(self) -> dict[str, dict[str, float]]:
        """What the newest cycle that measured anything did, by what it was of: an objective, the discriminator, the
        training_data."""
        reports = (cycle["report"].get("diagnostics") for cycle in self.cycles(limit=50))
        return next((diagnostics for diagnostics in reports if diagnostics), {})

    def agreement(self, adapter: str) -> list[float]:
        """Expert agreement of an adapter's own steps in the newest cycle that judged any: 1 or 0, newest step first."""
        rows = self._rows(
            "SELECT value FROM step_rewards JOIN steps ON steps.id = step_id JOIN episodes ON episodes.id = episode_id "
            "WHERE source = 'expert_agreement' AND episodes.purpose <> 'evaluation' AND episodes.is_assigned "
            "AND steps.adapter = ? "
            "AND cycle = (SELECT cycle FROM cycles WHERE EXISTS (SELECT 1 FROM step_rewards WHERE "
            "step_rewards.cycle = cycles.cycle AND source = 'expert_agreement') ORDER BY id DESC LIMIT 1) "
            "ORDER BY steps.created_at DESC",
            [adapter],
        )
        return [row["value"] for row in rows]

    def is_learner_alive(self) -> bool:
        """Whether a learner works on this state folder now, whoever started it."""
        try:
            with (self._state / LOCK_FILE).open() as lock:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        return False

    def _statuses(self, rest: str, values: Sequence[object]) -> list[dict[str, Any]]:
        rows = self._rows(f"SELECT * FROM cycle_status {rest}", values)
        return [self._told_truly({**row, "report": json.loads(row["report"])}) for row in rows]

    def _told_truly(self, status: dict[str, Any]) -> dict[str, Any]:
        """A cycle without an ending and without a learner was cut off; the next learner will write it down."""
        if status["stage"] in ENDINGS or self.is_learner_alive():
            return status
        return {**status, "stage": "failed", "message": f"the learner ended while it was in stage {status['stage']}"}

    def _rows(self, query: str, values: Sequence[object]) -> list[dict[str, Any]]:
        uri = (self._state / "agent.db").absolute().as_uri() + "?mode=ro"
        try:
            with closing(sqlite3.connect(uri, uri=True, timeout=10.0)) as connection:
                connection.row_factory = sqlite3.Row
                return [dict(row) for row in connection.execute(query, values).fetchall()]
        except sqlite3.OperationalError as error:
            if "no such table" in str(error):  # no learner has run yet
                return []
            raise
