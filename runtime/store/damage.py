"""Damage: rows and pages of the database that can no longer be read. They are named, counted and stepped over.

One bad byte must not take a whole list with it. So each record is checked when it is read, column by column, and one
that is no record any more raises `Damaged`; lists leave it out and note it. A page that SQLite itself cannot read is
cornered by halves, until the rows that lie on it are known.

Not covered: a changed byte that leaves a sound record behind, in a text for instance; only tokens have a checksum.
"""

from __future__ import annotations

import json
import logging
import sqlite3
import struct
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

Row = sqlite3.Row | Mapping[str, Any]
Query = Callable[..., Sequence[Row]]
"""Rows of a query with its values; `StepLog.query` is one. Raises StepLogError."""

_log = logging.getLogger(__name__)

WHAT_TO_DO = "docs/OPERATIONS.md says what to do: python -m learner verify, python -m runtime.backup restore"

_CODES = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
_UNREADABLE = (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError, struct.error)


class StepLogError(Exception):
    """The step log could not be opened, read or written; the message says why and what to do."""


class Damaged(StepLogError):
    """A row, or a page of the file, can no longer be read."""

    def __init__(self, table: str, row: object, problem: str) -> None:
        self.table = table
        self.row = row.decode(errors="replace") if isinstance(row, bytes) else str(row)
        self.problem = problem
        super().__init__(f"{table} {self.row} is damaged: {problem}".removeprefix(" "))

    def shown(self) -> dict[str, str]:
        """As clients see it."""
        return {"table": self.table, "id": self.row, "problem": self.problem}


class DamageNotes:
    """What a store has stepped over since it was opened; each row is told once. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[tuple[str, str], Damaged] = {}

    def note(self, damaged: Damaged) -> None:
        with self._lock:
            is_new = (damaged.table, damaged.row) not in self._known
            self._known.setdefault((damaged.table, damaged.row), damaged)
        if is_new:
            _log.error("%s. It is stepped over. %s", damaged, WHAT_TO_DO)

    def __len__(self) -> int:
        return len(self._known)

    def sound(self, rows: Iterable[T], read: Callable[[T], R], damaged: list[Damaged] | None = None) -> Iterator[R]:
        """The records of these rows, without those that are damaged; these are noted, and added to `damaged`."""
        for row in rows:
            try:
                yield read(row)
            except Damaged as error:
                self.note(error)
                if damaged is not None:
                    damaged.append(error)


# ---------------------------------------------------------------------------------------------------- rows


def text_or_bytes(raw: bytes) -> str | bytes:
    """SQLite's text, as bytes where it is no UTF-8: sqlite3 would refuse the whole query, `record_of` the one row."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw


def record_of(
    table: str, types: Mapping[str, type], may_be_null: Collection[str] = (), key: str = "id"
) -> Callable[[Callable[Concatenate[Any, P], R]], Callable[Concatenate[Any, P], R]]:
    """Decorates a function that makes a record of a row: it raises `Damaged` for a row that makes none.

    `types` are Python's, by column; a float must be finite. `key` is the column that names the row.
    """
    columns = [(name, kind, name in may_be_null) for name, kind in types.items()]

    def decorated(read: Callable[Concatenate[Any, P], R]) -> Callable[Concatenate[Any, P], R]:
        @wraps(read)
        def checked(row: Row, *values: P.args, **more: P.kwargs) -> R:
            try:
                for name, kind, is_nullable in columns:
                    value = row[name]
                    if type(value) is kind:
                        if kind is float and value - value != 0.0:
                            raise ValueError(f"{name} is {value}")
                    elif not (value is None and is_nullable):
                        raise TypeError(f"{name} is no {in_words(kind)} but {in_words(type(value))}")
                return read(row, *values, **more)
            except _UNREADABLE as error:
                raise Damaged(table, row[key], f"{str(error) or type(error).__name__}"[:300]) from error

        return checked

    return decorated


_WORDS = {str: "text", int: "integer", float: "number", bytes: "blob", type(None): "null"}


def in_words(kind: type | None) -> str:
    """What SQLite calls a type of Python's."""
    return "value" if kind is None else _WORDS.get(kind, kind.__name__)


def problems_in(query: Query, table: str, read: Callable[[Row], object]) -> Iterator[str]:
    """What is wrong with the records of a table, in sentences; none where there is no such table."""
    if query("SELECT 1 FROM sqlite_schema WHERE name = ?", table):
        for row in query(f"SELECT * FROM {table}"):
            try:
                read(row)
            except Damaged as damaged:
                yield str(damaged)


def json_object(text: str) -> dict[str, Any]:
    """Raises ValueError for any other JSON."""
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError(f"a JSON object is stored there, not {type(value).__name__}")
    return value


def json_objects(text: str) -> list[dict[str, Any]]:
    """A list of objects. Raises ValueError for any other JSON."""
    value = json.loads(text)
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        raise ValueError("a JSON list of objects is stored there, and this is none")
    return value


# --------------------------------------------------------------------------------------------------- pages


def is_damage(error: Exception) -> bool:
    """Whether SQLite says that the file itself is damaged, as against locked, full, or asked for nonsense."""
    if isinstance(error, UnicodeDecodeError):  # what it says quotes the damage
        return True
    code = getattr(error, "sqlite_errorcode", None)
    return code is not None and code & 0xFF in _CODES


def damaged_file(error: Exception, path: object) -> Damaged:
    """What is raised for an error that `is_damage`."""
    told = "its schema cannot be read" if isinstance(error, UnicodeDecodeError) else str(error)
    return Damaged("", path, f"{told}. {WHAT_TO_DO}")


def unusable(error: Exception, path: object) -> str:
    """A sentence for SQLite's error with a file."""
    if is_damage(error):
        return str(damaged_file(error, path))
    remedy = "; make room, end who keeps it locked, or let the server write it"
    return f"{path} cannot be used: {error}{remedy if isinstance(error, sqlite3.OperationalError) else ''}"


def rows_between(
    connection: sqlite3.Connection,
    query: str,
    values: tuple[object, ...],
    low: int,
    high: int,
    newest_first: bool = False,
) -> Iterator[sqlite3.Row | int]:
    """Rows of a query that ends in `rowid BETWEEN ? AND ?`, perhaps ordered; of those on damaged pages the rowids."""
    try:
        yield from connection.execute(query, (*values, low, high)).fetchall()
        return
    except sqlite3.DatabaseError as error:
        if not is_damage(error):
            raise
    if low == high:
        yield low
        return
    middle = (low + high) // 2
    halves = [(low, middle), (middle + 1, high)]
    for half in reversed(halves) if newest_first else halves:
        yield from rows_between(connection, query, values, *half, newest_first)


def last_rowid(connection: sqlite3.Connection, table: str) -> int:
    """The greatest, also where the page that it lies on is damaged and an index is not. Raises sqlite3's errors."""
    greatest = "SELECT coalesce(max(rowid), 0) FROM {}"
    try:
        return connection.execute(greatest.format(table)).fetchone()[0]
    except sqlite3.DatabaseError as error:
        if not is_damage(error):
            raise
        indexes = connection.execute("SELECT name FROM sqlite_schema WHERE type = 'index' AND tbl_name = ?", (table,))
        for (index,) in indexes.fetchall():
            with suppress(sqlite3.DatabaseError):  # damaged too, or of some rows only
                return connection.execute(greatest.format(f"{table} INDEXED BY {index}")).fetchone()[0]
        raise
