"""/v1/learner/cycles: a real learner process beside a real server, and a server that does not mind its death."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from learner.__main__ import main as learner
from policies.chat.chat_protocol import ChatProtocol
from runtime.engines.embedded.engine import EmbeddedEngine
from runtime.store.episodes import Actor, Episode, Purpose
from runtime.store.learning_log import ENDINGS, LearningReader
from tests.demonstrations import expert_demonstration
from tests.serving import MODEL, Served, parts_of, served, wait_until


@pytest.fixture
def server(novice_engine: EmbeddedEngine, protocol: ChatProtocol, tmp_path: Path) -> Iterator[Served]:
    with served(parts_of(novice_engine, protocol, tmp_path)) as running:
        yield running


def start(server: Served, **body: Any) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/learner/cycles", json=body, timeout=30)


def cycle(server: Served, name: str) -> dict[str, Any]:
    return httpx.get(f"{server.url}/v1/learner/cycles/{name}", timeout=30).raise_for_status().json()


def ended(server: Served, name: str) -> dict[str, Any]:
    """The cycle once it has ended."""
    wait_until(lambda: cycle(server, name)["stage"] in ENDINGS and not learning(server).process.running, 240)
    return cycle(server, name)


def learning(server: Served) -> Any:
    assert server.parts.learning is not None
    return server.parts.learning


def asks_well(server: Served) -> bool:
    answer = server.client().chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "Hi"}], tools=[], max_tokens=4
    )
    return answer.choices[0].finish_reason in ("stop", "length", "tool_calls")


def test_a_cycle_runs_beside_the_server_and_says_why_it_learned_nothing(server: Served) -> None:
    answer = start(server)
    assert answer.status_code == 202, answer.text
    name = answer.json()["id"]
    busy = start(server)
    assert (busy.status_code, name in busy.json()["error"]["message"]) == (409, True)
    assert cycle(server, name)["stage"] not in ENDINGS
    wait_until(lambda: cycle(server, name)["stage"] in ENDINGS, 240)
    second = start(server)
    assert second.status_code == 202, "the process of a cycle that has ended is waited for"
    assert ended(server, second.json()["id"])["stage"] == "no_lesson"
    told = cycle(server, name)
    assert told["stage"] == "no_lesson"
    assert "import some first" in told["message"]
    listed = httpx.get(f"{server.url}/v1/learner/cycles", timeout=30).json()["data"]
    assert [each["id"] for each in listed] == [second.json()["id"], name]
    metrics = httpx.get(f"{server.url}/metrics").text
    assert 'stepagent_learner_cycles_total{agent="",ending="no_lesson"} 2.0' in metrics


def test_of_two_who_ask_at_once_one_gets_a_cycle(server: Served) -> None:
    with ThreadPoolExecutor() as threads:
        answers = list(threads.map(lambda _: start(server), range(4)))
    assert sorted(answer.status_code for answer in answers) == [202, 409, 409, 409]
    (name,) = (answer.json()["id"] for answer in answers if answer.status_code == 202)
    assert ended(server, name)["stage"] == "no_lesson"


def import_demonstrations(server: Served, number: int) -> None:
    body = {"demonstrations": [expert_demonstration(index) for index in range(number)]}
    httpx.post(f"{server.url}/v1/demonstrations", json=body, timeout=60).raise_for_status()


def test_a_learner_that_is_killed_in_the_middle_of_training_leaves_a_failed_cycle(
    server: Served, tmp_path: Path
) -> None:
    import_demonstrations(server, 12)
    name = start(server).json()["id"]
    wait_until(lambda: cycle(server, name)["stage"] == "train", 240)
    os.kill(learning(server).process.pid, signal.SIGKILL)
    told = ended(server, name)
    assert (told["stage"], told["message"]) == ("failed", "the learner ended while it was in stage train")
    assert asks_well(server)


DYING_LEARNERS = """
import os, sys
import learner.commands.once, learner.cycle  # seconds: once for all learners, which are forks
from learner.__main__ import main
from runtime.store.learning_log import LearningLog
note = LearningLog.note
for stage in map(str.strip, sys.stdin):
    def note_and_die(self, cycle, noted, *more, **options):
        note(self, cycle, noted, *more, **options)
        if noted == stage:
            os._exit(9)
    if (child := os.fork()) == 0:
        LearningLog.note = note_and_die
        os.dup2(2, 1)
        os._exit(main(sys.argv[1:]))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def test_a_learner_may_die_at_any_stage_and_the_next_one_clears_up(
    engine: EmbeddedEngine, protocol: ChatProtocol, tmp_path: Path
) -> None:
    stages = ["collect", "inspect", "reward", "train", "gate", "promote"]
    with served(parts_of(engine, protocol, tmp_path)) as server:
        import_demonstrations(server, 12)
        where = ["once", "--url", f"{server.url}/v1", "--state", str(tmp_path)]
        options = ["--gate-tasks", "40", "--lr", "4e-3", "--epochs", "8"]  # enough for a promotion
        command = [sys.executable, "-c", DYING_LEARNERS, *where, *options]
        with subprocess.Popen(command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as learners:
            assert learners.stdin is not None
            assert learners.stdout is not None
            for stage in stages:
                print(stage, file=learners.stdin, flush=True)
                assert learners.stdout.readline() == "9\n", stage
                assert asks_well(server)
                newest = LearningReader(tmp_path).cycles()[0]
                assert newest.stage == stage
        assert len(engine.loaded_adapters()) == 1, "the last one died with a candidate in the engine"
        assert learner([*where, "--gate-tasks", "8", "--epochs", "1"]) == 0
        newest, *killed = LearningReader(tmp_path).cycles()
        assert [stage in told.message for stage, told in zip(reversed(stages), killed, strict=True)] == [True] * 6
        assert newest.stage in ("promoted", "refused")
        registry = server.parts.registry
        assert {registry.state(adapter.name) for adapter in registry.adapters()} <= {"refused", "acting"}
        assert [adapter.name for adapter in engine.loaded_adapters()] in ([], [newest.report["promoted"]])


def test_a_learner_that_cannot_even_start_is_told(server: Served, tmp_path: Path) -> None:
    process = learning(server).process
    process._arguments = ("--model", str(tmp_path / "nowhere"))
    name = start(server).json()["id"]
    told = ended(server, name)
    assert (told["stage"], "learner.log" in told["message"]) == ("failed", True)
    assert (tmp_path / "learner.log").read_text()
    assert asks_well(server)
    process._arguments = ()
    newer = start(server).json()["id"]
    ended(server, newer)
    listed = httpx.get(f"{server.url}/v1/learner/cycles", timeout=30).json()["data"]
    assert [each["id"] for each in listed] == [newer, name], "in the order in which they were started"
    assert listed[1]["message"] == told["message"], "its exit code is known still"


def test_a_learner_by_hand_and_one_of_the_servers_do_not_meet(server: Served, tmp_path: Path) -> None:
    import fcntl

    with (tmp_path / "learner.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert LearningReader(tmp_path).is_learner_alive()
        answer = start(server)
        assert (answer.status_code, "by hand" in answer.json()["error"]["message"]) == (409, True)
    assert not LearningReader(tmp_path).is_learner_alive()


@pytest.mark.parametrize(
    "body",
    [
        {"objectives": ["telepathy"]},
        {"objectives": []},
        {"gate_tasks": 3},
        {"canary_share": 2.0},
        {"seed": -1},
        {"objectives": "sft"},
    ],
)
def test_a_wrong_body_starts_nothing(server: Served, body: dict[str, Any]) -> None:
    assert start(server, **body).status_code == 400
    assert learning(server).process.running is None


def test_an_unknown_cycle_is_not_found(server: Served) -> None:
    assert httpx.get(f"{server.url}/v1/learner/cycles/cycle_none", timeout=30).status_code == 404


def test_a_cycle_starts_by_itself_after_enough_episodes(
    novice_engine: EmbeddedEngine, protocol: ChatProtocol, tmp_path: Path
) -> None:
    parts = parts_of(novice_engine, protocol, tmp_path)
    assert parts.learning is not None
    parts.learning.trigger.every_episodes[""] = 3
    with served(parts) as server:
        for _ in range(2):
            assert asks_well(server)
        time.sleep(2.5)
        assert httpx.get(f"{server.url}/v1/learner/cycles", timeout=30).json()["data"] == []
        assert asks_well(server)
        wait_until(lambda: learning(server).process.running is not None, 30)
        wait_until(lambda: learning(server).process.running is None, 240)
        time.sleep(2.5)
        assert len(httpx.get(f"{server.url}/v1/learner/cycles", timeout=30).json()["data"]) == 1


async def test_a_learner_that_dies_before_its_first_word_is_not_started_again_at_once(
    novice_engine: EmbeddedEngine, protocol: ChatProtocol, tmp_path: Path
) -> None:
    """With a wrong --learner-arg the server once started a process every two seconds, for ever."""
    parts = parts_of(novice_engine, protocol, tmp_path)
    assert parts.learning is not None
    trigger, process = parts.learning.trigger, parts.learning.process
    trigger.every_episodes[""], process._arguments = 1, ("--objectives", "telepathy")
    parts.log.append(Episode("ep_1", Actor.POLICY, Purpose.SERVE, "base")).result()
    for _ in range(2):
        await trigger.look()
        assert process._process is not None
        await process._process.wait()
    first = process._process
    await trigger.look()
    assert process._process is first, "it waits"
    assert (tmp_path / "learner.log").read_text().count("no objective is called") == 1
