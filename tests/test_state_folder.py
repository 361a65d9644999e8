"""The state folder: nobody else reads it, and no second server works on it; what it costs does not grow with it."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.store.state_folder import StateFolder
from tests.serving import ROOT

HOLD = """
import sys, time
from pathlib import Path
from runtime.store.state_folder import StateFolder
folder = StateFolder(Path(sys.argv[1]))
folder.say("process %d, http://127.0.0.1:9" % __import__("os").getpid())
print("held", flush=True)
if "with-child" in sys.argv:
    __import__("subprocess").Popen(["sleep", "30"], close_fds=False)
    print("child", flush=True)
time.sleep(60)
"""

TRY = """
import sys
from pathlib import Path
from runtime.store.state_folder import StateFolder, StateFolderTaken
try:
    StateFolder(Path(sys.argv[1]))
except StateFolderTaken as error:
    print(error)
"""


def tried(folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", TRY, str(folder)], cwd=ROOT, text=True, capture_output=True, timeout=60
    )
    assert not done.stderr, done.stderr
    return done.stdout


@pytest.mark.parametrize("more", [(), ("with-child",)])
def test_a_second_server_is_told_who_holds_the_folder_and_a_killed_one_holds_nothing(
    tmp_path: Path, more: tuple[str, ...]
) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path), *more], cwd=ROOT, text=True, stdout=subprocess.PIPE
    )
    assert holder.stdout is not None
    for _ in ("held", *more):
        holder.stdout.readline()
    said = tried(tmp_path)
    assert f"process {holder.pid}, http://127.0.0.1:9" in said
    assert "another --state" in said
    holder.kill()
    holder.wait()
    assert tried(tmp_path) == ""


def test_nobody_else_reads_what_is_in_it_also_of_an_older_release(tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir(mode=0o755)
    sqlite3.connect(state / "agent.db").execute("PRAGMA user_version = 1")
    os.chmod(state / "agent.db", 0o644)
    before = os.umask(0o022)
    try:
        folder = StateFolder(state)
        (state / "learner.log").touch()
        folder.close()
        folder.close()
    finally:
        os.umask(before)
    assert state.stat().st_mode & 0o777 == 0o700
    assert {file.stat().st_mode & 0o777 for file in state.iterdir()} == {0o600}


@pytest.mark.parametrize("name", ["agent.db", "agent.db-wal", "server.lock", "learner.lock", "learner.log"])
def test_a_link_among_the_files_is_refused_and_what_it_leads_to_is_left_alone(tmp_path: Path, name: str) -> None:
    """Whoever wrote in the folder before us could have us overwrite any file of ours: a lock is emptied and written."""
    (tmp_path / "state").mkdir()
    precious = tmp_path / "precious"
    precious.write_text("precious")
    (tmp_path / "state" / name).symlink_to(precious)
    with pytest.raises(ValueError, match="symbolic link"):
        StateFolder(tmp_path / "state")
    assert precious.read_text() == "precious"
    (tmp_path / "state" / name).unlink()
    StateFolder(tmp_path / "state").close()


def test_one_database_in_two_folders_is_refused(tmp_path: Path) -> None:
    """Each folder has a lock of its own, so that two servers worked on the one file."""
    for folder in ("one", "other"):
        (tmp_path / folder).mkdir()
    (tmp_path / "one" / "agent.db").write_bytes(b"")
    os.link(tmp_path / "one" / "agent.db", tmp_path / "other" / "agent.db")
    with pytest.raises(ValueError, match="hard link"):
        StateFolder(tmp_path / "other")


def test_a_link_to_the_whole_folder_has_the_folders_own_lock(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "state")
    held = StateFolder(tmp_path / "state")
    second = subprocess.run(
        [sys.executable, "-c", HOLD, str(tmp_path / "link")], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert "is in use by another server" in second.stderr
    held.close()
