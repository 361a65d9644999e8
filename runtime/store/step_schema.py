"""The step log's tables and triggers, as migrations; its views are in `step_views`.

Everything that needs no other row to be read is a plain column; lists are JSON, token ids and logprobs are blobs. The
tables are strict, and triggers refuse to edit a fact, so that the promise also holds for whoever opens the file with
another program. Refused: one JSON document per step, which neither an index nor a view can look into cheaply.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from sqlite_utils import Database, Migrations

from runtime.store.erasure_schema import create_erasures
from runtime.store.step_views import EPISODE_TEXT, STEP_SUMMARY

STEP_LOG_MIGRATIONS = Migrations("step_log")

FACT_TABLES = ("episodes", "steps", "outcomes", "corrections", "tool_sets", "withdrawals", "step_candidates")
_FIRST_TABLES = FACT_TABLES[:5]


@STEP_LOG_MIGRATIONS()
def create_facts(database: Database) -> None:
    """Tables, indexes, triggers and views of the first release."""
    _create(database, "episodes", EPISODE_COLUMNS, may_be_null={"task"})
    _create(database, "tool_sets", TOOL_SET_COLUMNS, pk="digest")
    _create(
        database,
        "steps",
        STEP_COLUMNS,
        may_be_null=STEP_MAY_BE_NULL,
        foreign_keys=[
            ("episode_id", "episodes", "id"),
            ("parent_id", "steps", "id"),
            ("tools_digest", "tool_sets", "digest"),
        ],
    )
    _create(database, "outcomes", OUTCOME_COLUMNS, foreign_keys=[("episode_id", "episodes", "id")])
    _create(database, "corrections", CORRECTION_COLUMNS, foreign_keys=[("step_id", "steps", "id")])
    for table, columns in INDEXES:
        database.table(table).create_index(columns)
    for table in _FIRST_TABLES:
        _refuse_edits(database, table, database.table(table).pks[0])
    _create_views(database)


@STEP_LOG_MIGRATIONS()
def say_who(database: Database) -> None:
    """Whose an episode is, who said what of it, and what was taken back."""
    for table, column in (
        ("episodes", "owner TEXT NOT NULL DEFAULT ''"),
        ("episodes", "is_assigned INTEGER NOT NULL DEFAULT 1"),
        ("outcomes", "key TEXT NOT NULL DEFAULT ''"),
        ("outcomes", "role TEXT NOT NULL DEFAULT 'admin'"),
        ("corrections", "key TEXT NOT NULL DEFAULT ''"),
    ):
        database.execute(f"ALTER TABLE {table} ADD COLUMN {column}")
    _create(database, "withdrawals", WITHDRAWAL_COLUMNS)
    _refuse_edits(database, "withdrawals", "id")
    database.table("withdrawals").create_index(["fact_id"])
    for columns in LIST_INDEXES:
        database.table("episodes").create_index(columns)
    for name, columns in (("by_adapter", "adapter, is_assigned, id"), ("by_time", "created_at")):
        database.execute(
            f"CREATE INDEX learnable_episodes_{name} ON episodes({columns}) "
            "WHERE actor = 'policy' AND purpose <> 'evaluation'"
        )


@STEP_LOG_MIGRATIONS()
def recognise_rewritten_conversations(database: Database) -> None:
    """Whom an episode is for, and what its steps are recognised by where a client rewrites its conversation."""
    for table, column in (
        ("episodes", "user TEXT NOT NULL DEFAULT ''"),
        ("episodes", "agent TEXT NOT NULL DEFAULT ''"),
        ("steps", "prompt_change TEXT"),
        ("steps", "thread_digest TEXT NOT NULL DEFAULT ''"),
        ("steps", "tail_digest TEXT NOT NULL DEFAULT ''"),
    ):
        database.execute(f"ALTER TABLE {table} ADD COLUMN {column}")
    _create(database, "step_calls", STEP_CALL_COLUMNS, pk=None, foreign_keys=[("step_id", "steps", "id")])
    _refuse_edits(database, "step_calls", None)
    database.execute(
        "INSERT INTO step_calls SELECT json_extract(call.value, '$.id'), steps.id "
        "FROM steps, json_each(CASE WHEN json_valid(steps.action) THEN steps.action ELSE '{}' END, '$.calls') AS call "
        "WHERE typeof(json_extract(call.value, '$.id')) = 'text'"  # a damaged row must not keep a release from starting
    )
    _create(database, "responses", RESPONSE_COLUMNS, foreign_keys=[("step_id", "steps", "id")])
    _create(database, "response_deletions", {"id": str, "created_at": float})
    for table in ("responses", "response_deletions"):
        _refuse_edits(database, table, "id")
    for table, columns in (("step_calls", ["call_id"]), ("steps", ["thread_digest"]), ("steps", ["tail_digest"])):
        database.table(table).create_index(columns)


@STEP_LOG_MIGRATIONS()
def keep_what_was_not_chosen(database: Database) -> None:
    """The draws that a step was chosen among."""
    _create(database, "step_candidates", STEP_CANDIDATE_COLUMNS, pk=None, foreign_keys=[("step_id", "steps", "id")])
    database.execute("CREATE UNIQUE INDEX step_candidates_by_step ON step_candidates(step_id, number)")
    _refuse_edits(database, "step_candidates", None)


@STEP_LOG_MIGRATIONS()
def remember_what_keys_use_up(database: Database) -> None:
    """A row for each key with a quota and day: a count, and no fact, so that a start reads few of them."""
    columns = {"key": str, "day": int, "requests": int, "steps": int, "tokens": int}
    _create(database, "key_usage", columns, pk=["day", "key"])


@STEP_LOG_MIGRATIONS()
def erase(database: Database) -> None:
    """What was erased, and leave to delete it."""
    create_erasures(database)


@STEP_LOG_MIGRATIONS()
def find_by_agent(database: Database) -> None:
    """Several agents in one log: what is read of one of them is read off an index."""
    for columns in AGENT_INDEXES:
        database.table("episodes").create_index(columns)
    for name, columns in (("by_adapter", "agent, adapter, is_assigned, id"), ("by_time", "agent, created_at")):
        database.execute(f"DROP INDEX learnable_episodes_{name}")
        database.execute(
            f"CREATE INDEX learnable_episodes_{name} ON episodes({columns}) "
            "WHERE actor = 'policy' AND purpose <> 'evaluation'"
        )


@STEP_LOG_MIGRATIONS()
def show_beside_damage(database: Database) -> None:
    """Views that one damaged row does not end."""
    _create_views(database)


EPISODE_COLUMNS = {
    "id": str,
    "actor": str,
    "purpose": str,
    "adapter": str,
    "task": str,
    "metadata": str,  # JSON object
    "created_at": float,
}

TOOL_SET_COLUMNS = {
    "digest": str,  # SHA-256 of `tools`, in hex: the same tools are on offer at most steps
    "tools": str,  # JSON list
}

STEP_COLUMNS = {
    "id": str,
    "episode_id": str,
    "parent_id": str,
    "step_index": int,
    "new_messages": str,  # JSON list
    "tools_digest": str,
    "prefix_len": int,  # how many ids of the parent's prompt + completion the prompt begins with
    "prompt_suffix": bytes,  # the prompt's other ids, int32 little endian
    "num_prompt_tokens": int,
    "completion_token_ids": bytes,  # int32 little endian
    "num_completion_tokens": int,
    "tokens_crc32": int,  # of prompt + completion as int32 little endian: shows that a rebuilt prompt is the served one
    "behavior_logprobs": bytes,  # float32 little endian
    "mean_logprob": float,
    "sampling": str,  # JSON object
    "adapter": str,
    "action": str,  # JSON object with a `type`
    "finish_reason": str,
    "stop_reason": str,
    "tool_results": str,  # JSON list
    "conversation_digest": str,
    "created_at": float,
    "first_token_ms": float,
    "latency_ms": float,
}

STEP_MAY_BE_NULL = frozenset({"parent_id", "behavior_logprobs", "mean_logprob", "stop_reason"})

OUTCOME_COLUMNS = {
    "id": str,
    "episode_id": str,
    "value": float,
    "source": str,
    "note": str,
    "created_at": float,
}

CORRECTION_COLUMNS = {
    "id": str,
    "step_id": str,
    "action": str,
    "completion_token_ids": bytes,
    "source": str,
    "created_at": float,
}

WITHDRAWAL_COLUMNS = {
    "id": str,
    "fact_id": str,  # of an outcome, a correction, or a demonstration's episode
    "reason": str,
    "key": str,
    "created_at": float,
}

RESPONSE_COLUMNS = {
    "id": str,
    "episode_id": str,
    "step_id": str,  # the first one
    "request": str,  # JSON object
    "created_at": float,
}

STEP_CANDIDATE_COLUMNS = {
    "step_id": str,
    "number": int,
    "action": str,  # JSON object with a `type`
    "completion_token_ids": bytes,  # int32 little endian
    "logprobs": bytes,  # float32 little endian
    "finish_reason": str,
    "score": float,
    "scorer": str,
    "is_chosen": int,
}

STEP_CALL_COLUMNS = {
    "call_id": str,
    "step_id": str,
}

INDEXES = (
    ("episodes", ["purpose", "id"]),
    ("episodes", ["actor", "id"]),
    ("episodes", ["adapter", "id"]),
    ("episodes", ["task", "id"]),
    ("steps", ["episode_id", "created_at"]),
    ("steps", ["conversation_digest", "created_at"]),
    ("steps", ["parent_id"]),
    ("outcomes", ["episode_id", "created_at"]),
    ("corrections", ["step_id"]),
)


LIST_INDEXES = (
    ["owner", "id"],
    ["owner", "purpose", "id"],
    ["owner", "actor", "id"],
    ["owner", "adapter", "id"],
    ["purpose", "actor", "id"],
    ["purpose", "adapter", "id"],
    ["actor", "adapter", "id"],
)
"""A list with two filters is read off an index as one with a single filter is."""

AGENT_INDEXES = (["agent", "id"], ["agent", "purpose", "id"], ["agent", "actor", "id"], ["agent", "adapter", "id"])
"""Of an agent, with one more filter: what the learner reads."""


def _create_views(database: Database) -> None:
    database.create_view("episode_text", EPISODE_TEXT, replace=True)
    database.create_view("step_summary", STEP_SUMMARY, replace=True)


def _create(
    database: Database,
    table: str,
    columns: dict[str, Any],
    pk: str | list[str] | None = "id",
    may_be_null: Collection[str] = (),
    foreign_keys: list[Any] | None = None,
) -> None:
    not_null = set(columns) - set(may_be_null)
    database.table(table).create(columns, pk=pk, not_null=not_null, foreign_keys=foreign_keys or [], strict=True)


def _refuse_edits(database: Database, table: str, pk: str | None) -> None:
    for edit in ("UPDATE", "DELETE"):
        sentence = f"{table} are facts: they are appended, never edited. {edit} refused."
        database.execute(
            f"CREATE TRIGGER {table}_refuse_{edit.lower()} BEFORE {edit} ON {table} "
            f"BEGIN SELECT RAISE(ABORT, '{sentence}'); END"
        )
    if pk is None:
        return
    # INSERT OR REPLACE deletes the old row without waking the DELETE trigger, unless recursive_triggers is on.
    sentence = f"{table} are facts: what is logged once is never replaced. A second {pk} of the same name refused."
    database.execute(
        f"CREATE TRIGGER {table}_refuse_replace BEFORE INSERT ON {table} "
        f"WHEN EXISTS (SELECT 1 FROM {table} WHERE {pk} = NEW.{pk}) BEGIN SELECT RAISE(ABORT, '{sentence}'); END"
    )
