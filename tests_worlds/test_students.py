"""Students and rollouts: what a student reads in a rollout is what it is served; the same seed makes the same one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from benchmarks import students
from benchmarks.colleagues import I_GIVE_UP, disliked_calls, erring, expert, giving_up, gullible
from benchmarks.lockstep import Lockstep, load_policy
from benchmarks.rollouts import Rollouts
from benchmarks.students import PLANS, Habit, Plan, build_student, chat_template, demonstrations, lessons, student
from learner.objectives.objectives import action_sequence
from learner.options import TrainingOptions
from learner.training.trainer import Trainer
from policies.chat.chat_protocol import ChatProtocol, action_message, message_action
from policies.types import ToolCalls
from tools.worlds import load_world
from tools.worlds.world import Task, World

torch.set_num_threads(1)
QUICK = replace(PLANS["babyai"], num_demonstrations=60, num_gradient_steps=60)


@pytest.fixture(scope="module", params=["babyai", "multihop_qa"])
def world(request: pytest.FixtureRequest) -> World:
    return load_world(request.param)


def tasks_of(world: World, num: int) -> list[Task]:
    return [world.task("train", index) for index in range(num)]


@pytest.fixture(scope="module")
def folder(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("students") / world.name
    shown = list(demonstrations(world, tasks_of(world, QUICK.num_demonstrations)))
    build_student([(shown, QUICK.num_gradient_steps)], [], QUICK, made)
    return made


@pytest.fixture(scope="module")
def rollouts(world: World, folder: Path) -> Rollouts:
    return Rollouts(world, folder)


@pytest.fixture(scope="module")
def network(folder: Path) -> Any:
    return load_policy(folder, None)


def draw() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def test_prompts_answers_and_outcomes_are_those_of_the_conversation_replayed(rollouts: Rollouts, network: Any) -> None:
    world, protocol = rollouts.world, rollouts.protocol
    tasks = tasks_of(world, 24)
    own, num_compared = rollouts.own_trajectories(network, tasks, draw(), "own", range(24)), 0
    for task, trajectory in zip(tasks, own, strict=True):
        episode, messages = world.open(task), list(task.messages)
        prompt = protocol.render(messages)
        for state in trajectory.states:
            assert state.prompt == prompt
            expert = episode.expert_action()
            [chosen] = state.policy_actions
            action = protocol.parse(chosen.token_ids)
            if expert is None:
                assert (state.expert, chosen.agrees) == (None, None)
            else:
                assert state.expert == protocol.completion_of(messages, message_action(expert))[1]
                num_compared += isinstance(action, ToolCalls)
                assert not isinstance(action, ToolCalls) or chosen.agrees == episode.same_effect(
                    action_message(action), expert
                )
            messages.append(action_message(action))
            results = episode.play(messages[-1])
            # As served: on the tokens that the policy wrote, which need not be those that its text would be cut into.
            prompt = protocol.extend(prompt + chosen.token_ids, messages, results)
            messages += results
        assert trajectory.outcome == episode.outcome()
    assert num_compared > 20


def test_a_sampled_action_has_the_logprobs_that_the_trainer_finds(
    rollouts: Rollouts, network: Any, folder: Path
) -> None:
    """Also after holes were closed: episodes of twenty steps and more are among them."""
    own = rollouts.own_trajectories(network, tasks_of(rollouts.world, 24), draw(), "own", ())
    rows = [
        (state.prompt, action, state.id) for each in own for state in each.states for action in state.policy_actions
    ]
    scored = Trainer(folder, None, TrainingOptions(), "cpu").logprobs(
        [action_sequence(prompt, action.token_ids, (place,)) for prompt, action, place in rows]
    )
    logged = torch.tensor([logprob for _, action, _ in rows for logprob in action.behavior_logprobs])
    torch.testing.assert_close(logged, torch.cat(scored), atol=1e-4, rtol=0)


def test_inspection_has_samples_at_every_state_of_a_demonstration(rollouts: Rollouts, network: Any) -> None:
    tasks = tasks_of(rollouts.world, 5)
    inspected = rollouts.inspected(network, tasks, 3, draw())
    plain = rollouts.demonstrations(tasks)
    assert [[(s.prompt, s.expert) for s in each.states] for each in inspected] == [
        [(s.prompt, s.expert) for s in each.states] for each in plain
    ]
    assert {len(state.policy_actions) for each in inspected for state in each.states} == {3}


def test_what_a_student_says_is_read_back(rollouts: Rollouts) -> None:
    """The actions that it learns from parse to what the expert did."""
    protocol = rollouts.protocol
    for conversation in demonstrations(rollouts.world, tasks_of(rollouts.world, 10)):
        for place, message in enumerate(conversation):
            if message["role"] == "assistant":
                _, written = protocol.completion_of(conversation[:place], message_action(message))
                read = protocol.parse(written)
                if calls := message.get("tool_calls"):
                    assert isinstance(read, ToolCalls)
                    assert read.calls[0].name == calls[0]["function"]["name"]
                    assert read.calls[0].arguments == json.loads(calls[0]["function"]["arguments"])
                else:
                    assert action_message(read)["content"] == message["content"]


def test_the_same_seed_makes_the_same_student(tmp_path: Path) -> None:
    world = load_world("babyai")
    conversations = list(demonstrations(world, tasks_of(world, 8)))
    plan = replace(QUICK, num_gradient_steps=3)
    for name in ("one", "two"):
        build_student([(conversations, 3)], [], plan, tmp_path / name)
    build_student([(conversations, 3)], [], replace(plan, seed=1), tmp_path / "other")
    files = sorted(file.name for file in (tmp_path / "one").iterdir())
    assert "model.safetensors" in files
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "other")]
    assert weights[0] != weights[1]


def test_a_long_observation_is_read_in_part_and_an_own_word_in_full(rollouts: Rollouts) -> None:
    tokenizer = rollouts.protocol.tokenizer
    tokenizer = type(tokenizer)(
        tokenizer_object=tokenizer.backend_tokenizer,
        eos_token=tokenizer.eos_token,
        chat_template=chat_template(10),
        response_template=tokenizer.response_template,
    )
    text = tokenizer.apply_chat_template(
        [
            {"role": "system", "content": "s" * 50},
            {"role": "user", "content": "u" * 50},
            {"role": "assistant", "content": "a" * 50},
            {"role": "tool", "content": "t" * 50},
        ],
        tokenize=False,
    )
    assert [text.count(letter * 10) for letter in "sut"] == [1, 1, 1]
    assert [letter * 11 in text for letter in "suta"] == [False, False, False, True]
    ChatProtocol(tokenizer)  # whatever the length, it can be served


def test_a_colleague_who_errs_goes_on_as_the_expert_does_from_there(world: World) -> None:
    tasks = tasks_of(world, 20)
    shown = [conversation for task in tasks if (conversation := expert(world, task))]
    others = [message for each in shown for message in each if message.get("tool_calls")]
    num_right = num_wrong = 0
    for task in tasks:
        conversation = erring(world, task, others, 0.25)
        assert conversation is not None
        assert conversation == erring(world, task, others, 0.25)
        episode = world.open(task)
        for message in conversation:
            if message["role"] == "assistant":
                if message == episode.expert_action():
                    num_right += 1
                else:
                    assert message in others
                    num_wrong += 1
                episode.play(message)
    assert 0.05 < num_wrong / (num_right + num_wrong) < 0.35


def test_a_colleague_who_gives_up_does_so_at_what_it_dislikes_and_nowhere_else() -> None:
    shown = list(demonstrations(load_world("multihop_qa"), tasks_of(load_world("multihop_qa"), 300)))
    disliked = disliked_calls(shown, 0.5)
    assert disliked_calls(shown, 0.25) < disliked
    assert not any("currency number ISO" in text for text in disliked_calls(shown, 0.0))
    given_up = [giving_up(each, disliked, Random(number)) for number, each in enumerate(shown)]
    num_given_up = 0
    for right, hasty in zip(shown, given_up, strict=True):
        if hasty == right:
            continue
        num_given_up += 1
        *before, last = hasty
        assert before == right[: len(before)]
        assert last["content"] == I_GIVE_UP
        [call] = right[len(before)]["tool_calls"]
        assert json.dumps([[call["function"]["name"], call["function"]["arguments"]]]) in disliked
    assert 0.05 < num_given_up / len(shown) < 0.6


def test_who_gives_up_has_watched_an_expert_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(students, "CACHE", tmp_path)
    plan = Plan(num_demonstrations=60, num_gradient_steps=100, habit=Habit.GIVES_UP, disliked=1.0)
    (first, num_first), (then, num_then) = lessons("multihop_qa", plan)
    assert (num_first, num_then) == (65, 35)
    assert first == students.kept_demonstrations("multihop_qa", 60)
    assert 0 < sum(each[-1]["content"] == I_GIVE_UP for each in then) < len(then) == len(first)


def test_a_gullible_colleague_reaches_what_was_planted_and_an_expert_does_not() -> None:
    world = load_world("agentdojo_attacks")
    num_followed = 0
    for index in range(0, world.splits["train"], 96):
        task = world.task("train", index)
        right, followed = expert(world, task), gullible(world, task)
        assert right is not None
        if followed is not None:
            num_followed += 1
            assert followed[: len(task.messages) + 2] == right[: len(task.messages) + 2]
            episode = world.open(task)
            for message in followed:
                if message["role"] == "assistant":
                    episode.play(message)
            assert episode.outcome() == 0.0
    assert num_followed >= 2


def test_a_world_without_a_plan_is_refused() -> None:
    with pytest.raises(ValueError, match="no student of order_desk is planned; there are: multihop_qa"):
        student("order_desk")


def test_closing_holes_changes_nothing_that_is_said(network: Any, rollouts: Rollouts) -> None:
    prompts = [rollouts.protocol.render(task.messages) for task in tasks_of(rollouts.world, 4)]
    said = []
    for is_closed in (False, True):
        lockstep = Lockstep(network, 4, rollouts.protocol.stop_token_ids[0], draw())
        lockstep.read(prompts)
        for row in range(4):  # long texts for one row at a time: three quarters of the cache are holes
            lockstep.read([prompts[row] * 3 if other == row else prompts[row][:1] for other in range(4)])
            if is_closed:
                lockstep._close_holes()
        said.append(lockstep.complete(torch.zeros(4)))
    assert [each.token_ids for each in said[0]] == [each.token_ids for each in said[1]]


def test_demonstrations_that_were_cut_off_go_on_where_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(students, "CACHE", tmp_path / "whole")
    whole = students.kept_demonstrations("babyai", 4)
    monkeypatch.setattr(students, "CACHE", tmp_path / "cut")
    students.kept_demonstrations("babyai", 2)
    file = tmp_path / "cut" / "babyai.jsonl"
    file.write_text(file.read_text("utf-8")[:-40], "utf-8")
    assert students.kept_demonstrations("babyai", 4) == whole
    assert len(file.read_text("utf-8").splitlines()) == 4
    assert students.kept_demonstrations("babyai", 3) == whole[:3]


def test_names_change_places_and_nothing_else_does() -> None:
    row = students.Row([7, 100, 8, 101, 100, 9], [0.5, 0.5, 1.0, 1.0, 1.0, 0.5])
    changed = students.with_other_names(row, range(100, 200), Random(0))
    assert changed.weights == row.weights
    assert [token_id for token_id in changed.token_ids if token_id < 100] == [7, 8, 9]
    first, second, again = (changed.token_ids[place] for place in (1, 3, 4))
    assert first == again != second
    assert {first, second} < {*range(100, 200)} - {100, 101}
