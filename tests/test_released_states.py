"""The state folder of every release opens, serves what acted, is sound, and is learned from: an upgrade is a start.

Each archive was made by the server of its release: chats, feedback, demonstrations, an adapter that acts, a cycle.
"""

from __future__ import annotations

import asyncio
import tarfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest

from learner.data.collect import collect
from learner.options import CollectionOptions
from runtime.config import parse_settings
from runtime.store.backup import make_backup, verify_backup
from runtime.store.learning_log import CycleStage, LearningLog
from runtime.store.soundness import problems_of
from runtime.store.step_log import StepLog
from serve import build_parts, start_engine
from tests.serving import Served, served

RELEASES = sorted((Path(__file__).parent / "released_states").glob("*.tar.xz"))
KEY = {"authorization": "Bearer s3cret"}


@pytest.fixture(scope="module", params=RELEASES, ids=lambda path: path.name.removesuffix(".tar.xz"))
def upgraded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """This release's server, wired as by its command line, on the old folder."""
    state = tmp_path_factory.mktemp("released")
    with tarfile.open(request.param) as archive:
        archive.extractall(state, filter="data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STEPAGENT_API_KEY", "s3cret")
        parts = build_parts(parse_settings(["--state", str(state), "--threads", "1", "--learn-every", "0"]))
    asyncio.run(start_engine(parts))
    with served(parts) as server:
        yield server
    asyncio.run(parts.engine.close())
    assert parts.state is not None
    parts.state.close()


def ask(server: Served, path: str) -> Any:
    answer = httpx.get(f"{server.url}{path}", headers=KEY, timeout=60)
    assert answer.status_code == 200, f"{path}: {answer.text}"
    return answer


def chat(server: Served, messages: list[dict[str, Any]], **more: Any) -> httpx.Response:
    body = {"model": "novice_model", "messages": messages, "max_tokens": 16, "temperature": 0, **more}
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, headers=KEY, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer


def state_of(server: Served) -> Path:
    return server.parts.log._path.parent


def test_two_releases_are_kept() -> None:
    assert [path.name.removesuffix(".tar.xz") for path in RELEASES] == ["0.1.0", "0.2.0"]
    assert all(path.stat().st_size < 300_000 for path in RELEASES)


def test_it_is_sound_and_what_acted_acts(upgraded: Served) -> None:
    assert list(problems_of(state_of(upgraded))) == []
    health = ask(upgraded, "/health").json()
    assert (health["acting"], health["storage"]["problem"]) == ("agent-v0001", "")
    assert [adapter.name for adapter in upgraded.parts.engine.loaded_adapters()] == ["agent-v0001"]


def test_its_lists_are_read(upgraded: Served) -> None:
    episodes = ask(upgraded, "/v1/episodes?limit=1000").json()
    assert len(episodes["data"]) > 5
    assert "damaged" not in episodes
    assert len(ask(upgraded, "/v1/demonstrations").json()["data"]) == 2
    (cycle, *_) = ask(upgraded, "/v1/learner/cycles").json()["data"]
    assert ask(upgraded, f"/v1/learner/cycles/{cycle['id']}").json()["rewards"]
    assert {each["name"] for each in ask(upgraded, "/v1/adapters").json()["data"]} >= {"agent-v0001", "agent-v0002"}
    assert len(ask(upgraded, "/v1/export?format=atif").text.splitlines()) > 5
    for path in ("/v1/keys", "/v1/learner/watch", "/metrics"):
        ask(upgraded, path)
    served_ones = ask(upgraded, "/v1/episodes?purpose=serve&actor=policy").json()["data"]
    assert any(ask(upgraded, f"/v1/episodes/{each['id']}").json()["outcomes"] for each in served_ones)


def test_an_old_conversation_goes_on_and_a_new_one_begins(upgraded: Served) -> None:
    old = next(
        each
        for each in ask(upgraded, "/v1/episodes?purpose=serve&actor=policy&limit=1000").json()["data"]
        if each["id"] == "ep_client"
    )
    before = ask(upgraded, f"/v1/episodes/{old['id']}").json()["steps"]
    again = chat(
        upgraded, [{"role": "user", "content": "And now?"}], metadata={"episode_id": "ep_client"}, tools=[],
    )  # fmt: skip
    assert again.headers["x-episode-id"] == "ep_client"
    assert again.headers["x-adapter"] == old["adapter"]
    assert len(ask(upgraded, f"/v1/episodes/{old['id']}").json()["steps"]) > len(before)
    new = chat(upgraded, [{"role": "user", "content": "Order 1007 has come in."}])
    assert new.headers["x-adapter"] == "agent-v0001"


def test_a_learner_collects_writes_and_a_backup_is_sound(upgraded: Served, tmp_path: Path) -> None:
    with closing(StepLog(state_of(upgraded) / "agent.db", read_only=True)) as log:
        collected = collect(log, None, ["agent-v0001", "base"], CollectionOptions(), seed=0)
    assert collected.policy_episodes
    assert collected.demonstrations or collected.held_out
    with closing(LearningLog(state_of(upgraded))) as log:
        log.fail_unfinished()
        log.note("cycle_next", CycleStage.NOTHING_TO_LEARN, "nothing new")
    assert len(ask(upgraded, "/v1/learner/cycles").json()["data"]) == 2
    assert make_backup(state_of(upgraded), tmp_path / "b.tar") == []
    assert verify_backup(tmp_path / "b.tar") == []
