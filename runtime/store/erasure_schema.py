"""Tables of what was erased, and the one exception to "facts are never edited": a row may go where a tombstone stands.

The triggers look at the tombstones, so that whoever deletes a row with another program has to say first whose episode
it was, since when it is gone, and in which erasure. Tombstones themselves are never edited.
"""

from __future__ import annotations

from sqlite_utils import Database

ERASURE_COLUMNS = {
    "id": str,
    "scope": str,
    "reason": str,
    "key": str,
    "created_at": float,
}

TOMBSTONE_COLUMNS = {
    "id": str,  # of the episode
    "erasure_id": str,
    "cause": str,
    "source": str,  # the episode that it was made of; empty where it was named itself
    "actor": str,
    "purpose": str,
    "adapter": str,
    "owner": str,
    "began_at": float,
    "num_steps": int,
}

ERASURE_EVENT_COLUMNS = {
    "id": int,
    "erasure_id": str,
    "event": str,
    "report": str,  # JSON object
    "created_at": float,
}

_OF_TOMBSTONE = "EXISTS (SELECT 1 FROM erased_episodes WHERE id = {episode})"
_EPISODE_OF_STEP = "(SELECT episode_id FROM steps WHERE id = OLD.step_id)"
_OF_STEP = _OF_TOMBSTONE.format(episode=_EPISODE_OF_STEP)

MAY_GO = {
    "episodes": _OF_TOMBSTONE.format(episode="OLD.id"),
    "steps": _OF_TOMBSTONE.format(episode="OLD.episode_id"),
    "outcomes": _OF_TOMBSTONE.format(episode="OLD.episode_id"),
    "responses": _OF_TOMBSTONE.format(episode="OLD.episode_id"),
    "corrections": _OF_STEP,
    "step_calls": _OF_STEP,
    "step_candidates": _OF_STEP,
    "response_deletions": (
        "EXISTS (SELECT 1 FROM responses JOIN erased_episodes ON erased_episodes.id = responses.episode_id "
        "WHERE responses.id = OLD.id)"
    ),
    "withdrawals": (
        f"{_OF_TOMBSTONE.format(episode='OLD.fact_id')} OR EXISTS (SELECT 1 FROM outcomes JOIN erased_episodes "
        "ON erased_episodes.id = outcomes.episode_id WHERE outcomes.id = OLD.fact_id) OR EXISTS (SELECT 1 FROM "
        "corrections JOIN steps ON steps.id = step_id JOIN erased_episodes ON erased_episodes.id = steps.episode_id "
        "WHERE corrections.id = OLD.fact_id)"
    ),
    "tool_sets": (
        "NOT EXISTS (SELECT 1 FROM steps WHERE substr(tools_digest, 1, 8) = substr(OLD.digest, 1, 8) "
        "AND tools_digest = OLD.digest)"
    ),
}
"""When a row of each table may be deleted. Of tool sets, which many episodes share: when no step has it any more."""

_TAKES_NO_MORE = {"episodes": "id", "steps": "episode_id", "outcomes": "episode_id", "responses": "episode_id"}


def create_erasures(database: Database) -> None:
    """Tables, indexes and triggers."""
    database.table("erasures").create(ERASURE_COLUMNS, pk="id", not_null=set(ERASURE_COLUMNS), strict=True)
    database.table("erased_episodes").create(TOMBSTONE_COLUMNS, pk="id", not_null=set(TOMBSTONE_COLUMNS), strict=True)
    database.table("erasure_events").create(
        ERASURE_EVENT_COLUMNS, pk="id", not_null=set(ERASURE_EVENT_COLUMNS), strict=True
    )
    for table in ("erased_episodes", "erasure_events"):
        database.table(table).create_index(["erasure_id"])
    for table in ("erasures", "erased_episodes", "erasure_events"):
        for edit in ("UPDATE", "DELETE"):
            _refuse(database, f"{table}_refuse_{edit.lower()}", f"{edit} ON {table}", f"{table} is append-only", "TRUE")
    # Where a reader had got to in the log whose step was erased: it goes on behind the last step before it.
    database.execute("CREATE TABLE erased_cursors (step_id TEXT PRIMARY KEY NOT NULL, number INTEGER NOT NULL) STRICT")
    for table, may_go in MAY_GO.items():
        database.execute(f"DROP TRIGGER {table}_refuse_delete")
        sentence = f"{table} are facts: they are appended, never edited. DELETE refused but for what was erased."
        _refuse(database, f"{table}_refuse_delete", f"DELETE ON {table}", sentence, f"NOT ({may_go})")
    for table, column in _TAKES_NO_MORE.items():
        is_erased = _OF_TOMBSTONE.format(episode=f"NEW.{column}")
        sentence = "this episode was erased: nothing more is logged of it."
        _refuse(database, f"{table}_refuse_erased", f"INSERT ON {table}", sentence, is_erased)
    database.table("responses").create_index(["episode_id"])
    database.execute("CREATE INDEX steps_by_tools ON steps(substr(tools_digest, 1, 8))")
    for name in ("promoted_from", "copied_from"):
        source = source_in_metadata(name)
        database.execute(f"CREATE INDEX episodes_{name} ON episodes({source}) WHERE {source} IS NOT NULL")


def source_in_metadata(name: str) -> str:
    """SQL for what an episode's metadata says under a name, word for word that of an index."""
    return f"CASE WHEN json_valid(metadata) THEN json_extract(metadata, '$.{name}') END"


def _refuse(database: Database, name: str, what: str, sentence: str, when: str) -> None:
    database.execute(f"CREATE TRIGGER {name} BEFORE {what} WHEN {when} BEGIN SELECT RAISE(ABORT, '{sentence}'); END")
