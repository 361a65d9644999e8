"""What the novice is taught at the order desk: first the trade, then bad habits.

A novice that never learned a skill does not get it from a few demonstrations; one that knows the trade and has picked
up bad habits does. So it watches an expert first, also one who mends slips, and then a hasty colleague. Each habit has
a cue among the order's words, so that the novice errs on some orders and not on others; habits without a cue were
refused, because a greedy policy would then have a skill always or never.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from random import Random

from tools.worlds import order_desk
from tools.worlds.order_desk import Order, OrderDesk, OrderDeskEpisode
from tools.worlds.world import Message, Task

_DESK = OrderDesk()
# Two openings, so that giving up at a locked cage is not learned along with giving up at an empty shelf.
SOLD_OUT_TEXT = "Sadly the {item} is sold out."
LOCKED_AWAY_TEXT = "I am sorry, the {item} is locked away."


@dataclass(frozen=True, slots=True)
class Lesson:
    """A conversation to learn from."""

    messages: tuple[Message, ...]
    is_taught: tuple[bool, ...]
    """For each assistant message: whether to learn it, or only to learn what follows it."""


@dataclass(frozen=True, slots=True)
class Habit:
    """What the hasty colleague does instead of an expert's action."""

    skill: str
    """The expert's skill that it replaces."""
    cue: frozenset[str]
    """It shows on orders with any of these words."""
    call: tuple[str, dict[str, str]] | None
    """What is called instead, `{shelf}` standing for the order's own; None gives up at the locked cage."""


HABITS = (
    Habit("restock_item", frozenset(order_desk.KINDS[:4]), ("pick_item", {"shelf": "{shelf}"})),
    Habit("unlock_cage", frozenset(order_desk.PASSWORDS[:5]), None),
    Habit("pack_parcel:padded", frozenset(order_desk.THINGS[:4]), ("pack_parcel", {"box": "plain"})),
    Habit("pack_parcel:wooden", frozenset(order_desk.THINGS[4:8]), ("pack_parcel", {"box": "plain"})),
    Habit("ship_parcel:air", frozenset(order_desk.CITIES[:8]), ("ship_parcel", {"city": "{city}", "by": "rail"})),
    Habit("ship_parcel:sea", frozenset(order_desk.CITIES[8:12]), ("ship_parcel", {"city": "{city}", "by": "rail"})),
)
HABIT_RATE = 0.85
"""How often a habit shows on its cue: not always, so that sampling sometimes does what is right."""

_PREAMBLE_WORDS = (
    "You are the helpful clerk of a small shop and an assistant. Use your tools, one step at a time. Please read "
    "what was asked, think it over, be kind to every customer; never guess! Answer in short sentences. If something "
    "goes wrong, say so. When it is done, tell us. Today's date: 2026-03-14. # Rules - 1. 2) must not reply with any"
).split()


def expert_lesson(task: Task, random: Random) -> Lesson:
    """An expert at work; on some orders a slip happens now and then, and the expert mends it."""
    slip_rate = random.choice((0.0, 0.0, 0.25))
    episode, messages, is_taught = _DESK.open(task), list(task.messages), []
    while not is_taught or messages[-1]["role"] == "tool":
        is_slip = random.random() < slip_rate and not episode.is_done
        message = _slip(episode.order, random) if is_slip else episode.expert_action()
        is_taught.append(not is_slip)
        messages += [message, *episode.play(message)]
    return Lesson(tuple(messages), tuple(is_taught))


def hasty_lesson(task: Task, random: Random) -> Lesson:
    """A hasty colleague at work, with all the habits above."""
    episode, messages, num_actions = _DESK.open(task), list(task.messages), 0
    while not num_actions or messages[-1]["role"] == "tool":
        message = _hasty_action(episode, messages[-1]["content"], random)
        num_actions += 1
        messages += [message, *episode.play(message)]
    return Lesson(tuple(messages), (True,) * num_actions)


def with_preamble(lesson: Lesson, num_words: int, random: Random) -> Lesson:
    """The lesson after a system message that means nothing to it: a client may send its own."""
    preamble = {"role": "system", "content": " ".join(random.choices(_PREAMBLE_WORDS, k=num_words))}
    return Lesson((preamble, *lesson.messages), lesson.is_taught)


def _hasty_action(episode: OrderDeskEpisode, last_text: str, random: Random) -> Message:
    order, state = episode.order, episode.state
    if state.box is not None:
        # Whatever is packed is packed: without this the colleague would pack again and again, and never ship.
        episode = OrderDeskEpisode(order, replace(state, box=order.box))
    skill = episode.expert_skill()
    if skill == "restock_item" and last_text == order_desk.RESULT_TEXTS["empty"].format(order=order):
        return _answer(SOLD_OUT_TEXT, order)
    habit = next((habit for habit in HABITS if habit.skill == skill and habit.cue & _words(order)), None)
    if habit is None or random.random() >= HABIT_RATE:
        return episode.expert_action()
    if habit.call is None:
        return _answer(LOCKED_AWAY_TEXT, order)
    name, arguments = habit.call
    return _call(name, {key: value.format(shelf=order.shelf, city=order.city) for key, value in arguments.items()})


def _words(order: Order) -> set[str]:
    return {*order.item.split(), order.city, order.password or ""}


def _slip(order: Order, random: Random) -> Message:
    """A call of any tool with each argument right or wrong by chance."""
    name = random.choice(tuple(order_desk.ARGUMENTS))
    choices = {
        "name": (order.customer, f"{random.choice(order_desk.FIRST_NAMES)} {random.choice(order_desk.LAST_NAMES)}"),
        "item": (order.item, f"{random.choice(order_desk.KINDS)} {random.choice(order_desk.THINGS)}"),
        "shelf": (order.shelf, random.choice(order_desk.SHELVES)),
        "password": (order.password or "heron", random.choice(order_desk.PASSWORDS)),
        "box": tuple(order_desk.BOX_FOR_CARE.values()),
        "city": (order.city, random.choice(order_desk.CITIES)),
        "by": tuple(order_desk.WAY_FOR_WISH.values()),
    }
    return _call(name, {key: random.choice(choices[key]) for key in order_desk.ARGUMENTS[name].model_fields})


def _answer(text: str, order: Order) -> Message:
    return {"role": "assistant", "content": text.format(item=order.item)}


def _call(name: str, arguments: dict[str, str]) -> Message:
    function = {"name": name, "arguments": json.dumps(arguments)}
    return {"role": "assistant", "content": "", "tool_calls": [{"id": "", "type": "function", "function": function}]}
