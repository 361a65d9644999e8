"""Folders that are there whole or not at all, whatever happens to the disk or the process meanwhile."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into, beside `folder`; it takes that name once all that was written is on the disk.

    What fails inside leaves nothing behind; a process that is killed leaves a hidden folder, never one under the name.
    Raises FileExistsError where `folder` is there and holds something.
    """
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} holds something already; an adapter is written once, into a folder of its own")
    folder.parent.mkdir(parents=True, exist_ok=True)
    incoming = folder.parent / f".{folder.name}-{secrets.token_hex(4)}"
    incoming.mkdir()
    try:
        yield incoming
        for path in (*incoming.rglob("*"), incoming):
            _to_disk(path)
        incoming.rename(folder)
    except BaseException:
        shutil.rmtree(incoming, ignore_errors=True)
        raise
    _to_disk(folder.parent)


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
