"""Work that would hold up the event loop, and with it every other request: done in threads of its own.

Two threads and no more: large requests wait for each other, and small ones for none of them. What runs there must
give way: a call into a library that keeps the interpreter's lock for long holds up the loop all the same.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

_threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="large-request")

FREE_AFTER_S = 1.0


def free_off_loop(*things: object) -> None:
    """Let large objects go in a thread, a moment later, when whoever still holds them has ended: a hundred thousand
    small ones take tens of milliseconds, which whoever drops the last reference would spend on the event loop."""
    held = [*things]
    asyncio.get_running_loop().call_later(FREE_AFTER_S, lambda: _threads.submit(held.clear))


async def to_its_end(work: Awaitable[T]) -> T:
    """Await what must not be left half done: whoever asks for it and goes away ends only after it."""
    working = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(working)
    finally:
        if not working.done():
            await asyncio.wait({working})


async def off_loop(is_large: bool, work: Callable[P, T], *values: P.args, **more: P.kwargs) -> T:
    """Do it in a thread if it is large, else here and now: going to a thread and back costs a tenth of a millisecond,
    which most requests do not take altogether."""
    if not is_large:
        return work(*values, **more)
    return await asyncio.get_running_loop().run_in_executor(_threads, partial(work, *values, **more))
