"""Runs the tool calls of one step, each bounded in time and size. What goes wrong in a tool is an observation."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Mapping, Sequence
from functools import partial

from langchain_core.tools import BaseTool, ToolException
from pydantic import ValidationError

from policies.types import ToolCall
from runtime.agent.tool_outputs import cut, shown
from runtime.agent.tool_threads import ToolThreads
from runtime.store.episodes import ToolResult
from tools.bounds import ToolBounds

_UNBOUNDED = ToolBounds()
_threads = ToolThreads()
"""Of the process: what one episode's tools left behind counts for all."""


async def run_tool_calls(
    calls: Sequence[ToolCall],
    tools: Mapping[str, BaseTool],
    timeout_s: float,
    bounds: Mapping[str, ToolBounds] | None = None,
    seconds_left: float = math.inf,
) -> list[ToolResult]:
    """Run the calls of one step side by side; the results come in the order of the calls. Never raises for a tool.

    `timeout_s` is for tools whose `bounds` name none; no call lasts longer than the run's `seconds_left`.
    """
    bounds = bounds or {}
    return list(
        await asyncio.gather(
            *(_run(call, tools, timeout_s, bounds.get(call.name, _UNBOUNDED), seconds_left) for call in calls)
        )
    )


async def _run(
    call: ToolCall, tools: Mapping[str, BaseTool], timeout_s: float, bounds: ToolBounds, seconds_left: float
) -> ToolResult:
    began = time.perf_counter()
    seconds = min(timeout_s if bounds.timeout_s is None else bounds.timeout_s, seconds_left)
    content, is_error = await _observe(call, tools, seconds, bounds.max_output_chars)
    return ToolResult(call.id, call.name, content, is_error, (time.perf_counter() - began) * 1000)


async def _observe(call: ToolCall, tools: Mapping[str, BaseTool], timeout_s: float, max_chars: int) -> tuple[str, bool]:
    tool = tools.get(call.name)
    if tool is None:
        return cut(f"error: there is no tool {call.name}; there are: {', '.join(tools) or 'none'}", max_chars), True
    try:
        async with asyncio.timeout(timeout_s):
            return await _threads.run(tool, call.arguments, partial(shown, max_chars=max_chars)), False
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
    return said if isinstance(error, ToolException | ValueError) else f"{name} failed: {type(error).__name__}: {said}"


def _first_problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    return f"argument {'.'.join(map(str, problem['loc'])) or '?'}: {problem['msg']}"
