"""Demonstrations of the order desk, as a client imports them."""

from __future__ import annotations

from typing import Any

import httpx
from langchain_core.utils.function_calling import convert_to_openai_tool

from tests.serving import Served
from tools.worlds.order_desk import OrderDesk

WORLD = OrderDesk()


def expert_demonstration(index: int, **said: Any) -> dict[str, Any]:
    """What the order desk's expert does with a task, from the first message to its answer."""
    task = WORLD.task("train", index)
    episode = WORLD.open(task)
    messages = [*task.messages, episode.expert_action()]
    while messages[-1].get("tool_calls"):
        messages += episode.play(messages[-1])
        messages.append(episode.expert_action())
    tools = [convert_to_openai_tool(tool) for tool in episode.tools]
    return {"messages": messages, "tools": tools, "task": task.id, **said}


def post(server: Served, *demonstrations: dict[str, Any]) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/demonstrations", json={"demonstrations": demonstrations}, timeout=30)
