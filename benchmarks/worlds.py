"""The worlds: tasks, how an expert fares directly and through the endpoint, speed and memory.

    .venv/bin/python -m benchmarks.worlds [--worlds bfcl,agentdojo] [--tasks 40] [--endpoint-tasks 8]

Each world is measured in a process of its own. Through the endpoint an engine replays what the expert says, token by
token, once with tools that the client runs and once with those that the server runs: what is measured is the server
and the world, not a model. Prints one table; a world whose package is missing is named below it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from learner.practice import Attempt, PracticeOptions, practise
from policies.chat.chat_protocol import ChatProtocol, message_action
from runtime.agent.budget import RunLimits
from runtime.agent.tools import Toolbox
from tests.serving import LIMITS, MODEL, NOVICE_FOLDER, SayingEngine, Served, parts_of, served
from tools.worlds import WORLDS, load_world
from tools.worlds.world import Message, Task, World

MOST_STEPS = 100
NUM_REPLAYED = 20


@dataclass(frozen=True, slots=True)
class Row:
    """One world's figures."""

    world: str
    splits: dict[str, int]
    load_s: float
    num_tried: int
    num_without_expert: int
    """Tasks on which the expert did not know the way to the end."""
    num_steps: list[int]
    direct: float
    """Share of the tried tasks on which the expert reached outcome 1."""
    steps_per_s: float
    replay_ms: float
    """Of opening a task and replaying `NUM_REPLAYED` calls."""
    memory_mib: int
    """Of the process with the world loaded and its tasks tried, over that of the process before."""
    num_through_endpoint: int
    client_run: float
    server_run: float


# ---------------------------------------------------------------------------------------------- the expert


def expert_messages(world: World, task: Task) -> tuple[list[Message], list[Message], float]:
    """The whole conversation of an expert, its own messages alone, and the outcome."""
    episode, conversation, said = world.open(task), list(task.messages), list[Message]()
    while len(said) < MOST_STEPS and (message := episode.expert_action()) is not None:
        said.append(message)
        conversation += [message, *(told := episode.play(message))]
        if not told:
            break
    return conversation, said, episode.outcome()


def spread(world: World, num: int) -> list[Task]:
    """Tasks from all splits, evenly."""
    places = [(split, index) for split, size in world.splits.items() for index in range(size)]
    num = min(num, len(places))
    return [world.task(*places[number * len(places) // num]) for number in range(num)]


def replay_ms(world: World, task: Task, said: Sequence[Message]) -> float:
    calls = [message for message in said if message.get("tool_calls")]
    if not calls:
        return 0.0
    began = time.perf_counter()
    episode = world.open(task)
    for message in (calls * NUM_REPLAYED)[:NUM_REPLAYED]:
        episode.play(message)
    return (time.perf_counter() - began) * 1000


# -------------------------------------------------------------------------------------------- the endpoint


def completions(protocol: ChatProtocol, conversation: Sequence[Message]) -> Iterator[tuple[int, ...]]:
    """What a policy would have to write, message by message."""
    for place, message in enumerate(conversation):
        if message["role"] == "assistant":
            yield protocol.completion_of(conversation[:place], message_action(message))[1]


def through_endpoint(world: World, tasks: Sequence[Task]) -> tuple[float, float]:
    """Shares of outcome 1 with tools that the client runs, and with those that the server runs."""
    protocol = ChatProtocol.load(NOVICE_FOLDER)
    engine = SayingEngine(protocol, limits=replace(LIMITS, max_context_tokens=10_000_000))
    limits = RunLimits(max_steps=MOST_STEPS, max_completion_tokens=10_000_000)
    by_client, by_server = [], []
    with TemporaryDirectory() as folder:
        parts = parts_of(engine, protocol, Path(folder), toolbox=Toolbox((), world), limits=limits)
        with served(parts) as server:
            for task in tasks:
                conversation, _, _ = expert_messages(world, task)
                engine.says.clear()
                engine.says.extend(completions(protocol, conversation))
                by_client.append(_client_run(server, world, task))
                engine.says.clear()
                engine.says.extend(completions(protocol, conversation))
                by_server.append(_server_run(server, world, task))
    return _share(by_client), _share(by_server)


def _client_run(server: Served, world: World, task: Task) -> float:
    async def practised() -> Attempt:
        async with server.async_client(timeout=300) as client:
            [attempt] = await practise(client, world, [task], PracticeOptions(MODEL, purpose="evaluation"))
            return attempt

    attempt = asyncio.run(practised())
    if attempt.error:
        print(f"{task.id}, client-run: {attempt.error}", file=sys.stderr)
    return attempt.outcome


def _server_run(server: Served, world: World, task: Task) -> float:
    """The server runs the tools; what the world's user says after an answer is said from here."""
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


# --------------------------------------------------------------------------------------------- measuring


def measure(name: str, num_tasks: int, num_endpoint_tasks: int) -> Row:
    memory_before = _memory_mib()
    began = time.perf_counter()
    world = load_world(name)
    load_s = time.perf_counter() - began
    tasks = spread(world, num_tasks)
    tried = {task.id: expert_messages(world, task) for task in tasks}  # also warms what the world caches
    began = time.perf_counter()
    again = [expert_messages(world, task) for task in tasks]
    steps_per_s = sum(len(said) for _, said, _ in again) / (time.perf_counter() - began)
    memory_mib = _memory_mib() - memory_before
    knows = [task for task in tasks if _comes_to_an_end(tried[task.id][1])]
    longest = max(knows, key=lambda task: len(tried[task.id][1]))
    replays = [replay_ms(world, longest, tried[longest.id][1]) for _ in range(5)]
    through = knows[:: -(-len(knows) // num_endpoint_tasks)]
    client_run, server_run = through_endpoint(world, through)
    return Row(
        world=name,
        splits=dict(world.splits),
        load_s=load_s,
        num_tried=len(tasks),
        num_without_expert=len(tasks) - len(knows),
        num_steps=[len(tried[task.id][1]) for task in knows],
        direct=_share([outcome for _, _, outcome in tried.values()]),
        steps_per_s=steps_per_s,
        replay_ms=min(replays),
        memory_mib=memory_mib,
        num_through_endpoint=len(through),
        client_run=client_run,
        server_run=server_run,
    )


def _comes_to_an_end(said: Sequence[Message]) -> bool:
    return bool(said) and not said[-1].get("tool_calls")


def _share(outcomes: Sequence[float]) -> float:
    return sum(outcome == 1.0 for outcome in outcomes) / len(outcomes)


def _memory_mib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def table(rows: Sequence[Row]) -> str:
    lines = [
        "| world | tasks train / validation / heldout | expert's steps: median (range) | outcome 1: directly | "
        "client-run tools | server-run tools | steps/s | 20 steps replayed, ms | load, s | memory, MiB |",
        "|" + "---|" * 10,
    ]
    for row in rows:
        cells = [
            row.world,
            " / ".join(str(size) for size in row.splits.values()),
            f"{median(row.num_steps):g} ({min(row.num_steps)} to {max(row.num_steps)})",
            f"{row.direct:.1%} of {row.num_tried}",
            f"{row.client_run:.0%} of {row.num_through_endpoint}",
            f"{row.server_run:.0%} of {row.num_through_endpoint}",
            f"{row.steps_per_s:.0f}",
            f"{row.replay_ms:.1f}",
            f"{row.load_s:.1f}",
            str(row.memory_mib),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--worlds", default="", help="names by commas; default: all that need no file of yours")
    parser.add_argument("--tasks", type=int, default=10_000, help="most tasks of a world on which the expert is tried")
    parser.add_argument("--endpoint-tasks", type=int, default=10, help="of them, how many go through the endpoint")
    parser.add_argument("--one", action="store_true", help="measure the one world in this process and print JSON")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(asdict(measure(options.worlds, options.tasks, options.endpoint_tasks))))
        return
    names = options.worlds.split(",") if options.worlds else [n for n, each in WORLDS.items() if not each.takes_file]
    rows, missing = [], []
    for name in names:
        command = [sys.executable, "-m", "benchmarks.worlds", "--one", "--worlds", name]
        command += ["--tasks", str(options.tasks), "--endpoint-tasks", str(options.endpoint_tasks)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            missing.append(name)
        else:
            rows.append(Row(**json.loads(done.stdout.splitlines()[-1])))
    print(table(rows))
    for name in missing:
        print(f"{name} could not be measured; see the error above")


if __name__ == "__main__":
    main()
