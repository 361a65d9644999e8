"""ScienceWorld on the real package."""

from __future__ import annotations

import os
import signal

import pytest
from scienceworld import ScienceWorldEnv

from tests_worlds import promises, simulated
from tools.worlds import load_world
from tools.worlds.calls import calling
from tools.worlds.scienceworld import TASK_TYPES, ScienceWorld, _pool
from tools.worlds.world import Task

simulated.skip_without("java", "default-jre-headless")
WORLD = load_world("scienceworld")


@pytest.fixture(scope="module")
def tasks() -> list[Task]:
    """Some of each split."""
    return [WORLD.task(split, index) for split in WORLD.splits for index in range(4)]


def test_tasks_are_told_apart() -> None:
    promises.assert_tasks_are_told_apart(WORLD)


def test_the_expert_solves_the_first_tasks_of_each_split() -> None:
    tasks = [
        WORLD.task(split, index)
        for split, number in (("train", 12), ("validation", 6), ("heldout", 6))
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


def test_the_expert_knows_the_way_after_a_harmless_detour_and_says_where_it_does_not() -> None:
    task = WORLD.task("train", list(TASK_TYPES).index("find-animal"))
    episode = WORLD.open(task)
    for number, action in enumerate(("look around", "sing", "inventory")):
        episode.play(calling("act", {"action": action}, number))
    promises.follow_expert(episode)
    assert episode.outcome() == 1.0
    lost = WORLD.open(task)
    lost.play(calling("act", {"action": "focus on picture"}, 0))
    assert lost.is_done
    assert lost.outcome() == 0.0
    strayed = WORLD.open(task)
    for number, action in enumerate(("open door to bedroom", "go to bedroom", "close door to hallway")):
        strayed.play(calling("act", {"action": action}, number))
    assert strayed.expert_action() is None or strayed.expert_action()["tool_calls"]


def test_task_types_and_splits_are_the_packages_own() -> None:
    environment = ScienceWorldEnv("")
    for name, sizes in TASK_TYPES.items():
        environment.load(name, 0)
        ranges = [
            environment.get_variations_train(),
            environment.get_variations_dev(),
            environment.get_variations_test(),
        ]
        first = 0
        for listed, size in zip(ranges, sizes, strict=True):
            assert list(listed) == list(range(first, first + size)), name
            first += size
    environment.close()


def test_a_missing_package_or_java_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    simulated.assert_missing_is_told("scienceworld", "scienceworld", "needs the package scienceworld")
    simulated.assert_missing_program_is_told(ScienceWorld, monkeypatch, "default-jre-headless")


def test_the_jvm_dies_with_its_pool() -> None:
    WORLD.open(WORLD.task("train", 0))
    [process] = _pool().process_ids
    jvms = simulated.descendants(process)
    assert jvms
    os.kill(process, signal.SIGKILL)
    assert all(simulated.is_gone(jvm) for jvm in jvms)
