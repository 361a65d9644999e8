"""BabyAI on the real package."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest

from tests_worlds import promises, simulated
from tools.worlds import load_world
from tools.worlds.babyai import LEVELS, BabyAIEpisode
from tools.worlds.calls import calling

WORLD = load_world("babyai")


def test_tasks_are_told_apart() -> None:
    promises.assert_tasks_are_told_apart(WORLD)


def test_the_expert_solves_two_tasks_of_each_level_in_each_split() -> None:
    tasks = [WORLD.task(split, index) for split in WORLD.splits for index in range(2 * len(LEVELS))]
    assert set(promises.outcomes_of_expert(WORLD, tasks).values()) == {1.0}


@pytest.mark.parametrize("index", range(len(LEVELS)))
def test_the_expert_knows_the_way_from_where_a_stray_agent_is(index: int) -> None:
    """After ten steps at random. Where a box was opened, or the bot gives up, it says that it does not know."""
    names, unknown = ("turn_left", "turn_right", "go_forward", "pick_up", "put_down"), 0
    for number in range(3):
        episode, drawn = WORLD.open(WORLD.task("train", index + number * len(LEVELS))), random.Random(number)
        for step in range(10):
            episode.play(calling(drawn.choice(names), {}, step))
        said = promises.follow_expert(episode)
        unknown += not said or bool(said[-1].get("tool_calls") or said[-1]["role"] == "tool")
        if not unknown:
            assert episode.outcome() == 1.0
    assert unknown <= 1


def test_no_split_holds_anothers_room() -> None:
    rooms: dict[object, str] = {}
    for split in WORLD.splits:
        for index in range(150):
            episode = WORLD.open(WORLD.task(split, index))
            assert isinstance(episode, BabyAIEpisode)
            assert rooms.setdefault(episode.state, split) == split


def test_episodes_do_not_mix_and_calls_are_read() -> None:
    task = WORLD.task("train", LEVELS.index("PutNextLocal-v0"))
    promises.assert_episodes_do_not_mix(WORLD, task)
    promises.assert_tools_convert(WORLD.open(task))
    promises.assert_bad_calls_are_told_in_words(WORLD, task)
    promises.assert_server_tools_act_as_play(WORLD, task)
    promises.assert_same_effect_is_judged(WORLD, task)


def test_turning_thrice_the_other_way_is_the_same_place() -> None:
    episode = WORLD.open(WORLD.task("train", 0))
    left, right = calling("turn_left", {}, 0), calling("turn_right", {}, 0)
    assert not episode.same_effect(left, right)
    for message in (left, left):
        episode.play(message)
    there = WORLD.open(WORLD.task("train", 0))
    for message in (right, right):
        there.play(message)
    assert isinstance(episode, BabyAIEpisode)
    assert episode.is_where(there)


def test_an_episode_is_opened_again_quickly() -> None:
    promises.assert_reopens_quickly(WORLD, WORLD.task("train", LEVELS.index("UnlockPickup-v0")))


def test_another_process_tells_the_same_tasks() -> None:
    script = (
        "from tools.worlds import load_world; world = load_world('babyai')\n"
        "print([world.task('train', index).messages for index in range(60)])"
    )
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert told.strip() == str([WORLD.task("train", index).messages for index in range(60)])


def test_a_missing_package_is_told() -> None:
    simulated.assert_missing_is_told("babyai", "minigrid", "the world babyai needs the package minigrid")
