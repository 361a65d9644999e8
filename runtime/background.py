"""Work that a server does beside its requests, for ever."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

_log = logging.getLogger(__name__)


async def keep_doing(what: str, do: Callable[[], Awaitable[object]], every_s: float) -> None:
    """Do something again and again. What fails is told and tried again at the next turn, whatever it is: a background
    task that ends is missed by nobody until it is needed."""
    while True:
        await asyncio.sleep(every_s)
        try:
            await do()
        except Exception as error:
            _log.warning("%s failed and is tried again in %g s: %s", what, every_s, error, exc_info=error)
