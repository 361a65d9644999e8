"""Running tools: each call is bounded in time and size, and whatever goes wrong is an observation."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any, Literal

import pytest
from langchain_core.tools import BaseTool, ToolException, tool

from policies.types import ToolCall
from runtime.agent.tool_calls import run_tool_calls
from runtime.store.episodes import ToolResult


@tool
def add(left: int, right: int) -> int:
    """Add two numbers."""
    return left + right


@tool
def shout(text: str, mood: Literal["glad", "cross"] = "glad") -> str:
    """Say it loudly."""
    return f"{text.upper()} ({mood})"


@tool
async def nap(seconds: float) -> str:
    """Sleep without holding anybody up."""
    await asyncio.sleep(seconds)
    return "awake"


@tool
def doze(seconds: float) -> str:
    """Sleep on a thread."""
    time.sleep(seconds)
    return "awake"


@tool
def fail(kind: str) -> str:
    """Go wrong in one of many ways."""
    raise {"tool": ToolException, "value": ValueError, "key": KeyError, "zero": ZeroDivisionError}[kind]("no luck")


TOOLS: dict[str, BaseTool] = {each.name: each for each in (add, shout, nap, doze, fail)}


async def run_one(called: str, timeout_s: float = 5.0, /, **arguments: Any) -> ToolResult:
    (result,) = await run_tool_calls([ToolCall("call_1", called, arguments)], TOOLS, timeout_s)
    return result


async def test_a_result_belongs_to_its_call_and_says_how_long_it_took() -> None:
    result = await run_one("shout", text="hello", mood="cross")
    assert (result.tool_call_id, result.name, result.content) == ("call_1", "shout", "HELLO (cross)")
    assert not result.is_error
    assert 0 < result.latency_ms < 10_000


async def test_what_is_no_text_is_shown_as_json() -> None:
    assert (await run_one("add", left=2, right=3)).content == "5"


async def test_an_unknown_tool_is_told_which_there_are() -> None:
    result = await run_one("fly")
    assert result.is_error
    assert "there is no tool fly" in result.content
    assert "add, shout, nap" in result.content


async def test_without_any_tools_an_unknown_tool_is_told_that_there_are_none() -> None:
    (result,) = await run_tool_calls([ToolCall("c", "fly", {})], {}, 1.0)
    assert result.content.endswith("there are: none")


@pytest.mark.parametrize(
    ("name", "arguments", "complaint"),
    [
        ("add", {"left": 1}, "argument right: Field required"),
        ("add", {"left": "one", "right": 2}, "argument left: Input should be a valid integer"),
        ("add", {}, "argument left: Field required"),
        ("shout", {"text": "x", "mood": "sad"}, "argument mood: Input should be 'glad' or 'cross'"),
    ],
)
async def test_bad_arguments_are_named(name: str, arguments: dict[str, Any], complaint: str) -> None:
    result = await run_one(name, **arguments)
    assert result.is_error
    assert result.content.startswith(f"error: {complaint}")


@pytest.mark.parametrize("kind", ["tool", "value", "key", "zero"])
async def test_whatever_a_tool_raises_is_an_observation(kind: str) -> None:
    result = await run_one("fail", kind=kind)
    assert result.is_error
    assert result.content.startswith("error: ")
    assert "no luck" in result.content


async def test_no_arguments_make_a_tool_call_an_exception() -> None:
    """Names that langchain itself uses must not slip into its own calls."""
    for name in ("config", "run_manager", "callbacks", "self", "input", "type", "args", "tool_input", "id", "name"):
        assert isinstance(await run_one("add", **{"left": 1, "right": 2, name: {"configurable": 3}}), ToolResult)
        assert (await run_one("add", **{name: "x"})).is_error


@pytest.mark.parametrize("name", ["nap", "doze"])
async def test_a_tool_that_takes_too_long_is_given_up(name: str) -> None:
    began = time.perf_counter()
    result = await run_one(name, 0.1, seconds=3.0)
    assert time.perf_counter() - began < 2.7
    assert result.is_error
    assert result.content == f"error: {name} took longer than 0.1 seconds"


async def test_a_slow_tool_does_not_hold_up_the_server() -> None:
    ticks = 0
    running = asyncio.create_task(run_one("doze", seconds=0.3))
    while not running.done():
        await asyncio.sleep(0.01)
        ticks += 1
    assert ticks > 10


async def test_the_calls_of_one_step_run_side_by_side() -> None:
    """Each waits for all the others: one after another they would never end."""
    everyone = threading.Barrier(3)

    @tool
    def meet() -> str:
        """Wait until three are here."""
        everyone.wait(5.0)
        return "met"

    calls = [ToolCall(f"call_{number}", "meet", {}) for number in range(3)]
    results = await run_tool_calls(calls, {"meet": meet}, 10.0)
    assert [result.content for result in results] == ["met"] * 3


async def test_results_come_in_the_order_of_the_calls() -> None:
    calls = [ToolCall("slow", "nap", {"seconds": 0.1}), ToolCall("quick", "nap", {"seconds": 0.0})]
    assert [result.tool_call_id for result in await run_tool_calls(calls, TOOLS, 5.0)] == ["slow", "quick"]


async def test_one_failing_call_leaves_the_others_alone() -> None:
    calls = [ToolCall("a", "fail", {"kind": "zero"}), ToolCall("b", "add", {"left": 1, "right": 1})]
    results = await run_tool_calls(calls, TOOLS, 5.0)
    assert [(result.is_error, result.content[:6]) for result in results] == [(True, "error:"), (False, "2")]


async def test_a_long_output_is_cut_and_says_so() -> None:
    result = await run_one("shout", text="x" * 50_000)
    assert len(result.content) <= 20_100
    assert result.content.endswith("[cut here: the whole output has 50007 characters]")


async def test_a_long_error_is_cut_too() -> None:
    @tool
    def rage() -> str:
        """Go wrong at length."""
        raise ValueError("no" * 50_000)

    (result,) = await run_tool_calls([ToolCall("c", "rage", {})], {"rage": rage}, 5.0)
    assert result.is_error
    assert len(result.content) <= 20_100


async def test_half_a_surrogate_pair_in_an_output_does_not_reach_the_log() -> None:
    @tool
    def mangle() -> str:
        """Give back half of a character."""
        return "a\ud83d"

    (result,) = await run_tool_calls([ToolCall("c", "mangle", {})], {"mangle": mangle}, 5.0)
    assert result.content.encode()


async def test_a_cancelled_run_cancels_its_tools() -> None:
    ended = threading.Event()

    @tool
    async def wait() -> str:
        """Wait for ever."""
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()
        return "done"

    running = asyncio.create_task(run_tool_calls([ToolCall("c", "wait", {})], {"wait": wait}, 60.0))
    await asyncio.sleep(0.05)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    await asyncio.to_thread(ended.wait, 5.0)
    assert ended.is_set()
