"""The learner's tables: a cycle has a beginning and one ending, rewards and decisions are kept as they were given."""

from __future__ import annotations

import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from runtime.store.episodes import Actor, Episode, Purpose, new_id
from runtime.store.learning_log import CycleStage, LearningLog, RewardSource, StepReward
from runtime.store.step_log import StepLog


@pytest.fixture
def log(tmp_path: Path) -> LearningLog:
    return LearningLog(tmp_path)


def test_a_cycle_shows_its_newest_stage_and_when_it_began(log: LearningLog) -> None:
    log.note("c1", CycleStage.COLLECT)
    log.note("c1", CycleStage.TRAIN, "epoch 1", done=3, total=10, report={"kept": 5})
    status = log.status("c1")
    assert status is not None
    assert (status.stage, status.done, status.total, status.report) == (CycleStage.TRAIN, 3, 10, {"kept": 5})
    assert status.started_at <= status.created_at


def test_an_ended_cycle_cannot_go_on(log: LearningLog) -> None:
    log.note("c1", CycleStage.REFUSED, "not better")
    with pytest.raises(ValueError, match="ended as refused"):
        log.note("c1", CycleStage.TRAIN)


def test_a_killed_learners_cycle_is_failed_at_the_next_start(tmp_path: Path) -> None:
    first = LearningLog(tmp_path)
    first.note("c1", CycleStage.PROMOTED)
    first.note("c2", CycleStage.GATE)
    second = LearningLog(tmp_path)
    assert second.fail_unfinished() == ["c2"]
    status = second.status("c2")
    assert status is not None
    assert status.stage is CycleStage.FAILED
    assert "gate" in status.message


def test_a_killed_cycle_ran_until_it_was_last_heard_of_and_what_it_knew_stays_known(log: LearningLog) -> None:
    """A cycle that died after minutes, and was marked at the next start, was told to have run for days; and its report,
    with what an expert had answered to every question, was empty since."""
    days_ago = time.time() - 300_000
    log.note("c1", CycleStage.COLLECT, created_at=days_ago)
    log.note("c1", CycleStage.TRAIN, report={"expert_problems": {"silent": 8}}, created_at=days_ago + 90)
    log.fail_unfinished()
    status = log.status("c1")
    assert status is not None
    assert status.stage is CycleStage.FAILED
    assert status.created_at - status.started_at == pytest.approx(90)
    assert status.report == {"expert_problems": {"silent": 8}}


def test_rewards_are_kept_and_not_given_twice(log: LearningLog) -> None:
    reward = StepReward("step_1", "c1", RewardSource.EXPERT_AGREEMENT, 1.0)
    log.add_rewards([reward, StepReward("step_1", "c1", RewardSource.IMPLICIT, -0.25)])
    assert reward in log.rewards("c1")
    with pytest.raises(sqlite3.IntegrityError):
        log.add_rewards([StepReward("step_2", "c1", RewardSource.IMPLICIT, 0.0), reward])
    assert len(log.rewards("c1")) == 2


def test_no_fact_can_be_edited(log: LearningLog) -> None:
    log.note("c1", CycleStage.COLLECT)
    log.add_decision("c1", "agent-v0001", "base", True, "better", {"gain": 0.2})
    for statement in ("UPDATE cycles SET stage = 'promoted'", "DELETE FROM gate_decisions"):
        with pytest.raises(sqlite3.IntegrityError, match="append-only"):
            log.db.execute(statement)
    assert log.decisions("c1")[0]["evidence"] == {"gain": 0.2}


def test_the_cursor_is_that_of_the_last_cycle_that_did_not_fail(log: LearningLog) -> None:
    assert log.last_step_seen() is None
    log.note("c1", CycleStage.REFUSED, last_step_id="step_7")
    log.note("c2", CycleStage.FAILED, last_step_id="step_9")
    assert log.last_step_seen() == "step_7"


def test_two_writers_of_one_file_wait_for_each_other(tmp_path: Path) -> None:
    """A cycle once failed, "database is locked": its transaction had read before it wrote, and the server wrote."""
    path = tmp_path / "agent.db"
    log = LearningLog(tmp_path)
    step_log = StepLog(path)
    episodes = (Episode(new_id("ep"), Actor.POLICY, Purpose.SERVE, "base") for _ in range(400))
    with ThreadPoolExecutor(2) as pool:
        appended = pool.submit(lambda: [step_log.append(episode).result() for episode in episodes])
        while not appended.done():
            log.note("c1", CycleStage.TRAIN)
            log.add_decision("c1", "agent-v0001", "base", False, "no", {})
        appended.result()
    step_log.close()
