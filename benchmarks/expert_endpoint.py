"""A world's expert through the HTTP endpoint: an engine that says, after each prompt, what the expert would say there.

What is tried is the server and the world, not a model. The prompt tells where an episode stands, so any number of them
can run at once; one that hears what another should have heard leaves the expert's way, and fails.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from learner.practice import Attempt, PracticeOptions, practise
from policies.chat.chat_protocol import ChatProtocol, message_action
from policies.types import TokenIds
from runtime.agent.budget import RunLimits
from runtime.agent.tools import Toolbox
from tests.scripted_engine import ScriptedEngine
from tests.serving import LIMITS, MODEL, NOVICE_FOLDER, Served, parts_of, served
from tools.worlds.world import Message, Task, World

MOST_STEPS = 100
CONCURRENCY = 8


def expert_messages(world: World, task: Task) -> tuple[list[Message], list[Message], float]:
    """The whole conversation of an expert, its own messages alone, and the outcome."""
    episode, conversation, said = world.open(task), list(task.messages), list[Message]()
    while len(said) < MOST_STEPS and (message := episode.expert_action()) is not None:
        said.append(message)
        conversation += [message, *(told := episode.play(message))]
        if not told:
            break
    return conversation, said, episode.outcome()


def script_of(protocol: ChatProtocol, conversations: Sequence[Sequence[Message]]) -> dict[TokenIds, TokenIds]:
    """What a policy would have to write, by the prompt before it."""
    return dict(
        protocol.completion_of(conversation[:place], message_action(message))
        for conversation in conversations
        for place, message in enumerate(conversation)
        if message["role"] == "assistant"
    )


class ExpertEngine(ScriptedEngine):
    """Says what the script has for a prompt, and that it is lost where the script has nothing."""

    def __init__(self, protocol: ChatProtocol, script: Mapping[TokenIds, TokenIds]) -> None:
        lost = protocol.encode("I am lost.<|im_end|>")
        limits = replace(LIMITS, max_context_tokens=10_000_000)
        super().__init__(lambda prompt, _: script.get(prompt, lost), limits)


@contextmanager
def expert_served(world: World, tasks: Sequence[Task], folder: Path) -> Iterator[Served]:
    """A server that knows the world, with the expert's way through the tasks as its model."""
    protocol = ChatProtocol.load(NOVICE_FOLDER)
    script = script_of(protocol, [expert_messages(world, task)[0] for task in tasks])
    limits = RunLimits(max_steps=MOST_STEPS, max_completion_tokens=10_000_000)
    engine = ExpertEngine(protocol, script)
    with served(parts_of(engine, protocol, folder, toolbox=Toolbox((), world), limits=limits)) as server:
        yield server


def client_run(server: Served, world: World, tasks: Sequence[Task]) -> list[float]:
    """Outcomes where the client runs the tools."""

    async def practised() -> list[Attempt]:
        async with server.async_client(timeout=300) as client:
            options = PracticeOptions(MODEL, purpose="evaluation", concurrency=CONCURRENCY)
            return await practise(client, world, tasks, options)

    attempts = asyncio.run(practised())
    for attempt in attempts:
        if attempt.error:
            print(f"{attempt.task_id}, client-run: {attempt.error}", file=sys.stderr)
    return [attempt.outcome for attempt in attempts]


def server_run(server: Served, world: World, tasks: Sequence[Task]) -> list[float]:
    """Outcomes where the server runs the tools."""
    with ThreadPoolExecutor(CONCURRENCY) as threads:
        return list(threads.map(lambda task: _server_run(server, world, task), tasks))


def _server_run(server: Served, world: World, task: Task) -> float:
    """What the world's user says after an answer is said from here."""
    user, messages, episode_id = world.open(task), list[Any](task.messages), ""
    metadata: Any = {"task": task.id, "purpose": "evaluation"}
    while messages[-1]["role"] == "user":
        answer = server.client(timeout=300).chat.completions.with_raw_response.create(
            model=MODEL, messages=messages, metadata=metadata
        )
        episode_id = answer.headers["x-episode-id"]
        messages.append({"role": "assistant", "content": answer.parse().choices[0].message.content or ""})
        messages += user.play(messages[-1])
    return server.parts.log.outcomes(episode_id)[-1].value
