"""What is wrong with a state folder: its database, its log, its adapters' files. Reads only, also beside a server."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

from policies.adapters.files import AdapterRefused, weights_digest
from runtime.store.adapter_registry import registry_problems, weights_to_check
from runtime.store.damage import Query, damaged_file, is_damage
from runtime.store.erasure import erasure_problems
from runtime.store.keys import key_problems
from runtime.store.learning_log import learning_problems
from runtime.store.state_folder import DATABASE
from runtime.store.step_log import StepLog, StepLogError
from runtime.store.tables import page_problems

_CHECKS = (registry_problems, learning_problems, key_problems, erasure_problems)


def problems_of(state: Path) -> Iterator[str]:
    """Sentences; none where all is well. Damage to one part hides that of no other."""
    try:
        log = StepLog(state / DATABASE, read_only=True)
    except StepLogError as error:
        yield str(error)
        return
    try:
        yield from log.verify()
        for check in (*_CHECKS, partial(_weights_problems, state)):
            try:
                yield from check(log.query)
            except StepLogError as error:
                yield str(error)
    finally:
        log.close()


def _weights_problems(state: Path, query: Query) -> Iterator[str]:
    for adapter in weights_to_check(query):
        try:
            if weights_digest(state / adapter.path) != adapter.digest:
                yield f"{adapter.path}: its weights are not those that were registered"
        except (AdapterRefused, OSError) as error:
            yield f"{adapter.path}: {error}"


def file_problems(database: Path) -> list[str]:
    """What SQLite's quick check finds in a file that nobody writes."""
    uri = f"{database.absolute().as_uri()}?mode=ro&immutable=1"
    try:
        with closing(sqlite3.connect(uri, uri=True)) as connection:
            return list(page_problems(connection, "quick_check"))
    except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
        if not is_damage(error):
            raise
        return [str(damaged_file(error, database.name))]
