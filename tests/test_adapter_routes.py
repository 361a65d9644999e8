"""Adapters over HTTP: registered, promoted, refused and rolled back; what is refused disturbs nobody."""

from __future__ import annotations

import errno
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from policies.chat.chat_protocol import ChatProtocol
from runtime.adapters.swap import Swap
from runtime.store.adapter_registry import AdapterRegistry
from tests.scripted_engine import ScriptedEngine
from tests.serving import MODEL, Served, parts_of, served
from tests.tiny_adapters import TinyNetwork, faithful_script


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyNetwork:
    return TinyNetwork(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def server(tiny: TinyNetwork, protocol: ChatProtocol, tmp_path: Path) -> Iterator[Served]:
    """Serves the tiny network's adapters, on an engine that says what each one's probe says."""
    registry = AdapterRegistry(tmp_path / "agent.db")
    engine = ScriptedEngine(faithful_script(registry))
    swap = Swap(engine, registry, tiny.network)
    with served(parts_of(engine, protocol, tmp_path, registry=registry, swap=swap)) as running:
        yield running


def post(server: Served, path: str = "", body: Any = None) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/adapters{path}", json=body, timeout=30)


def register(server: Served, path: Path, **more: str) -> dict[str, Any]:
    response = post(server, "", {"path": str(path), **more})
    assert response.status_code == 201, response.text
    return response.json()


def listed(server: Served) -> list[dict[str, Any]]:
    return httpx.get(f"{server.url}/v1/adapters").json()["data"]


def refusal(response: httpx.Response, status: int = 409) -> str:
    """The sentence of a refusal in OpenAI's form."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error["message"]


def adapter_of_new_episode(server: Served) -> str:
    """The adapter that a new episode is answered by."""
    messages: list[Any] = [{"role": "user", "content": "Hi"}]
    raw = server.client().chat.completions.with_raw_response.create(model=MODEL, messages=messages)
    return raw.headers["x-adapter"]


def test_a_registered_adapter_is_verified_and_does_not_act_yet(server: Served, tiny: TinyNetwork) -> None:
    record = register(server, tiny.adapter(1), reason="cycle 1")
    assert record["name"] == "agent-v0001"
    assert (record["version"], record["rank"], record["parent"], record["is_acting"]) == (1, 4, None, False)
    assert [event["state"] for event in record["events"]] == ["registered", "validated", "loaded", "verified"]
    assert record["events"][0]["reason"] == "cycle 1"
    assert listed(server) == [record]
    assert adapter_of_new_episode(server) == "base"


def test_registering_the_same_files_again_is_the_same_adapter(server: Served, tiny: TinyNetwork) -> None:
    assert register(server, tiny.adapter(1)) == register(server, tiny.adapter(1))


def test_promoted_and_rolled_back_new_episodes_follow(server: Served, tiny: TinyNetwork) -> None:
    register(server, tiny.adapter(1))
    child = register(server, tiny.adapter(2), parent="agent-v0001")
    assert child["parent"] == "agent-v0001"
    for name in ("agent-v0001", "agent-v0002"):
        record = post(server, f"/{name}/promote", {"reason": "better"}).json()
        assert (record["is_acting"], record["state"], record["events"][-1]["reason"]) == (True, "acting", "better")
        assert adapter_of_new_episode(server) == name
    assert [record["is_acting"] for record in listed(server)] == [False, True]
    for behind in ("agent-v0001", "base"):
        assert post(server, "/rollback").json() == {"acting": behind}
        assert adapter_of_new_episode(server) == behind


def test_an_episode_whose_outcome_is_known_holds_no_adapter(server: Served, tiny: TinyNetwork) -> None:
    register(server, tiny.adapter(1))
    post(server, "/agent-v0001/promote")
    messages: list[Any] = [{"role": "user", "content": "Hi"}]
    raw = server.client().chat.completions.with_raw_response.create(model=MODEL, messages=messages)
    assert server.parts.swap.num_leases("agent-v0001") == 1
    episode = raw.headers["x-episode-id"]
    assert httpx.post(f"{server.url}/v1/episodes/{episode}/outcome", json={"value": 1.0}).status_code == 201
    assert server.parts.swap.num_leases("agent-v0001") == 0


def test_rolling_back_with_nothing_behind_is_a_conflict(server: Served) -> None:
    assert "nothing to roll back to" in refusal(post(server, "/rollback", {"reason": "worse"}))


def test_a_refused_adapter_stays_refused(server: Served, tiny: TinyNetwork) -> None:
    register(server, tiny.adapter(1))
    record = post(server, "/agent-v0001/refuse", {"reason": "the gate says no"}).json()
    assert (record["state"], record["events"][-1]["reason"]) == ("refused", "the gate says no")
    assert "the gate says no" in refusal(post(server, "/agent-v0001/promote"))
    assert "cannot become refused" in refusal(post(server, "/agent-v0001/refuse", {"reason": "again"}))


def test_an_unloaded_adapter_frees_its_slot_and_is_brought_up_again(server: Served, tiny: TinyNetwork) -> None:
    for seed in (1, 2):
        register(server, tiny.adapter(seed))
    post(server, "/agent-v0001/promote")
    assert "it cannot be unloaded" in refusal(post(server, "/agent-v0001/unload"))
    for _ in range(2):  # again: nothing is done
        assert post(server, "/agent-v0002/unload", {"reason": "tried"}).json()["state"] == "unloaded"
    assert [adapter.name for adapter in server.parts.engine.loaded_adapters()] == ["agent-v0001"]
    record = register(server, tiny.adapter(2))
    assert (record["name"], record["state"]) == ("agent-v0002", "verified")
    assert refusal(post(server, "/agent-v0009/unload"), 404)


@pytest.mark.parametrize("path", ["/nowhere/at/all", "x" * 4000, "\x00"])
def test_a_folder_that_is_none_is_refused_and_serving_goes_on(server: Served, path: str) -> None:
    refusal(post(server, "", {"path": path}))
    assert listed(server) == []
    assert adapter_of_new_episode(server) == "base"


def test_a_broken_adapter_is_refused_on_record_and_the_acting_one_goes_on(
    server: Served, tiny: TinyNetwork, tmp_path: Path
) -> None:
    register(server, tiny.adapter(1))
    post(server, "/agent-v0001/promote")
    broken = tiny.copy(2, tmp_path / "broken")
    (broken / "probe.json").write_text("{}")
    reason = refusal(post(server, "", {"path": str(broken)}))
    assert "probe.json" in reason
    record = listed(server)[1]
    assert record["state"] == "refused"
    assert record["events"][-1]["reason"] in reason
    assert adapter_of_new_episode(server) == "agent-v0001"


def test_a_disk_that_is_full_when_an_adapter_is_copied_in_is_told_and_nothing_is_left(
    server: Served, tiny: TinyNetwork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copyfile

    def until_full(source: Path, target: Path) -> None:
        if source.name == "probe.json":
            raise OSError(errno.ENOSPC, "No space left on device")
        copy(source, target)

    monkeypatch.setattr(shutil, "copyfile", until_full)
    reason = refusal(post(server, "", {"path": str(tiny.adapter(1))}))
    assert reason == "the folder could not be copied in: No space left on device"
    assert listed(server) == []
    assert list((tmp_path / "adapters").iterdir()) == []
    monkeypatch.undo()
    assert register(server, tiny.adapter(1))["name"] == "agent-v0001"


def test_a_database_that_cannot_be_written_is_told_and_the_server_goes_on(
    server: Served, tiny: TinyNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cannot(*_: Any) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    register(server, tiny.adapter(1))
    with monkeypatch.context() as full:
        full.setattr(server.parts.registry, "promote", cannot)
        reason = refusal(post(server, "/agent-v0001/promote"), 503)
    assert "database or disk is full; is the disk full" in reason
    assert post(server, "/agent-v0001/promote").status_code == 200
    assert adapter_of_new_episode(server) == "agent-v0001"


def test_a_promotion_for_another_parent_than_what_acts_changes_nothing(server: Served, tiny: TinyNetwork) -> None:
    register(server, tiny.adapter(1))
    reason = refusal(post(server, "/agent-v0001/promote", {"expected_acting": "agent-v0007"}))
    assert "agent-v0007 does not act any more: base does" in reason
    assert adapter_of_new_episode(server) == "base"
    assert post(server, "/agent-v0001/promote", {"expected_acting": "base"}).status_code == 200


def test_an_unknown_adapter_is_not_found(server: Served, tiny: TinyNetwork) -> None:
    assert "'agent-v0009'" in refusal(post(server, "/agent-v0009/promote"), 404)
    assert "'agent-v0009'" in refusal(post(server, "/agent-v0009/refuse", {"reason": "no"}), 404)
    unknown_parent = {"path": str(tiny.adapter(1)), "parent": "agent-v0009"}
    assert "'agent-v0009'" in refusal(post(server, "", unknown_parent), 404)


@pytest.mark.parametrize(
    ("path", "body"),
    [("", {}), ("", {"path": ""}), ("", {"path": 3}), ("/agent-v0001/refuse", {}), ("/rollback", {"reason": 3})],
)
def test_a_body_of_the_wrong_form_is_a_bad_request(server: Served, path: str, body: Any) -> None:
    refusal(post(server, path, body), 400)
