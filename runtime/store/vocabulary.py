"""Whose tokens the log holds. A step is kept in the token ids of one tokenizer, and in another's they mean nothing:
conversations that go on, and what is learned, would be other words than were said.

Noted as SQLite's `user_version`, which a backup carries along; a file of an older release has none yet.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

from runtime.store.damage import StepLogError


def require_vocabulary(database: Path, fingerprint: int, model: str) -> None:
    """Note whose tokens are logged from now on. Raises StepLogError where the log holds those of another tokenizer,
    and sqlite3's errors.

    `fingerprint` is the tokenizer's, above 0 and below 2**31.
    """
    with closing(sqlite3.connect(database, isolation_level=None)) as connection:
        [noted] = connection.execute("PRAGMA user_version").fetchone()
        if noted == fingerprint:
            return
        [has_steps] = connection.execute("SELECT EXISTS (SELECT 1 FROM steps)").fetchone()
        if noted and has_steps:
            raise StepLogError(
                f"{database} holds what was said in the tokens of another model than {model}: start it with the model "
                "that it was served with, or give this one another --state"
            )
        connection.execute(f"PRAGMA user_version = {fingerprint:d}")
