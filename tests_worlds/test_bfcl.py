"""BFCL's multi-turn conversations on the real package."""

from __future__ import annotations

import gc
import time
from typing import Any

import pytest
from bfcl_eval.eval_checker.multi_turn_eval import multi_turn_utils

from tests_worlds import promises
from tools.worlds import load_world
from tools.worlds.bfcl import Bfcl, BfclEpisode
from tools.worlds.calls import answering, calling
from tools.worlds.world import TaskId


@pytest.fixture(scope="module")
def world() -> Bfcl:
    loaded = load_world("bfcl")
    assert isinstance(loaded, Bfcl)
    return loaded


def open_kind(world: Bfcl, id: str) -> BfclEpisode:
    for task in promises.all_tasks(world):
        if world.item(task.split, task.index).entry["id"] == id:
            return world.open_item(world.item(task.split, task.index))
    raise KeyError(id)


def test_a_conversation_is_in_one_split_in_all_its_kinds(world: Bfcl) -> None:
    promises.assert_tasks_are_told_apart(world)
    assert dict(world.splits) == {"train": 480, "validation": 160, "heldout": 160}
    split_of_number: dict[str, set[str]] = {}
    for task in promises.all_tasks(world):
        number = world.item(task.split, task.index).entry["id"].rsplit("_", 1)[1]
        split_of_number.setdefault(number, set()).add(task.split)
    assert len(split_of_number) == 200
    assert all(len(splits) == 1 for splits in split_of_number.values())


def test_the_expert_solves_all_but_the_one_that_nobody_can(world: Bfcl) -> None:
    """In multi_turn_miss_func_49 a right call is of the very function that is offered only a turn later."""
    outcomes = promises.outcomes_of_expert(world, promises.all_tasks(world))
    failed = [id for id, outcome in outcomes.items() if outcome != 1.0]
    places = [TaskId.parse(id) for id in failed]
    assert [world.item(place.split, place.index).entry["id"] for place in places] == ["multi_turn_miss_func_49"]


def test_the_user_goes_on_after_an_answer_until_he_has_no_more_to_say(world: Bfcl) -> None:
    episode = open_kind(world, "multi_turn_base_0")
    texts = []
    for _ in range(4):
        assert not episode.is_done
        assert episode.outcome() == 0.0
        texts += [told["content"] for told in episode.play(answering("What else?"))]
    assert [text.split()[0] for text in texts] == ["Perform", "Upon", "Move"]
    assert episode.is_done
    assert episode.outcome() == 0.0
    [told] = episode.play(calling("ls", {"a": True}, 1))
    assert "has left" in told["content"]


def test_a_function_that_comes_later_can_be_called_later(world: Bfcl) -> None:
    episode = open_kind(world, "multi_turn_miss_func_0")
    before = {tool.name for tool in episode.tools}
    while {tool.name for tool in episode.tools} == before:
        message = episode.expert_action()
        assert message is not None
        told = episode.play(message)
    assert told == [
        {"role": "user", "content": "I have updated some more functions you can choose from. What about now?"}
    ]
    assert len({tool.name for tool in episode.tools} - before) == 1
    promises.follow_expert(episode)
    assert episode.outcome() == 1.0


def test_a_missing_call_or_a_wrong_one_fails_the_conversation(world: Bfcl) -> None:
    for wrong in (None, calling("mkdir", {"dir_name": "elsewhere"}, 7)):
        episode = open_kind(world, "multi_turn_base_0")
        if wrong is None:
            episode.play(answering("Done."))
        else:
            episode.play(wrong)
        assert episode.expert_action() is None
        while not episode.is_done:
            episode.play(answering("Done."))
        assert episode.outcome() == 0.0


def test_nothing_written_in_an_argument_is_run(world: Bfcl, tmp_path) -> None:
    episode = open_kind(world, "multi_turn_base_0")
    trap = tmp_path / "trap"
    for name, arguments in (
        ("ls", {f"a=open({str(trap)!r}, 'w'), b": True}),
        ("ls", {"a": f"__import__('pathlib').Path({str(trap)!r}).touch()"}),
        (f"ls(open({str(trap)!r}, 'w'))", {}),
        ("ls", {"a": "')+open('" + str(trap) + "','w')+('"}),
    ):
        episode.play(calling(name, arguments, 1))
    assert not trap.exists()


def test_the_packages_globals_do_not_grow(world: Bfcl) -> None:
    gc.collect()
    before = len(vars(multi_turn_utils))
    promises.outcomes_of_expert(world, promises.some_tasks(world, every=50))
    gc.collect()
    assert len(vars(multi_turn_utils)) == before


def test_tools_bad_input_and_copies(world: Bfcl) -> None:
    task = world.task("train", 0)
    promises.assert_tools_convert(world.open(task))
    promises.assert_found_by_text(world, task)
    promises.assert_bad_calls_are_told_in_words(world, task)
    promises.assert_episodes_do_not_mix(world, task)
    promises.assert_server_tools_act_as_play(world, task)
    promises.assert_same_effect_is_judged(world, task)


def test_twenty_steps_are_replayed_in_under_50_ms(world: Bfcl) -> None:
    for kind in range(0, 480, 120):
        promises.assert_reopens_quickly(world, world.task("train", kind))


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("power", {"base": 9, "exponent": 387420489}, "too many digits"),
        ("power", {"base": int("9" * 900), "exponent": 900}, "too many digits"),
        ("logarithm", {"value": 2, "base": 10, "precision": 20_000_000}, "precision is at most"),
        ("square_root", {"number": 2, "precision": 30_000_000}, "precision is at most"),
        ("square_root", {"number": 2, "precision": float("inf")}, "precision is at most"),
        ("mean", {"numbers": [int("9" * 4000)]}, "at most 1000 digits"),
    ],
)
def test_what_would_compute_for_ever_is_refused_in_words(
    world: Bfcl, name: str, arguments: dict[str, Any], words: str
) -> None:
    episode = open_with(world, name)
    began = time.process_time()
    assert words in episode.call(name, arguments)
    assert time.process_time() - began < 1.0
    assert "32.0" in episode.call("power", {"base": 2.0, "exponent": 5})
    assert "1.41421356" in episode.call("square_root", {"number": 2, "precision": 30})


def open_with(world: Bfcl, name: str) -> BfclEpisode:
    """An episode in which a function can be called."""
    episodes = (world.open_item(world.item(task.split, task.index)) for task in promises.all_tasks(world))
    return next(each for each in episodes if any(schema["name"] == name for schema in each.schemas()))
