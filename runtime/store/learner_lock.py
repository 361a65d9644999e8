"""At most one learner works on a state folder: whoever runs a cycle holds a lock, which its death frees."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

LOCK_FILE = "learner.lock"
PATIENCE_S = 1.0
"""The server holds the lock for a moment when it looks whether a learner is alive."""


@contextmanager
def only_learner(state: Path) -> Iterator[bool]:
    """Whether no other learner works on this state folder, as long as this goes on."""
    with (state / LOCK_FILE).open("w") as lock:
        yield _locks(lock)


def is_learner_alive(state: Path) -> bool:
    """Whether a learner works on this state folder now, whoever started it."""
    try:
        with (state / LOCK_FILE).open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _locks(lock: TextIO) -> bool:
    give_up_at = time.monotonic() + PATIENCE_S
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > give_up_at:
                return False
            time.sleep(0.02)
