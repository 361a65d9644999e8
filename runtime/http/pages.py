"""Pages of episodes and of steps: bounded in number and in bytes, and written beside the event loop."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import Any

import orjson
from fastapi import Response

from runtime.store.damage import Damaged
from runtime.store.episodes import Episode

PAGE_BYTES = 4 * 2**20
"""Of the entries of one page, unless a single one is larger."""


async def page(make: Callable[[], dict[str, Any]]) -> Response:
    """An answer that is gathered and written in a thread: it may be large, and others are not to wait for it."""
    return Response(await asyncio.to_thread(lambda: as_json(make())), media_type="application/json")


def as_json(value: Any) -> bytes:
    try:
        return orjson.dumps(value)
    except TypeError:  # integers of more than 64 bits, halves of surrogate pairs: a model writes them one day
        return json.dumps(value).encode()


def that_fit(entries: Iterable[dict[str, Any]], limit: int) -> tuple[list[dict[str, Any]], bool]:
    """The first entries, as many as a page has room for but at least one, and whether there are more of them.

    They are read only as far as is needed.
    """
    fitting: list[dict[str, Any]] = []
    num_bytes = 0
    for entry in entries:
        num_bytes += len(as_json(entry))
        if len(fitting) == limit or (fitting and num_bytes > PAGE_BYTES):
            return fitting, True
        fitting.append(entry)
    return fitting, False


def episode_page(found: Iterable[Episode], limit: int, damaged: Sequence[Damaged] = ()) -> dict[str, Any]:
    """One page of a list; `found` may go on beyond it. `damaged` is what reading it has stepped over."""
    entries, has_more = that_fit(map(shown_episode, found), limit)
    last_id = entries[-1]["id"] if entries else None
    return {"object": "list", "data": entries, "has_more": has_more, "last_id": last_id} | left_out(damaged)


def left_out(damaged: Sequence[Damaged]) -> dict[str, Any]:
    """What a list says of the damaged rows that it leaves out; nothing where there are none."""
    return {"damaged": [each.shown() for each in damaged]} if damaged else {}


def shown_episode(episode: Episode) -> dict[str, Any]:
    """An episode as clients see it, without its steps."""
    return {"object": "episode", **asdict(episode)}
