"""What experts do in a world, as transcripts: what a team would import that has logs and no world."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from math import sqrt
from statistics import fmean, stdev
from typing import Any

from langchain_core.utils.function_calling import convert_to_openai_tool

from benchmarks.colleagues import Conversation, expert
from tools.worlds.world import Message, World


def expert_conversations(world: World, split: str, number: int) -> list[Conversation]:
    """Of the first tasks of a split that the expert brings to outcome 1, so many with different first requests."""
    found: dict[str, Conversation] = {}
    for index in range(world.splits[split]):
        if len(found) == number:
            break
        if (conversation := expert(world, world.task(split, index))) is not None:
            found.setdefault(first_request(conversation), conversation)
    return list(found.values())


def first_request(conversation: Conversation) -> str:
    return next(str(message["content"]) for message in conversation if message["role"] == "user")


def first_steps(conversation: Conversation, number: int) -> Conversation:
    """Up to so many of the expert's actions: a long transcript is most of a training's tokens."""
    ends = [place for place, message in enumerate(conversation) if message["role"] == "assistant"]
    return conversation[: ends[min(number, len(ends)) - 1] + 1]


def of_one_agent(world: World, conversations: Sequence[Conversation]) -> list[Conversation]:
    """Those which call only what most of the world's tasks offer together: the transcripts that one agent would have
    where tasks differ in their tools."""
    tasks = (world.task("train", index) for index in range(world.splits["train"]))
    offered = Counter(frozenset(tool.name for tool in world.open(task).tools) for task in tasks)
    ((tools, _),) = offered.most_common(1)
    return [each for each in conversations if called_in(each) <= tools]


def called_in(conversation: Conversation) -> set[str]:
    return {call["function"]["name"] for message in conversation for call in message.get("tool_calls") or ()}


def tools_of(world: World, conversations: Sequence[Conversation]) -> list[Any]:
    """The world's tools that any of these calls, which no single task may have all of. Raises ValueError for a call of
    none of them."""
    called = set[str]().union(*map(called_in, conversations))
    found: dict[str, Any] = {}
    for index in range(world.splits["train"]):
        if called <= set(found):
            break
        for tool in world.open(world.task("train", index)).tools:
            if tool.name in called and tool.name not in found:
                found[tool.name] = convert_to_openai_tool(tool)
    if unknown := called - set(found):
        raise ValueError(f"no task of {world.name} has the tool {min(unknown)!r}")
    return list(found.values())


def states_of(conversation: Conversation) -> Iterator[tuple[Conversation, Message]]:
    """What stood there, and what the expert did."""
    for place, message in enumerate(conversation):
        if message["role"] == "assistant":
            yield conversation[:place], message


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and 95 % interval by the normal approximation, a transcript being the unit."""
    half = 1.96 * stdev(values) / sqrt(len(values)) if len(values) > 1 else float("inf")
    return fmean(values), fmean(values) - half, fmean(values) + half
