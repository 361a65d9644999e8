"""A world of your own on one page: a house whose lamps are to be set as somebody wishes.

.venv/bin/python serve.py --world examples.own_world:Lamps
.venv/bin/python -m learner.practice --world examples.own_world:Lamps --episodes 20
"""

from __future__ import annotations

from itertools import product

from tools.worlds.calls import ToolEpisode, answering, calling
from tools.worlds.listed import ListedWorld, split_by_fives

ROOMS = ("hall", "kitchen", "attic", "cellar", "study", "porch")
ROOM = {"type": "object", "properties": {"room": {"type": "string", "enum": list(ROOMS)}}, "required": ["room"]}
TOOLS = [
    {"name": "look", "description": "See whether a room's lamp is on.", "parameters": ROOM},
    {"name": "press_switch", "description": "Turn a room's lamp on or off.", "parameters": ROOM},
]
Wish = tuple[bool, ...]
"""For each room whether its lamp is to be on."""


class LampsEpisode(ToolEpisode):
    """One attempt at one wish. All lamps are off at first."""

    def __init__(self, wish: Wish) -> None:
        super().__init__()
        self.wish, self.is_on = wish, dict.fromkeys(ROOMS, False)

    def schemas(self):
        return TOOLS

    def run(self, name, arguments):  # whatever it raises is told to the agent as an error
        if name == "press_switch":
            self.is_on[arguments["room"]] = not self.is_on[arguments["room"]]
        return f"The lamp is {'on' if self.is_on[arguments['room']] else 'off'}."

    def outcome(self):
        return float(tuple(self.is_on.values()) == self.wish)

    def expert_action(self):
        wrong = [room for room, wanted in zip(ROOMS, self.wish, strict=True) if self.is_on[room] != wanted]
        return calling("press_switch", {"room": wrong[0]}, self.num_moves) if wrong else answering("It is as you wish.")

    def reopened(self):
        return LampsEpisode(self.wish)

    def is_where(self, other):
        return self.is_on == other.is_on


class Lamps(ListedWorld[Wish]):
    """One wish for each set of rooms."""

    name = "lamps"

    def __init__(self) -> None:
        super().__init__(split_by_fives(list(product((False, True), repeat=len(ROOMS)))[1:]))

    def messages_of(self, item: Wish):
        rooms = [room for room, wanted in zip(ROOMS, item, strict=True) if wanted]
        return ({"role": "user", "content": f"Light these rooms and no other: {', '.join(rooms)}."},)

    def open_item(self, item: Wish):
        return LampsEpisode(item)
