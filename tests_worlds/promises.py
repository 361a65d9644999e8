"""What every world promises, as checks that each world's tests call with their own world."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from typing import Any

from langchain_core.utils.function_calling import convert_to_openai_tool

from tools.worlds.calls import LONGEST_OBSERVATION, calling
from tools.worlds.world import SPLITS, Message, Task, World, WorldEpisode, task_named

MOST_STEPS = 100


def all_tasks(world: World) -> Iterator[Task]:
    for split, size in world.splits.items():
        yield from (world.task(split, index) for index in range(size))


def some_tasks(world: World, every: int) -> list[Task]:
    return list(all_tasks(world))[::every]


def follow_expert(episode: WorldEpisode) -> list[Message]:
    """Let the expert act until it has answered the user's last message, or does not know the way; what was said."""
    said: list[Message] = []
    while len(said) < MOST_STEPS and (message := episode.expert_action()) is not None:
        told = episode.play(message)
        said += [message, *told]
        if not told:
            break
    return said


def outcomes_of_expert(world: World, tasks: Iterable[Task]) -> dict[str, float]:
    outcomes = {}
    for task in tasks:
        episode = world.open(task)
        follow_expert(episode)
        outcomes[task.id] = episode.outcome()
    return outcomes


def assert_tasks_are_told_apart(world: World) -> None:
    """Splits are what they are called, a task is the same each time and has one id, and ids beyond are refused."""
    assert tuple(world.splits) == SPLITS
    assert all(size > 0 for size in world.splits.values())
    for split, size in world.splits.items():
        last = world.task(split, size - 1)
        assert task_named(world, last.id) == last == world.task(split, size - 1)
        for index in (size, -1):
            try:
                world.task(split, index)
            except IndexError:
                continue
            raise AssertionError(f"{split}/{index} is beyond the split and was not refused")
    try:
        world.task("test", 0)
    except KeyError:
        return
    raise AssertionError("an unknown split was not refused")


def assert_found_by_text(world: World, task: Task) -> None:
    found = world.find_task([{"role": "system", "content": "x"}, *task.messages])
    in_parts = [{**each, "content": [{"type": "text", "text": each["content"]}]} for each in task.messages]
    assert world.find_task(in_parts) == found
    assert found is not None
    assert found.messages == task.messages
    assert world.find_task([{"role": "user", "content": "Good morning!"}]) is None
    assert world.find_task([]) is None


def assert_tools_convert(episode: WorldEpisode) -> None:
    """In OpenAI's form, with JSON schema's types alone."""
    assert episode.tools
    for tool in episode.tools:
        converted = convert_to_openai_tool(tool)
        assert converted["function"]["name"] == tool.name
        assert converted["function"]["description"]
        assert set(types_in(converted["function"]["parameters"])) <= {
            "object", "string", "integer", "number", "boolean", "array", "null",
        }  # fmt: skip


def types_in(schema: Any) -> Iterator[str]:
    if isinstance(schema, dict):
        if isinstance(schema.get("type"), str):
            yield schema["type"]
        for value in schema.values():
            yield from types_in(value)
    if isinstance(schema, list):
        for value in schema:
            yield from types_in(value)


def assert_bad_calls_are_told_in_words(world: World, task: Task) -> None:
    """Whatever a call looks like, it is an observation, and the expert still reaches the end."""
    episode = world.open(task)
    name = episode.tools[0].name
    for tool, arguments in (
        ("fly_to_the_moon", "{}"),
        (name, "{"),
        (name, "[]"),
        (name, '"text"'),
        (name, '{"no_such_argument": 1}'),
        (name, '{"__class__": {}, "a b": [], "x); import os; (y": "z"}'),
        (name, "[" * 100_000),
    ):
        call = {"id": "call_x", "type": "function", "function": {"name": tool, "arguments": arguments}}
        [told] = episode.play({"role": "assistant", "content": None, "tool_calls": [call]})
        assert (told["role"], told["tool_call_id"]) == ("tool", "call_x")
        assert "rror" in told["content"] or "No " in told["content"], (arguments[:40], told["content"][:200])
    follow_expert(episode)
    assert episode.outcome() == 1.0


def assert_episodes_do_not_mix(world: World, task: Task) -> None:
    """One attempt is led to the end while another waits; the other is still where it began."""
    first, second, third = world.open(task), world.open(task), world.open(task)
    said = follow_expert(first)
    assert follow_expert(second) == said
    assert first.outcome() == second.outcome() == 1.0
    assert third.outcome() < 1.0 or world.name == "agentdojo_attacks"
    assert third.expert_action() == said[0]


def assert_server_tools_act_as_play(world: World, task: Task) -> None:
    """What a tool says to the server is what `play` says to a client."""
    by_play, by_tools, observed = world.open(task), world.open(task), ""
    for message in follow_expert(by_play):
        if message["role"] == "assistant" and "tool_calls" in message:
            function = message["tool_calls"][0]["function"]
            tool = next(tool for tool in by_tools.tools if tool.name == function["name"])
            observed = tool.invoke(json.loads(function["arguments"]))
        elif message["role"] == "assistant":
            by_tools.play(message)
        elif message["role"] == "tool":
            assert observed == message["content"]
            assert len(observed) <= LONGEST_OBSERVATION + 100
    assert by_tools.outcome() == by_play.outcome() == 1.0


def assert_reopens_quickly(world: World, task: Task, limit_s: float = 0.05, num_steps: int = 20) -> float:
    """Open a task and replay twenty steps: the expert's, one after the other again and again."""
    calls = [message for message in follow_expert(world.open(task)) if message.get("tool_calls")]
    steps = (calls * num_steps)[:num_steps]

    def once() -> float:
        began = time.perf_counter()
        episode = world.open(task)
        for message in steps:
            episode.play(message)
        return time.perf_counter() - began

    quickest, patience = once(), time.perf_counter() + 20
    while quickest >= limit_s and time.perf_counter() < patience:  # the first time fills caches; others may be at work
        quickest = min(quickest, once())
    assert quickest < limit_s, f"{quickest * 1000:.0f} ms"
    return quickest


def assert_same_effect_is_judged(world: World, task: Task) -> None:
    episode = world.open(task)
    expert = episode.expert_action()
    assert expert is not None
    assert expert.get("tool_calls"), "choose a task that needs a call"
    assert episode.same_effect(expert, {**expert, "content": "Let me see."})
    assert not episode.same_effect(expert, {"role": "assistant", "content": "Done."})
    assert not episode.same_effect(expert, calling("fly_to_the_moon", {}, 1))
    assert episode.expert_action() == expert, "judging changes nothing"
