"""A disk that is full, a folder that is gone, a lock that another holds: told at once, refused cleanly, got over."""

from __future__ import annotations

import asyncio
import resource
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from policies.chat.chat_protocol import ChatProtocol
from runtime.adapters.live_guard import Watch, WatchOptions
from runtime.config import parse_settings
from runtime.http.load import Load, today
from runtime.store import step_log
from runtime.store.episodes import Outcome, Role, new_id
from runtime.store.keys import Key, KeyRing, KeyStore, Quota
from runtime.store.learning_log import LearningReader
from runtime.store.step_log import StepLog, StepLogError
from serve import build_parts
from tests.conftest import ServeScripted
from tests.records import make_episode, make_step
from tests.serving import MODEL, SayingEngine, parts_of, served

ASKED: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}]}


def told(url: str) -> tuple[int, dict[str, Any]]:
    health = httpx.get(f"{url}/health", timeout=30)
    return health.status_code, health.json()


def metric(url: str, name: str) -> float:
    lines = httpx.get(f"{url}/metrics", timeout=30).text.splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith(f"{name} ")))


def chat(url: str, **more: Any) -> httpx.Response:
    return httpx.post(f"{url}/v1/chat/completions", json=ASKED, timeout=30, **more)


def log_something(log: StepLog) -> None:
    episode = make_episode(metadata={"note": "x" * 5000})
    log.append(episode, make_step(episode)).result()


def log_until_refused(log: StepLog) -> None:
    for _ in range(100):
        log_something(log)


@contextmanager
def files_no_larger_than(num_bytes: int) -> Iterator[None]:
    """Stands for a disk without room."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_without_room_is_told_refuses_answers_and_is_got_over(serve_scripted: ServeScripted) -> None:
    server = serve_scripted()
    log = server.parts.log
    assert told(server.url)[1]["storage"]["problem"] == ""
    largest = max(path.stat().st_size for path in log._path.parent.glob("agent.db*"))
    with files_no_larger_than(largest):
        for _ in range(3):
            with pytest.raises(StepLogError):
                log_until_refused(log)
        refused = chat(server.url)
        status, health = told(server.url)
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "log_error"
        assert (status, health["status"], health["storage"]["is_writable"]) == (503, "down", False)
        assert health["storage"]["problem"]
        assert metric(server.url, "stepagent_log_writable") == 0
        assert metric(server.url, "stepagent_log_failed_writes_total") >= 4
    assert told(server.url)[0] == 200, "nobody has asked since: health itself has tried"
    assert chat(server.url).status_code == 200
    assert log.verify() == []


def test_little_room_is_told_before_it_is_too_late(
    serve_scripted: ServeScripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve_scripted()
    assert metric(server.url, "stepagent_state_free_bytes") > 0
    monkeypatch.setattr(step_log, "LOW_SPACE_BYTES", 2**60)
    status, health = told(server.url)
    assert status == 200
    assert "make room" in health["storage"]["problem"]


def test_a_folder_that_is_moved_away_answers_nothing_it_could_not_find_again(
    serve_scripted: ServeScripted, tmp_path: Path
) -> None:
    server = serve_scripted()
    assert chat(server.url).status_code == 200
    state = server.parts.log._path.parent
    away = state.with_name("away")
    state.rename(away)
    try:
        refused = chat(server.url)
        status, health = told(server.url)
        assert metric(server.url, "stepagent_log_writable") == 0
    finally:
        away.rename(state)
    assert refused.status_code == 503
    assert "moved or removed" in refused.json()["error"]["message"]
    assert status == 503
    assert "moved or removed" in health["storage"]["problem"]
    assert told(server.url)[0] == 200
    assert chat(server.url).status_code == 200


def test_another_folder_in_its_place_is_not_taken_for_it(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    with closing(StepLog(tmp_path / "state" / "agent.db")) as log:
        (tmp_path / "state").rename(tmp_path / "old")
        (tmp_path / "state").mkdir()
        (tmp_path / "state" / "agent.db").write_bytes((tmp_path / "old" / "agent.db").read_bytes())
        with pytest.raises(StepLogError, match="moved or removed"):
            log_something(log)


def test_who_asks_while_others_wait_for_a_lock_waits_no_longer_than_they(tmp_path: Path) -> None:
    with closing(StepLog(tmp_path / "agent.db", lock_timeout_s=2.0)) as log:
        with closing(sqlite3.connect(tmp_path / "agent.db", isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            waits = [wait_for_one(log, after_s) for after_s in (0.0, 0.1, 0.5, 1.8)]
            took = [wait() for wait in waits]
            other.execute("ROLLBACK")
        assert all(0.05 < seconds < 5 for seconds in took), took  # one after the other the last would take 6
        log_something(log)


def wait_for_one(log: StepLog, after_s: float) -> Any:
    result: list[float] = []

    def ask() -> None:
        time.sleep(after_s)
        began = time.monotonic()
        with pytest.raises(StepLogError, match="lock"):
            log_something(log)
        result.append(time.monotonic() - began)

    thread = threading.Thread(target=ask)
    thread.start()

    def wait() -> float:
        thread.join()
        return result[0]

    return wait


def test_a_key_that_is_made_while_another_holds_the_lock_holds_up_nobody(
    serve_scripted: ServeScripted, tmp_path: Path
) -> None:
    server = serve_scripted(keys=KeyRing(KeyStore(tmp_path / "agent.db"), "s3cret"))
    headers = {"authorization": "Bearer s3cret"}
    with closing(sqlite3.connect(tmp_path / "agent.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        making = threading.Thread(
            target=httpx.post,
            args=(f"{server.url}/v1/keys",),
            kwargs={"json": {"name": "ann"}, "headers": headers, "timeout": 30},
        )
        making.start()
        time.sleep(0.2)
        began = time.monotonic()
        assert httpx.get(f"{server.url}/v1/models", headers=headers, timeout=30).status_code == 200
        assert time.monotonic() - began < 1.0
        other.execute("ROLLBACK")
        making.join()


# ------------------------------------------------------------------------------------------------- quotas


def test_what_was_used_up_today_is_known_after_a_kill(protocol: ChatProtocol, tmp_path: Path) -> None:
    """Nothing is closed between the two servers' logs: as after kill -9."""
    with closing(KeyStore(tmp_path / "agent.db")) as store:
        secret = store.make("ann", Role.USE, Quota(requests=3))
        free = store.make("bob", Role.USE)
    answered = []
    for _ in range(2):
        log = StepLog(tmp_path / "agent.db")
        keys = KeyRing(KeyStore(tmp_path / "agent.db"), "s3cret")
        parts = parts_of(SayingEngine(protocol), protocol, tmp_path, keys=keys, load=Load(used=log.usage_of(today())))
        with served(parts) as server:
            for _ in range(2):
                answered.append(chat(server.url, headers={"authorization": f"Bearer {secret}"}).status_code)
            assert chat(server.url, headers={"authorization": f"Bearer {free}"}).status_code == 200
    assert answered == [200, 200, 200, 429]
    with closing(StepLog(tmp_path / "agent.db")) as log:
        (used,) = log.usage_of(today())
        steps = [step for episode in log.episodes(owner="ann") for step in log.steps(episode.id)]
        assert (used.key, used.requests, used.steps) == ("ann", 3, len(steps))
        assert used.tokens == sum(len(step.prompt_token_ids) + len(step.completion_token_ids) for step in steps)
        assert log.usage_of(today() + 1) == []


def test_the_command_line_server_goes_on_from_there(tmp_path: Path) -> None:
    with closing(StepLog(tmp_path / "agent.db")) as log:
        load = Load()
        key = Key("ann", Role.USE, Quota(steps=1))
        log.append(*load.usage_of(key, make_step(make_episode()))).result()
    parts = build_parts(parse_settings(["--state", str(tmp_path)]))
    try:
        with pytest.raises(Exception, match="used up its 1 steps"):
            parts.load._require_quota(key)
    finally:
        asyncio.run(parts.engine.close())
        parts.log.close()
        parts.registry.close()
        assert parts.state is not None
        parts.state.close()


def test_a_new_day_begins_at_nothing() -> None:
    now = [5 * 86400.0]
    load = Load(clock=lambda: now[0])
    key = Key("ann", Role.USE, Quota(steps=10))
    step = make_step(make_episode())
    (first,) = load.usage_of(key, step)
    now[0] += 86400
    (second,) = load.usage_of(key, step)
    assert (first.day, second.day) == (5, 6)


# ------------------------------------------------------------------------------------------------- clocks


def test_a_clock_that_is_set_back_does_not_blind_the_watch(
    protocol: ChatProtocol, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The adapter was promoted at a later time than all that it does afterwards seems to be of."""
    parts = parts_of(SayingEngine(protocol), protocol, tmp_path)
    watch = Watch(parts.log, LearningReader(tmp_path), parts.registry, parts.swap, WatchOptions(least_values=5))
    promoted_at = time.time() + 3600
    watch._compare("", "agent-v0001", "base", promoted_at)
    for adapter, value in (("base", 1.0), ("agent-v0001", 0.0)):
        for _ in range(20):
            episode = make_episode(adapter=adapter)
            outcome = Outcome(new_id("out"), episode.id, value, "user", role=Role.TEACH)
            parts.log.append(episode, replace(outcome)).result()
    evidence = watch._compare("", "agent-v0001", "base", promoted_at)[0]
    assert len(evidence.values) == 20
    assert evidence.is_worse
    parts.log.close()
    parts.registry.close()
