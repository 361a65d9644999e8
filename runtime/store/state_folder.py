"""The state folder: for its owner's eyes alone, and for one server at a time.

The lock is the system's own lock on a file (a POSIX record lock: children do not inherit it), so it ends with its
process, however that dies, and is never left over. Refused: a file with a process id in it, which a crash leaves behind
and another process may bear tomorrow.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

DATABASE = "agent.db"
SERVER_LOCK = "server.lock"
LOCKS = (SERVER_LOCK, "learner.lock")
_FILES = (DATABASE, f"{DATABASE}-wal", f"{DATABASE}-shm", "learner.log", *LOCKS)

RESTORING = ".restoring"
"""A folder in the state folder as long as a backup is being restored to it."""


class StateFolderTaken(ValueError):
    """Another server works on the folder, and which."""


class StateFolder:
    """Constructing makes the folder, closes it to others, and takes it. Raises StateFolderTaken, or OSError; and
    ValueError for links among its files, and for what a restore that was broken off has left unless it is to be
    restored now."""

    def __init__(self, path: Path, *, is_being_restored: bool = False) -> None:
        self.path = path
        if not is_being_restored and (path / RESTORING).exists() and not (path / DATABASE).exists():
            raise ValueError(f"a restore to {path} was broken off: run python -m runtime.backup restore again")
        os.umask(0o077)  # for all that this process and its children will write
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._refuse_links()
        self._lock = os.open(path / SERVER_LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.pread(self._lock, 200, 0).decode(errors="replace").strip()
            os.close(self._lock)
            raise StateFolderTaken(
                f"{path} is in use by another server ({holder or 'it has not said which'}): stop that one first, or "
                "give this one another --state"
            ) from None
        self.say(f"process {os.getpid()}")
        self._close_to_others()

    def _refuse_links(self) -> None:
        """Of our own files: what they lead to would be overwritten, and a database under two names has two locks."""
        for path in (self.path / name for name in _FILES):
            if path.is_symlink():
                raise ValueError(
                    f"{path} is a symbolic link: put the file itself there. To keep the state on another disk, make "
                    "the whole folder a link, or name it with --state"
                )
        database = self.path / DATABASE
        if database.exists() and database.stat().st_nlink > 1:
            raise ValueError(f"{database} has another name as well (a hard link), where another server could use it")

    def say(self, holder: str) -> None:
        """What a second server is told of us."""
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, f"{holder}\n".encode(), 0)

    def close(self) -> None:
        """Give it back. May be called twice."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _close_to_others(self) -> None:
        """Also what an older release has left open."""
        os.chmod(self.path, 0o700)
        for name in _FILES:
            if (self.path / name).exists():
                os.chmod(self.path / name, 0o600)
