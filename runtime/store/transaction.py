"""A transaction that means to write from its first statement on: for stores that share one SQLite file.

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
