"""The order desk keeps a world's promises: same calls, same state; an expert everywhere; tasks told by their text."""

from __future__ import annotations

import asyncio
import json
import re
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tools.worlds import load_world
from tools.worlds.calls import LONGEST_OBSERVATION, read_call
from tools.worlds.order_desk import (
    ARGUMENTS,
    BOX_FOR_CARE,
    CITIES,
    MAX_CALLS,
    SHELVES,
    OrderDesk,
    OrderDeskEpisode,
    draw_order,
)
from tools.worlds.world import Message, Task

WORLD = OrderDesk()
TASK = WORLD.task("train", 0)
modest = settings(deadline=None, max_examples=80)

tasks = st.sampled_from(sorted(WORLD.splits)).flatmap(
    lambda split: st.builds(WORLD.task, st.just(split), st.integers(0, WORLD.splits[split] - 1))
)


def call_message(name: str, arguments: Any, id: str = "call_x") -> Message:
    text = arguments if isinstance(arguments, str) else json.dumps(arguments)
    call = {"id": id, "type": "function", "function": {"name": name, "arguments": text}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def argument_values(task: Task) -> st.SearchStrategy[Any]:
    order = WORLD.open(task).order
    facts = [order.customer, order.item, order.city, order.shelf, order.password or "heron", order.box, order.by]
    return st.sampled_from([*facts, order.item.upper(), "sea", "plain", "Atlantis", "", 3, None])


def wild_messages(task: Task) -> st.SearchStrategy[Message]:
    """Calls that make sense, calls that do not, and calls that cannot be read."""
    values = argument_values(task)
    fitting = st.sampled_from(sorted(ARGUMENTS)).flatmap(
        lambda name: st.builds(
            call_message, st.just(name), st.fixed_dictionaries(dict.fromkeys(ARGUMENTS[name].model_fields, values))
        )
    )
    broken = st.builds(
        call_message, st.sampled_from(["pick_item", "fly"]), st.sampled_from(["", "{", "[]", "{}", "7", '{"x": 1}'])
    )
    return st.one_of(fitting, fitting, fitting, broken, st.just({"role": "assistant", "content": "Done."}))


@st.composite
def reached_states(draw: st.DrawFn) -> tuple[Task, OrderDeskEpisode, list[Message]]:
    """A task, an episode in some reachable state, and the messages that led there; experts and others take turns."""
    task = draw(tasks)
    episode, played = WORLD.open(task), []
    for wild in draw(st.lists(st.one_of(st.none(), wild_messages(task)), max_size=14)):
        played.append(wild or episode.expert_action())
        episode.play(played[-1])
    return task, episode, played


def follow_expert(episode: OrderDeskEpisode) -> list[str]:
    """Play the expert to the end; the skills it used."""
    skills = []
    while not episode.is_done:
        skills.append(episode.expert_skill())
        episode.play(episode.expert_action())
    return skills


@modest
@given(reached_states())
def test_from_any_state_the_expert_comes_to_an_end_and_answers(reached) -> None:
    _, episode, _ = reached
    follow_expert(episode)
    assert not episode.expert_action().get("tool_calls")
    assert episode.expert_action()["content"]


@modest
@given(reached_states())
def test_until_the_parcel_has_left_every_mistake_can_be_mended_while_calls_last(reached) -> None:
    _, episode, _ = reached
    if episode.state.shipped_to is None and episode.state.num_calls <= MAX_CALLS - 8:
        follow_expert(episode)
        assert episode.outcome() == 1.0


@modest
@given(reached_states())
def test_replaying_the_calls_on_a_fresh_episode_gives_the_same_state_and_observations(reached) -> None:
    task, episode, played = reached
    copy, again = WORLD.open(task), WORLD.open(task)
    assert [copy.play(message) for message in played] == [again.play(message) for message in played]
    assert copy.state == again.state == episode.state


@modest
@given(reached_states(), st.data())
def test_same_effect_is_told_by_where_messages_lead_and_changes_nothing(reached, data) -> None:
    task, episode, _ = reached
    before, expert = episode.state, episode.expert_action()
    other = data.draw(wild_messages(task))
    assert episode.same_effect(expert, expert)
    verdict = episode.same_effect(expert, other)
    assert verdict == episode.same_effect(other, expert)
    assert episode.state == before
    assert episode.expert_action() == expert
    if verdict and expert.get("tool_calls"):
        episode.play(other)
        assert episode.state.num_calls == before.num_calls + 1


def test_an_action_in_other_words_has_the_same_effect_and_another_action_has_not() -> None:
    episode = WORLD.open(WORLD.task("train", 0))
    name = episode.order.customer
    expert = episode.expert_action()
    assert episode.same_effect(expert, call_message("look_up_customer", {"name": f"  {name.upper()} "}, id="another"))
    assert not episode.same_effect(expert, call_message("look_up_customer", {"name": "Nobody"}))
    assert not episode.same_effect(expert, call_message("check_item", {"item": episode.order.item}))
    assert not episode.same_effect(expert, {"role": "assistant", "content": "Done."})


@modest
@given(tasks)
def test_the_expert_fills_every_order_in_5_to_8_calls(task: Task) -> None:
    episode = WORLD.open(task)
    follow_expert(episode)
    assert episode.outcome() == 1.0
    assert 5 <= episode.state.num_calls <= 8
    assert episode.expert_skill() == "answer"


def test_success_needs_the_right_box_the_right_city_and_the_right_way() -> None:
    order = draw_order(1000)
    right = (order.box, order.city, order.by)
    boxes, ways = sorted(BOX_FOR_CARE.values()), ("air", "rail", "sea")
    for choice in [(box, city, by) for box in boxes for city in CITIES for by in ways]:
        episode = OrderDeskEpisode(order)
        while episode.expert_skill().split(":")[0] != "pack_parcel":
            episode.play(episode.expert_action())
        episode.play(call_message("pack_parcel", {"box": choice[0]}))
        episode.play(call_message("ship_parcel", {"city": choice[1], "by": choice[2]}))
        assert episode.is_done
        assert episode.outcome() == float(choice == right)


def test_a_wrong_box_is_mended_until_the_parcel_has_left_and_not_after() -> None:
    order = draw_order(1000)
    wrong_box = next(box for box in BOX_FOR_CARE.values() if box != order.box)
    episode = OrderDeskEpisode(order)
    while episode.expert_skill().split(":")[0] != "pack_parcel":
        episode.play(episode.expert_action())
    episode.play(call_message("pack_parcel", {"box": wrong_box}))
    assert episode.expert_skill() == f"pack_parcel:{order.box}"
    episode.play(call_message("ship_parcel", {"city": order.city, "by": order.by}))
    assert episode.is_done
    assert "gone wrong" in episode.expert_action()["content"]


def test_at_the_end_any_answer_does_as_the_experts_and_a_call_does_not() -> None:
    episode = WORLD.open(WORLD.task("train", 0))
    follow_expert(episode)
    expert = episode.expert_action()
    assert episode.same_effect(expert, {"role": "assistant", "content": "All done!"})
    assert not episode.same_effect(expert, call_message("pick_item", {"shelf": episode.order.shelf}))


def test_the_desk_closes_after_its_last_call() -> None:
    episode = WORLD.open(WORLD.task("train", 0))
    wrong_shelf = next(shelf for shelf in SHELVES if shelf != episode.order.shelf)
    for _ in range(MAX_CALLS):
        assert not episode.is_done
        episode.play(call_message("pick_item", {"shelf": wrong_shelf}))
    assert episode.is_done
    assert episode.outcome() == 0.0
    [result] = episode.play(call_message("check_item", {"item": episode.order.item}))
    assert result["content"] == "The desk has closed for today."
    assert episode.expert_skill() == "answer"


@modest
@given(tasks)
def test_a_task_is_the_same_each_time_and_is_found_by_its_text_alone(task: Task) -> None:
    assert WORLD.task(task.split, task.index) == task
    assert task.id == f"order_desk/{task.split}/{task.index}"
    system = {"role": "system", "content": "Order 1234 is not meant."}
    text = task.messages[0]["content"]
    later = {"role": "user", "content": "Thank you!"}
    assert WORLD.find_task([system, {"role": "user", "content": f" {text}\n"}, later]) == task
    parts = [{"type": "text", "text": text[:9]}, {"type": "text", "text": text[9:]}]
    assert WORLD.find_task([system, {"role": "user", "content": parts}, later]) == task


@pytest.mark.parametrize("content", ["", "Hello", "Order 1000", "order 9999: a globe", None, [{"type": "text"}]])
def test_no_task_is_found_for_another_text(content: Any) -> None:
    assert WORLD.find_task([{"role": "user", "content": content}]) is None
    assert WORLD.find_task([]) is None


def test_no_task_is_found_where_the_number_fits_but_the_order_was_changed() -> None:
    text = WORLD.task("train", 0).messages[0]["content"]
    assert WORLD.find_task([{"role": "user", "content": text.replace("antique", "brass")}]) is None


def test_splits_have_no_text_in_common() -> None:
    tasks = [Task(WORLD.name, split, index, ()) for split in WORLD.splits for index in range(WORLD.splits[split])]
    texts = [WORLD.open(task).order.text for task in tasks]
    assert len(set(texts)) == sum(WORLD.splits.values())


@pytest.mark.parametrize(
    ("split", "index", "error"), [("test", 0, KeyError), ("train", 5000, IndexError), ("train", -1, IndexError)]
)
def test_a_task_that_does_not_exist_is_refused(split: str, index: int, error: type[Exception]) -> None:
    with pytest.raises(error):
        WORLD.task(split, index)


def test_a_world_is_loaded_by_name() -> None:
    assert load_world("order_desk").name == "order_desk"
    with pytest.raises(ValueError, match="order_desk"):
        load_world("moon")


@settings(deadline=None, max_examples=40)
@given(reached_states(), st.data())
def test_a_langchain_tool_and_a_played_message_do_the_same(reached, data) -> None:
    task, episode, _ = reached
    message = data.draw(wild_messages(task).filter(lambda message: "tool_calls" in message))
    function = message["tool_calls"][0]["function"]
    tool = {tool.name: tool for tool in episode.tools}.get(function["name"])
    try:
        arguments = json.loads(function["arguments"])
    except ValueError:
        return
    if tool is None or not isinstance(arguments, dict):
        return
    twin = OrderDeskEpisode(episode.order, episode.state)
    [played] = twin.play(message)
    call = {"type": "tool_call", "id": "call_x", "name": tool.name, "args": arguments}
    result = asyncio.run(tool.ainvoke(call))
    assert result.content == played["content"]
    assert (result.status == "error") == played["content"].startswith("Error")
    assert episode.state == twin.state


async def test_an_unreadable_call_is_an_observation_and_changes_nothing() -> None:
    episode = WORLD.open(WORLD.task("train", 0))
    before = episode.state
    pack = next(tool for tool in episode.tools if tool.name == "pack_parcel")
    assert "padded" in await pack.ainvoke({"box": "golden"})
    assert "box" in await pack.ainvoke({})
    assert episode.state == before


def test_every_tool_and_argument_is_described() -> None:
    for tool in WORLD.open(WORLD.task("train", 0)).tools:
        assert len(tool.description) > 20
        assert all(len(field["description"]) > 10 for field in tool.args.values())


def test_neighbouring_orders_differ_in_what_must_be_read() -> None:
    orders = [draw_order(number) for number in range(1000, 1400)]
    for fact in ("customer", "item", "city", "shelf", "care", "by"):
        values = [getattr(order, fact) for order in orders]
        assert len(set(values)) >= 3
        assert sum(a != b for a, b in pairwise(values)) > len(values) / 2


@pytest.mark.parametrize(
    "message",
    [
        call_message("pick_item", {"shelf": "x" * 300_000}),
        call_message("pick_item", {"shelf": "A1", "y" * 300_000: 1}),
        call_message("z" * 300_000, {}),
    ],
)
def test_an_observation_is_cut_with_a_mark_whoever_runs_the_call(message: Message) -> None:
    (told,) = WORLD.open(TASK).play(message)
    assert LONGEST_OBSERVATION < len(told["content"]) < LONGEST_OBSERVATION + 100
    assert re.search(r"\[cut here: the whole observation has 300\d\d\d characters\]$", told["content"])
    name, arguments = read_call(message["tool_calls"][0])
    for tool in WORLD.open(TASK).tools:
        if tool.name == name:
            assert tool.invoke(arguments) == told["content"]
