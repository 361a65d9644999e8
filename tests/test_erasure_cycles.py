"""What learned from an erased episode is known, and nothing learns from one, not even a cycle that is running."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from learner.__main__ import main as learner
from learner.data.collect import LoggedState
from learner.data.experts import ExpertAnswer
from policies.adapters.files import weights_digest
from policies.chat.chat_protocol import ChatProtocol
from policies.types import FinalAnswer
from runtime.adapters.swap import Swap
from runtime.engines.embedded.engine import EmbeddedEngine
from runtime.privacy.erasing import Erasing
from runtime.store.adapter_registry import AdapterRegistry
from runtime.store.learning_log import CycleStage, LearningLog, LessonRole
from runtime.store.lineage import Lineage
from runtime.store.step_log import StepLog
from tests.cycles import WORLD, run
from tests.demonstrations import expert_demonstration, post
from tests.scripted_engine import ScriptedEngine
from tests.serving import MODEL, SayingEngine, Served, parts_of, served, wait_until
from tests.test_erasure import SECRET, ask, episode_of, files_with
from tests.tiny_adapters import TinyNetwork, faithful_script


def promoted_to_demonstration(server: Served, episode: str) -> str:
    ask(server, "POST", f"/episodes/{episode}/outcome", json={"value": 1.0}).raise_for_status()
    return ask(server, "POST", f"/episodes/{episode}/promote").raise_for_status().json()["id"]


def test_a_running_cycle_that_has_read_an_erased_episode_is_ended_and_named(
    novice_engine: EmbeddedEngine, protocol: ChatProtocol, tmp_path: Path
) -> None:
    with served(parts_of(novice_engine, protocol, tmp_path)) as server:
        post(server, *(expert_demonstration(number) for number in range(12))).raise_for_status()
        episode = episode_of(server, f"{SECRET} orders a globe.", max_tokens=8)
        assert server.parts.learning is not None
        process = server.parts.learning.process
        cycle = ask(server, "POST", "/learner/cycles").json()["id"]
        wait_until(lambda: Lineage(tmp_path).cycles_of([episode]) == [cycle], 240)
        assert process.running == cycle
        erased = ask(server, "DELETE", f"/episodes/{episode}").raise_for_status().json()
        assert process.running is None
        assert (erased["cycles"], erased["report"]["ended_cycle"]) == ([cycle], cycle)
        assert ask(server, "GET", f"/learner/cycles/{cycle}").json()["stage"] == "failed"
        assert not (tmp_path / "candidates").exists()
        assert files_with(tmp_path, SECRET) == []


def test_a_cycle_whose_episode_is_erased_meanwhile_ends_without_an_adapter(
    protocol: ChatProtocol, tmp_path: Path
) -> None:
    """As a learner that was started by hand, which the server cannot end."""

    class ErasingExpert:
        """An expert who sees to it that the state he is asked about is erased."""

        async def answer(self, state: LoggedState) -> ExpertAnswer:
            async with httpx.AsyncClient() as client:
                await client.delete(f"{server.url}/v1/episodes/{state.step.episode_id}", timeout=30)
            return ExpertAnswer(FinalAnswer("Good day."), "an expert")

    with served(parts_of(SayingEngine(protocol), protocol, tmp_path)) as server:
        episode = episode_of(server, f"{SECRET} was here.")
        status = run(server, tmp_path, experts=(ErasingExpert(),))
        assert status.stage is CycleStage.FAILED
        assert f"were erased meanwhile ({episode}" in status.message
        assert ask(server, "GET", "/adapters").json()["data"] == []


def test_what_taught_an_adapter_is_on_record_in_both_directions(
    engine: EmbeddedEngine, protocol: ChatProtocol, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A real cycle; and what it leaves of an erased episode: neither words nor tokens, also beside its adapter."""
    with served(parts_of(engine, protocol, tmp_path)) as server:
        post(server, *(expert_demonstration(number) for number in range(2))).raise_for_status()
        asked = WORLD.task("train", 50).messages[-1]["content"]
        episode = episode_of(server, asked, tools=None, temperature=0)
        demonstration = promoted_to_demonstration(server, episode)
        status = run(server, tmp_path)
        assert status.stage in (CycleStage.PROMOTED, CycleStage.REFUSED), status.message
        adapters = ask(server, "GET", "/adapters").json()["data"]
        assert adapters
        for adapter in adapters:
            lessons = ask(server, "GET", f"/adapters/{adapter['name']}/lineage").json()["own"]
            assert lessons["cycle"] == "cycle_1"
            assert len(lessons["demonstrations"]) == 3
            assert demonstration in lessons["demonstrations"]
            assert episode in lessons["own_episodes"]
        of_episode = ask(server, "GET", f"/episodes/{episode}/lineage").json()
        assert of_episode["demonstrations"] == [demonstration]
        assert [each["name"] for each in of_episode["adapters"]] == [adapter["name"] for adapter in adapters]
        for name in (episode, adapters[0]["name"]):
            assert learner(["lineage", name, "--state", str(tmp_path)]) == 0
            assert demonstration in capsys.readouterr().out
        assert learner(["lineage", "nobody", "--state", str(tmp_path)]) == 1
        erased = ask(server, "DELETE", f"/episodes/{episode}").raise_for_status().json()
        assert [each["name"] for each in erased["adapters"]] == [adapter["name"] for adapter in adapters]
        assert {each["cause"] for each in erased["episodes"]} == {"named", "promoted", "copied"}
        assert erased["cycles"] == ["cycle_1"]
        assert files_with(tmp_path, asked) == []
        assert ask(server, "GET", f"/adapters/{adapters[0]['name']}/lineage").json()["own"]["erased"]
        assert server.parts.log.verify() == []


# ------------------------------------------------------------------------------------ adapters that act already


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyNetwork:
    return TinyNetwork(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def server(tiny: TinyNetwork, protocol: ChatProtocol, tmp_path: Path) -> Iterator[Served]:
    """Serves the tiny network's adapters, on an engine that says what each one's probe says."""
    registry = AdapterRegistry(tmp_path / "agent.db")
    engine = ScriptedEngine(faithful_script(registry))
    swap = Swap(engine, registry, tiny.network)
    parts = parts_of(engine, protocol, tmp_path, registry=registry, swap=swap)
    erasing = Erasing(tmp_path, StepLog(tmp_path / "agent.db", read_only=True), registry, swap, parts.learning)
    parts = parts_of(engine, protocol, tmp_path, registry=registry, swap=swap, erasing=erasing)
    with served(parts) as running:
        yield running


def register(server: Served, path: Path, **more: Any) -> str:
    return ask(server, "POST", "/adapters", json={"path": str(path), **more}).raise_for_status().json()["name"]


def test_adapters_that_learned_from_it_are_named_and_a_retraining_goes_on_from_what_has_not(
    server: Served, tiny: TinyNetwork, tmp_path: Path
) -> None:
    episode = episode_of(server, "Hi")
    log = LearningLog(tmp_path)
    log.note_episodes("cycle_1", "sft", [(LessonRole.OWN, episode)])
    log.note_weights("cycle_1", "sft", weights_digest(tiny.adapter(2)))
    log.note_weights("cycle_1", "sft", weights_digest(tiny.adapter(4)))
    log.close()
    clean = register(server, tiny.adapter(1))
    taught = register(server, tiny.adapter(2), parent=clean)
    ask(server, "POST", f"/adapters/{clean}/promote").raise_for_status()
    ask(server, "POST", f"/adapters/{taught}/promote").raise_for_status()
    child = register(server, tiny.adapter(3), parent=taught)
    ask(server, "POST", f"/adapters/{child}/promote").raise_for_status()
    erased = ask(server, "DELETE", f"/episodes/{episode}", params={"retrain": "true"}).raise_for_status().json()
    named = {each["name"]: (each["learned"], each["inherited_from"]) for each in erased["adapters"]}
    assert named == {taught: ([episode], None), child: ([], taught)}
    retraining = erased["report"]["retraining"]
    assert (retraining["rolled_back"], retraining["acting"]) == (child, clean)
    assert retraining["cycle"] is not None
    assert {each["name"]: each["is_acting"] for each in ask(server, "GET", "/adapters").json()["data"]}[clean]
    late = register(server, tiny.adapter(4), parent=clean)
    refused = ask(server, "POST", f"/adapters/{late}/promote", json={"is_proposal": True})
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "learned_from_erased")


def test_without_being_asked_for_a_retraining_nothing_is_rolled_back(
    server: Served, tiny: TinyNetwork, tmp_path: Path
) -> None:
    episode = episode_of(server, "Hi")
    log = LearningLog(tmp_path)
    log.note_episodes("cycle_1", "sft", [(LessonRole.OWN, episode)])
    log.note_weights("cycle_1", "sft", weights_digest(tiny.adapter(2)))
    log.close()
    taught = register(server, tiny.adapter(2))
    ask(server, "POST", f"/adapters/{taught}/promote").raise_for_status()
    erased = ask(server, "DELETE", f"/episodes/{episode}").raise_for_status().json()
    assert [(each["name"], each["is_acting"]) for each in erased["adapters"]] == [(taught, True)]
    assert "retraining" not in erased["report"]
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "tools": []}
    assert httpx.post(f"{server.url}/v1/chat/completions", json=body).headers["x-adapter"] == taught
