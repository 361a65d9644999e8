"""What is of a held-out task is held out, whatever names it; and agents that are always greeted alike still learn."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest

from learner.data.held_out import Conversation, HeldOut, TaskNames
from policies.types import Message
from tests.faulty_worlds import numbers, raising
from tools.worlds import threads
from tools.worlds.order_desk import OrderDesk
from tools.worlds.world import WorldFailed

WORLD = OrderDesk()


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def said(text: str) -> Message:
    return {"role": "assistant", "content": text}


def called(name: str, result: str) -> list[Message]:
    call = {"id": "call_0", "type": "function", "function": {"name": name, "arguments": "{}"}}
    return [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_0", "content": result},
    ]


def conversation(
    id: str, *messages: Message, task: str | None = None, at: float = 0.0, **metadata: Any
) -> Conversation:
    return Conversation(id, task, metadata, (*messages, said("Done.")), at)


def asked(split: str, index: int, before: str = "", after: str = "") -> Message:
    return user(before + WORLD.task(split, index).messages[-1]["content"] + after)


def all_held_out(*demonstrations: Conversation) -> HeldOut:
    return HeldOut.among(demonstrations, WORLD, 1.0)


@pytest.mark.parametrize("split", ["validation", "heldout"])
@pytest.mark.parametrize(
    "named",
    [
        lambda split: conversation("ep_1", user("Hi"), task=f"order_desk/{split}/3"),
        lambda split: conversation("ep_1", user("Hi"), note=f"order_desk/{split}/3"),
        lambda split: conversation("ep_1", asked(split, 3)),
        lambda split: conversation("ep_1", asked(split, 3, " ", "\n"), task="order_desk/train/3"),
        lambda split: conversation("ep_1", {"role": "system", "content": "Be quick."}, asked(split, 3), task="mine"),
    ],
    ids=["its task", "its metadata", "what is asked", "what is asked under a false name", "a name of the client's own"],
)
def test_what_is_of_a_task_that_the_gate_may_try_is_never_trained_on(named: Any, split: str) -> None:
    of_gate = named(split)
    assert HeldOut.among([], WORLD, 0.0).covers(of_gate)
    assert HeldOut.among([of_gate], WORLD, 0.0).held_out_episodes == {"ep_1"}


def test_the_training_split_and_other_worlds_are_trained_on() -> None:
    apart = HeldOut.among([], WORLD, 0.0)
    assert not apart.covers(conversation("ep_1", asked("train", 3), task="order_desk/train/3"))
    assert not apart.covers(conversation("ep_2", user("e4"), task="chess/validation/3"))
    assert not HeldOut.among([], None, 0.0).covers(conversation("ep_3", asked("validation", 3)))


@pytest.mark.parametrize(
    "same",
    [
        conversation("ep_1", user("Ship order 7"), *called("find", "here")),
        conversation("ep_1", user(" ship  ORDER 7 ")),
        conversation("ep_1", user("Ship order 7"), said("Where?"), user("Rome")),
        conversation("ep_1", user("Something else"), promoted_from="demo_1"),
        conversation("ep_1", user("Something else"), task="orders/7"),
    ],
    ids=["same words", "same words spelled otherwise", "same beginning", "promoted from it", "same task"],
)
def test_who_shares_a_name_with_a_held_out_demonstration_is_held_out(same: Conversation) -> None:
    held_out = conversation("demo_1", user("Ship order 7"), said("Where?"), user("Paris"), task="orders/7")
    assert all_held_out(held_out).covers(same)
    assert not all_held_out(held_out).covers(conversation("ep_2", user("Ship order 8"), task="orders/8"))


def test_an_agent_that_is_always_greeted_alike_still_learns() -> None:
    held_out = [
        conversation(f"demo_{n}", user("Hi"), said("Hello!"), user(f"Ship order {n}")) for n in range(4)
    ]  # fmt: skip
    apart = all_held_out(*held_out)
    assert not apart.covers(conversation("ep_1", user("Hi"), said("Good day!"), user("Ship order 9")))
    assert apart.covers(conversation("ep_2", user("Hi"), said("Good day!"), user("Ship order 2")))


def test_an_agent_that_is_always_told_to_take_the_next_ticket_still_learns() -> None:
    tickets = [conversation(f"demo_{n}", user("Next, please"), *called("next", f"ticket {n}")) for n in range(4)]
    assert not all_held_out(*tickets).covers(conversation("ep_1", user("Next, please"), *called("next", "ticket 9")))


def test_one_request_that_was_demonstrated_many_times_is_one_task() -> None:
    """However each expert went about it: the same call always finds the same."""
    ways = ["find", "find", "list", "open", "find", "list"]
    many = [conversation(f"demo_{n}", user("Ship order 7"), *called(way, f"{way}: 7")) for n, way in enumerate(ways)]
    apart = all_held_out(*many)
    assert apart.covers(conversation("ep_1", user("Ship order 7"), *called("ask", "who knows")))
    assert len({group for each in many for group in apart.groups(each)}) == 1


def test_a_task_is_held_out_as_a_whole_and_later_imports_move_nothing() -> None:
    old = [conversation(f"demo_{n}", user(f"Ship order {n}"), task=f"orders/{n}", at=n) for n in range(40)]
    new = [conversation(f"demo_a{n}", user(f"ship order {n}"), at=100 + n) for n in range(40)]
    before, after = HeldOut.among(old, None, 0.3), HeldOut.among([*new, *old], None, 0.3)
    assert 4 < len(before.held_out_episodes) < 24
    assert {id for id in after.held_out_episodes if not id.startswith("demo_a")} == before.held_out_episodes
    assert len(after.held_out_episodes) == 2 * len(before.held_out_episodes)
    assert all(after.groups(one) == after.groups(other) for one, other in zip(old, new, strict=True))


def test_conversations_without_words_are_not_one_task() -> None:
    names = TaskNames(None, [])
    silent = [conversation(id, {"role": "system", "content": "Go."}) for id in ("ep_1", "ep_2")]
    assert set(names.names(silent[0])).isdisjoint(names.names(silent[1]))


def test_anchors_are_kept_apart_with_their_tasks() -> None:
    demonstrations = [
        conversation("demo_1", user("Greet me")),
        conversation("demo_2", asked("train", 5)),
        conversation("demo_3", user("Ship order 3")),
    ]
    anchor = conversation("ep_1", user("Greet me"))
    apart = HeldOut.among(demonstrations, WORLD, 0.0, [anchor], ["order_desk/train/5"])
    assert apart.held_out_episodes == {"demo_1", "demo_2"}
    assert apart.covers(anchor)
    assert apart.covers(conversation("ep_2", asked("train", 5)))
    assert not apart.covers(conversation("ep_3", user("Ship order 4")))


@pytest.mark.parametrize(
    ("find_task", "told"),
    [
        (raising(KeyError("x")), "`find_task` of the world numbers raised KeyError: 'x'"),
        (raising(SystemExit(2)), "`find_task` of the world numbers raised SystemExit: 2"),
        (lambda *_: "numbers/train/0", "`find_task` of the world numbers raised AttributeError"),
        (lambda *_: time.sleep(1.0), "the world numbers did not answer within 0.2 seconds"),
    ],
)
def test_a_world_that_cannot_find_a_task_is_named(find_task: Any, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cycle failed with KeyError: 'x', ended without a word, or hung for ever."""
    monkeypatch.setattr(threads, "PATIENCE_S", 0.2)
    monkeypatch.setattr(threads, "_LEFT_BEHIND", {})  # other tests count what they leave behind themselves
    with pytest.raises(WorldFailed, match=re.escape(told)):
        HeldOut.among([conversation("ep_1", user("Hi"))], numbers(find_task=find_task), 0.5)
