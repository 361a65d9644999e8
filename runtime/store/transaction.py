"""What stores that share one SQLite file have in common: a transaction that means to write from its first statement on,
and tables that are only ever appended to.

A deferred transaction that reads before it writes (a store's look at its own schema is enough) fails at once with
"database is locked" where another process wrote in between, whatever the timeout. An immediate one waits its turn.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sqlite_utils import Database


@contextmanager
def write_transaction(db: Database) -> Iterator[None]:
    """All or nothing, and durable when it ends. Not to be nested. Raises sqlite3's errors."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        db.rollback()
        raise


def make_append_only(db: Database, *tables: str) -> None:
    """Refuse every edit of a table's rows, whichever program makes it."""
    for table in tables:
        for verb in ("UPDATE", "DELETE"):
            db.execute(
                f"CREATE TRIGGER {table}_no_{verb.lower()} BEFORE {verb} ON {table} "
                f"BEGIN SELECT RAISE(ABORT, '{table} is append-only'); END"
            )
