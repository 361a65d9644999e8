"""The methods benchmark's own rollouts are what the server would do, and a run gives the same figures twice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.desk_rollouts import WORLD, Desk, load_policy
from benchmarks.methods import METHODS, Answers, FinishedRuns, Run, Scene, run
from learner.data.training_data import Trajectory
from learner.objectives.objectives import action_sequence
from learner.options import TrainingOptions
from learner.training.trainer import Trainer
from policies.chat.chat_protocol import ChatProtocol, action_message, message_action
from policies.novice.build import NOVICE_PATH, roll_out
from tests.expert_sequences import expert_rows

torch.set_num_threads(1)
TASKS = [WORLD.task("train", index) for index in range(12)]
SCENE = Scene(seed=1, num_demonstrations=2, split="validation", num_tasks=4, num_cycles=1)


def draw() -> torch.Generator:
    return torch.Generator().manual_seed(5)


@pytest.fixture(scope="module")
def desk(protocol: ChatProtocol) -> Desk:
    return Desk(protocol)


@pytest.fixture(scope="module")
def network() -> Any:
    return load_policy(NOVICE_PATH, None)


@pytest.fixture(scope="module")
def own(desk: Desk, network: Any) -> list[Trajectory]:
    return desk.own_trajectories(network, TASKS, draw(), "own")


def expert_tokens(trajectories: Sequence[Trajectory]) -> list[tuple[int, ...]]:
    return [state.prompt + (state.expert or ()) for each in trajectories for state in each.states]


# --------------------------------------------------------------------------------------------- rollouts


def test_greedy_attempts_end_as_those_of_transformers_generate(desk: Desk, network: Any) -> None:
    ours = desk.attempts(network, TASKS, [0.0] * len(TASKS), draw())
    theirs = roll_out(network, desk.protocol.tokenizer, TASKS)
    assert [attempt.outcome for attempt in ours] == [attempt.episode.outcome() for attempt in theirs]
    assert len({attempt.outcome for attempt in ours}) == 2


def test_own_actions_carry_the_logprobs_that_the_trainer_finds_for_them(own: list[Trajectory]) -> None:
    rows = [action_sequence(s.prompt, s.policy_actions[0].token_ids, (s.id,)) for each in own for s in each.states]
    logged = [logprob for each in own for s in each.states for logprob in s.policy_actions[0].behavior_logprobs]
    scored = torch.cat(Trainer(NOVICE_PATH, None, TrainingOptions(), "cpu").logprobs(rows))
    torch.testing.assert_close(torch.tensor(logged), scored, atol=1e-4, rtol=0)


def test_prompts_and_outcomes_are_those_of_the_conversation_replayed(desk: Desk, own: list[Trajectory]) -> None:
    protocol = desk.protocol
    for task, trajectory in zip(TASKS, own, strict=True):
        episode, messages = WORLD.open(task), list(task.messages)
        for state in trajectory.states:
            assert state.prompt == protocol.render(messages)
            assert state.expert == protocol.completion_of(messages, message_action(episode.expert_action()))[1]
            message = action_message(protocol.parse(state.policy_actions[0].token_ids))
            assert state.policy_actions[0].agrees == episode.same_effect(message, episode.expert_action())
            messages += [message, *episode.play(message)]
        assert trajectory.outcome == episode.outcome()
    assert {action.agrees for each in own for state in each.states for action in state.policy_actions} == {True, False}


def test_inspection_shows_the_expert_s_episodes_with_samples_at_each_state(desk: Desk, network: Any) -> None:
    rows = expert_rows(desk.protocol, "train", 3)
    assert expert_tokens(desk.demonstrations(TASKS[:3])) == [row.token_ids for row in rows]
    inspected = desk.inspected(network, TASKS[:3], 3, draw())
    assert expert_tokens(inspected) == [row.token_ids for row in rows]
    assert {len(state.policy_actions) for each in inspected for state in each.states} == {3}
    own = [(state.prompt, action) for each in inspected for state in each.states for action in state.policy_actions]
    scored = Trainer(NOVICE_PATH, None, TrainingOptions(), "cpu").logprobs(
        [action_sequence(prompt, action.token_ids, (place,)) for place, (prompt, action) in enumerate(own)]
    )
    logged = torch.tensor([logprob for _, action in own for logprob in action.behavior_logprobs])
    torch.testing.assert_close(logged, torch.cat(scored), atol=1e-4, rtol=0)


# ------------------------------------------------------------------------------------------------- runs


@pytest.mark.parametrize(
    ("answers", "num_answered"),
    [(Answers.NONE, 0), (Answers.DEMONSTRATED, 2), (Answers.FRESH, 2), (Answers.FAILED, 2)],
)
def test_an_expert_answers_at_as_many_own_episodes_as_there_are_demonstrations(
    desk: Desk, network: Any, tmp_path: Path, answers: Answers, num_answered: int
) -> None:
    method = replace(METHODS["rft"], answers=answers)
    training_data = Run(desk, method, SCENE, tmp_path)._material(network, 0)
    answered = [
        each for each in training_data.policy_episodes if any(state.expert is not None for state in each.states)
    ]
    demonstrated = {each.task for each in training_data.demonstrations}
    assert len(answered) == num_answered
    assert all((each.task in demonstrated) == (answers is Answers.DEMONSTRATED) for each in answered)
    if answers is Answers.FAILED:
        assert {each.outcome for each in answered} == {0.0}
    silent = [
        action.agrees
        for each in training_data.policy_episodes
        if each not in answered
        for s in each.states
        for action in s.policy_actions
    ]
    assert set(silent) == {None}


def test_a_finished_run_is_read_from_its_file_and_would_come_out_the_same(desk: Desk, tmp_path: Path) -> None:
    method = METHODS["sft"]
    first = FinishedRuns(tmp_path / "runs.jsonl", desk).results(method, SCENE)
    written = (tmp_path / "runs.jsonl").read_text()
    again = FinishedRuns(tmp_path / "runs.jsonl", desk).results(method, SCENE)
    assert [asdict(result) for result in again] == [asdict(result) for result in first]
    assert (tmp_path / "runs.jsonl").read_text() == written
    afresh = run(desk, method, SCENE)
    assert [(r.greedy, r.sampled, r.diagnostics) for r in afresh] == [
        (r.greedy, r.sampled, r.diagnostics) for r in first
    ]
