"""What was kept long enough goes, oldest first, and what is needed stays."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from runtime.privacy.retention import Limits, Retention
from runtime.store.episodes import Actor, Episode, Purpose
from runtime.store.learner_lock import only_learner
from runtime.store.learning_log import CycleStage, LearningLog, LessonRole
from runtime.store.step_log import StepLog
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
