"""What was kept long enough goes, oldest first, and what is needed stays."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from runtime.agents import AgentsFileProblem, read_agents
from runtime.config import parse_settings
from runtime.privacy.retention import Limits, Retention
from runtime.store.agent_sizes import AgentSizes
from runtime.store.episodes import Actor, Episode, Purpose
from runtime.store.learner_lock import only_learner
from runtime.store.learning_log import CycleStage, LearningLog, LessonRole
from runtime.store.step_log import StepLog
from serve import retention_of
from tests.conftest import ServeScripted
from tests.records import make_chain, make_episode, make_step
from tests.serving import Served
from tests.test_erasure import ask, episode_of, files_with

DAY_S = 86400.0


@pytest.fixture
def server(serve_scripted: ServeScripted) -> Served:
    return serve_scripted()


def logged(log: StepLog, days_old: float, days_of_last_step: float | None = None, **fields: Any) -> Episode:
    began = time.time() - days_old * DAY_S
    episode = make_episode(created_at=began, **fields)
    first = make_step(episode, created_at=began)
    steps = [first]
    if days_of_last_step is not None:
        steps.append(make_step(episode, first, created_at=time.time() - days_of_last_step * DAY_S))
    log.append(episode, *steps).result()
    return episode


def retention(server: Served, state: Path, limits: Limits, **more: Any) -> Retention:
    assert server.parts.erasing is not None
    return Retention(state, server.parts.log, server.parts.erasing, limits, server.parts.swap.is_in_progress, **more)


def left(server: Served) -> set[str]:
    return {row["id"] for row in server.parts.log.query("SELECT id FROM episodes")}


def test_episodes_go_when_their_last_step_is_too_old_and_all_that_is_needed_stays(
    server: Served, tmp_path: Path
) -> None:
    log = server.parts.log
    old = [logged(log, 40).id, logged(log, 35, purpose=Purpose.EVALUATION).id]
    kept = {
        "young": logged(log, 3).id,
        "gone on with": logged(log, 40, 2).id,
        "imported": logged(log, 90, actor=Actor.EXPERT).id,
        "an anchor": logged(log, 90).id,
    }
    kept["promoted"] = logged(log, 60).id
    kept["its demonstration"] = logged(log, 60, actor=Actor.EXPERT, metadata={"promoted_from": kept["promoted"]}).id
    sweeping = retention(server, tmp_path, Limits(days=30), spared=[kept["an anchor"]])
    assert asyncio.run(sweeping.sweep()) == 2
    assert left(server) == set(kept.values())
    (erasure,) = ask(server, "GET", "/erasures").json()["data"]
    assert (erasure["scope"], erasure["reason"], erasure["num_episodes"]) == ("retention", "retention", 2)
    assert [each["id"] for each in ask(server, "GET", f"/erasures/{erasure['id']}").json()["episodes"]] == sorted(old)
    assert 'stepagent_erased_episodes_total{scope="retention"} 2.0' in httpx.get(f"{server.url}/metrics").text
    assert asyncio.run(sweeping.sweep()) == 0


def test_a_running_cycles_episodes_and_trials_stay_until_it_has_ended(server: Served, tmp_path: Path) -> None:
    log = server.parts.log
    read, trial, other = logged(log, 40), logged(log, 40, purpose=Purpose.EVALUATION), logged(log, 40)
    learning_log = LearningLog(tmp_path)
    learning_log.note("cycle_1", CycleStage.TRAIN)
    learning_log.note_episodes("cycle_1", "", [(LessonRole.OWN, read.id)])
    sweeping = retention(server, tmp_path, Limits(days=30))
    with only_learner(tmp_path):
        asyncio.run(sweeping.sweep())
        assert left(server) == {read.id, trial.id}
    learning_log.note("cycle_1", CycleStage.REFUSED)
    learning_log.close()
    asyncio.run(sweeping.sweep())
    assert left(server) == set()
    assert log.episode(other.id) is None


def test_an_episode_that_holds_an_adapter_is_in_progress(server: Served, tmp_path: Path) -> None:
    episode = episode_of(server, "Hi")
    sweeping = retention(server, tmp_path, Limits(days=1e-9))
    assert asyncio.run(sweeping.sweep()) == 0
    server.parts.swap.finish(episode)
    assert asyncio.run(sweeping.sweep()) == 1
    assert files_with(tmp_path, "Hi") == [] or left(server) == set()


def test_the_oldest_go_where_the_log_is_too_large(server: Served, tmp_path: Path) -> None:
    log = server.parts.log
    episodes = [make_episode(created_at=time.time() - (400 - number) * DAY_S) for number in range(300)]
    for episode in episodes:
        said = ({"role": "user", "content": "x" * 5000},)
        log.append(episode, make_step(episode, created_at=episode.created_at, new_messages=said))
    log.append(*(young := [make_episode()]), *make_chain(young[0], 3)).result()
    sweeping = retention(server, tmp_path, Limits())
    limit = sweeping.num_bytes() - 700_000
    sweeping = retention(server, tmp_path, Limits(num_bytes=limit))
    assert asyncio.run(sweeping.sweep()) == 200, "a hundred at a time, as long as it is too large"
    assert sweeping.num_bytes() <= limit
    assert left(server) == {episode.id for episode in episodes[200:]} | {young[0].id}
    assert server.parts.log.verify() == []


def test_an_agent_with_its_own_age_is_kept_shorter_or_longer_than_the_others(server: Served, tmp_path: Path) -> None:
    log = server.parts.log
    kept = {logged(log, days, agent=agent).id for days, agent in ((20, ""), (20, "other"), (5, "short"), (300, "long"))}
    for days, agent in ((40, ""), (40, "other"), (20, "short"), (400, "long")):
        logged(log, days, agent=agent)
    kept.add(logged(log, 90, actor=Actor.EXPERT, agent="short").id)
    of_agents = {"short": Limits(days=10), "long": Limits(days=365)}
    assert asyncio.run(retention(server, tmp_path, Limits(days=30), of_agents=of_agents).sweep()) == 4
    assert left(server) == kept
    logged(log, 500)
    sweeping = retention(server, tmp_path, Limits(), of_agents=of_agents)
    assert asyncio.run(sweeping.sweep()) == 0, "no limit for the others"


def test_the_limits_of_agents_are_those_of_their_file(server: Served, tmp_path: Path) -> None:
    file = tmp_path / "agents.toml"
    file.write_text("[agents.a]\nkeep_days = 7.5\n[agents.b]\nkeep_gb = 0.5\n[agents.c]\nsystem = 'Hi'\n")
    settings = parse_settings(["--agents", str(file), "--keep-days", "90", "--state", str(tmp_path / "none")])
    parts = server.parts
    assert parts.erasing is not None
    found = retention_of(settings, parts.log, parts.erasing, parts.swap)
    assert found.limits == Limits(days=90)
    assert found.of_agents == {"a": Limits(days=7.5), "b": Limits(days=90, num_bytes=500_000_000)}
    for wrong in ("keep_days = 0", "keep_gb = -1", "keep_days = inf", "keep_days = '3'"):
        file.write_text(f"[agents.a]\n{wrong}\n")
        with pytest.raises(AgentsFileProblem, match=wrong.split()[0]):
            read_agents(file)


def test_the_oldest_of_an_agent_go_where_its_own_episodes_take_too_much(server: Served, tmp_path: Path) -> None:
    log = server.parts.log

    def large(number: int, agent: str, **more: Any) -> str:
        episode = make_episode(created_at=time.time() - (400 - number) * DAY_S, agent=agent, **more)
        said = ({"role": "user", "content": "ü" * 5000},)
        log.append(episode, make_step(episode, created_at=episode.created_at, new_messages=said)).result()
        return episode.id

    wordy = [large(number, "wordy") for number in range(150)]
    others = {large(number, "quiet") for number in range(3)} | {large(0, "wordy", actor=Actor.EXPERT)}
    size = AgentSizes(log).of_episodes(wordy[:1])["wordy"]
    assert 10_000 < size < 12_000
    sweeping = retention(server, tmp_path, Limits(), of_agents={"wordy": Limits(num_bytes=60 * size)})
    assert asyncio.run(sweeping.sweep()) == 100, "a hundred at a time"
    assert left(server) == others | {*wordy[100:]}
    assert AgentSizes(log).now()["wordy"] == 50 * size
    assert asyncio.run(sweeping.sweep()) == 0
    more = [large(number + 200, "wordy") for number in range(9)]
    assert asyncio.run(sweeping.sweep()) == 0, "59 of 60 fit"
    ask(server, "DELETE", f"/episodes/{more[0]}").raise_for_status()
    more += [large(number + 300, "wordy") for number in range(2)]
    assert asyncio.run(sweeping.sweep()) == 0, "what was erased for another reason is no longer counted"
    large(390, "wordy")
    assert asyncio.run(sweeping.sweep()) == 61
    assert log.verify() == []
