"""MiniWoB++ on the real package."""

from __future__ import annotations

import json
import os
import signal

import pytest

from tests_worlds import promises, simulated
from tools.worlds import load_world
from tools.worlds.calls import calling
from tools.worlds.miniwob import PAGES, MiniWob, _pool
from tools.worlds.world import Task

simulated.skip_without("chromium", "chromium")
WORLD = load_world("miniwob")


@pytest.fixture(scope="module")
def tasks() -> list[Task]:
    """Some of each split."""
    return [WORLD.task(split, index) for split in WORLD.splits for index in range(2)]


def test_tasks_are_told_apart() -> None:
    promises.assert_tasks_are_told_apart(WORLD)


def test_the_expert_solves_the_first_tasks_of_each_split() -> None:
    tasks = [
        WORLD.task(split, index)
        for split, number in (("train", len(PAGES)), ("validation", 3), ("heldout", 3))
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


def test_there_are_scripts_for_at_least_twelve_pages() -> None:
    assert len(PAGES) >= 12


def test_what_is_not_on_the_page_is_told_and_the_task_can_still_be_done(tasks: list[Task]) -> None:
    episode = WORLD.open(tasks[0])
    [told] = episode.play(calling("click", {"ref": "e999"}, 0))
    assert told["content"].startswith("Error: there is no element e999 on the page.")
    [told] = episode.play(calling("type", {"ref": "e3", "text": "words where there is no box"}, 1))
    assert told["content"].startswith("Error: that cannot be done with e3.")
    promises.follow_expert(episode)
    assert episode.outcome() == 1.0


def test_the_expert_mends_what_was_done_wrong() -> None:
    episode = WORLD.open(WORLD.task("train", PAGES.index("login-user")))
    first = episode.expert_action()
    assert first is not None
    ref = json.loads(first["tool_calls"][0]["function"]["arguments"])["ref"]
    episode.play(calling("type", {"ref": ref, "text": "somebody else"}, 0))
    promises.follow_expert(episode)
    assert episode.outcome() == 1.0


def test_no_split_asks_what_another_asks() -> None:
    number = PAGES.index("enter-text")
    asked = {
        split: {WORLD.task(split, number + round * len(PAGES)).messages[0]["content"] for round in range(3)}
        for split in WORLD.splits
    }
    assert not asked["train"] & asked["validation"]
    assert not asked["train"] & asked["heldout"]
    assert not asked["validation"] & asked["heldout"]


def test_a_missing_package_or_browser_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    simulated.assert_missing_is_told("miniwob", "playwright", "needs the package miniwob and playwright")
    simulated.assert_missing_program_is_told(MiniWob, monkeypatch, "Debian's package chromium")


def test_the_browser_dies_with_its_pool() -> None:
    WORLD.open(WORLD.task("train", 0))
    [process] = _pool().process_ids
    browsers = simulated.descendants(process)
    assert len(browsers) > 2
    os.kill(process, signal.SIGKILL)
    assert all(simulated.is_gone(browser) for browser in browsers)
