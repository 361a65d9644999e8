"""Runs the tool calls of one step, each bounded in time and size. What goes wrong in a tool is an observation."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

from langchain_core.tools import BaseTool, ToolException
from pydantic import ValidationError

from policies.types import ToolCall
from runtime.agent.tool_outputs import cut, shown
from runtime.agent.tool_threads import Read, ToolThreads
from runtime.store.episodes import ToolResult
from tools.bounds import ToolBounds
from tools.worlds.world import WorldFailed

_UNBOUNDED = ToolBounds()
_threads = ToolThreads()
"""Of the process: what one episode's tools left behind counts for all."""


Turns = Mapping[str, Callable[[], AbstractContextManager[None]]]
"""By the tool's name: what a call holds while it runs."""
Ask = Callable[[BaseTool, Mapping[str, Any], Read], Awaitable[str]]
"""Calls a tool, and gives what is made of its output."""


async def run_tool_calls(
    calls: Sequence[ToolCall],
    tools: Mapping[str, BaseTool],
    timeout_s: float,
    bounds: Mapping[str, ToolBounds] | None = None,
    turns: Turns | None = None,
    seconds_left: Callable[[], float] = lambda: math.inf,
    world: str = "",
) -> list[ToolResult]:
    """Run the calls of one step; the results come in the order of the calls. Never raises for a tool.

    Calls run side by side, but those of tools with a turn one after the other. `timeout_s` is for tools whose `bounds`
    name none; no call lasts longer than the run's `seconds_left` when it begins. Tools with a turn are of the `world`.
    """
    bounds, turns = bounds or {}, turns or {}

    in_order = asyncio.Lock()  # whoever asks for it first gets it first

    async def run(call: ToolCall) -> ToolResult:
        bound, turn = bounds.get(call.name, _UNBOUNDED), turns.get(call.name, nullcontext)
        async with in_order if call.name in turns else nullcontext():
            seconds = min(timeout_s if bound.timeout_s is None else bound.timeout_s, seconds_left())
            ask = partial(_threads.run, turn=turn(), world=world if call.name in turns else "")
            return await _run(call, tools, seconds, bound.max_output_chars, ask)

    return list(await asyncio.gather(*map(run, calls)))


async def _run(call: ToolCall, tools: Mapping[str, BaseTool], timeout_s: float, max_chars: int, ask: Ask) -> ToolResult:
    began = time.perf_counter()
    content, is_error = await _observe(call, tools, timeout_s, max_chars, ask)
    return ToolResult(call.id, call.name, content, is_error, (time.perf_counter() - began) * 1000)


async def _observe(
    call: ToolCall, tools: Mapping[str, BaseTool], timeout_s: float, max_chars: int, ask: Ask
) -> tuple[str, bool]:
    tool = tools.get(call.name)
    if tool is None:
        return cut(f"error: there is no tool {call.name}; there are: {', '.join(tools) or 'none'}", max_chars), True
    try:
        async with asyncio.timeout(timeout_s):
            return await ask(tool, call.arguments, partial(shown, max_chars=max_chars)), False
    except TimeoutError:
        return f"error: {call.name} took longer than {timeout_s:g} seconds", True
    except Exception as error:  # a tool is foreign code: whatever it raises, the agent is told and the server lives
        return cut(f"error: {_told(call.name, error)}", max_chars), True


def _told(name: str, error: Exception) -> str:
    if isinstance(error, ValidationError):
        return _first_problem(error)
    try:
        said = str(error)
    except Exception:  # an exception of foreign code may not even say what it is
        said = ""
    return (
        said
        if isinstance(error, ToolException | ValueError | WorldFailed)
        else f"{name} failed: {type(error).__name__}: {said}"
    )


def _first_problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    return f"argument {'.'.join(map(str, problem['loc'])) or '?'}: {problem['msg']}"
