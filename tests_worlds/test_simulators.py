"""The pool of simulators: episodes do not mix, what hangs or dies ends with a reason, nothing outlives its owner."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar

import pytest

from policies.types import ToolCall
from runtime.agent.tool_calls import run_tool_calls
from tests_worlds.simulated import is_gone
from tools.worlds.calls import LONGEST_OBSERVATION, calling
from tools.worlds.reading import Arguments
from tools.worlds.simulators.episode import SimulatedEpisode
from tools.worlds.simulators.pool import SimulatorFailed, SimulatorPool
from tools.worlds.simulators.worker import MAX_LIVE

HOST = "tests_worlds.counting_host:CountingHost"


def add(number: int) -> tuple[str, dict[str, int]]:
    return "add", {"by": number}


@pytest.fixture
def pool() -> Iterator[SimulatorPool]:
    made = SimulatorPool(HOST, num_processes=2, timeout_s=5.0)
    yield made
    made.close()


def test_more_episodes_at_once_than_a_process_holds_do_not_mix(pool: SimulatorPool) -> None:
    def play(number: int) -> list[str]:
        calls, seen = [], []
        for step in range(12):
            calls.append(add(number + step))
            seen.append(pool.frame({"from": number % 3}, calls).observation)
        return seen

    with ThreadPoolExecutor(8) as threads:
        played = list(threads.map(play, range(4 * MAX_LIVE)))
    for number, seen in enumerate(played):
        sums = [number % 3 + sum(number + step for step in range(length)) for length in range(1, 13)]
        assert seen == [str(value) for value in sums]
    assert len(pool.process_ids) <= 2


def test_a_process_that_was_killed_is_replaced_and_the_episode_goes_on(pool: SimulatorPool) -> None:
    calls = [add(1), add(2)]
    assert pool.frame({"from": 0}, calls).observation == "3"
    [killed] = pool.process_ids
    os.kill(killed, signal.SIGKILL)
    assert pool.frame({"from": 0}, [*calls, add(4)]).observation == "7"
    assert pool.process_ids != [killed]


@pytest.mark.parametrize(
    ("name", "reason"), [("hang", "did not answer within 1 seconds"), ("die", "exit code 3"), ("raise", "lost count")]
)
def test_an_episode_whose_simulator_fails_is_over_with_a_reason(name: str, reason: str) -> None:
    pool = SimulatorPool(HOST, num_processes=1, timeout_s=1.0)
    try:
        pool.frame({"from": 0}, [])
        frame = pool.frame({"from": 0}, [add(1), (name, {})])
        assert frame.is_done
        assert frame.outcome == 0.0
        assert reason in frame.failure
        assert reason in frame.observation
        assert pool.frame({"from": 0}, [add(1), (name, {})]) == frame, "the same when it is opened again"
        assert pool.frame({"from": 0}, [add(1), add(1)]).observation == "2", "other episodes go on"
    finally:
        pool.close()


@pytest.mark.parametrize(("name", "is_tried_anew"), [("hang", True), ("die", True), ("raise", False)])
def test_what_may_work_another_time_is_not_remembered_for_long(
    name: str, is_tried_anew: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tools.worlds.simulators.pool.RETRY_AFTER_S", 0.1)
    pool = SimulatorPool(HOST, num_processes=1, timeout_s=1.0)
    ask, num_asked = pool._ask, 0

    def counting(*arguments: Any, **options: Any) -> dict[str, Any]:
        nonlocal num_asked
        num_asked += 1
        return ask(*arguments, **options)

    monkeypatch.setattr(pool, "_ask", counting)
    try:
        first = pool.frame({"from": 0}, [(name, {})])
        assert first.failure
        assert pool.frame({"from": 0}, [(name, {})]) == first
        assert num_asked == 1
        time.sleep(0.2)
        assert pool.frame({"from": 0}, [(name, {})]).failure
        assert num_asked == (2 if is_tried_anew else 1)
    finally:
        pool.close()


def test_what_a_package_writes_beside_itself_goes_with_its_process(pool: SimulatorPool) -> None:
    folder = Path(pool.frame({"from": 0}, [("where", {})]).observation)
    assert folder != Path.cwd()
    assert folder.is_dir()
    pool.close()
    assert not folder.exists()


def test_a_task_that_cannot_be_opened_is_refused_in_words(pool: SimulatorPool) -> None:
    with pytest.raises(SimulatorFailed, match="nothing to open"):
        pool.frame({"from": 0, "fails": True}, [])
    broken = SimulatorPool("tests_worlds.counting_host:NoSuchHost", num_processes=1)
    with pytest.raises(SimulatorFailed, match=r"has no attribute .NoSuchHost"):
        broken.frame({"from": 0}, [])
    broken.close()


def test_a_simulator_and_its_children_die_with_a_pool(pool: SimulatorPool) -> None:
    child = int(pool.frame({"from": 0}, [("have_child", {})]).observation)
    [process] = pool.process_ids
    pool.close()
    assert is_gone(process)
    assert is_gone(child)
    assert pool.frame({"from": 0}, [add(1)]).observation == "1", "and start again when they are needed"


def test_a_simulator_dies_with_an_owner_that_is_killed() -> None:
    script = (
        "import threading, time\n"
        "from tools.worlds.simulators.pool import SimulatorPool\n"
        f"pool = SimulatorPool({HOST!r}, num_processes=1)\n"
        "thread = threading.Thread(target=pool.frame, args=({'from': 0}, []))\n"
        "thread.start(); thread.join(); time.sleep(0.5)  # a thread that ends does not take the process with it\n"
        "print(*pool.process_ids, flush=True)\n"
        "time.sleep(1000)\n"
    )
    owner = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    simulator = int(owner.stdout.readline())
    os.kill(simulator, 0)
    owner.kill()
    owner.wait()
    assert is_gone(simulator)


class Add(Arguments):
    """Add a number."""

    by: int


class CountingEpisode(SimulatedEpisode):
    readers: ClassVar = {"add": Add, "talk": Add}
    max_calls = 5


async def test_calls_of_one_step_keep_their_order(pool: SimulatorPool) -> None:
    episode = CountingEpisode(pool, {"from": 0})
    tools = {tool.name: tool for tool in episode.tools}
    calls = [ToolCall(f"call_{by}", "add", {"by": by}) for by in (1, 10, 100)]
    results = await run_tool_calls(calls, tools, 30.0, turns={"add": nullcontext})
    assert [result.content for result in results] == ["1", "11", "111"]


def test_an_observation_of_a_megabyte_is_cut_with_a_mark(pool: SimulatorPool) -> None:
    episode = CountingEpisode(pool, {"from": 0})
    [told] = episode.play(calling("talk", {"by": 1_000_000}, 0))
    assert len(told["content"]) < LONGEST_OBSERVATION + 100
    assert "cut here: the whole observation has 1000000 characters" in told["content"]


def test_calls_that_cannot_be_read_change_nothing_and_too_many_end_the_episode(pool: SimulatorPool) -> None:
    episode = CountingEpisode(pool, {"from": 0})
    for arguments in ({"by": "much"}, {"by": 1, "twice": True}, {}):
        [told] = episode.play(calling("add", arguments, 0))
        assert told["content"].startswith("Error: ")
    for number in range(1, 6):
        assert not episode.is_done
        [told] = episode.play(calling("add", {"by": 1}, number))
        assert told["content"] == str(number)
    assert episode.is_done
    [told] = episode.play(calling("add", {"by": 1}, 9))
    assert told["content"].startswith("The episode is over")
