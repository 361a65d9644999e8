"""A backup is whole or has no name; what is restored is what was served; nothing is written over what is there."""

from __future__ import annotations

import asyncio
import io
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import httpx
import pytest

from benchmarks.large_log import fill
from policies.chat.chat_protocol import ChatProtocol
from runtime.backup import main
from runtime.store.adapter_registry import AdapterRegistry, AdapterState
from runtime.store.backup import SUMS, BackupError, make_backup, restore_backup, verify_backup
from runtime.store.soundness import problems_of
from runtime.store.state_folder import RESTORING, StateFolder, StateFolderTaken
from runtime.store.step_log import StepLog
from serve import start_engine
from tests.records import make_episode, make_step
from tests.serving import ROOT, SayingEngine, parts_of, served
from tests.small_states import fill_state
from tests.tiny_adapters import TinyNetwork, faithful_script


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyNetwork:
    return TinyNetwork(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def state(tiny: TinyNetwork, tmp_path: Path) -> Path:
    fill_state(tmp_path / "state", *(tiny.adapter(seed) for seed in (1, 2, 3)))
    return tmp_path / "state"


HOLD = """
import sys, time
from pathlib import Path
from runtime.store.state_folder import StateFolder
folder = StateFolder(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_is_restored_is_what_was_backed_up(state: Path, tmp_path: Path) -> None:
    backup, restored = tmp_path / "monday.tar", tmp_path / "restored"
    assert make_backup(state, backup) == []
    assert backup.stat().st_mode & 0o777 == 0o600
    assert verify_backup(backup) == []
    restore_backup(backup, restored)
    assert list(problems_of(restored)) == []
    adapters = files_in(state / "adapters")
    assert adapters == files_in(restored / "adapters")
    assert len(adapters) >= 9
    with closing(AdapterRegistry(restored / "agent.db")) as registry:
        assert registry.acting() == registry.adapter("agent-v0003")
    assert {path.stat().st_mode & 0o777 for path in restored.rglob("*") if path.is_file()} == {0o600}
    assert {path.stat().st_mode & 0o777 for path in [restored, *restored.rglob("*")] if path.is_dir()} == {0o700}
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_its_digests_are_checked_by_sha256sum_too(state: Path, tmp_path: Path) -> None:
    make_backup(state, tmp_path / "b.tar")
    (tmp_path / "out").mkdir()
    subprocess.run(["tar", "-xf", tmp_path / "b.tar", "-C", tmp_path / "out"], check=True)
    done = subprocess.run(["sha256sum", "--check", "--strict", SUMS], cwd=tmp_path / "out", capture_output=True)
    assert done.returncode == 0, done.stderr


def test_a_server_that_is_written_to_is_backed_up_in_one_moment(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    fill(tmp_path / "state" / "agent.db", 300)
    log, stop, logged = StepLog(tmp_path / "state" / "agent.db"), threading.Event(), list[str]()

    def write() -> None:
        while not stop.is_set():
            episode = make_episode()
            log.append(episode, make_step(episode)).result()
            logged.append(episode.id)

    writing = threading.Thread(target=write)
    writing.start()
    try:
        for number in range(3):
            before = list(logged)
            make_backup(tmp_path / "state", tmp_path / f"{number}.tar")
            assert verify_backup(tmp_path / f"{number}.tar") == []
            restore_backup(tmp_path / f"{number}.tar", tmp_path / f"restored-{number}")
            with closing(StepLog(tmp_path / f"restored-{number}" / "agent.db", read_only=True)) as restored:
                assert all(restored.episode(name) is not None for name in before)
    finally:
        stop.set()
        writing.join()
        log.close()


def test_a_restored_server_serves_the_same_acting_adapter(
    novice_engine: object, protocol: ChatProtocol, tiny: TinyNetwork, state: Path, tmp_path: Path
) -> None:
    """Through the swap's own verification: the engine must say what the adapter's probe says."""
    make_backup(state, tmp_path / "b.tar")
    restore_backup(tmp_path / "b.tar", tmp_path / "restored")
    shutil.rmtree(state)
    engine = SayingEngine(protocol)
    parts = parts_of(engine, protocol, tmp_path / "restored")
    parts.swap._base = tiny.network
    engine._script = faithful_script(parts.registry)
    asyncio.run(start_engine(parts))
    with served(parts) as server:
        assert httpx.get(f"{server.url}/health").json()["acting"] == "agent-v0003"
        assert [adapter.name for adapter in engine.loaded_adapters()] == ["agent-v0003"]
        assert len(httpx.get(f"{server.url}/v1/episodes").json()["data"]) == 6


# ------------------------------------------------------------------------------------------- broken off


def test_a_backup_that_is_killed_leaves_nothing_under_its_name_and_the_next_one_goes_through(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    fill(tmp_path / "state" / "agent.db", 1500)
    backup = tmp_path / "b.tar"
    command = [sys.executable, "-m", "runtime.backup", "make", str(backup), "--state", str(tmp_path / "state")]
    workshop = tmp_path / f".{backup.name}.partial"
    for wanted in ("agent.db", "archive"):
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
        while not (workshop / wanted).exists() and process.poll() is None:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not backup.exists() or verify_backup(backup) == []
        backup.unlink(missing_ok=True)
    make_backup(tmp_path / "state", backup)
    assert verify_backup(backup) == []
    assert not workshop.exists()


@pytest.mark.parametrize("moment", ["while it is unpacked", "before the database has its place"])
def test_a_restore_that_is_broken_off_is_never_served_and_is_done_again(
    state: Path, tmp_path: Path, moment: str
) -> None:
    make_backup(state, tmp_path / "b.tar")
    half = tmp_path / "half"
    (half / RESTORING).mkdir(parents=True)
    (half / RESTORING / "agent.db").write_bytes(b"half of it")
    if moment != "while it is unpacked":
        shutil.copytree(state / "adapters" / "agent-v0001", half / "adapters" / "agent-v0001")
    with pytest.raises(ValueError, match="broken off"):
        StateFolder(half)
    restore_backup(tmp_path / "b.tar", half)
    assert list(problems_of(half)) == []
    assert not (half / RESTORING).exists()
    StateFolder(half).close()


def test_an_adapter_that_is_refused_meanwhile_makes_it_another_moment(
    state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from runtime.store import backup as module

    copy, num_copies = module._copy_database, 0

    def refuse_after_the_first(source: Path, target: Path) -> None:
        nonlocal num_copies
        copy(source, target)
        num_copies += 1
        if num_copies == 1:
            with closing(AdapterRegistry(state / "agent.db")) as registry:
                registry.record("agent-v0002", AdapterState.REFUSED, "worse")
            shutil.rmtree(state / "adapters" / "agent-v0002")

    monkeypatch.setattr(module, "_copy_database", refuse_after_the_first)
    assert make_backup(state, tmp_path / "b.tar") == []
    assert num_copies == 2
    assert verify_backup(tmp_path / "b.tar") == []


# ------------------------------------------------------------------------------------------ what is refused


def test_nothing_is_restored_over_what_is_there_or_under_a_running_server(state: Path, tmp_path: Path) -> None:
    make_backup(state, tmp_path / "b.tar")
    before = files_in(state)
    with pytest.raises(BackupError, match="not empty"):
        restore_backup(tmp_path / "b.tar", state)
    (tmp_path / "somebody").mkdir()
    (tmp_path / "somebody").chmod(0o755)
    (tmp_path / "somebody" / "thesis.txt").write_text("mine")
    with pytest.raises(BackupError, match=r"not empty.*thesis\.txt"):
        restore_backup(tmp_path / "b.tar", tmp_path / "somebody")
    assert os.listdir(tmp_path / "somebody") == ["thesis.txt"]
    assert (tmp_path / "somebody").stat().st_mode & 0o777 == 0o755
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "new")], cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    try:
        with pytest.raises(StateFolderTaken, match="in use"):
            restore_backup(tmp_path / "b.tar", tmp_path / "new")
    finally:
        process.kill()
        process.wait()
    assert files_in(state) == before


def test_a_backup_is_never_overwritten_and_two_do_not_write_one(state: Path, tmp_path: Path) -> None:
    (tmp_path / "b.tar").write_text("yesterday's")
    with pytest.raises(BackupError, match="never overwritten"):
        make_backup(state, tmp_path / "b.tar")
    assert (tmp_path / "b.tar").read_text() == "yesterday's"


def members(backup: Path) -> list[tuple[tarfile.TarInfo, bytes]]:
    with tarfile.open(backup) as tar:
        return [(member, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]


def rewritten(backup: Path, change: Callable[[list[tuple[tarfile.TarInfo, bytes]]], object]) -> None:
    content = members(backup)
    change(content)
    with tarfile.open(backup, "w") as tar:
        for member, data in content:
            member.size = len(data) if member.isreg() else 0
            tar.addfile(member, io.BytesIO(data))


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type, made.linkname = kind, link
    return made


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "a flipped byte": (lambda b: flip(b, 5000), "damaged"),
    "a flipped byte in an adapter": (lambda b: flip_in(b, "adapter_model.safetensors"), "adapter_model"),
    "cut in the middle": (lambda b: os.truncate(b, b.stat().st_size // 2), ""),
    "cut before its digests": (lambda b: rewritten(b, lambda m: m.pop()), "cut off"),
    "empty": (lambda b: b.write_bytes(b""), ""),
    "no archive": (lambda b: b.write_bytes(os.urandom(20000)), "no backup"),
    "a path that leads out": (lambda b: rewritten(b, lambda m: m.insert(0, (member("../evil"), b"x"))), "evil"),
    "an absolute path": (lambda b: rewritten(b, lambda m: m.insert(0, (member("/tmp/evil"), b"x"))), "evil"),
    "a path in an adapter": (
        lambda b: rewritten(b, lambda m: m.insert(0, (member("adapters/../../README.md"), b"x"))), "README",
    ),
    "a link": (
        lambda b: rewritten(b, lambda m: m.insert(0, (member("agent.db", tarfile.SYMTYPE, "/etc/passwd"), b""))),
        "agent.db",
    ),
    "a hard link": (
        lambda b: rewritten(b, lambda m: m.insert(1, (member("adapters/a/README.md", tarfile.LNKTYPE, "x"), b""))),
        "README",
    ),
    "a device": (lambda b: rewritten(b, lambda m: m.insert(0, (member("agent.db", tarfile.CHRTYPE), b""))), "agent.db"),
    "the database twice": (lambda b: rewritten(b, lambda m: m.insert(1, m[0])), "agent.db"),
    "another file": (lambda b: rewritten(b, lambda m: m.insert(0, (member("server.lock"), b""))), "server.lock"),
    "an adapter too few": (lambda b: rewritten(b, lambda m: m.pop(1)), "not what was backed up"),
    "something after its end": (lambda b: rewritten(b, lambda m: m.append((member("x"), b"x"))), "after its end"),
}  # fmt: skip


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def flip_in(path: Path, name: str) -> None:
    with tarfile.open(path) as tar:
        at = next(each.offset_data for each in tar if each.name.endswith(name))
    flip(path, at + 100)


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_no_whole_backup_is_refused_and_nothing_is_left_of_it(state: Path, tmp_path: Path, what: str) -> None:
    break_it, sentence = BROKEN[what]
    backup = tmp_path / "folder" / "b.tar"
    backup.parent.mkdir()
    make_backup(state, backup)
    break_it(backup)
    assert sentence in " ".join(verify_backup(backup))
    assert verify_backup(backup) != []
    with pytest.raises(BackupError):
        restore_backup(backup, tmp_path / "folder" / "restored")
    assert {path.name for path in (tmp_path / "folder" / "restored").iterdir()} <= {"server.lock"}
    assert {path.name for path in (tmp_path / "folder").iterdir()} == {"b.tar", "restored"}
    assert not (tmp_path / "evil").exists()


# --------------------------------------------------------------------------------------------- the command


def test_the_command_says_what_it_did_and_what_is_wrong(
    state: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    backup = str(tmp_path / "b.tar")
    assert main(["make", backup, "--state", str(state)]) == 0
    assert main(["verify", backup]) == 0
    assert "is sound" in capsys.readouterr().out
    assert main(["restore", backup, "--state", str(tmp_path / "r")]) == 0
    assert f"--state {tmp_path / 'r'}" in capsys.readouterr().out
    assert main(["make", backup, "--state", str(tmp_path / "nowhere")]) == 1
    assert main(["restore", str(tmp_path / "nothing.tar"), "--state", str(tmp_path / "q")]) == 1
    assert main(["make", str(tmp_path / "no" / "b.tar"), "--state", str(state)]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 3
    assert "Traceback" not in said
    assert main(["verify", str(tmp_path / "nothing.tar")]) == 1
    assert capsys.readouterr() == ("", f"there is no {tmp_path / 'nothing.tar'}\n")  # it was called damaged


def test_what_is_damaged_is_backed_up_and_told(state: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = bytearray((state / "agent.db").read_bytes())
    content[-4096:] = bytes(4096)
    (state / "agent.db").write_bytes(content)
    (state / "adapters" / "agent-v0001" / "probe.json").unlink()
    assert main(["make", str(tmp_path / "b.tar"), "--state", str(state)]) == 1
    said = capsys.readouterr()
    assert "damaged" in said.out
    assert "probe.json is missing" in said.err
    assert (tmp_path / "b.tar").exists()


def test_a_file_that_cannot_grow_is_a_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    """A limit on the size of files stands for a full disk."""
    (tmp_path / "state").mkdir()
    fill(tmp_path / "state" / "agent.db", 400)
    command = [
        sys.executable,
        "-m",
        "runtime.backup",
        "make",
        str(tmp_path / "b.tar"),
        "--state",
        str(tmp_path / "state"),
    ]
    done = subprocess.run(
        ["bash", "-c", 'ulimit -f 200; exec "$@"', "bash", *command], cwd=ROOT, text=True, capture_output=True
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["state"]
