"""A judge model ranks own episodes that nobody has judged, over real HTTP; whatever it says, a cycle goes on."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from openai import AsyncOpenAI

from learner.data.collect import LoggedEpisode
from learner.data.judge import Judge, judge_rewards, read_scores, with_judged_outcomes
from learner.data.training_data import TrainingData, Trajectory
from policies.chat.chat_protocol import ChatProtocol
from runtime.engines.embedded.engine import EmbeddedEngine
from runtime.store.learning_log import CycleStage, RewardSource
from tests.cycles import QUICK, collaborators, run
from tests.demonstrations import expert_demonstration
from tests.records import make_chain, make_episode
from tests.serving import LIMITS, MODEL, SayingEngine, Served, parts_of, served


def scored(*scores: float) -> str:
    listed = [{"id": str(number), "score": score, "reason": "so"} for number, score in enumerate(scores, 1)]
    return f"I compared them.\n```json\n{json.dumps({'scores': listed})}\n```"


def episodes(*tasks: str | None) -> list[LoggedEpisode]:
    made = [make_episode(task=task) for task in tasks]
    return [LoggedEpisode(each, tuple(make_chain(each, 2)), None) for each in made]


def judged(tmp_path: Path, protocol: ChatProtocol, says: Sequence[str], own: Sequence[LoggedEpisode]) -> Any:
    """(scores by episode, problems, the engine behind the judge)."""
    engine = SayingEngine(protocol, *says, limits=LONG)
    with served(parts_of(engine, protocol, tmp_path)) as server:
        # One group after the other: what is said is for the first that asks.
        judge = Judge(server.async_client(), MODEL, places=asyncio.Semaphore(1))
        return asyncio.run(judge.scores(own)), judge.problems, engine


LONG = replace(LIMITS, max_context_tokens=65536)


def test_attempts_at_one_task_are_scored_against_each_other_and_a_lonely_one_is_not(
    protocol: ChatProtocol, tmp_path: Path
) -> None:
    own = episodes("desk/1", "desk/2", "desk/1", None, None)
    scores, problems, engine = judged(tmp_path, protocol, [scored(0.2, 0.95), scored(1, 0)], own)
    ids = [each.episode.id for each in own]
    assert scores == {ids[0]: 0.2, ids[2]: 0.95, ids[3]: 1.0, ids[4]: 0.0}, "what has no task goes by its first state"
    assert not problems
    assert len(engine.prompts) == 2
    steps = {reward.step_id: reward.value for reward in judge_rewards("cycle_1", own, scores)}
    assert [steps[step.id] for step in own[2].path] == [0.95, 0.95]
    assert len(steps) == 8


def test_of_a_large_group_none_is_left_alone(protocol: ChatProtocol, tmp_path: Path) -> None:
    """Of nine attempts eight were judged, and the last one had no company."""
    says = [scored(0.1, 0.2, 0.3, 0.4, 0.5), scored(0.6, 0.7, 0.8, 0.9)]
    scores, problems, _ = judged(tmp_path, protocol, says, episodes(*["desk/1"] * 9))
    assert not problems
    assert sorted(scores.values()) == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]


def test_scores_become_outcomes_where_nobody_has_said_one() -> None:
    training_data = TrainingData((), (Trajectory("a", ()), Trajectory("b", ()), Trajectory("c", (), None, 0.0)))
    told = with_judged_outcomes(training_data, {"a": 0.95, "b": 0.4, "c": 1.0})
    assert [each.outcome for each in told.policy_episodes] == [1.0, 0.4, 0.0]


@pytest.mark.parametrize(
    "said",
    [
        "I would rather not.",
        "",
        '{"scores": []}',
        '{"scores": [{"id": "1", "score": 0.5}]}',
        '{"scores": [{"id": "1", "score": 0.5}, {"id": "2", "score": "high"}]}',
        '{"scores": [{"id": "1", "score": 0.5}, {"id": "2", "score": 7}]}',
        '{"scores": [{"id": "1", "score": 0.5}, {"id": "2", "score": NaN}]}',
        '{"scores": {"1": 0.5, "2": 0.5}}',
        "[" * 100_000,
        '{"a":' * 20_000,
        '{"scores": [{"id": "1", "score": 0.5}, {"id": "2", "score": 1' + "0" * 400 + "}]}",
        "}{",
    ],
)
def test_what_is_no_score_of_each_attempt_is_refused(said: str) -> None:
    with pytest.raises(ValueError, match="the judge"):
        read_scores(said, 2)


def test_a_group_that_gets_nonsense_goes_without_and_the_next_does_not(protocol: ChatProtocol, tmp_path: Path) -> None:
    own = episodes("desk/1", "desk/1", "desk/2", "desk/2")
    scores, problems, _ = judged(tmp_path, protocol, ["All fine!", scored(0.5, 0.6)], own)
    assert len(scores) == 2
    ((problem, number),) = problems.items()
    assert "no score of each attempt: 'All fine!'" in problem
    assert number == 1


def test_a_judge_that_is_not_there_is_a_problem_and_no_error() -> None:
    judge = Judge(AsyncOpenAI(base_url="http://127.0.0.1:9/v1", api_key="none", max_retries=0), "nobody")
    assert asyncio.run(judge.scores(episodes("desk/1", "desk/1"))) == {}
    assert next(iter(judge.problems)).startswith("nobody answers at 127.0.0.1:9: APIConnectionError")


def test_braces_without_end_are_read_in_seconds() -> None:
    """Each of them was tried to the end of the answer: 400 kB took the learner half a minute, and 2 MB a quarter of
    an hour."""
    began = time.monotonic()
    with pytest.raises(ValueError, match="no score of each attempt"):
        read_scores('{"scores":' * 100_000, 2)
    assert time.monotonic() - began < 15.0
    assert read_scores("{" * 100_000 + scored(0.25, 0.75), 2) == [0.25, 0.75]


def test_a_judge_may_think_aloud_before_it_answers() -> None:
    thought = '<think>Is {"scores": [{"id": "1", "score": 1}]} right? {No.</think>'
    assert read_scores(f"{thought} {scored(0.25, 0.75)}", 2) == [0.25, 0.75]


def test_there_is_a_limit_to_what_a_judge_is_asked() -> None:
    judge = Judge(AsyncOpenAI(base_url="http://127.0.0.1:9/v1", api_key="none", max_retries=0), "nobody", most_groups=1)
    asyncio.run(judge.scores(episodes("a", "a", "b", "b", "c", "c")))
    assert judge.problems["over the limit of groups"] == 2


# ------------------------------------------------------------------------------------------- whole cycles


def served_twice(server: Served, question: str) -> None:
    tools = expert_demonstration(0)["tools"]
    for seed in (1, 2):
        server.client().chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": question}], tools=tools, seed=seed
        )


def test_a_cycle_learns_what_the_judge_liked_where_nobody_said_how_it_ended(
    engine: EmbeddedEngine, protocol: ChatProtocol, tmp_path: Path
) -> None:
    options = replace(QUICK, objectives=("rft",), gate_tasks=2)
    saying = SayingEngine(protocol, scored(0.1, 1.0), scored(0.2, 0.3), limits=LONG)
    with (
        served(parts_of(engine, protocol, tmp_path / "agent")) as server,
        served(parts_of(saying, protocol, tmp_path / "judge")) as judge_server,
    ):
        for question in ("Hello there.", "Please see to order 7000."):
            served_twice(server, question)
        without = run(server, tmp_path / "agent", "cycle_1", options, experts=())
        assert without.stage is CycleStage.NOTHING_TO_LEARN
        assert "no own success can be imitated" in without.message
        judge = Judge(judge_server.async_client(), MODEL)
        status = run(server, tmp_path / "agent", "cycle_2", options, experts=(), judge=judge)
        assert status.stage in (CycleStage.PROMOTED, CycleStage.REFUSED), status.message
        assert status.report["judge"]["scored"] == 4
        rewards = collaborators(server, tmp_path / "agent").learning_log.rewards("cycle_2")
        assert sorted(each.value for each in rewards if each.source is RewardSource.JUDGE) == [0.1, 0.2, 0.3, 1.0]
        assert server.parts.log.counts()["outcomes"] == 0 or all(
            outcome.source != "judge"
            for episode in server.parts.log.episodes(limit=100)
            for outcome in server.parts.log.outcomes(episode.id)
        )
        gone = Judge(AsyncOpenAI(base_url="http://127.0.0.1:9/v1", api_key="none", max_retries=0), "nobody")
        last = run(server, tmp_path / "agent", "cycle_3", options, experts=(), judge=gone)
        assert last.stage is CycleStage.NOTHING_TO_LEARN
        assert last.report["judge"]["problems"]
