"""Every logged step that a cycle reads is rewarded, and a user reads which step lost an episode."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from learner.__main__ import main
from learner.data.explanation import Evidence, JudgedStep, lost_at, short, to_compare
from learner.data.rewards import agreement_rewards, logged_actions_of
from learner.data.training_data import PolicyAction, State, TrainingData, Trajectory
from learner.terminal import width
from policies.types import Action, FinalAnswer, MalformedAction, ToolCall, ToolCalls
from runtime.store.episodes import Actor, Correction, Episode, Outcome, Step, new_id
from runtime.store.learning_log import LearningLog, RewardSource, StepReward
from runtime.store.step_log import StepLog
from tests.records import make_chain, make_episode, make_step


@pytest.fixture(autouse=True)
def _no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Test runners may tell of one that is 80 columns wide."""
    monkeypatch.delenv("COLUMNS", raising=False)


def reward(step: Step, source: RewardSource, value: float, cycle: str = "cycle_1") -> StepReward:
    return StepReward(step.id, cycle, source, value)


def judged(*values: tuple[float | None, float | None], **actions: object) -> list[JudgedStep]:
    """Steps of one episode by (agreement, discriminator) rewards."""
    episode, parent, steps = make_episode(), None, list[JudgedStep]()
    for number, (agreement, logit) in enumerate(values):
        action = actions.get(f"at{number}", FinalAnswer(f"word {number}"))
        parent = make_step(episode, parent, action=action)
        given = {RewardSource.EXPERT_AGREEMENT: agreement, RewardSource.DISCRIMINATOR: logit}
        rewards = {of: reward(parent, of, value) for of, value in given.items() if value is not None}
        steps.append(JudgedStep(parent, rewards))
    return steps


# ------------------------------------------------------------------------------------ what is rewarded


def a_state(step_id: str, expert: tuple[int, ...] | None, *own: PolicyAction) -> State:
    return State(step_id, (1, 2), expert, own)


def test_experts_steps_and_held_out_ones_are_rewarded_and_no_step_twice() -> None:
    own = PolicyAction("own_1", (5,), (-0.1,), agrees=False)
    shared = Trajectory("ep_own", (a_state("own_1", (4,), own),))
    training_data = TrainingData(
        demonstrations=(Trajectory("demo", (a_state("expert_1", (4,)),), is_demonstration=True),),
        policy_episodes=(shared, shared),  # a corrected side way shares its first steps with the main line
        held_out=(
            Trajectory("kept", (a_state("expert_2", (4,)),), is_demonstration=True),
            Trajectory("own_kept", (a_state("own_2", None, PolicyAction("own_2", (6,), (-0.1,), agrees=None)),)),
        ),
    )
    assert [each.step_id for each in logged_actions_of(training_data)] == ["expert_1", "own_1", "expert_2", "own_2"]
    given = {each.step_id: each.value for each in agreement_rewards("cycle_1", training_data)}
    assert given == {"expert_1": 1.0, "own_1": 0.0, "expert_2": 1.0}  # nobody has answered at own_2
    learned = [state.id for trajectory in training_data.trajectories for state in trajectory.states]
    assert "expert_2" not in learned
    assert "own_2" not in learned


# ------------------------------------------------------------------------------------ which step lost it


def test_the_first_step_that_an_expert_contradicts_lost_a_failed_episode() -> None:
    steps = judged((1.0, 0.5), (0.0, 0.4), (0.0, -9.0))
    found = lost_at(steps, outcome=0.0)
    assert found is not None
    assert (found.index, found.evidence) == (1, Evidence.DISAGREES)


def test_a_correction_says_more_than_any_reward() -> None:
    steps = judged((0.0, 0.5), (1.0, 0.4))
    should = Correction(new_id("corr"), steps[1].step.id, FinalAnswer("better"), (1,), "ann")
    found = lost_at([steps[0], JudgedStep(steps[1].step, steps[1].rewards, (should,))], outcome=0.0)
    assert found is not None
    assert (found.index, found.evidence) == (1, Evidence.CORRECTED)
    assert found.reason == "ann says it should have been says 'better'"


def test_a_correction_that_confirms_the_step_is_no_evidence() -> None:
    (step,) = judged((None, None))
    same = Correction(new_id("corr"), step.step.id, step.step.action, (1,), "ann")
    assert lost_at([JudgedStep(step.step, {}, (same,))], outcome=0.0) is None


def test_of_several_corrections_the_newest_counts() -> None:
    """A correction that was taken back by a newer one was still the step that lost the episode."""
    (step,) = judged((None, None))
    better, same = (
        Correction(new_id("corr"), step.step.id, action, (1,), who)
        for action, who in ((FinalAnswer("better"), "ann"), (step.step.action, "bob"))
    )
    assert lost_at([JudgedStep(step.step, {}, (better, same))], outcome=0.0) is None
    found = lost_at([JudgedStep(step.step, {}, (same, better))], outcome=0.0)
    assert found is not None
    assert found.evidence is Evidence.CORRECTED


def test_learned_rewards_are_held_against_those_of_one_cycle_and_agreement_is_the_newest() -> None:
    """A cycle that reads an episode for a correction reads the way to it: its rewards have a scale of their own."""
    steps = [each.step for each in judged((None, None), (None, None), (None, None))]
    given = [
        reward(step, RewardSource.DISCRIMINATOR, value) for step, value in zip(steps, (1.0, -2.0, 0.5), strict=True)
    ]
    given += [
        reward(step, RewardSource.DISCRIMINATOR, value, "cycle_2")
        for step, value in zip(steps, (5.0, 4.0), strict=False)
    ]
    given += [
        reward(steps[0], RewardSource.EXPERT_AGREEMENT, 0.0),
        reward(steps[0], RewardSource.EXPERT_AGREEMENT, 1.0, "cycle_2"),
    ]
    found = to_compare(given)
    assert [found[step.id][RewardSource.DISCRIMINATOR].value for step in steps] == [1.0, -2.0, 0.5]
    assert found[steps[0].id][RewardSource.EXPERT_AGREEMENT].value == 1.0
    lost = lost_at([JudgedStep(step, found[step.id]) for step in steps], outcome=0.0)
    assert lost is not None
    assert (lost.index, lost.evidence) == (1, Evidence.UNLIKE_EXPERT)
    again = [reward(step, RewardSource.DISCRIMINATOR, -9.0, "cycle_3") for step in steps]
    assert {each[RewardSource.DISCRIMINATOR].cycle for each in to_compare([*given, *again]).values()} == {"cycle_3"}


def test_without_an_expert_the_discriminators_lowest_is_where_to_look() -> None:
    found = lost_at(judged((None, 1.0), (None, -2.0), (None, 0.0)), outcome=0.0)
    assert found is not None
    assert (found.index, found.evidence) == (1, Evidence.UNLIKE_EXPERT)
    assert "-2.00, the other 2 have 0.50" in found.reason


def test_what_cannot_be_read_is_named_also_where_nobody_judged() -> None:
    found = lost_at(judged((None, None), (None, None), at1=MalformedAction("<x", "no end")), outcome=None)
    assert found is not None
    assert (found.index, found.evidence) == (1, Evidence.MALFORMED)


@pytest.mark.parametrize("outcome", [1.0, None])
def test_a_learned_reward_alone_does_not_make_an_episode_lost(outcome: float | None) -> None:
    assert lost_at(judged((None, 1.0), (None, -2.0)), outcome) is None


# ------------------------------------------------------------------------------------ the command


@pytest.fixture
def failed(tmp_path: Path) -> tuple[Episode, list[Step]]:
    """An episode of three steps that failed, rewarded by two cycles."""
    log, learning_log = StepLog(tmp_path / "agent.db"), LearningLog(tmp_path)
    episode = make_episode(task="order_desk/train/1")
    steps = make_chain(episode, 2)
    steps.append(make_step(episode, steps[-1], action=ToolCalls((ToolCall("a", "pack", {"item": "mug", "count": 2}),))))
    log.append(episode, *steps, Outcome(new_id("out"), episode.id, 0.0, "world")).result()
    for cycle, values in (("cycle_1", (1.0, 1.0, 1.0)), ("cycle_2", (1.0, 1.0, 0.0))):
        learning_log.add_rewards(
            reward(step, RewardSource.EXPERT_AGREEMENT, value, cycle) for step, value in zip(steps, values, strict=True)
        )
    learning_log.close()
    log.close()
    return episode, steps


def test_a_user_reads_the_steps_of_an_episode_and_which_one_lost_it(
    failed: tuple[Episode, list[Step]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    episode, steps = failed
    assert main(["steps", episode.id, "--state", str(tmp_path)]) == 0
    said = capfd.readouterr().out
    assert f"{episode.id}  policy base, order_desk/train/1, 3 steps, outcome 0" in said
    assert "> " in next(line for line in said.splitlines() if "pack(item='mug', count=2)" in line)
    assert "lost at step 2: an expert would have done something else here (agreement 0 in cycle_2)" in said
    assert main(["steps", episode.id, "--json", "--state", str(tmp_path)]) == 0
    told = json.loads(capfd.readouterr().out)
    assert told["lost_at"]["step_id"] == steps[2].id
    assert [each["rewards"]["expert_agreement"]["cycle"] for each in told["steps"]] == ["cycle_2"] * 3


def test_an_experts_episode_and_an_unknown_one_are_answered_in_sentences(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    log = StepLog(tmp_path / "agent.db")
    episode = make_episode(actor=Actor.EXPERT, adapter="ann")
    log.append(episode, *make_chain(episode, 1)).result()
    log.close()
    assert main(["steps", episode.id, "--state", str(tmp_path)]) == 0
    said = capfd.readouterr().out
    assert "no cycle has rewarded these steps yet" in said
    assert "nothing speaks against any step: nobody has said how it ended" in said
    assert main(["steps", "ep_none", "--state", str(tmp_path)]) == 1
    assert "the episode 'ep_none' is not in" in capfd.readouterr().err


def said_of(tmp_path: Path, capfd: pytest.CaptureFixture[str], *actions: Action, task: str | None = None) -> list[str]:
    """What is printed of an episode of these actions: the table, and as JSON."""
    log, episode, steps = StepLog(tmp_path / "agent.db"), make_episode(task=task), list[Step]()
    for action in actions:
        steps.append(make_step(episode, steps[-1] if steps else None, action=action))
    log.append(episode, *steps, Outcome(new_id("out"), episode.id, 0.0, "world")).result()
    log.close()
    LearningLog(tmp_path).close()
    said = []
    for more in ([], ["--json"]):
        assert main(["steps", episode.id, "--state", str(tmp_path), *more]) == 0
        said.append(capfd.readouterr().out)
    return said


def test_what_a_policy_or_a_user_writes_cannot_speak_to_the_terminal(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    call = ToolCalls((ToolCall("a", "na\x1b[31mme\n", {"k\n\x1b[2J": "\u202ev"}),))
    broken = MalformedAction("<x", "the arguments\nof \x1b[8m are none")
    table, told = said_of(tmp_path, capfd, call, broken, task="desk\n\x1b]0;owned\x07")
    assert table.replace("\n", "").isprintable()
    assert len(table.splitlines()) == 6, "a line a step"
    assert "it cannot be read as an action: the arguments\\nof \\x1b[8m are none" in table
    assert json.loads(told)["task"] == "desk\n\x1b]0;owned\x07"


def test_rewards_of_steps_beside_the_main_line_are_in_the_json(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    log, episode = StepLog(tmp_path / "agent.db"), make_episode()
    beside, chosen = make_step(episode, action=FinalAnswer("no")), make_step(episode, action=FinalAnswer("yes"))
    log.append(episode, beside, chosen).result()
    log.close()
    learning_log = LearningLog(tmp_path)
    learning_log.add_rewards([reward(beside, RewardSource.IMPLICIT, -1.0), reward(chosen, RewardSource.IMPLICIT, 1.0)])
    learning_log.close()
    assert main(["steps", episode.id, "--state", str(tmp_path), "--json"]) == 0
    told = json.loads(capfd.readouterr().out)
    rewarded = [[each["rewards"]["implicit"]["value"] for each in told[key]] for key in ("steps", "steps_beside")]
    assert (rewarded, told["num_steps_beside"]) == ([[1.0], [-1.0]], 1)


def test_letters_of_any_width_stand_in_columns_and_half_ones_are_told(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    table, told = said_of(tmp_path, capfd, FinalAnswer("日本語の答え" * 30), FinalAnswer("e\u0301\ud800"))
    rows = table.splitlines()[1:4]
    places = [width(row[: row.rindex("  -")]) if "  -" in row else None for row in rows]
    assert places[1] == places[2]
    assert "says 'e\u0301\\ud800'" in rows[2]
    assert told.isascii()
    assert json.loads(told)["steps"][1]["action"]["content"] == "e\u0301\ud800"


def test_on_a_narrow_terminal_an_action_is_cut_shorter(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    table, _ = said_of(tmp_path, capfd, FinalAnswer("x" * 1_000_000))
    assert max(map(len, table.splitlines()[1:3])) <= 80
    assert len(short(FinalAnswer("x" * 1_000_000))) == 72


def test_a_reader_who_has_had_enough_and_one_with_few_letters_are_no_errors(tmp_path: Path) -> None:
    log, episode = StepLog(tmp_path / "agent.db"), make_episode()
    steps = make_chain(episode, 400)
    log.append(episode, make_step(episode, action=FinalAnswer("größer 日本 😀")), *steps).result()
    log.close()
    LearningLog(tmp_path).close()
    command = f"{sys.executable} -m learner steps {episode.id} --state {tmp_path}"
    few = {**os.environ, "PYTHONIOENCODING": "ascii"}
    ended = subprocess.run(
        f"{command} | head -1; {command} --json | head -c 5", shell=True, capture_output=True, env=few
    )
    assert (ended.stderr, ended.stdout[:3]) == (b"", b"ep_")


def test_a_damaged_step_is_told_in_a_sentence(
    failed: tuple[Episode, list[Step]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    episode, steps = failed
    db = sqlite3.connect(tmp_path / "agent.db")
    db.execute("DROP TRIGGER steps_refuse_update")
    db.execute("UPDATE steps SET action = '{' WHERE id = ?", [steps[1].id])
    db.commit()
    db.close()
    assert main(["steps", episode.id, "--state", str(tmp_path)]) == 1
    said = capfd.readouterr()
    assert (said.out, f"{steps[1].id} is damaged" in said.err) == ("", True)
