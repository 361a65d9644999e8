"""The methods benchmark's own rollouts are what the server would do, and a run gives the same figures twice."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import best_of
from benchmarks.desk_rollouts import WORLD, Desk, load_policy
from benchmarks.experience import experience
from benchmarks.figures import interval
from benchmarks.graphed_lockstep import GraphedLockstep
from benchmarks.harder_worlds import ErringExpert, PermutingExpert, Resumed
from benchmarks.lockstep import Lockstep
from benchmarks.method_runs import (
    AXES,
    NUM_BRANCHES,
    NUM_FOLD_SAMPLES,
    NUM_SAMPLES,
    Run,
    Scene,
    Stage,
    with_hard_negatives,
)
from benchmarks.methods import Row, Rows, run_scene, scene_table
from benchmarks.methods import main as methods_main
from benchmarks.own_choice import majority, raft
from benchmarks.recipes import CONTROL, DEFAULT, METHODS
from learner.data.training_data import PolicyAction, State, TrainingData, Trajectory
from learner.objectives.objectives import action_sequence
from learner.objectives.states import NothingToLearn
from learner.options import CycleOptions, ObjectiveOptions, TrainingOptions
from learner.packing.prefix_tree import ScoredSequence
from learner.training.trainer import Trainer
from policies.chat.chat_protocol import ChatProtocol, action_message, message_action
from policies.novice.build import NOVICE_PATH, roll_out
from policies.types import Completion, FinishReason, TokenIds, ToolCalls
from tests.expert_sequences import expert_rows

torch.set_num_threads(1)
TASKS = [WORLD.task("train", index) for index in range(12)]


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
    return desk.own_trajectories(network, TASKS, draw(), "own", range(len(TASKS)))


class RecordingDesk(Desk):
    """Takes the steps that a GPU records, which a CPU runs as they are."""

    def _lockstep(self, network: Any, num_rows: int, generator: torch.Generator) -> Lockstep:
        return GraphedLockstep(network, num_rows, self.protocol.stop_token_ids[0], generator, self.max_action_tokens)


def expert_tokens(trajectories: Sequence[Trajectory]) -> list[tuple[int, ...]]:
    return [state.prompt + (state.expert or ()) for each in trajectories for state in each.states]


# --------------------------------------------------------------------------------------------- rollouts


def test_steps_with_every_tensor_in_its_place_are_the_same_steps(
    desk: Desk, network: Any, own: list[Trajectory], protocol: ChatProtocol
) -> None:
    recording = RecordingDesk(protocol)
    again = recording.own_trajectories(network, TASKS, draw(), "own", range(len(TASKS)))
    assert [_tokens(each) for each in again] == [_tokens(each) for each in own]
    inspected, again = (each.inspected(network, TASKS[:4], 3, draw()) for each in (desk, recording))
    assert [_tokens(each) for each in again] == [_tokens(each) for each in inspected]


def test_the_expert_is_asked_where_somebody_wants_to_know_and_the_episodes_are_the_same(
    desk: Desk, network: Any, own: list[Trajectory]
) -> None:
    again = desk.own_trajectories(network, TASKS, draw(), "own", range(1, 3))
    assert [(_tokens(each), each.outcome) for each in again] == [(_tokens(each), each.outcome) for each in own]
    assert list(again[1].states) == list(own[1].states)
    assert any(state.expert for state in again[2].states)
    others = [state for each in (again[0], *again[3:]) for state in each.states]
    assert {state.expert for state in others} == {None}
    assert {action.agrees for state in others for action in state.policy_actions} == {None}


def test_own_episodes_end_where_they_have_become_too_long(desk: Desk, network: Any, own: list[Trajectory]) -> None:
    again = desk.own_trajectories(network, TASKS, draw(), "own", (), max_steps=2)
    assert [len(each.states) for each in again] == [min(2, len(each.states)) for each in own]
    assert {each.outcome for each, whole in zip(again, own, strict=True) if len(whole.states) > 2} == {0.0}


def _tokens(trajectory: Trajectory) -> list[Any]:
    """What was read and written at each state."""
    return [(state.prompt, [action.token_ids for action in state.policy_actions]) for state in trajectory.states]


def test_greedy_attempts_end_as_those_of_transformers_generate(desk: Desk, network: Any) -> None:
    ours = desk.attempts(network, TASKS, [0.0] * len(TASKS), draw())
    theirs = roll_out(network, desk.protocol.tokenizer, TASKS)
    assert [attempt.outcome for attempt in ours] == [attempt.episode.outcome() for attempt in theirs]
    assert len({attempt.outcome for attempt in ours}) == 2


class StubbornDesk(Desk):
    """Where all rows write the same action over and over."""

    def __init__(self, protocol: ChatProtocol, action: TokenIds) -> None:
        super().__init__(protocol)
        self.said = Completion(action, (0.0,) * len(action), FinishReason.STOP)

    def _lockstep(self, network: Any, num_rows: int, generator: torch.Generator) -> Any:
        rows = SimpleNamespace(read=lambda texts: None, keep=lambda places: None)
        rows.complete = lambda temperatures: [self.said] * len(temperatures)
        return rows


def test_an_attempt_that_goes_round_in_circles_is_cut_where_that_is_asked_for(
    desk: Desk, network: Any, protocol: ChatProtocol
) -> None:
    first_of_the_expert = desk.demonstrations(TASKS[:1])[0].states[0].expert
    stubborn = StubbornDesk(protocol, first_of_the_expert or ())
    for max_repeats, num_steps in ((3, 3), (None, stubborn.max_steps)):
        stubborn.max_repeats = max_repeats
        (own,) = stubborn.own_trajectories(network, TASKS[:1], draw(), "own", range(1))
        assert (len(own.states), own.outcome) == (num_steps, 0.0)


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


def scene_of(axis: str | None = None, demonstrations: int = 2) -> Scene:
    return Scene("order_desk", "novice", NOVICE_PATH, 1, demonstrations, AXES[axis], "validation", 4, 2, 16)


def stage(folder: Path, axis: str | None = None, demonstrations: int = 2) -> Stage:
    return Stage(scene_of(axis, demonstrations), folder)


def training_data(name: str, folder: Path, axis: str | None = None) -> TrainingData:
    """What a method is given in its first cycle, from the novice."""
    return Run(stage(folder, axis), name, METHODS[name])._training_data(1)


def answered(data: TrainingData) -> list[Trajectory]:
    return [each for each in data.policy_episodes if any(state.expert is not None for state in each.states)]


def test_a_method_is_given_what_its_name_in_the_table_says_and_no_more(tmp_path: Path) -> None:
    data = training_data("sft, expert at own states", tmp_path)
    assert len(answered(data)) == 2
    assert {each.task for each in answered(data)}.isdisjoint(each.task for each in data.demonstrations)
    assert {each.outcome for each in data.policy_episodes} == {None}
    silent = [each for each in data.policy_episodes if each not in answered(data)]
    assert {a.agrees for each in silent for s in each.states for a in s.policy_actions} == {None}
    judged = training_data("rft + sft", tmp_path)
    assert answered(judged) == []
    assert {each.outcome for each in judged.policy_episodes} == {0.0, 1.0}
    assert training_data(CONTROL, tmp_path).policy_episodes == ()


def test_rarely_judged_episodes_have_an_outcome_seldom_and_the_others_none(tmp_path: Path) -> None:
    outcomes = [each.outcome for each in training_data("rft + sft", tmp_path, "25 % judged").policy_episodes]
    assert 0 < sum(outcome is not None for outcome in outcomes) < len(outcomes) / 2


def test_more_traffic_is_more_own_episodes_of_tasks_that_are_all_different(tmp_path: Path) -> None:
    tasks = [each.task for each in training_data("rft + sft", tmp_path, "4 x the traffic").policy_episodes]
    assert len(set(tasks)) == len(tasks) == 4 * scene_of().num_own_episodes


def test_only_states_that_nobody_judged_or_answered_are_sampled(tmp_path: Path) -> None:
    data = training_data("rft + sft + majority", tmp_path, "25 % judged")
    for each in data.policy_episodes:
        num_samples = {len(state.policy_actions) for state in each.states}
        if each.outcome is not None:
            assert num_samples == {1}
    assert NUM_SAMPLES in {len(s.policy_actions) for each in data.policy_episodes for s in each.states}


def test_fold_samples_are_of_policies_that_have_not_seen_the_demonstration(tmp_path: Path) -> None:
    data = training_data("implicit, folds", tmp_path)
    assert [each.task for each in data.demonstrations] == [each.task for each in stage(tmp_path).demonstrations]
    assert {len(state.policy_actions) for each in data.demonstrations for state in each.states} == {NUM_FOLD_SAMPLES}


def test_a_critical_step_is_an_action_that_led_from_a_failed_episode_to_success(tmp_path: Path) -> None:
    """The branch is played by the policy, by chance; so this holds what it must: an answer nobody but replay gave."""
    data = training_data("critical steps", tmp_path)
    assert 0 < len(answered(data)) <= NUM_BRANCHES
    for each in answered(data):
        [state] = [state for state in each.states if state.expert is not None]
        assert state.expert != state.policy_actions[0].token_ids


def test_hard_negatives_are_the_expert_s_call_with_one_argument_changed(protocol: ChatProtocol, desk: Desk) -> None:
    demonstrations = desk.demonstrations(TASKS[:3])
    changed = with_hard_negatives(demonstrations, protocol)
    num_changed = 0
    for before, after in zip(demonstrations, changed, strict=True):
        for state, harder in zip(before.states, after.states, strict=True):
            for action in harder.policy_actions:
                one, other = protocol.parse(state.expert or ()), protocol.parse(action.token_ids)
                assert isinstance(one, ToolCalls)
                assert isinstance(other, ToolCalls)
                ours, theirs = one.calls[0].arguments, other.calls[0].arguments
                assert one.calls[0].name == other.calls[0].name
                assert sum(ours[key] != theirs[key] for key in ours) == 1
                assert action.agrees is False
                num_changed += 1
    assert num_changed > 10


def test_experience_learns_what_the_world_said_and_nothing_that_the_policy_wrote(desk: Desk, network: Any) -> None:
    own = desk.own_trajectories(network, TASKS[:3], draw(), "own", range(3))
    objective = experience(TrainingData((), tuple(own)))
    texts = [desk.protocol.decode(row.token_ids[row.spans[0].start :]) for row in objective.sequences]
    assert len(texts) == sum(len(each.states) - 1 for each in own)
    assert all("tool_call>" not in text.replace("<tool_response>", "") for text in texts)


# ------------------------------------------------------------------------------------------- own choices

RIGHT, WRONG, WORSE = (7, 2), (8, 9, 2), (5, 2)


class LongestIsBest:
    def rewards(self, sequences: Sequence[ScoredSequence]) -> Sequence[float]:
        return [float(len(sequence.token_ids) - sequence.spans[0].start) for sequence in sequences]


def sampled(*actions: TokenIds, outcome: float | None = None, expert: TokenIds | None = None) -> TrainingData:
    """One own state with these samples."""
    own = tuple(PolicyAction("step", action, (-1.0,) * len(action), None) for action in actions)
    return TrainingData((), (Trajectory("g", (State("g-0", (30, 4), expert, own),), None, outcome),))


def test_majority_imitates_the_commonest_sample_of_own_states_that_nobody_answered_or_judged() -> None:
    [chosen] = majority(sampled(RIGHT, WRONG, WRONG), ObjectiveOptions()).sequences
    assert (chosen.token_ids, chosen.spans[0].start) == ((30, 4, *WRONG), 2)
    unfit = (sampled(RIGHT, RIGHT, outcome=0.0), sampled(RIGHT, RIGHT, expert=WRONG), sampled(RIGHT))
    for training_data in unfit:
        with pytest.raises(NothingToLearn, match="nobody judged"):
            majority(training_data, ObjectiveOptions())


def test_raft_imitates_what_the_discriminator_rewards_most_of_what_was_sampled_twice() -> None:
    [once] = raft(sampled(RIGHT, WORSE, WORSE, WRONG), ObjectiveOptions(), LongestIsBest()).sequences
    assert once.token_ids == (30, 4, *WORSE)
    [twice] = raft(sampled(RIGHT, WORSE, WORSE, WRONG, WRONG), ObjectiveOptions(), LongestIsBest()).sequences
    assert twice.token_ids == (30, 4, *WRONG)


# ---------------------------------------------------------------------------------------- harder worlds


def test_an_erring_expert_errs_as_often_as_asked_and_only_demonstrations_that_end_well_are_shown(
    tmp_path: Path,
) -> None:
    world = ErringExpert(WORLD, 0.25, seed=1)
    num_states = num_errors = 0
    for index in range(40):
        task = world.task("train", index)
        episode, right = world.open(task), WORLD.open(task)
        for _ in range(8):
            message, best = episode.expert_action(), right.expert_action()
            assert message is not None
            assert message == episode.expert_action()  # asked twice, the same
            num_states += 1
            num_errors += not right.same_effect(message, best)
            if not message.get("tool_calls"):
                break
            assert episode.play(message) == right.play(message)
    assert 0.15 < num_errors / num_states < 0.3
    shown = stage(tmp_path, "expert errs 0.25", demonstrations=6)
    assert len(shown.demonstrations) == len(shown.demonstrated) == 6
    assert any(len(each.states) > 8 for each in shown.demonstrations) or num_errors


def test_an_expert_who_permutes_does_either_of_two_independent_steps_first_and_still_succeeds() -> None:
    world = PermutingExpert(WORLD, seed=1)
    firsts = set()
    for index in range(30):
        task = world.task("train", index)
        episode = world.open(task)
        message = episode.expert_action()
        firsts.add(message["tool_calls"][0]["function"]["name"] if message else None)
        while message is not None and message.get("tool_calls"):
            episode.play(message)
            message = episode.expert_action()
        assert episode.outcome() == 1.0
    assert firsts == {"look_up_customer", "check_item"}


def test_a_resumed_task_goes_on_where_somebody_stopped() -> None:
    task = TASKS[0]
    episode, messages = WORLD.open(task), list(task.messages)
    for _ in range(3):
        message = episode.expert_action()
        messages += [message, *episode.play(message)]
    resumed = Resumed(WORLD).open(replace(task, messages=tuple(messages)))
    assert resumed.expert_action() == episode.expert_action()


# ------------------------------------------------------------------------------------------------- rows


def test_a_finished_run_is_read_from_its_file_and_would_come_out_the_same(tmp_path: Path) -> None:
    rows = Rows(tmp_path / "methods.json")
    scene, methods = scene_of(), [CONTROL, "rft + sft"]
    run_scene(rows, scene, methods)
    first = rows.read()
    assert [(row.method, row.is_default) for row in first] == [("rft + sft", True), (CONTROL, False)]
    written = (tmp_path / "methods.json").read_text()
    assert all(set(row) == {field.name for field in fields(Row)} for row in json.loads(written))
    run_scene(rows, scene, methods)
    assert (tmp_path / "methods.json").read_text() == written
    again = Rows(tmp_path / "again.json")
    run_scene(again, scene, methods)
    assert [(r.success_t1, r.success_greedy) for r in again.read()] == [(r.success_t1, r.success_greedy) for r in first]


def test_the_table_pairs_by_seed() -> None:
    def row(method: str, seed: int, success: float) -> Row:
        return Row(method, "order_desk", "novice", seed, 8, None, success, success, 1.0, False)

    rows = [row(CONTROL, 1, 50), row(CONTROL, 2, 70), row("rft + sft", 1, 60), row("rft + sft", 2, 80)]
    heading, best, control = scene_table(rows)
    assert (best[0], best[2], best[3]) == ("rft + sft", "70.0 ± 127.1", "+10.0 ± 0.0")
    assert control[:4] == [CONTROL, "-", "60.0 ± 127.1", ""]
    assert len(heading) == len(best)


def finished(method: str, seed: int = 1, tasks: int | None = 4, **changes: Any) -> Row:
    row = Row(method, "order_desk", "novice", seed, 2, None, 50.0, 40.0, 1.0, False, tasks)
    return replace(row, **changes)


def test_a_row_that_was_not_tried_greedily_is_no_zero_in_the_table() -> None:
    rows = [finished(CONTROL), finished("rft", success_t1=60.0, success_greedy=None)]
    assert [row[4:6] for row in scene_table(rows)[1:]] == [["", ""], ["40.0", ""]]


def test_runs_on_other_tasks_are_neither_taken_for_finished_nor_put_beside(tmp_path: Path) -> None:
    """A run of a few tasks, tried quickly, was the row that a whole one was never run for."""
    rows = Rows(tmp_path / "methods.json")
    rows.add(finished("untrained", tasks=200))
    with pytest.raises(SystemExit, match="tried on 200 tasks, not 4: take --results FILE"):
        run_scene(rows, scene_of(), ["untrained"])
    rows.add(finished("untrained", tasks=None))  # of a release that did not note it
    run_scene(rows, scene_of(), ["untrained"])
    assert rows.read() == [finished("untrained", tasks=None)]


def test_rows_of_one_cell_take_the_place_of_those_and_of_no_other(tmp_path: Path) -> None:
    """best_of put its rows in the place of all of its world, also of numbers of demonstrations not asked for."""
    rows = Rows(tmp_path / "methods.json")
    kept = [finished("sft", demonstrations=8, axis="best-of-4"), finished("sft")]
    rows.add(*kept, finished("sft, best of 4 by an older name", axis="best-of-4"), finished("sft", axis="best-of-4"))
    new = finished("sft", axis="best-of-4", success_t1=70.0)
    rows.add(new, instead_of=lambda row: row.cell)
    assert sorted(rows.read(), key=str) == sorted([*kept, new], key=str)


def test_a_cell_that_was_half_written_is_run_again_and_the_others_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[int] = []

    def run(cell: best_of.Cell, base: Path) -> dict[str, Any]:
        ran.append(cell.seed)
        return {"seed": cell.seed}

    monkeypatch.setattr(best_of, "run", run)
    first, second = (best_of.Cell("order_desk", 4, seed, 2) for seed in (1, 2))
    cells = best_of.FinishedCells(tmp_path / "cells.jsonl")
    for cell in (first, second):
        cells.result(cell, NOVICE_PATH)
    whole = (tmp_path / "cells.jsonl").read_text()
    (tmp_path / "cells.jsonl").write_text(whole[:-9])
    for _ in range(2):
        again = best_of.FinishedCells(tmp_path / "cells.jsonl")
        assert [again.result(cell, NOVICE_PATH) for cell in (first, second)] == [{"seed": 1}, {"seed": 2}]
    assert (tmp_path / "cells.jsonl").read_text() == whole
    assert ran == [1, 2, 2]


@pytest.mark.parametrize(
    ("num", "t"), [(2, 12.71), (7, 2.45), (9, 2.31), (11, 2.228), (19, 2.101), (20, 2.093), (40, 2.023)]
)
def test_an_interval_is_students_for_any_number_of_seeds(num: int, t: float) -> None:
    """Of 7 or 9 seeds best_of told none; with 11 the table of methods could not be made."""
    mean, half = interval([0.0] * (num - 1) + [float(num)])
    assert (mean, half) == (1.0, pytest.approx(t, rel=0.005))  # the deviation of these is the root of their number


@pytest.mark.parametrize("wrong", ["--methods=sfft", "--axes=noise", "--seeds=5-1", "--seeds=x", "--demonstrations=0"])
def test_options_are_checked_before_anything_runs(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["methods", wrong])
    with pytest.raises(SystemExit) as ended:
        methods_main()
    assert ended.value.code == 2


def test_the_default_of_the_table_is_the_learner_s() -> None:
    assert CycleOptions().objectives == (METHODS[DEFAULT].objective,)
    assert CycleOptions().objective.max_success_length == METHODS[DEFAULT].objectives.max_success_length
