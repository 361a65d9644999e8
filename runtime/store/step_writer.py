"""The step log's one writer: a thread that commits in groups.

While one group is being synced to disk the next one gathers, so that many waiting callers share one fsync and none
waits for more than two. Refused: a commit for every append (as many fsyncs as callers), and a commit on a timer (which
makes the only caller of an idle server wait).
"""

from __future__ import annotations

import sqlite3
import struct
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

from policies.types import ToolCalls
from runtime.store.damage import WHAT_TO_DO, StepLogError, is_damage
from runtime.store.episodes import (
    Correction,
    Episode,
    Fact,
    KeyUsage,
    Outcome,
    ResponseDeletion,
    ResponseRecord,
    Step,
    StepCandidate,
    Withdrawal,
)
from runtime.store.prompt_chains import SequenceCache, common_prefix_len, sequence_of
from runtime.store.step_rows import (
    Row,
    candidate_to_row,
    correction_to_row,
    episode_to_row,
    fields_of,
    has_utf8,
    outcome_to_row,
    step_to_row,
    to_json,
    tokens_to_blob,
    tool_set_to_row,
    withdrawal_to_row,
)


@dataclass(frozen=True, slots=True)
class Append:
    """One caller's facts: logged all together, or not at all."""

    facts: tuple[Fact, ...]
    done: Future[None] = field(default_factory=Future)
    asked_at: float = field(default_factory=time.monotonic)


# What is wrong with one caller's facts, as against what is wrong with the file: the others of the group are committed.
_CALLERS_FAULT = (
    sqlite3.IntegrityError,
    sqlite3.DataError,
    sqlite3.ProgrammingError,
    sqlite3.InterfaceError,
    StepLogError,
    TypeError,
    ValueError,
    AttributeError,
    OverflowError,
    RecursionError,
    struct.error,
)


_ADD_USAGE = """
INSERT INTO key_usage (key, day, requests, steps, tokens) VALUES (:key, :day, :requests, :steps, :tokens)
ON CONFLICT (day, key) DO UPDATE SET
    requests = requests + excluded.requests, steps = steps + excluded.steps, tokens = tokens + excluded.tokens"""


class StepWriter:
    """Owns the writing connection and the thread that uses it. `connection` is in autocommit mode.

    Nobody waits longer than `lock_timeout_s` for another process that writes to the file: who asked while a group was
    waiting has waited with it.
    """

    def __init__(self, connection: sqlite3.Connection, cache: SequenceCache, path: Path, lock_timeout_s: float) -> None:
        self.connection = connection
        self.problem = ""
        """Why the last group could not be written; empty where it could."""
        self.num_failed = 0
        """Groups that could not be written since the start."""
        self._cache = cache
        self._path = path
        self._place = _place_of(path)
        self._lock_timeout_s = lock_timeout_s
        self._waiting: list[Append] = []
        self._is_closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="step-log-writer", daemon=True)
        self._thread.start()

    def append(self, facts: tuple[Fact, ...]) -> Future[None]:
        """Queue facts. The future resolves when they are on disk; cancelling it does not take them back."""
        append = Append(facts)
        append.done.set_running_or_notify_cancel()  # a client that hangs up must not take its step out of the log
        with self._changed:
            if self._is_closed:
                raise StepLogError("the step log is closed: nothing more can be appended")
            self._waiting.append(append)
            self._changed.notify()
        return append.done

    def close(self) -> None:
        """Commit what waits, then end the thread and the connection. May be called twice."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join()
        self.connection.close()

    def _run(self) -> None:
        while group := self._next_group():
            self._commit(group)

    def _next_group(self) -> list[Append]:
        """All that waits; empty only when the log is closed and nothing is left."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._is_closed)
            group, self._waiting = self._waiting, []
            return group

    def _commit(self, group: list[Append]) -> None:
        try:
            problems = self._write(group)
            self.problem = ""
        except Exception as error:  # whatever it was, those who wait must be told and the thread must go on
            self._roll_back(group)
            self.problem = _file_problem(error)
            self.num_failed += 1
            problems = [self.problem] * len(group)
        for append, problem in zip(group, problems, strict=True):
            if problem is None:
                append.done.set_result(None)
            else:
                append.done.set_exception(StepLogError(problem))

    def _write(self, group: list[Append]) -> list[str | None]:
        """One transaction for the group; returns what is wrong with each caller's facts, None where nothing is."""
        self.require_place()
        waited_s = time.monotonic() - group[0].asked_at
        patience_s = max(self._lock_timeout_s - waited_s, 0.05)
        self.connection.execute(f"PRAGMA busy_timeout = {round(patience_s * 1000)}")
        self.connection.execute("BEGIN IMMEDIATE")
        problems = [self._write_one(append) for append in group]
        self.connection.execute("COMMIT")
        return problems

    def require_place(self) -> None:
        """Raises StepLogError where the file is no longer where it was opened: what is written would be found by no
        restart."""
        if _place_of(self._path) != self._place:
            raise StepLogError(no_longer_there(self._path))

    def _write_one(self, append: Append) -> str | None:
        self.connection.execute("SAVEPOINT one_caller")
        problem = None
        for fact in append.facts:
            try:
                self._insert_fact(fact)
            except _CALLERS_FAULT as error:
                problem = _fact_problem(fact, error)
                self.connection.execute("ROLLBACK TO one_caller")
                self._forget(append)
                break
        self.connection.execute("RELEASE one_caller")
        return problem

    def _insert_fact(self, fact: Fact) -> None:
        match fact:
            case Step():
                self._insert_step(fact)
            case Episode():
                self._insert("episodes", episode_to_row(fact))
            case StepCandidate():
                self._insert("step_candidates", candidate_to_row(fact))
            case Outcome():
                self._insert("outcomes", outcome_to_row(fact))
            case Correction():
                self._insert("corrections", correction_to_row(fact))
            case Withdrawal():
                self._insert("withdrawals", withdrawal_to_row(fact))
            case ResponseRecord():
                self._insert("responses", fields_of(fact) | {"request": to_json(fact.request)})
            case ResponseDeletion():
                self._insert("response_deletions", fields_of(fact))
            case KeyUsage():
                self.connection.execute(_ADD_USAGE, fields_of(fact))
            case _:
                raise TypeError(
                    f"a fact is an Episode, Step, Outcome, Correction or Withdrawal, got {type(fact).__name__}"
                )

    def _insert_step(self, step: Step) -> None:
        parent_sequence = b""
        if step.parent_id is not None:
            parent_sequence = sequence_of(self.connection, self._cache, step.parent_id)
            if parent_sequence is None:
                raise StepLogError(f"its parent {step.parent_id} is not in the log")
        prompt, completion = tokens_to_blob(step.prompt_token_ids), tokens_to_blob(step.completion_token_ids)
        tool_set = tool_set_to_row(step)
        if not self._is_known_tool_set(tool_set["digest"]):
            self._insert("tool_sets", tool_set)
        prefix_len = common_prefix_len(parent_sequence, prompt)
        self._insert("steps", step_to_row(step, tool_set["digest"], prompt, completion, prefix_len))
        if isinstance(step.action, ToolCalls):
            for call in step.action.calls:
                if has_utf8(call.id):  # by another nobody can ask for the step
                    self._insert("step_calls", {"call_id": call.id, "step_id": step.id})
        self._cache.put(step.id, prompt + completion)  # not committed yet, but nobody looks for a step he cannot see

    def _is_known_tool_set(self, digest: str) -> bool:
        return self.connection.execute("SELECT 1 FROM tool_sets WHERE digest = ?", (digest,)).fetchone() is not None

    def _insert(self, table: str, row: Row) -> None:
        places = ", ".join("?" * len(row))
        self.connection.execute(f"INSERT INTO {table} ({', '.join(row)}) VALUES ({places})", tuple(row.values()))

    def _roll_back(self, group: list[Append]) -> None:
        for append in group:
            self._forget(append)
        if self.connection.in_transaction:
            self.connection.execute("ROLLBACK")

    def _forget(self, append: Append) -> None:
        self._cache.discard(fact.id for fact in append.facts if isinstance(fact, Step))


def _fact_problem(fact: Fact, error: Exception) -> str:
    """A sentence on what is wrong with a fact."""
    name = f"{type(fact).__name__.lower()} {getattr(fact, 'id', '')!s}".strip()
    message = str(error)
    if message.startswith("FOREIGN KEY constraint failed"):
        owner = f"step {fact.step_id}" if isinstance(fact, Correction) else f"episode {getattr(fact, 'episode_id', '')}"
        return f"{name} belongs to {owner}, which is not in the log"
    return f"{name} cannot be logged: {message}"


def no_longer_there(path: Path) -> str:
    """What is said of a file that was moved or removed."""
    return (
        f"{path} is no longer there: its folder was moved or removed. Put it back, or stop the server and restore a "
        "backup; until then nothing is logged, so nothing is answered"
    )


def _place_of(path: Path) -> tuple[int, int] | None:
    """What a path leads to; None: nothing."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _file_problem(error: Exception) -> str:
    """A sentence on why a whole group could not be written."""
    message = str(error)
    if isinstance(error, StepLogError):
        return message
    if "full" in message:
        return "the disk is full: these facts were not logged; free some space and try again"
    if "locked" in message:
        return "another process holds the file's write lock for too long: these facts were not logged"
    if isinstance(error, sqlite3.Error) and is_damage(error):
        return f"agent.db is damaged ({message}): these facts were not logged. {WHAT_TO_DO}"
    return f"the step log could not be written, these facts were not logged: {message or type(error).__name__}"
