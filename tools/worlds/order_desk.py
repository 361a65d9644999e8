"""The order desk of a small curiosity shop: find the thing, pack it as it needs, send it where and when it is wanted.

    look_up_customer -> check_item -> [restock_item] -> pick_item -> [unlock_cage -> pick_item]
                     -> pack_parcel -> ship_parcel

Whatever an order needs stands in its text or in a tool's result, and is drawn anew for every order: nothing can be
known by heart. Mistakes can be mended until the parcel has left. Every state is one frozen record and every call one
pure transition, so that an action can be tried on a copy; undo methods on a mutable shop were refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any, Literal

from langchain_core.tools import BaseTool
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tools.worlds.calls import answering, calling, read_call, shown
from tools.worlds.world import Message, Task, opening_of

# ------------------------------------------------------------------------------------------------- words


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


FIRST_NAMES = _words("Ada Bruno Clara Diego Elif Farid Greta Hana Ivo Jonas Kira Luis Mina Nils Olga Pavel")
LAST_NAMES = _words(
    "Moreau Santos Novak Okafor Lindqvist Tanaka Rossi Keller Haddad Ortega Petrov Sato Varga Wilde Yilmaz Zeman"
)
KINDS = _words("brass walnut painted antique silver travelling pocket miniature")
THINGS = _words("globe barometer lantern teapot telescope clock inkwell kaleidoscope puppet typewriter")
CITIES = _words(
    "Lisbon Oslo Cairo Kyoto Lima Prague Dublin Nairobi Quito Riga Seville Toronto Vienna Warsaw Athens Bergen"
)
SHELVES = tuple(f"{row}{place}" for row in "ABCD" for place in range(1, 5))
PASSWORDS = _words("heron maple comet velvet anchor saffron thimble walrus juniper cobalt harbour magpie")
REMARKS = (".", ". Pays in advance.", ". Always writes back.", ". Asks after the shop cat.")
STOCKS = ("none left", "one left", "two left", "plenty left")
EMPTY = STOCKS[0]

BOX_FOR_CARE = {"fragile": "padded", "heavy": "wooden", "sturdy": "plain"}
WAY_FOR_WISH = {
    "as fast as it can go": "air",
    "by tomorrow evening": "air",
    "before the weekend": "rail",
    "some time this week": "rail",
    "with no hurry at all": "sea",
    "whenever it suits": "sea",
}

ORDER_TEXTS = (
    "Order {number}: {customer} would like the {item}, {wish}.",
    "Order {number} has come in: the {item} for {customer}, {wish}.",
    "Please see to order {number}. {customer} has chosen the {item} and wants it {wish}.",
)
ANSWER_TEXTS = {
    "done": "Done: the {item} is on its way to {city}.",
    "lost": "I am sorry, this order has gone wrong.",
}

RESULT_TEXTS = {
    "customer": "Lives in {order.city}{order.remark}",
    "no_customer": "There is no customer of that name.",
    "item": "On shelf {order.shelf}, {order.stock}. It is {order.care}.",
    "no_item": "There is no such item in the catalogue.",
    "restocked": "Shelf {order.shelf} is full again.",
    "not_empty": "Shelf {order.shelf} needs nothing.",
    "picked": "You hold the {order.item}.",
    "holding": "You hold the {order.item} already.",
    "wrong_shelf": "Shelf {call.shelf} holds other things.",
    "locked": "Shelf {order.shelf} is in a locked cage. A note says: the password is {order.password}.",
    "empty": "There is none on shelf {order.shelf}.",
    "unlocked": "The cage is open.",
    "wrong_password": "The cage stays shut.",
    "no_cage": "There is no locked cage here.",
    "packed": "It lies in a {call.box} box.",
    "nothing_to_pack": "There is nothing to pack yet.",
    "shipped": "The parcel has left for {call.city} by {call.by}.",
    "nothing_to_ship": "There is no parcel to ship yet.",
    "gone": "The parcel has left already.",
    "closed": "The desk has closed for today.",
}

# ------------------------------------------------------------------------------------------------- tools


class _Arguments(BaseModel):
    model_config = ConfigDict(extra="forbid")


class LookUpCustomer(_Arguments):
    """Read a customer's card: the city where the customer lives."""

    name: str = Field(description="First and last name, as in the order.")


class CheckItem(_Arguments):
    """Read an item's card: its shelf, how many are left, and whether it is fragile, heavy or sturdy."""

    item: str = Field(description="The item, as in the order.")


class RestockItem(_Arguments):
    """Fill an item's shelf from the cellar. Needed where the card says that none are left."""

    item: str = Field(description="The item, as in the order.")


class PickItem(_Arguments):
    """Take the ordered item from its shelf."""

    shelf: str = Field(description="The shelf on the item's card, such as B3.")


class UnlockCage(_Arguments):
    """Open a locked cage; afterwards the item can be picked."""

    password: str = Field(description="The password on the note at the cage.")


class PackParcel(_Arguments):
    """Pack the picked item; packing again changes the box. Fragile: padded. Heavy: wooden. Sturdy: plain."""

    box: Literal["padded", "wooden", "plain"] = Field(description="The kind of box.")


class ShipParcel(_Arguments):
    """Send the packed parcel off, for good. Wanted by tomorrow or faster: air. Within the week: rail. Else: sea."""

    city: str = Field(description="The city on the customer's card.")
    by: Literal["air", "rail", "sea"] = Field(description="The way it travels.")


ARGUMENTS: dict[str, type[_Arguments]] = {
    "look_up_customer": LookUpCustomer,
    "check_item": CheckItem,
    "restock_item": RestockItem,
    "pick_item": PickItem,
    "unlock_cage": UnlockCage,
    "pack_parcel": PackParcel,
    "ship_parcel": ShipParcel,
}
"""The tools by name, in the order of their use; each one's docstring is its description."""


def complain(error: Any) -> str:
    """What the agent is told of a pydantic ValidationError: its call's arguments cannot be read."""
    problems = (f"{'.'.join(map(str, problem['loc'])) or 'arguments'}: {problem['msg']}" for problem in error.errors())
    return "Error: " + "; ".join(problems)


class _DeskTool(BaseTool):
    """One of the desk's tools, bound to an episode."""

    run_call: Callable[[str, dict[str, Any]], str] = Field(exclude=True)

    def _run(self, **arguments: Any) -> str:
        return self.run_call(self.name, arguments)


# ------------------------------------------------------------------------------------- an order, its state


@dataclass(frozen=True, slots=True)
class Order:
    """What is true of one order. The agent sees its text, and the rest only through the tools."""

    number: int
    text: str
    customer: str
    item: str
    wish: str
    city: str
    remark: str
    shelf: str
    stock: str
    care: str
    password: str | None
    """Of the locked cage around the shelf; None where there is no cage."""

    @property
    def box(self) -> str:
        """The right box."""
        return BOX_FOR_CARE[self.care]

    @property
    def by(self) -> str:
        """The right way to travel."""
        return WAY_FOR_WISH[self.wish]


def draw_order(number: int) -> Order:
    """The order of a number, always the same."""
    random = Random(f"order_desk/{number}")
    customer = f"{random.choice(FIRST_NAMES)} {random.choice(LAST_NAMES)}"
    item = f"{random.choice(KINDS)} {random.choice(THINGS)}"
    wish = random.choice(tuple(WAY_FOR_WISH))
    return Order(
        number=number,
        text=random.choice(ORDER_TEXTS).format(number=number, customer=customer, item=item, wish=wish),
        customer=customer,
        item=item,
        wish=wish,
        city=random.choice(CITIES),
        remark=random.choice(REMARKS),
        shelf=random.choice(SHELVES),
        stock=EMPTY if random.random() < 0.4 else random.choice(STOCKS[1:]),
        care=random.choice(tuple(BOX_FOR_CARE)),
        password=random.choice(PASSWORDS) if random.random() < 0.4 else None,
    )


@dataclass(frozen=True, slots=True)
class State:
    """What the calls so far have brought about."""

    num_calls: int = 0
    knows_customer: bool = False
    knows_item: bool = False
    restocked: bool = False
    knows_password: bool = False
    unlocked: bool = False
    picked: bool = False
    box: str | None = None
    """The box that the item lies in."""
    shipped_to: tuple[str, str] | None = None
    """City and way, once the parcel has left."""


MAX_CALLS = 12
"""The desk closes after so many calls; an expert needs 5 to 8."""

Effect = tuple[State, str]
"""A call's result: the state it leads to and the key of its text in `RESULT_TEXTS`."""


def _same(said: str, meant: str) -> bool:
    return " ".join(said.split()).casefold() == meant.casefold()


def _look_up_customer(order: Order, state: State, call: LookUpCustomer) -> Effect:
    if not _same(call.name, order.customer):
        return state, "no_customer"
    return replace(state, knows_customer=True), "customer"


def _check_item(order: Order, state: State, call: CheckItem) -> Effect:
    if not _same(call.item, order.item):
        return state, "no_item"
    return replace(state, knows_item=True), "item"


def _restock_item(order: Order, state: State, call: RestockItem) -> Effect:
    if not _same(call.item, order.item):
        return state, "no_item"
    if order.stock != EMPTY or state.restocked:
        return state, "not_empty"
    return replace(state, restocked=True), "restocked"


def _pick_item(order: Order, state: State, call: PickItem) -> Effect:
    if state.picked:
        return state, "holding"
    if not _same(call.shelf, order.shelf):
        return state, "wrong_shelf"
    if order.password is not None and not state.unlocked:
        return replace(state, knows_password=True), "locked"
    if order.stock == EMPTY and not state.restocked:
        return state, "empty"
    return replace(state, picked=True), "picked"


def _unlock_cage(order: Order, state: State, call: UnlockCage) -> Effect:
    if order.password is None or state.unlocked:
        return state, "no_cage"
    if not _same(call.password, order.password):
        return state, "wrong_password"
    return replace(state, unlocked=True), "unlocked"


def _pack_parcel(order: Order, state: State, call: PackParcel) -> Effect:
    if not state.picked:
        return state, "nothing_to_pack"
    return replace(state, box=call.box), "packed"


def _ship_parcel(order: Order, state: State, call: ShipParcel) -> Effect:
    if state.box is None:
        return state, "nothing_to_ship"
    city = order.city if _same(call.city, order.city) else call.city
    return replace(state, shipped_to=(city, call.by)), "shipped"


_TRANSITIONS: dict[str, Callable[[Order, State, Any], Effect]] = {
    "look_up_customer": _look_up_customer,
    "check_item": _check_item,
    "restock_item": _restock_item,
    "pick_item": _pick_item,
    "unlock_cage": _unlock_cage,
    "pack_parcel": _pack_parcel,
    "ship_parcel": _ship_parcel,
}


def _is_done(state: State) -> bool:
    return state.shipped_to is not None or state.num_calls >= MAX_CALLS


def _is_success(order: Order, state: State) -> bool:
    return state.box == order.box and state.shipped_to == (order.city, order.by)


def _transition(order: Order, state: State, name: str, arguments: Any) -> tuple[State, str]:
    """The state after a call, and what the agent is told. A call that cannot be read changes nothing."""
    if name not in ARGUMENTS:
        return state, f"Error: there is no tool {name!r}."
    try:
        call = ARGUMENTS[name].model_validate(arguments)
    except ValidationError as error:
        return state, complain(error)
    if _is_done(state):
        return state, RESULT_TEXTS["closed" if state.shipped_to is None else "gone"]
    next_state, key = _TRANSITIONS[name](order, state, call)
    text = RESULT_TEXTS[key].format(order=order, call=call)
    return replace(next_state, num_calls=state.num_calls + 1), text


# ------------------------------------------------------------------------------------------------ expert

Choice = tuple[str, dict[str, str]]
"""A tool's name and its arguments."""


def _expert_call(order: Order, state: State) -> Choice | None:
    """What an expert does next, from what the agent has been told alone; None where no call helps any more."""
    if _is_done(state):
        return None
    if not state.knows_customer:
        return "look_up_customer", {"name": order.customer}
    if not state.knows_item:
        return "check_item", {"item": order.item}
    if not state.picked:
        return _expert_pick(order, state)
    if state.box != order.box:
        return "pack_parcel", {"box": order.box}
    return "ship_parcel", {"city": order.city, "by": order.by}


def _expert_pick(order: Order, state: State) -> Choice:
    if order.password is not None and state.knows_password and not state.unlocked:
        return "unlock_cage", {"password": order.password}
    if order.stock == EMPTY and not state.restocked:
        return "restock_item", {"item": order.item}
    return "pick_item", {"shelf": order.shelf}


def _skill(choice: Choice | None) -> str:
    """The skill of an expert's choice: its tool, and for boxes and ways which one, for they are learned apart."""
    if choice is None:
        return "answer"
    name, arguments = choice
    value = arguments.get("box") or arguments.get("by")
    return f"{name}:{value}" if value else name


# ----------------------------------------------------------------------------------------------- episode


class OrderDeskEpisode:
    """One attempt at one order."""

    def __init__(self, order: Order, state: State | None = None) -> None:
        self.order = order
        self.state = state or State()

    @property
    def tools(self) -> list[BaseTool]:
        """The desk's tools, bound to this episode."""
        return [
            _DeskTool(
                name=name,
                description=arguments.__doc__ or "",
                args_schema=arguments,
                handle_validation_error=lambda error: shown(complain(error)),
                run_call=self._call,
            )
            for name, arguments in ARGUMENTS.items()
        ]

    @property
    def is_done(self) -> bool:
        """The parcel has left, or the desk has closed."""
        return _is_done(self.state)

    def outcome(self) -> float:
        """1.0 where the parcel left in the right box, to the right city, the right way; else 0.0."""
        return float(_is_success(self.order, self.state))

    def play(self, message: Message) -> list[Message]:
        """Run an assistant message's tool calls in order and give back their tool messages."""
        return [
            {"role": "tool", "tool_call_id": call.get("id", ""), "content": self._call(*read_call(call))}
            for call in message.get("tool_calls") or ()
        ]

    def expert_action(self) -> Message:
        """The expert's next call; once nothing is left to do, its final answer."""
        choice = _expert_call(self.order, self.state)
        if choice is None:
            text = ANSWER_TEXTS["done" if self.outcome() else "lost"]
            return answering(text.format(item=self.order.item, city=self.order.city))
        return calling(*choice, self.state.num_calls)

    def expert_skill(self) -> str:
        """The skill that the expert's next action exercises."""
        return _skill(_expert_call(self.order, self.state))

    def same_effect(self, message_a: Message, message_b: Message) -> bool:
        """Whether both messages go on or both answer, and lead to the same state."""
        return self._effect(message_a) == self._effect(message_b)

    def _effect(self, message: Message) -> tuple[bool, State]:
        trial = OrderDeskEpisode(self.order, self.state)
        trial.play(message)
        return bool(message.get("tool_calls")), trial.state

    def _call(self, name: str, arguments: Any) -> str:
        self.state, text = _transition(self.order, self.state, name, arguments)
        return shown(text)


# ------------------------------------------------------------------------------------------------- world

_FIRST_NUMBER = {"train": 1000, "validation": 6000, "heldout": 7000}
_ORDER_NUMBER = re.compile(r"\border (\d{4})\b", re.IGNORECASE)


class OrderDesk:
    """The world of the order desk. An order's number says its split and its place there."""

    name = "order_desk"
    splits: Mapping[str, int] = {"train": 5000, "validation": 1000, "heldout": 2000}

    def task(self, split: str, index: int) -> Task:
        """One order as a task. Raises KeyError for an unknown split, IndexError for an index beyond its end."""
        if not 0 <= index < self.splits[split]:
            raise IndexError(f"{self.name}/{split} has tasks 0 to {self.splits[split] - 1}, not {index}")
        order = draw_order(_FIRST_NUMBER[split] + index)
        messages = ({"role": "user", "content": order.text},)
        return Task(self.name, split, index, messages)

    def find_task(self, messages: Sequence[Message]) -> Task | None:
        """The task whose text the first user message is, spaces aside; None for any other text."""
        text = opening_of(messages)
        found = _ORDER_NUMBER.search(text)
        if found is None:
            return None
        task = self._task_of_number(int(found[1]))
        # The number alone will not do: with another item or customer the world would contradict its own user.
        return task if task is not None and _same(text, task.messages[0]["content"]) else None

    def _task_of_number(self, number: int) -> Task | None:
        for split, first in _FIRST_NUMBER.items():
            if first <= number < first + self.splits[split]:
                return self.task(split, number - first)
        return None

    def open(self, task: Task) -> OrderDeskEpisode:
        """A fresh attempt at a task."""
        return OrderDeskEpisode(draw_order(_FIRST_NUMBER[task.split] + task.index))
