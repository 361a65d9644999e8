"""Runs the tool calls of one step, each bounded in time and size. What goes wrong in a tool is an observation."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from langchain_core.tools import BaseTool, ToolException
from pydantic import ValidationError

from policies.types import ToolCall
from runtime.store.episodes import ToolResult

_LONGEST_CONTENT = 20_000
"""Characters of a tool's output that the agent is shown."""


async def run_tool_calls(
    calls: Sequence[ToolCall], tools: Mapping[str, BaseTool], timeout_s: float
) -> list[ToolResult]:
    """Run the calls of one step side by side; the results come in the order of the calls. Never raises for a tool."""
    return list(await asyncio.gather(*(_run(call, tools, timeout_s) for call in calls)))


async def _run(call: ToolCall, tools: Mapping[str, BaseTool], timeout_s: float) -> ToolResult:
    began = time.perf_counter()
    content, is_error = await _observe(call, tools, timeout_s)
    latency_ms = (time.perf_counter() - began) * 1000
    return ToolResult(call.id, call.name, _shown(content), is_error, latency_ms)


async def _observe(call: ToolCall, tools: Mapping[str, BaseTool], timeout_s: float) -> tuple[str, bool]:
    tool = tools.get(call.name)
    if tool is None:
        return f"error: there is no tool {call.name}; there are: {', '.join(tools) or 'none'}", True
    try:
        async with asyncio.timeout(timeout_s):
            return _as_text(await tool.ainvoke(call.arguments)), False
    except TimeoutError:
        return f"error: {call.name} took longer than {timeout_s:g} seconds", True
    except ValidationError as error:
        return f"error: {_first_problem(error)}", True
    except (ToolException, ValueError) as error:
        return f"error: {error}", True
    except Exception as error:  # a tool is foreign code: whatever it raises, the agent is told and the server lives
        return f"error: {call.name} failed: {type(error).__name__}: {error}", True


def _as_text(output: Any) -> str:
    return output if isinstance(output, str) else json.dumps(output, ensure_ascii=False, default=str)


def _shown(content: str) -> str:
    """What the agent is shown: not too long, and text that UTF-8 can write."""
    content = content.encode(errors="replace").decode()
    if len(content) <= _LONGEST_CONTENT:
        return content
    return f"{content[:_LONGEST_CONTENT]}\n[cut here: the whole output has {len(content)} characters]"


def _first_problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    return f"argument {'.'.join(map(str, problem['loc'])) or '?'}: {problem['msg']}"
