"""Every world through the HTTP endpoint: eight episodes at once, two of each task, with tools that the client runs and
with those that the server runs; and what becomes of a server whose world hangs, dies, or says far too much."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import httpx
import pytest

from benchmarks.expert_endpoint import client_run, expert_messages, expert_served, server_run
from policies.chat.chat_protocol import ChatProtocol
from runtime.agent.budget import RunLimits
from runtime.agent.tools import Toolbox
from tests.serving import LIMITS, MODEL, NOVICE_FOLDER, SayingEngine, Served, parts_of, served
from tests_worlds.simulated import descendants
from tests_worlds.test_simulators import HOST, Add
from tools.worlds import WORLDS, load_world
from tools.worlds.calls import LONGEST_OBSERVATION
from tools.worlds.reading import Arguments
from tools.worlds.simulators.episode import SimulatedEpisode
from tools.worlds.simulators.pool import SimulatorPool
from tools.worlds.world import Message, Task, World

NEEDS = {"miniwob": "chromium", "scienceworld": "java"}
TIMEOUT_S = 3.0
"""Long enough for an event loop that waits along to be told from a machine that stands still for a second or two."""
NAMES = [name for name, listing in WORLDS.items() if not listing.takes_file]


def solvable(world: World, split: str, num: int) -> list[Task]:
    """The first tasks of a split that the expert brings to outcome 1."""
    tasks: list[Task] = []
    for index in range(world.splits[split]):
        task = world.task(split, index)
        if expert_messages(world, task)[2] == 1.0:
            tasks.append(task)
        if len(tasks) == num:
            return tasks
    raise AssertionError(f"{world.name}/{split} has no {num} tasks that its expert solves")


@pytest.mark.parametrize("name", NAMES)
def test_the_expert_ends_well_with_either_s_tools_eight_episodes_at_once(name: str, tmp_path: Path) -> None:
    if name in NEEDS and shutil.which(NEEDS[name]) is None:
        pytest.skip(f"{NEEDS[name]} is missing, see make setup-worlds")
    world = load_world(name)
    tasks = [*solvable(world, "train", 2), *solvable(world, "heldout", 2)]
    tasks = [task for task in tasks for _ in range(2)]
    with expert_served(world, tasks, tmp_path) as server:
        assert client_run(server, world, tasks) == [1.0] * len(tasks)
        assert server_run(server, world, tasks) == [1.0] * len(tasks)


# ------------------------------------------------------------------------------------- worlds that go wrong


class Nothing(Arguments):
    """Takes no arguments."""


class CountingEpisode(SimulatedEpisode):
    readers: ClassVar = {"add": Add, "talk": Add, "hang": Nothing, "die": Nothing, "have_child": Nothing}
    max_calls = 9


class CountingWorld:
    """The counting simulator as a world; whoever adds up to ten million has won."""

    name = "counting"
    splits: ClassVar[Mapping[str, int]] = {"train": 4, "validation": 1, "heldout": 1}

    def __init__(self, pool: SimulatorPool) -> None:
        self.pool = pool

    def task(self, split: str, index: int) -> Task:
        return Task(self.name, split, index, ({"role": "user", "content": f"Begin at {index}."},))

    def find_task(self, messages: Sequence[Message]) -> Task | None:
        return None

    def open(self, task: Task) -> CountingEpisode:
        return CountingEpisode(self.pool, {"from": task.index})


@pytest.fixture
def world() -> Iterator[CountingWorld]:
    pool = SimulatorPool(HOST, num_processes=1, timeout_s=TIMEOUT_S)
    yield CountingWorld(pool)
    pool.close()


@pytest.fixture
def engine() -> SayingEngine:
    return SayingEngine(ChatProtocol.load(NOVICE_FOLDER), limits=replace(LIMITS, max_context_tokens=1_000_000))


@pytest.fixture
def server(world: CountingWorld, engine: SayingEngine, tmp_path: Path) -> Iterator[Served]:
    limits = RunLimits(max_completion_tokens=10_000_000)
    with served(parts_of(engine, engine._protocol, tmp_path, toolbox=Toolbox((), world), limits=limits)) as running:
        yield running


def call(name: str, **arguments: Any) -> str:
    written = ", ".join(f'"{key}": {value}' for key, value in arguments.items())
    return f'<tool_call>\n{{"name": "{name}", "arguments": {{{written}}}}}\n</tool_call>'


def run(server: Served, index: int = 0) -> tuple[list[str], float]:
    """What was observed in an episode with server-run tools, and its outcome."""
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "Count."}],
        "metadata": {"task": f"counting/train/{index}"},
    }
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    log, episode_id = server.parts.log, answer.headers["x-episode-id"]
    observed = [result.content for step in log.steps(episode_id) for result in step.tool_results]
    return observed, log.outcomes(episode_id)[-1].value


@pytest.mark.parametrize(("name", "reason"), [("hang", "did not answer within 3 seconds"), ("die", "exit code 3")])
def test_an_episode_whose_world_hangs_or_dies_ends_with_a_reason_and_the_server_lives(
    server: Served, engine: SayingEngine, name: str, reason: str
) -> None:
    engine.says.extend([call("add", by=1), call(name), call("add", by=1), "I give up."])
    waits: list[float] = []
    is_over = threading.Event()

    def ask_after_health() -> None:
        while not is_over.is_set():
            began = time.perf_counter()
            assert httpx.get(f"{server.url}/health").status_code == 200
            waits.append(time.perf_counter() - began)

    watching = threading.Thread(target=ask_after_health)
    watching.start()
    try:
        observed, outcome = run(server)
    finally:
        is_over.set()
        watching.join()
    assert observed[0] == "1"
    assert "the world has failed" in observed[1]
    assert reason in observed[1]
    assert "The episode is over" in observed[1]
    assert observed[2].startswith("The episode is over")
    assert outcome == 0.0
    assert max(waits) < 0.9 * TIMEOUT_S, "the event loop waited along"
    engine.says.extend([call("add", by=2), call("add", by=3), "Five."])
    assert run(server, 0)[0] == ["2", "5"], "the next episode has a process again"


def test_a_simulator_that_is_killed_with_its_children_in_mid_episode_is_replaced(
    server: Served, engine: SayingEngine, world: CountingWorld
) -> None:
    engine.says.extend([call("add", by=1), call("have_child"), "Wait."])
    assert run(server)[0][0] == "1"
    [process] = world.pool.process_ids
    for each in (*descendants(process), process):
        os.kill(each, signal.SIGKILL)
    engine.says.extend([call("add", by=1), call("add", by=4), "Five."])
    assert run(server)[0] == ["1", "5"]
    assert len(world.pool.process_ids) == 1


def test_an_observation_of_a_megabyte_is_cut_with_a_mark_and_logged_so(server: Served, engine: SayingEngine) -> None:
    engine.says.extend([call("talk", by=1_000_000), "Much was said."])
    [observed], _ = run(server)
    assert len(observed) < LONGEST_OBSERVATION + 100
    assert observed.endswith("[cut here: the whole observation has 1000000 characters]")
