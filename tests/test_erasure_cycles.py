"""What learned from an erased episode is known, and nothing learns from one, not even a cycle that is running."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
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
from runtime.agent.served_agent import ServedAgent
from runtime.agent.tools import Toolbox
from runtime.engines.embedded.engine import EmbeddedEngine
from runtime.learning.learning import Learning
from runtime.privacy.erasing import Erasing
from runtime.privacy.retraining import Retraining
from runtime.store.adapter_registry import AdapterRegistry
from runtime.store.learner_lock import only_learner
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
        told = ask(server, "GET", f"/learner/cycles/{cycle}").json()
        assert told["stage"] == "failed"
        assert f": it had read what was erased ({erased['id']}), so start another cycle" in told["message"]
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


AGENTS = tuple(ServedAgent(name, name, Toolbox()) for name in ("day", "night"))


@pytest.fixture
def server(tiny: TinyNetwork, protocol: ChatProtocol, tmp_path: Path) -> Iterator[Served]:
    """Serves the tiny network's adapters, on an engine that says what each one's probe says."""
    registry = AdapterRegistry(tmp_path / "agent.db")
    engine = ScriptedEngine(faithful_script(registry))
    swap = Swap(engine, registry, tiny.network, agents=("", *(agent.name for agent in AGENTS)))
    parts = parts_of(engine, protocol, tmp_path, registry=registry, swap=swap, named_agents=AGENTS)
    erasing = Erasing(tmp_path, StepLog(tmp_path / "agent.db", read_only=True), registry, swap, parts.learning)
    with served(replace(parts, erasing=erasing)) as running:
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
    assert retraining["rolled_back"] == {child: clean}
    assert list(retraining["cycles"]) == [""]
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


def test_what_acts_for_any_agent_is_named_as_acting(server: Served, tiny: TinyNetwork, tmp_path: Path) -> None:
    """Only the agent whose pointer had moved last was: of the others one read that nothing acts that has learned."""
    episodes = {agent.name: episode_of(server, "Hi", model=agent.name, user="bob") for agent in AGENTS}
    log = LearningLog(tmp_path)
    for seed, (agent, episode) in enumerate(episodes.items(), 1):
        log.note_episodes(f"cycle_{agent}", "sft", [(LessonRole.OWN, episode)])
        log.note_weights(f"cycle_{agent}", "sft", weights_digest(tiny.adapter(seed)))
        taught = register(server, tiny.adapter(seed), agent=agent)
        ask(server, "POST", f"/adapters/{taught}/promote").raise_for_status()
    log.close()
    erased = ask(server, "DELETE", "/episodes", params={"user": "bob"}).raise_for_status().json()
    assert [each["is_acting"] for each in erased["adapters"]] == [True, True]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_every_agent_that_has_learned_from_it_is_retrained_one_after_the_other(
    server: Served, tiny: TinyNetwork, tmp_path: Path
) -> None:
    """With learners of its own: the second starts by itself when the first has ended. It was left to the operator."""
    names = [agent.name for agent in AGENTS]
    episodes = {name: episode_of(server, f"{SECRET}, {name}", model=name, user="bob") for name in names}
    taught: dict[str, str] = {}
    log = LearningLog(tmp_path)
    for seed, (agent, episode) in enumerate(episodes.items(), 1):
        log.note_episodes(f"cycle_{agent}", "sft", [(LessonRole.OWN, episode)])
        log.note_weights(f"cycle_{agent}", "sft", weights_digest(tiny.adapter(seed)))
        taught[agent] = register(server, tiny.adapter(seed), agent=agent)
        ask(server, "POST", f"/adapters/{taught[agent]}/promote").raise_for_status()
    log.close()
    with only_learner(tmp_path):  # as one that was started by hand, which nobody waits for
        erased = ask(server, "DELETE", "/episodes", params={"user": "bob", "retrain": "true"}).raise_for_status().json()
    retraining = erased["report"]["retraining"]
    assert retraining["rolled_back"] == {taught["day"]: "base", taught["night"]: "base"}
    assert (retraining["cycles"], retraining["agents_to_retrain"]) == ({}, ["day", "night"])

    def cycles() -> dict[str, str]:
        found = ask(server, "GET", f"/erasures/{erased['id']}").json()["report"]["retraining"]
        assert [*found["cycles"], *found["agents_to_retrain"]] == ["day", "night"]
        return found["cycles"]

    wait_until(lambda: len(cycles()) == 1, 30)
    wait_until(lambda: len(cycles()) == 2, 200)
    assert server.parts.learning is not None
    ended = {cycle.cycle: cycle.has_ended for cycle in server.parts.learning.log.cycles(limit=10)}
    assert ended[cycles()["day"]], "the second begins when the first has ended"
    wait_until(lambda: ask(server, "GET", f"/learner/cycles/{cycles()['night']}").json()["stage"] == "no_lesson", 200)
    agents = {ask(server, "GET", f"/learner/cycles/{cycle}").json()["agent"] for cycle in cycles().values()}
    assert agents == set(names)


def test_who_waits_for_a_retraining_still_waits_after_a_restart(server: Served, tmp_path: Path) -> None:
    parts = server.parts
    assert parts.erasing is not None
    assert parts.learning is not None
    episode = episode_of(server, "Hi")
    with only_learner(tmp_path):
        erased = ask(server, "DELETE", f"/episodes/{episode}", params={"retrain": "true"}).raise_for_status().json()
        learning = Learning.beside(tmp_path, parts.log, parts.registry, parts.swap, arguments=["--model", "none"])
        restarted = Retraining(parts.erasing.eraser, parts.registry, parts.swap, learning)
        assert asyncio.run(restarted.start_next()) is False, "beside a learner none starts"
        parts.learning.trigger.before_others.clear()  # the server before the restart is gone
    assert asyncio.run(restarted.start_next()) is True
    report = ask(server, "GET", f"/erasures/{erased['id']}").json()["report"]["retraining"]
    assert (list(report["cycles"]), report["agents_to_retrain"]) == ([""], [])
    assert asyncio.run(restarted.start_next()) is False
