"""A world may be anybody's code. What it does wrong is told to whoever asked it as the world's fault, in words."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from traceback import extract_tb
from typing import TYPE_CHECKING, SupportsFloat

from tools.bounds import TOOL_NAME
from tools.worlds.world import Message, UnknownTask, WorldEpisode, WorldFailed, require_told

if TYPE_CHECKING:
    from langchain_core.tools import BaseTool

MAX_SAID_CHARS = 300
"""Of what an exception says."""


@contextmanager
def blaming(world: str, method: str) -> Iterator[None]:
    """Raises WorldFailed, which names both, for whatever a world's method raises: SystemExit, too.

    UnknownTask, and a WorldFailed of the world's own, pass as they are.
    """
    try:
        yield
    except (WorldFailed, UnknownTask, KeyboardInterrupt, asyncio.CancelledError):
        raise
    except BaseException as error:
        raise WorldFailed(f"`{method}` of the world {world} {raised(error)}; the fault is the world's") from error


def raised(error: BaseException) -> str:
    """`raised KeyError: 'x' (lamps.py, line 12, in run)`: what and where, for who wrote the code."""
    try:
        said = str(error)[:MAX_SAID_CHARS]
    except Exception:  # an exception of foreign code may not even say what it is
        said = ""
    frames = extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno}, in {frames[-1].name})" if frames else ""
    return f"raised {type(error).__name__}{f': {said}' if said else ''}{where}"


def tools_of(world: str, episode: WorldEpisode) -> list[BaseTool]:
    """The tools that may be called now. Raises WorldFailed where they are none that a policy could be offered."""
    if not (hasattr(type(episode), "tools") or hasattr(episode, "tools")):  # a property may raise what hasattr hides
        raise WorldFailed(f"`open` of the world {world} gave {episode!r:.100}, which is no episode: it has no `tools`")
    with blaming(world, "tools"):
        tools = list(episode.tools)
        names = [tool.name for tool in tools]
    if unfit := [name for name in names if not (isinstance(name, str) and TOOL_NAME.fullmatch(name))]:
        raise WorldFailed(
            f"the world {world} has a tool with the name {unfit[0]!r}; it may have letters from a to z, digits, _, - "
            "and . only, at most 64 of them; the fault is the world's"
        )
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise WorldFailed(f"the world {world} has two tools with the name {twice[0]!r}; the fault is the world's")
    return tools


def told_by(world: str, episode: WorldEpisode, message: Message) -> list[Message]:
    """What the world says to an assistant message. Raises WorldFailed where a conversation cannot go on with it."""
    with blaming(world, "play"):
        told = episode.play(message)
        require_told(told)
        return list(told)


def outcome_of(world: str, episode: WorldEpisode) -> float:
    """How good the end is, 0 to 1. Raises WorldFailed for an outcome that is no such number."""
    with blaming(world, "outcome"):
        value = episode.outcome()
        number = float(value) if isinstance(value, SupportsFloat) else math.nan  # numpy's are no `numbers.Real`
        shown = repr(value)[:MAX_SAID_CHARS]
    if not 0 <= number <= 1:
        raise WorldFailed(f"`outcome` of the world {world} gave {shown}; it must be a number from 0 to 1")
    return number
