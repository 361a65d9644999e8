"""What can still be read of a damaged state folder, copied to a new one: for whoever has no sound backup.

Row by row, with their numbers, into tables that this release makes anew: damaged pages and indexes stay behind.
Refused: `sqlite3 .recover`, which gives up on this schema (SQLite 3.40), and knows nothing of adapters.
"""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from runtime.store.adapter_registry import AdapterRegistry
from runtime.store.backup import BackupError, require_empty
from runtime.store.damage import Damaged, is_damage, text_or_bytes
from runtime.store.keys import KeyStore
from runtime.store.learning_log import migrate_learning_log
from runtime.store.state_folder import DATABASE, StateFolder
from runtime.store.step_log import StepLog
from runtime.store.tables import all_rows, tables_of


def salvage(damaged: Path, state: Path) -> list[str]:
    """Returns what could not be copied, in sentences. `state` must be empty, or not there; `damaged` is left as it is.

    Raises BackupError where nothing can be read at all, StateFolderTaken, OSError.
    """
    require_empty(state)
    if not (damaged / DATABASE).is_file():
        raise BackupError(f"there is no {damaged / DATABASE}")
    taken = StateFolder(state)
    try:
        _make_tables(state)
        uri = f"{(damaged / DATABASE).absolute().as_uri()}?mode=ro"
        with (
            closing(sqlite3.connect(uri, uri=True)) as source,
            closing(sqlite3.connect(state / DATABASE, isolation_level=None)) as target,
        ):
            source.row_factory, source.text_factory = sqlite3.Row, text_or_bytes
            target.row_factory = sqlite3.Row
            target.execute("PRAGMA synchronous = FULL")
            target.execute("BEGIN")
            lost = list(_copied(source, target))
            target.execute("COMMIT")
        if (damaged / "adapters").is_dir():
            shutil.copytree(damaged / "adapters", state / "adapters", dirs_exist_ok=True)
        return lost
    finally:
        taken.close()


def _make_tables(state: Path) -> None:
    for store in (StepLog, AdapterRegistry, KeyStore):
        store(state / DATABASE).close()
    migrate_learning_log(state)


def _copied(source: sqlite3.Connection, target: sqlite3.Connection) -> Iterator[str]:
    """Copies every table, and yields what is lost of it."""
    for table in tables_of(target):
        if table.name == "_sqlite_migrations":
            continue
        number = "rowid, " if table.has_rowids else ""
        query = table.query.replace("SELECT *", f"SELECT {number}*")
        try:
            for row in all_rows(source, table.name, query):
                if isinstance(row, int):
                    yield str(Damaged(table.name, f"row {row}", "it lies on a damaged page of the file"))
                else:
                    yield from _copy_row(target, table.name, row)
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
            if "no such table" not in str(error):  # of a release that had none
                if not is_damage(error):
                    raise
                yield str(Damaged(table.name, "", f"{error}; its other rows are lost"))


def _copy_row(target: sqlite3.Connection, table: str, row: sqlite3.Row) -> Iterator[str]:
    columns = list(dict.fromkeys(row.keys()))
    places = ", ".join("?" * len(columns))
    try:
        target.execute(f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({places})", [row[name] for name in columns])
    except sqlite3.Error as error:
        yield str(Damaged(table, row["id"] if "id" in columns else row[0], str(error)))
