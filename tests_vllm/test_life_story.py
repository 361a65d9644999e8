"""One server's life on vLLM: served, logged, swapped, rolled back, killed, up again, and taught."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM

from benchmarks.demo import write_demonstrations
from learner.__main__ import main as learner
from policies.chat.chat_protocol import ChatProtocol
from runtime.store.learning_log import ENDINGS
from runtime.store.step_log import StepLog
from tests.serving import NOVICE_FOLDER
from tests_vllm.novice_adapters import NoviceAdapters
from tests_vllm.server_process import MODEL, QUESTION, ServerProcess, serving, wait_until
from tools.worlds.order_desk import OrderDesk


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("life") / "state"


@pytest.fixture(scope="module")
def life(state: Path) -> Iterator[ServerProcess]:
    with serving(state) as server:
        yield server


def test_while_the_engine_starts_health_says_so_and_requests_are_refused(life: ServerProcess) -> None:
    wait_until(life.is_answering, 60)
    assert life.health()["status"] == "starting"
    assert "the engine is starting: vLLM's process starts" in life.health()["engine"]["problem"]
    assert life.get("/health").status_code == 503
    assert life.gauge("alive") == 0
    with pytest.raises(Exception, match="the engine is starting"):
        life.answer("early")
    life.wait_until_serving()
    assert (life.health()["status"], life.gauge("alive"), life.gauge("restarts")) == ("ok", 1, 0)


def test_it_answers_whole_and_streamed_and_logs_what_the_engine_saw(
    life: ServerProcess, state: Path, protocol: ChatProtocol
) -> None:
    adapter, text = life.answer("plain")
    assert adapter == "base"
    assert life.streamed("streamed")[0] == text
    log = StepLog(state / "agent.db")
    plain, streamed = (log.steps(episode_id)[-1] for episode_id in ("plain", "streamed"))
    assert plain.completion_token_ids == streamed.completion_token_ids
    assert plain.behavior_logprobs == pytest.approx(streamed.behavior_logprobs, abs=1e-4)
    assert plain.prompt_token_ids == protocol.render([{"role": "user", "content": QUESTION}])
    assert log.verify() == []
    log.close()


def test_it_runs_its_worlds_tools_to_an_answer(life: ServerProcess) -> None:
    task: list[Any] = list(OrderDesk().task("heldout", 0).messages)
    answer = life.client().chat.completions.create(
        model=MODEL, messages=task, temperature=0,
        extra_headers={"x-episode-id": "run"},
    )  # fmt: skip
    steps = life.get("/v1/episodes/run").json()["steps"]
    assert len(steps) > 1
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert steps[0]["tool_results"]


def test_a_trained_adapter_is_registered_verified_promoted_and_acts(
    life: ServerProcess, novice: NoviceAdapters
) -> None:
    base = life.answer("before")[1]
    for version in (1, 2):
        life.post("/v1/adapters", path=str(novice.adapter(version).path))
    assert life.states("agent-v0001") == ["registered", "validated", "loaded", "verified"]
    assert life.answer("still")[0] == "base", "registered is not promoted"
    life.post("/v1/adapters/agent-v0001/promote")
    adapter, text = life.answer("after")
    assert (adapter, text == base) == ("agent-v0001", False)
    assert life.answer("pinned", extra_body={"model": "agent-v0002"})[0] == "agent-v0002"


def test_an_episode_keeps_its_adapter_across_a_swap_and_a_rollback(life: ServerProcess) -> None:
    assert life.answer("long")[0] == "agent-v0001"
    life.post("/v1/adapters/agent-v0002/promote")
    assert life.answer("new")[0] == "agent-v0002"
    assert life.answer("long")[0] == "agent-v0001"
    assert life.post("/v1/adapters/rollback", reason="worse") == {"acting": "agent-v0001"}
    assert life.answer("newer")[0] == "agent-v0001"
    assert life.answer("new")[0] == "agent-v0002"


def test_a_broken_adapter_is_refused_and_nothing_changes(
    life: ServerProcess, novice: NoviceAdapters, tmp_path: Path
) -> None:
    novice.write(tmp_path / "other", 5)
    (tmp_path / "other" / "probe.json").write_bytes((novice.adapter(1).path / "probe.json").read_bytes())
    refused = httpx.post(f"{life.url}/v1/adapters", json={"path": str(tmp_path / "other")}, timeout=60)
    assert refused.status_code == 409
    assert "does not serve what was trained" in refused.text
    assert life.answer("unmoved")[0] == "agent-v0001"


def test_a_killed_engine_is_told_replaced_and_serves_the_acting_adapter_again(life: ServerProcess) -> None:
    text = life.answer("dies")[1]
    os.kill(life.engine_process(), signal.SIGKILL)
    wait_until(lambda: life.gauge("alive") == 0, 10)
    assert life.get("/health").status_code == 503
    wait_until(lambda: life.health()["status"] == "starting", 10)
    with pytest.raises(Exception, match="engine"):
        life.answer("between")
    wait_until(lambda: life.health()["status"] == "ok", 120)
    assert (life.gauge("alive"), life.gauge("restarts")) == (1, 1)
    assert life.answer("dies") == ("agent-v0001", text)
    assert life.states("agent-v0001")[-5:] == ["unloaded", "validated", "loaded", "verified", "acting"]


@pytest.fixture(scope="module")
def reborn(life: ServerProcess, state: Path) -> Iterator[ServerProcess]:
    """The same state folder, served again after the first server was killed."""
    life.process.kill()
    life.process.wait()
    with serving(state, "--learner-arg", "gate-tasks=40") as server:
        server.wait_until_serving()
        yield server


def test_after_a_restart_of_the_server_the_same_adapter_acts_and_the_log_is_whole(
    reborn: ServerProcess, state: Path
) -> None:
    assert reborn.answer("reborn")[0] == "agent-v0001"
    assert reborn.answer("new")[0] == "agent-v0002", "an episode's adapter is known from the log"
    assert reborn.post("/v1/adapters/rollback") == {"acting": "base"}
    log = StepLog(state / "agent.db")
    assert log.verify() == []
    assert {step.adapter for step in log.steps("long")} == {"agent-v0001"}
    log.close()


def test_it_learns_from_demonstrations_while_it_serves_and_serves_what_it_learned(
    reborn: ServerProcess, state: Path, tmp_path: Path
) -> None:
    write_demonstrations(tmp_path / "demonstrations.jsonl", 24)
    imported = ["import", str(tmp_path / "demonstrations.jsonl"), "--url", f"{reborn.url}/v1"]
    assert learner(imported) == 0
    cycle = reborn.post("/v1/learner/cycles")["id"]
    ending = {}
    while ending.get("stage") not in ENDINGS:
        assert reborn.answer("beside")[0] == "base", "an episode keeps its adapter, and is answered all the while"
        ending = reborn.get(f"/v1/learner/cycles/{cycle}").json()
    assert ending["stage"] == "promoted", ending["message"]
    trained = ending["report"]["promoted"]
    assert reborn.answer("taught")[0] == trained
    assert reborn.states(trained) == ["registered", "validated", "loaded", "verified", "acting"]
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(NOVICE_FOLDER), str(state / "adapters" / trained))
    assert reborn.post("/v1/adapters/rollback") == {"acting": "base"}
