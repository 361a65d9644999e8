"""Backups of a state folder: the database and the adapters of one moment in one file, made while the server runs.

The file is a plain tar archive of `agent.db`, `adapters/NAME/...` and, last, `SHA256SUMS` as sha256sum writes it: an
archive that was cut off has none. It gets its name when it is whole and on disk, so that whoever dies on the way leaves
nothing under that name. The database is copied by SQLite's backup interface, which reads one moment of it beside any
number of writers; an adapter's folder never changes once it is registered. Refused: copying the files themselves,
which tears a database that is being written.

Left out: what the learner prints, candidates of a cycle that was running (the next learner marks it as failed), and
adapters that were refused.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import sqlite3
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from policies.adapters.files import ADAPTER_FILES
from runtime.store.adapter_registry import MODEL_CARD, AdapterState
from runtime.store.damage import is_damage, text_or_bytes
from runtime.store.soundness import file_problems, problems_of
from runtime.store.state_folder import DATABASE, LOCKS, RESTORING, StateFolder

SUMS = "SHA256SUMS"
_ADAPTER_FILE = re.compile(
    r"adapters/\w[\w.-]*/(" + "|".join(map(re.escape, (*ADAPTER_FILES, MODEL_CARD))) + ")", re.ASCII
)
_SUM_LINE = re.compile(r"([0-9a-f]{64})  (\S+)")
_MOST_SUM_BYTES = 64 * 2**20
_TRIES = 5
"""Moments that are tried, where an adapter is refused, and its folder deleted, while it is being copied."""
_PIECE = 2**20

_ADAPTERS = """
SELECT name, (SELECT state FROM adapter_events WHERE adapter = name ORDER BY id DESC LIMIT 1) AS state
FROM adapters ORDER BY version"""


class BackupError(Exception):
    """No backup could be made or restored, and why; nothing was left behind under its name."""


def make_backup(state: Path, file: Path) -> list[str]:
    """Back up a state folder, also of a running server; returns what is damaged in it, in sentences.

    What is damaged is in the backup as it is. Raises BackupError, or OSError such as for a full disk.
    """
    if not (state / DATABASE).is_file():
        raise BackupError(f"there is no {state / DATABASE}: name the server's state folder with --state")
    with _workshop(file) as workshop:
        for _ in range(_TRIES):
            with suppress(_Refused):
                problems = _write_archive(state, workshop)
                _give_name(workshop / "archive", file)
                return problems
    raise BackupError("adapters were refused again and again while they were copied: try again in a moment")


def verify_backup(file: Path) -> list[str]:
    """What is wrong with a backup, in sentences: its digests, and all that is read of a state folder; empty: nothing.

    Raises OSError. Needs as much room in the folder for temporary files as the backup takes.
    """
    with tempfile.TemporaryDirectory(prefix="stepagent-verify-") as folder:
        try:
            _unpack(file, Path(folder))
        except BackupError as error:
            return [str(error)]
        return list(problems_of(Path(folder)))


def restore_backup(file: Path, state: Path) -> None:
    """Make a state folder of a backup. `state` must be empty, or not there, and no server may work on it.

    Broken off, it is done by asking again; no server starts on half of it. Raises BackupError, StateFolderTaken, and
    OSError.
    """
    if not (state / LOCKS[0]).exists():
        require_empty(state)  # before anything is made in a folder that may be somebody's
    taken = StateFolder(state, is_being_restored=True)
    try:
        require_empty(state)
        for left_over in (state / RESTORING, state / "adapters"):
            shutil.rmtree(left_over, ignore_errors=True)
        unpacked = state / RESTORING
        unpacked.mkdir()
        try:
            _unpack(file, unpacked)
        except BackupError:
            shutil.rmtree(unpacked)
            raise
        if (unpacked / "adapters").exists():
            (unpacked / "adapters").rename(state / "adapters")
        _sync_folder(state)
        (unpacked / DATABASE).rename(state / DATABASE)  # from now on there is a state
        unpacked.rmdir()
        _sync_folder(state)
    finally:
        taken.close()


# --------------------------------------------------------------------------------------------------- making


class _Refused(Exception):
    """An adapter was refused, and its folder deleted, after the database was copied."""


@contextmanager
def _workshop(file: Path) -> Iterator[Path]:
    """A folder beside the file for what is not whole yet. One that a killed backup has left is used again."""
    if file.exists():
        raise BackupError(f"{file} is there already, and a backup is never overwritten: choose another name")
    if not file.parent.is_dir():
        raise BackupError(f"there is no folder {file.parent}: make it first")
    folder = file.parent / f".{file.name}.partial"
    folder.mkdir(mode=0o700, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise BackupError(f"another backup is being written to {file}: wait for its end") from None
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(lock)


def _write_archive(state: Path, workshop: Path) -> list[str]:
    """Write `archive` in the workshop; returns what is damaged."""
    for left_by_a_crash in workshop.iterdir():
        left_by_a_crash.unlink()
    copy = workshop / DATABASE
    _copy_database(state / DATABASE, copy)
    problems = [f"{DATABASE}: {problem}" for problem in file_problems(copy)]
    with open(os.open(workshop / "archive", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600), "wb") as raw:
        with tarfile.open(fileobj=raw, mode="w") as tar:
            archive = _Archive(tar)
            archive.add(DATABASE, copy)
            for name in _adapters_of(copy):
                problems += _add_adapter(archive, state, name)
            archive.close()
        raw.flush()
        os.fsync(raw.fileno())
    return problems


def _copy_database(source: Path, target: Path) -> None:
    target.touch(0o600)
    try:
        with closing(_opened(source, "mode=ro")) as live, closing(sqlite3.connect(target)) as copy:
            live.backup(copy)
    except sqlite3.Error as error:
        advice = "restore the newest backup that `verify` finds sound" if is_damage(error) else "is the disk full?"
        raise BackupError(f"{source} could not be copied: {error}; {advice}") from error


def _adapters_of(database: Path) -> list[str]:
    """Names of those that may serve again."""
    try:
        with closing(_opened(database, "mode=ro&immutable=1")) as connection:
            rows = connection.execute(_ADAPTERS).fetchall()  # text that is no UTF-8 is no name of a folder
    except sqlite3.Error as error:
        if "no such table" in str(error):  # a server that never came to its registry
            return []
        raise BackupError(f"the adapters in {database.name} could not be read: {error}") from error
    return _that_may_serve(rows)


def _add_adapter(archive: _Archive, state: Path, name: str) -> list[str]:
    """Its files, as far as they are there; returns what is missing. Raises _Refused where it was refused meanwhile."""
    folder = state / "adapters" / name
    for file_name in (*ADAPTER_FILES, MODEL_CARD):
        with suppress(FileNotFoundError):
            archive.add(f"adapters/{name}/{file_name}", folder / file_name)
    missing = [each for each in ADAPTER_FILES if f"adapters/{name}/{each}" not in archive.sums]
    if missing and name not in _adapters_of_live(state):
        raise _Refused
    return [f"{folder / each} is missing" for each in missing]


def _adapters_of_live(state: Path) -> list[str]:
    with closing(_opened(state / DATABASE, "mode=ro")) as connection:
        return _that_may_serve(connection.execute(_ADAPTERS).fetchall())


def _that_may_serve(rows: list[tuple[object, object]]) -> list[str]:
    return [name for name, last_state in rows if isinstance(name, str) and last_state != AdapterState.REFUSED.value]


def _opened(path: Path, how: str) -> sqlite3.Connection:
    connection = sqlite3.connect(f"{path.absolute().as_uri()}?{how}", uri=True, timeout=30.0)
    connection.text_factory = text_or_bytes
    return connection


@dataclass(slots=True)
class _Archive:
    """A tar file that is being written, and the digests of what is in it."""

    tar: tarfile.TarFile
    sums: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, path: Path) -> None:
        """Raises FileNotFoundError, before anything is written."""
        with path.open("rb") as file:
            hashed = _Hashed(file)
            self.tar.addfile(_member(name, os.fstat(file.fileno()).st_size), hashed)  # type: ignore[arg-type]
            self.sums[name] = hashed.sum.hexdigest()

    def close(self) -> None:
        """Write the digests, last of all."""
        lines = "".join(f"{digest}  {name}\n" for name, digest in self.sums.items()).encode()
        with tempfile.TemporaryFile() as file:
            file.write(lines)
            file.seek(0)
            self.tar.addfile(_member(SUMS, len(lines)), file)


@dataclass(slots=True)
class _Hashed:
    """A file that is hashed as it is read."""

    file: IO[bytes]
    sum: hashlib._Hash = field(default_factory=hashlib.sha256)

    def read(self, size: int = -1) -> bytes:
        piece = self.file.read(size)
        self.sum.update(piece)
        return piece


def _member(name: str, size: int) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.size, member.mode, member.mtime = size, 0o600, int(time.time())
    return member


def _give_name(whole: Path, file: Path) -> None:
    if file.exists():
        raise BackupError(f"{file} was made meanwhile by somebody else, and a backup is never overwritten")
    whole.rename(file)
    _sync_folder(file.parent)


def _sync_folder(folder: Path) -> None:
    """So that the names in it outlive a power cut."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


# ------------------------------------------------------------------------------------------------ restoring


def require_empty(state: Path) -> None:
    """But for locks, what a file system puts there, and what a restore that was broken off has left."""
    if not state.exists():
        return
    there = {path.name for path in state.iterdir()} - {*LOCKS, "lost+found"}
    if RESTORING in there and DATABASE not in there:
        there -= {RESTORING, "adapters"}
    if there:
        raise BackupError(
            f"{state} is not empty (it holds {', '.join(sorted(there)[:3])}), and nothing is restored over what is "
            "there: move it away, or restore to another --state"
        )


def _unpack(file: Path, folder: Path) -> None:
    """Write what the archive holds, and nothing but what a backup may hold, into the folder; raises BackupError where
    a byte of it differs from what was backed up."""
    sums: dict[str, str] = {}
    said: dict[str, str] | None = None
    try:
        with tarfile.open(file, mode="r:") as tar:
            for member in tar:
                if said is not None:
                    raise BackupError(f"{file} is no backup: {member.name!r} comes after its end")
                content = _content_of(tar, member, sums)
                if member.name == SUMS:
                    said = _sums_in(content.read(_MOST_SUM_BYTES))
                else:
                    sums[member.name] = _write_content(content, folder / member.name)
    except FileNotFoundError:
        raise BackupError(f"there is no {file}") from None
    except tarfile.TarError as error:
        raise BackupError(f"{file} is no backup, or a damaged one: {error}") from error
    if said is None:
        raise BackupError(f"{file} was cut off: its end is missing")
    if wrong := sorted(name for name in {*sums, *said} if sums.get(name) != said.get(name)):
        raise BackupError(f"{file} is damaged: {', '.join(wrong[:3])} in it is not what was backed up")
    if DATABASE not in sums:
        raise BackupError(f"{file} is no backup: it holds no {DATABASE}")


def _content_of(tar: tarfile.TarFile, member: tarfile.TarInfo, seen: dict[str, str]) -> IO[bytes]:
    """Raises BackupError for what no backup holds: links, paths that lead elsewhere, the same file twice."""
    is_known = member.name in (DATABASE, SUMS) or _ADAPTER_FILE.fullmatch(member.name)
    if not is_known or not member.isreg() or member.issparse() or member.name in seen:
        raise BackupError(f"{tar.name} is no backup: it holds {member.name!r}, which no backup does")
    content = tar.extractfile(member)
    assert content is not None, "a regular file has content"
    return content


def _write_content(content: IO[bytes], path: Path) -> str:
    """Its SHA-256, in hex."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    hashed = _Hashed(content)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        shutil.copyfileobj(hashed, file, _PIECE)  # type: ignore[type-var]
        file.flush()
        os.fsync(file.fileno())
    return hashed.sum.hexdigest()


def _sums_in(text: bytes) -> dict[str, str]:
    lines = [_SUM_LINE.fullmatch(line) for line in text.decode("ascii", "replace").splitlines()]
    return {found[2]: found[1] for found in lines if found}
