"""Worlds to practise in: each is one file, found by its name."""

from __future__ import annotations

from tools.worlds.order_desk import OrderDesk
from tools.worlds.world import World

WORLDS = {OrderDesk.name: OrderDesk}


def load_world(name: str) -> World:
    """The world of that name. Raises ValueError where there is none."""
    if name not in WORLDS:
        raise ValueError(f"no world is called {name!r}; there are: {', '.join(sorted(WORLDS))}")
    return WORLDS[name]()
