"""More than can be done: bounded queues, fair turns, quotas. And what nobody may turn into a 500 or a long wait."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from runtime.http.load import Load, Refused
from runtime.http.shutdown import Cutting, ServerStopping
from runtime.store import adapter_registry, step_log
from runtime.store.episodes import Role
from runtime.store.keys import Key, KeyRing, KeyStore, Quota
from tests.conftest import ServeScripted
from tests.serving import MODEL, SayingEngine
from tests.small_networks import until

ANN, BOB = Key("ann", Role.USE), Key("bob", Role.USE)


class Queue:
    """Requests that hold their places until they are told to end; notes the order in which they got them."""

    def __init__(self, load: Load) -> None:
        self.load = load
        self.started: list[str] = []
        self._ends: dict[str, asyncio.Event] = {}

    def ask(self, key: Key, name: str, num: int = 1) -> asyncio.Task[None]:
        self._ends[name] = asyncio.Event()

        async def hold() -> None:
            async with self.load.place(key, num):
                self.started.append(name)
                await self._ends[name].wait()

        return asyncio.create_task(hold())

    async def end(self, *names: str) -> None:
        for name in names:
            self._ends[name].set()
            await settle()


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_a_free_place_goes_to_the_key_with_the_fewest() -> None:
    queue = Queue(Load(places=2))
    tasks = [queue.ask(ANN, f"ann{n}") for n in range(6)]
    await settle()
    tasks.append(queue.ask(BOB, "bob"))
    await queue.end("ann0")
    assert queue.started == ["ann0", "ann1", "bob"], "not behind four others"
    await queue.end("bob", "ann1", "ann2", "ann3", "ann4", "ann5")
    await asyncio.gather(*tasks)
    assert queue.started[3:] == ["ann2", "ann3", "ann4", "ann5"]
    assert (queue.load.num_waiting, queue.load._free) == (0, 2)


async def test_the_learner_stands_back_for_users_until_they_have_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user waited 105 seconds behind its trials."""
    monkeypatch.setattr("runtime.http.load.USERS_PAUSE_S", 0.3)
    monkeypatch.setattr("runtime.http.load.BESIDE_USERS", 1 / 4)
    queue = Queue(Load(places=8))
    learner = [queue.ask(Key("learner", Role.ADMIN), f"trial{n}") for n in range(10)]
    await settle()
    assert len(queue.started) == 8, "alone it takes all places"
    user = queue.ask(ANN, "ann")
    await queue.end("trial0")
    assert queue.started[8:] == ["ann"], "before the trials that have waited longer"
    await queue.end(*(f"trial{n}" for n in range(1, 6)))
    assert len(queue.started) == 9, "two of them run"
    await queue.end("trial6", "trial7")
    assert queue.started[9:] == ["trial8", "trial9"], "it is not kept out"
    more = [queue.ask(Key("learner", Role.ADMIN), f"more{n}") for n in range(4)]
    await queue.end("ann")
    assert len(queue.started) == 11, "a user who runs a tool, or reads, is still there"
    other = queue.ask(BOB, "bob")
    await settle()
    assert queue.started[11:] == ["bob"], "at once, though trials wait"
    await queue.end("bob")
    deadline = time.monotonic() + 10
    while len(queue.started) < 16:
        assert time.monotonic() < deadline, "nobody is served any more, and they wait on"
        await asyncio.sleep(0.05)
    await queue.end("trial8", "trial9", *(f"more{n}" for n in range(4)))
    await asyncio.gather(user, other, *learner, *more)
    assert (queue.load.num_waiting, queue.load._free, queue.load._running.total()) == (0, 8, 0)


async def test_a_user_never_waits_for_the_learner_s_turn_where_a_place_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pause was over, and a newcomer was queued behind a trial that nobody had let in yet: for up to a second."""
    monkeypatch.setattr("runtime.http.load.USERS_PAUSE_S", 0.2)
    queue = Queue(Load(places=4, most_waiting=0))
    users = [queue.ask(ANN, "ann")]
    await settle()
    trials = [queue.ask(Key("learner", Role.ADMIN), f"trial{n}") for n in range(3)]
    await queue.end("ann")
    assert queue.started == ["ann", "trial0"], "places are free; no trial is sent away for the queue"
    monkeypatch.setattr(queue.load, "_users_until", 0.0)
    users.append(queue.ask(BOB, "bob"))
    await settle()
    assert "bob" in queue.started
    await queue.end("bob")
    monkeypatch.setattr(queue.load, "_users_until", 0.0)
    await asyncio.sleep(0.1)
    await queue.end("trial0", "trial1", "trial2")
    await asyncio.gather(*users, *trials)


async def test_a_full_queue_sends_away_the_last_of_the_busiest_key() -> None:
    queue = Queue(Load(places=1, most_waiting=3))
    tasks = [queue.ask(ANN, f"ann{n}") for n in range(4)]
    await settle()
    with pytest.raises(Refused, match="3 requests wait already") as refused:
        await queue.ask(ANN, "ann4")
    assert refused.value.retry_after_s >= 1
    tasks.append(queue.ask(BOB, "bob"))
    await settle()
    with pytest.raises(Refused):
        await tasks[3]
    await queue.end("ann0")
    assert queue.started == ["ann0", "bob"]
    await queue.end("bob", "ann1", "ann2")
    assert (queue.load.num_waiting, queue.load._free) == (0, 1)


async def test_who_goes_away_while_waiting_takes_no_place() -> None:
    queue = Queue(Load(places=1))
    running, gone, last = (queue.ask(ANN, name) for name in ("running", "gone", "last"))
    await settle()
    gone.cancel()
    await settle()
    await queue.end("running")
    assert queue.started == ["running", "last"]
    waiting, after = queue.ask(ANN, "waiting"), queue.ask(ANN, "after")
    await settle()
    queue._ends["last"].set()
    await asyncio.wait({last})
    waiting.cancel()  # in the very moment in which it was given a place
    await settle()
    assert queue.started[-1] == "after"
    await queue.end("after")
    await asyncio.gather(running, last, after)
    assert queue.load._free == 1


async def test_many_completions_count_as_many_and_never_wait_for_ever() -> None:
    queue = Queue(Load(places=2))
    many, one = queue.ask(ANN, "many", 8), queue.ask(BOB, "one")
    await settle()
    assert queue.started == ["many"]
    await queue.end("many")
    assert queue.started == ["many", "one"]
    await queue.end("one")
    await asyncio.gather(many, one)
    assert queue.load._free == 2


async def test_who_waits_when_the_server_ends_is_told() -> None:
    cutting = Cutting()
    queue = Queue(Load(places=1, cutting=cutting))
    running, waiting = queue.ask(ANN, "running"), queue.ask(ANN, "waiting")
    await settle()
    cutting.cut()
    with pytest.raises(ServerStopping):
        await waiting
    await queue.end("running")
    await running


async def test_who_waits_when_the_quota_is_used_up_is_refused_and_takes_no_place() -> None:
    """It was asked for before the wait alone: of a thousand requests at once, a quota of two let all through."""
    queue = Queue(Load(places=1))
    limited = Key("ann", Role.USE, Quota(requests=2))
    tasks = [queue.ask(limited, f"ann{n}") for n in range(4)]
    await settle()
    await queue.end("ann0", "ann1")
    refused = await asyncio.gather(*tasks[2:], return_exceptions=True)
    assert [str(each) for each in refused] == [str(refused[0])] * 2
    assert "used up its 2 requests of today" in str(refused[0])
    assert queue.started == ["ann0", "ann1"]
    assert (queue.load.num_waiting, queue.load._free) == (0, 1)


async def test_a_quota_is_of_a_day() -> None:
    now = [86400.0 * 3 + 86000]
    load = Load(clock=lambda: now[0])
    key = Key("ann", Role.USE, Quota(requests=2))
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(load.place(key))
        await stack.enter_async_context(load.place(key))
        with pytest.raises(Refused, match="used up its 2 requests of today") as refused:
            await stack.enter_async_context(load.place(key))
        assert refused.value.retry_after_s == 400
        now[0] += 500
        await stack.enter_async_context(load.place(key))


def test_quotas_and_full_queues_are_429_with_retry_after_and_counted(
    serve_scripted: ServeScripted, protocol: Any, tmp_path: Path
) -> None:
    store = KeyStore(tmp_path / "agent.db")
    secret = store.make("ann", Role.USE, Quota(tokens=5))
    engine = SayingEngine(protocol)
    from runtime.http.metrics import Metrics

    metrics = Metrics(engine)
    served = serve_scripted(
        engine=engine, metrics=metrics, load=Load(metrics=metrics.registry), keys=KeyRing(store, "s3cret")
    )
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "tools": []}
    headers = {"authorization": f"Bearer {secret}"}
    first, second = (httpx.post(f"{served.url}/v1/chat/completions", json=body, headers=headers) for _ in range(2))
    assert (first.status_code, second.status_code) == (200, 429)
    assert second.json()["error"]["code"] == "quota_exceeded"
    assert 1 <= int(second.headers["retry-after"]) <= 86400
    text = httpx.get(f"{served.url}/metrics", headers={"authorization": "Bearer s3cret"}).text
    assert 'stepagent_key_requests_total{key="ann"} 1.0' in text
    assert 'stepagent_refused_requests_total{key="ann",reason="quota"} 1.0' in text
    assert 'stepagent_key_tokens_total{key="ann"}' in text


async def test_a_burst_is_answered_or_refused_at_once_and_nobody_waits_long(
    serve_scripted: ServeScripted, protocol: Any
) -> None:
    engine = SayingEngine(protocol, *(["one two"] * 200), pause_s=0.02)
    served = serve_scripted(engine=engine, load=Load(places=4, most_waiting=8))
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "tools": []}
    async with httpx.AsyncClient(timeout=30, limits=httpx.Limits(max_connections=100)) as client:
        asked = (client.post(f"{served.url}/v1/chat/completions", json=body) for _ in range(60))
        answers = await asyncio.gather(*asked)
    statuses = [answer.status_code for answer in answers]
    assert set(statuses) == {200, 429}
    assert statuses.count(200) >= 12
    assert all("retry-after" in answer.headers for answer in answers if answer.status_code == 429)


@pytest.mark.parametrize("route", ["chat/completions", "messages", "responses"])
async def test_who_hangs_up_while_waiting_leaves_the_queue(
    serve_scripted: ServeScripted, protocol: Any, route: str
) -> None:
    engine = SayingEngine(protocol, *["one two three"] * 3, pause_s=1.0)
    served = serve_scripted(engine=engine, load=Load(places=1))
    said = "input" if route == "responses" else "messages"
    body = {"model": MODEL, said: [{"role": "user", "content": "Hello"}], "max_tokens": 9, "tools": []}
    load = served.parts.load
    async with httpx.AsyncClient(timeout=30) as client:
        running = asyncio.create_task(client.post(f"{served.url}/v1/{route}", json=body))
        await until(lambda: load._free == 0)
        with pytest.raises(httpx.ReadTimeout):
            await client.post(f"{served.url}/v1/{route}", json=body, timeout=0.3)
        await until(lambda: load.num_waiting == 0)
        assert not running.done(), "the place it waited for has not come yet"
        assert (await running).status_code == 200
    await until(lambda: load._free == 1)
    assert len(engine.prompts) == 1


# ------------------------------------------------------------------------------------- no 500, no long wait


def test_a_rank_that_no_integer_holds_is_refused(serve_scripted: ServeScripted, tmp_path: Path) -> None:
    from tests.tiny_adapters import TinyNetwork

    folder = TinyNetwork(tmp_path / "tiny").adapter(1)
    config = json.loads((folder / "adapter_config.json").read_text())
    served = serve_scripted()
    for rank in (2**63, 10**30, -1, 0):
        (folder / "adapter_config.json").write_text(json.dumps({**config, "r": rank}))
        refused = httpx.post(f"{served.url}/v1/adapters", json={"path": str(folder)})
        assert refused.status_code == 409, refused.text
        assert refused.json()["error"]["code"] == "adapter_refused"


RECURSIVE: list[dict[str, Any]] = [
    {"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
    {"$ref": "#"},
    {"allOf": [{"$ref": "#"}]},
    {"$defs": {"a": {"anyOf": [{"$ref": "#/$defs/b"}]}, "b": {"anyOf": [{"$ref": "#/$defs/a"}]}}, "$ref": "#/$defs/a"},
]


@pytest.mark.parametrize("schema", RECURSIVE, ids=str)
def test_a_schema_that_leads_back_to_itself_is_a_bad_request(novice_server: Any, schema: dict[str, Any]) -> None:
    asked = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "tools": [], "max_tokens": 4}
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    for more in ({"response_format": form}, {"tools": [tool], "tool_choice": "required"}):
        answer = httpx.post(f"{novice_server.url}/v1/chat/completions", json={**asked, **more}, timeout=60)
        assert answer.status_code in (200, 400), answer.text
    assert httpx.post(f"{novice_server.url}/v1/chat/completions", json=asked, timeout=60).status_code == 200


def test_a_write_lock_that_somebody_else_holds_is_a_503_soon(serve_scripted: ServeScripted, tmp_path: Path) -> None:
    assert max(step_log.LOCK_TIMEOUT_S, adapter_registry.LOCK_TIMEOUT_S) <= 5
    served = serve_scripted()
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "tools": []}
    other = sqlite3.connect(tmp_path / "agent.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    began = time.monotonic()
    try:
        refused = httpx.post(f"{served.url}/v1/chat/completions", json=body, timeout=60)
        assert httpx.get(f"{served.url}/v1/episodes", timeout=5).status_code == 200
    finally:
        other.execute("ROLLBACK")
    assert refused.status_code == 503
    assert "lock" in refused.json()["error"]["message"]
    assert time.monotonic() - began < 10
    assert httpx.post(f"{served.url}/v1/chat/completions", json=body, timeout=60).status_code == 200
