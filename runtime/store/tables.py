"""Checks a database by its own schema: its pages, the types of every column of every table, its references.

Knows no table by name, so that one which a later release adds is checked too.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from runtime.store.damage import Damaged, in_words, is_damage, last_rowid, rows_between

_PAGE = 200
"""Rows of one read: one long read would keep the writer's WAL from being folded back into the file."""
_TYPES: dict[str, type] = {"TEXT": str, "INTEGER": int, "REAL": float, "BLOB": bytes}


def page_problems(connection: sqlite3.Connection, check: str = "integrity_check") -> Iterator[str]:
    """What SQLite's own check finds: `integrity_check`, or `quick_check`, which does not compare the indexes."""
    try:
        for (verdict,) in connection.execute(f"PRAGMA {check}"):
            if verdict != "ok":
                yield f"agent.db: {verdict}"
    except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
        if not is_damage(error):
            raise
        yield f"agent.db: {error}"


def reference_problems(connection: sqlite3.Connection, may_go: Mapping[str, str]) -> Iterator[str]:
    """Rows that refer to none. `may_go`: by table, a condition on the row OLD for rows that are being deleted, parents
    before children."""
    for row in connection.execute("PRAGMA foreign_key_check"):
        table, rowid = row["table"], row["rowid"]
        goes = f'SELECT 1 FROM "{table}" AS OLD WHERE OLD.rowid = ? AND ({may_go.get(table, "FALSE")})'
        if connection.execute(goes, (rowid,)).fetchone() is None:
            yield f"{table} row {rowid} refers to a row that is not in {row['parent']}"


def table_problems(connection: sqlite3.Connection) -> Iterator[str]:
    """Rows that cannot be read, or that hold what their columns do not allow."""
    for table in tables_of(connection):
        try:
            for number, row in enumerate(all_rows(connection, table.name, table.query), 1):
                if isinstance(row, int):
                    yield str(Damaged(table.name, f"row {row}", "it lies on a damaged page of the file"))
                else:
                    yield from _row_problems(table, row, number)
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
            if not is_damage(error):
                raise
            yield str(Damaged(table.name, "", f"{error}; which rows cannot be told"))


def all_rows(connection: sqlite3.Connection, table: str, query: str = "") -> Iterator[sqlite3.Row | int]:
    """The rows in the order of their making; of those on damaged pages the rowids. Raises sqlite3's errors.

    `query`, if any, ends in `rowid BETWEEN ? AND ?`; of a table without rowids it is read as it is.
    """
    query = query or f"SELECT * FROM {table} WHERE rowid BETWEEN ? AND ?"
    if "?" not in query:
        yield from connection.execute(query)
        return
    last = last_rowid(connection, table)
    for low in range(1, last + 1, _PAGE):
        yield from rows_between(connection, query, (), low, min(low + _PAGE - 1, last))


@dataclass(frozen=True, slots=True)
class Table:
    """A table by its own schema."""

    name: str
    query: str
    columns: tuple[tuple[str, type | None, bool], ...]
    """Name, Python's type (None: any), and whether it may be null."""
    key: str
    """The column that names a row; empty: none does."""
    has_rowids: bool


def tables_of(connection: sqlite3.Connection) -> list[Table]:
    """All but SQLite's own. Its rows are read by name: `connection.row_factory` is sqlite3.Row."""
    found = connection.execute(
        "SELECT name, sql FROM sqlite_schema WHERE type = 'table' AND name NOT LIKE 'sqlite\\_%' ESCAPE '\\'"
    ).fetchall()
    return [_table(connection, name, sql) for name, sql in found]


def _table(connection: sqlite3.Connection, name: str, sql: str) -> Table:
    columns = connection.execute(f'PRAGMA table_info("{name}")').fetchall()
    keys = [column["name"] for column in columns if column["pk"]]
    has_rowids = "WITHOUT ROWID" not in sql.upper()
    return Table(
        name,
        f'SELECT * FROM "{name}"' + (" WHERE rowid BETWEEN ? AND ?" if has_rowids else ""),
        tuple((c["name"], _TYPES.get(c["type"].upper()), not c["notnull"] and not c["pk"]) for c in columns),
        keys[0] if len(keys) == 1 else "",
        has_rowids,
    )


def _row_problems(table: Table, row: sqlite3.Row, number: int) -> Iterator[str]:
    for name, kind, may_be_null in table.columns:
        value = row[name]
        is_right = kind is None or type(value) is kind or (kind is float and type(value) is int)
        if not is_right and not (value is None and may_be_null):
            named = row[table.key] if table.key else f"row {number}"
            yield str(Damaged(table.name, named, f"{name} is no {in_words(kind)} but {in_words(type(value))}"))
            return
