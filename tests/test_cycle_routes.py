"""/v1/learner/cycles: a real learner process beside a real server, and a server that does not mind its death."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from learner.learning_log import CycleStage, LearningLog
from policies.chat_protocol import ChatProtocol
from runtime.cycle_log import CycleLog
from runtime.engines.embedded import EmbeddedEngine
from tests.serving import MODEL, Served, parts_of, served, wait_until
from tests.test_demonstration_routes import expert_demonstration

ENDINGS = {"promoted", "refused", "no_lesson", "failed"}


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
    return answer.choices[0].finish_reason in ("stop", "length")


def test_a_cycle_runs_beside_the_server_and_says_why_it_learned_nothing(server: Served) -> None:
    answer = start(server)
    assert answer.status_code == 202, answer.text
    name = answer.json()["id"]
    busy = start(server)
    assert (busy.status_code, name in busy.json()["error"]["message"]) == (409, True)
    assert cycle(server, name)["stage"] not in ENDINGS
    told = ended(server, name)
    assert told["stage"] == "no_lesson"
    assert "import some first" in told["message"]
    listed = httpx.get(f"{server.url}/v1/learner/cycles", timeout=30).json()["data"]
    assert [each["id"] for each in listed] == [name]
    assert 'stepagent_learner_cycles_total{ending="no_lesson"} 1.0' in httpx.get(f"{server.url}/metrics").text
    assert start(server).status_code == 202  # the next one may come


@pytest.mark.parametrize("stage", ["inspect", "train", "gate"])
def test_a_learner_that_is_killed_leaves_a_failed_cycle_and_a_server_that_serves(
    server: Served, tmp_path: Path, stage: str
) -> None:
    body = {"demonstrations": [expert_demonstration(number) for number in range(12)]}
    httpx.post(f"{server.url}/v1/demonstrations", json=body, timeout=60).raise_for_status()
    name = start(server, gate_tasks=1000).json()["id"]
    wait_until(lambda: cycle(server, name)["stage"] == stage, 240)
    os.kill(learning(server).process.pid, signal.SIGKILL)
    told = ended(server, name)
    assert told["stage"] == "failed"
    assert f"ended while it was in stage {stage}" in told["message"]
    assert asks_well(server)
    log = LearningLog(tmp_path / "agent.db")
    assert log.fail_unfinished() == [name]
    status = log.status(name)
    assert status is not None
    assert status.stage is CycleStage.FAILED


def test_a_learner_that_cannot_even_start_is_told(server: Served, tmp_path: Path) -> None:
    process = learning(server).process
    process._arguments = ("--model", str(tmp_path / "nowhere"))
    name = start(server).json()["id"]
    told = ended(server, name)
    assert (told["stage"], "learner.log" in told["message"]) == ("failed", True)
    assert (tmp_path / "learner.log").read_text()
    assert asks_well(server)


def test_a_learner_by_hand_and_one_of_the_servers_do_not_meet(server: Served, tmp_path: Path) -> None:
    import fcntl

    with (tmp_path / "learner.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert CycleLog(tmp_path).is_learner_alive()
        answer = start(server)
        assert (answer.status_code, "by hand" in answer.json()["error"]["message"]) == (409, True)
    assert not CycleLog(tmp_path).is_learner_alive()


@pytest.mark.parametrize(
    "body",
    [
        {"objectives": ["telepathy"]},
        {"objectives": []},
        {"gate_tasks": 0},
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
    parts.learning.trigger.every_episodes = 3
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
