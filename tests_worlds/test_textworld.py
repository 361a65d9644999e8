"""TextWorld on the real package."""

from __future__ import annotations

import pytest

from tests_worlds import promises, simulated
from tools.worlds import load_world
from tools.worlds.calls import calling
from tools.worlds.textworld import _pool, game_settings
from tools.worlds.world import Task

WORLD = load_world("textworld")


@pytest.fixture(scope="module")
def tasks() -> list[Task]:
    """Some of each split."""
    return [WORLD.task(split, index) for split in WORLD.splits for index in range(3)]


def test_tasks_are_told_apart() -> None:
    promises.assert_tasks_are_told_apart(WORLD)


def test_the_expert_solves_the_first_tasks_of_each_split() -> None:
    tasks = [
        WORLD.task(split, index)
        for split, number in (("train", 6), ("validation", 3), ("heldout", 3))
        for index in range(number)
    ]
    assert set(promises.outcomes_of_expert(WORLD, tasks).values()) == {1.0}


def test_the_same_calls_lead_to_the_same_words_in_new_processes(tasks: list[Task]) -> None:
    simulated.assert_the_same_in_new_processes(WORLD, _pool(), tasks)


def test_episodes_that_take_turns_do_not_mix(tasks: list[Task]) -> None:
    simulated.assert_turns_do_not_mix(WORLD, _pool(), tasks[:5])
    promises.assert_episodes_do_not_mix(WORLD, tasks[0])


def test_what_a_call_may_look_like(tasks: list[Task]) -> None:
    promises.assert_tools_convert(WORLD.open(tasks[0]))
    promises.assert_bad_calls_are_told_in_words(WORLD, tasks[0])
    promises.assert_server_tools_act_as_play(WORLD, tasks[1])
    promises.assert_same_effect_is_judged(WORLD, tasks[0])


def test_an_episode_is_opened_again_quickly(tasks: list[Task]) -> None:
    promises.assert_reopens_quickly(WORLD, tasks[0])


def test_the_expert_finds_back_from_a_detour(tasks: list[Task]) -> None:
    for task in tasks[:3]:
        episode = WORLD.open(task)
        for number, command in enumerate(("dance", "go north", "go south", "go east", "go west", "inventory")):
            episode.play(calling("act", {"command": command}, number))
        if not episode.is_done:
            promises.follow_expert(episode)
        assert episode.outcome() == 1.0


def test_no_split_holds_anothers_game() -> None:
    settings = [
        str(game_settings(split, index)["seed"]) for split, size in WORLD.splits.items() for index in range(size)
    ]
    assert len(set(settings)) == len(settings)


def test_a_missing_package_is_told() -> None:
    simulated.assert_missing_is_told("textworld", "textworld", "the world textworld needs the package textworld")


@pytest.mark.parametrize(
    "command", ["save", "Restore", "quit", "restart", "script", "look. save", "look then undo", "tw-print-state", "\0"]
)
def test_what_is_for_the_program_and_not_the_game_is_refused_in_words(tasks: list[Task], command: str) -> None:
    episode = WORLD.open(tasks[0])
    [told] = episode.play(calling("act", {"command": command}, 0))
    assert told["content"].startswith("Error: command: ")
    assert episode.calls == []  # type: ignore[attr-defined]
    while not episode.is_done:
        action = episode.expert_action()
        assert action is not None
        episode.play(action)
    assert episode.outcome() == 1.0, "the expert goes on as if nothing had been said"
