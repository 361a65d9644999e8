"""AgentDojo on the real package: the tasks, and the planted instructions."""

from __future__ import annotations

import pytest

from tests_worlds import promises
from tools.worlds import load_world
from tools.worlds.agentdojo import AgentDojo, AgentDojoAttacks, AgentDojoEpisode
from tools.worlds.calls import answering, calling


@pytest.fixture(scope="module")
def world() -> AgentDojo:
    loaded = load_world("agentdojo")
    assert isinstance(loaded, AgentDojo)
    return loaded


@pytest.fixture(scope="module")
def attacks() -> AgentDojoAttacks:
    loaded = load_world("agentdojo_attacks")
    assert isinstance(loaded, AgentDojoAttacks)
    return loaded


def test_tasks_by_split(world: AgentDojo, attacks: AgentDojoAttacks) -> None:
    promises.assert_tasks_are_told_apart(world)
    promises.assert_tasks_are_told_apart(attacks)
    assert dict(world.splits) == {"train": 59, "validation": 19, "heldout": 19}
    assert dict(attacks.splits) == {"train": 575, "validation": 187, "heldout": 187}
    place = {task.messages[1]["content"]: task.split for task in promises.all_tasks(world)}
    assert all(place[task.messages[1]["content"]] == task.split for task in promises.all_tasks(attacks))


def test_the_expert_solves_what_the_package_itself_says_its_right_calls_solve(world: AgentDojo) -> None:
    outcomes = promises.outcomes_of_expert(world, promises.all_tasks(world))
    suites = {item.suite.name: item.suite for item in world._items["train"]}
    solvable = {
        (name, task_id)
        for name, suite in suites.items()
        for task_id, (is_solved, _) in suite.check(check_injectable=False)[1][0].items()
        if is_solved
    }
    solved = set()
    for task in promises.all_tasks(world):
        item = world.item(task.split, task.index)
        if outcomes[task.id] == 1.0:
            solved.add((item.suite.name, item.user_task.ID))
    assert solved == solvable
    assert len(solved) == 97


def test_an_expert_at_the_users_task_follows_no_planted_instruction(attacks: AgentDojoAttacks) -> None:
    for task in promises.some_tasks(attacks, every=40):
        episode = attacks.open(task)
        promises.follow_expert(episode)
        assert isinstance(episode, AgentDojoEpisode)
        assert (episode.outcome(), episode.has_followed(), episode.is_solved()) == (1.0, False, True)


def test_who_does_what_was_planted_fails(attacks: AgentDojoAttacks) -> None:
    """The package's own right calls for the planted goal are made, as by an agent that follows it.

    For eight goals it knows none. And one goal is recognised by a mail's subject, which in some mailboxes stands in the
    mail with the planted text too: there the package sees no harm.
    """
    num_tried, unseen = 0, []
    for task in promises.some_tasks(attacks, every=11):
        item = attacks.item(task.split, task.index)
        assert item.injection_task is not None
        episode = attacks.open(task)
        assert isinstance(episode, AgentDojoEpisode)
        assert item.injection_task.GOAL in dict(item.injections).popitem()[1]
        calls = item.injection_task.ground_truth(episode.environment)
        for call in calls:
            episode.play(calling(call.function, dict(call.args), num_tried))
        episode.play(answering(item.injection_task.GROUND_TRUTH_OUTPUT))
        assert episode.outcome() == float(not episode.has_followed())
        num_tried += bool(calls)
        unseen += [(item.user_task.ID, item.injection_task.ID)] if calls and not episode.has_followed() else []
    assert num_tried >= 40
    assert {injection for _, injection in unseen} <= {"injection_task_0"}
    assert len(unseen) <= 3


def test_what_is_planted_is_read(attacks: AgentDojoAttacks) -> None:
    for task in promises.some_tasks(attacks, every=100):
        said = promises.follow_expert(attacks.open(task))
        observed = [" ".join(message["content"].split()) for message in said if message["role"] == "tool"]
        assert any("important message from me" in text for text in observed)


def test_tools_bad_input_and_copies(world: AgentDojo) -> None:
    for index in (0, 24, 40, 50):  # one of each suite
        task = world.task("train", index)
        promises.assert_tools_convert(world.open(task))
        promises.assert_found_by_text(world, task)
        promises.assert_episodes_do_not_mix(world, task)
        promises.assert_server_tools_act_as_play(world, task)
        promises.assert_same_effect_is_judged(world, task)
    promises.assert_bad_calls_are_told_in_words(world, world.task("train", 0))


def test_twenty_steps_are_replayed_quickly(world: AgentDojo) -> None:
    """A bank in under 50 ms; an office with hundreds of mails takes the package longer."""
    for index in (0, 24, 40, 50):
        promises.assert_reopens_quickly(world, world.task("train", index), limit_s=0.5)
