"""The whole loop by its effect: a served agent gets better from demonstrations, and goes back when it is told to."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from learner.cycle import CycleOptions, CycleParts, run_cycle
from learner.endpoint import Endpoint
from learner.experts import WorldExpert
from learner.learning_log import CycleStage, LearningLog, RewardSource
from learner.trainer import TrainingOptions
from policies.chat_protocol import ChatProtocol
from runtime.engines.embedded import EmbeddedEngine
from runtime.step_log import StepLog
from tests.serving import NOVICE_FOLDER, Served, parts_of, served
from tools.worlds.order_desk import OrderDesk

NUM_DEMONSTRATIONS = 32


def expert_conversation(index: int) -> dict[str, object]:
    world = OrderDesk()
    task = world.task("train", index)
    episode, messages = world.open(task), list(task.messages)
    while messages[-1]["role"] != "assistant" or messages[-1].get("tool_calls"):
        messages.append(episode.expert_action())
        messages += episode.play(messages[-1])
    return {"messages": messages}


def cycle_parts(server: Served, folder: Path, **options: object) -> CycleParts:
    training = TrainingOptions(lr=2e-3, epochs=6, trajectories_per_step=8)
    return CycleParts(
        endpoint=Endpoint(server.async_client()),
        log=StepLog(folder / "agent.db", read_only=True),
        learning_log=LearningLog(folder / "agent.db"),
        protocol=server.parts.protocol,
        world=OrderDesk(),
        experts=[WorldExpert(OrderDesk())],
        base=NOVICE_FOLDER,
        state=folder,
        options=replace(CycleOptions(gate_tasks=60, training=training), **options),  # type: ignore[arg-type]
    )


@pytest.fixture
def engine(protocol: ChatProtocol):
    """An engine of its own: this one is swapped."""
    engine = EmbeddedEngine(NOVICE_FOLDER, tokenizer=protocol.tokenizer, device="cpu", num_threads=1)
    yield engine
    asyncio.run(engine.close())


def test_a_cycle_without_demonstrations_ends_with_a_reason(
    novice_engine: EmbeddedEngine, protocol: ChatProtocol, tmp_path: Path
) -> None:
    with served(parts_of(novice_engine, protocol, tmp_path)) as server:
        parts = cycle_parts(server, tmp_path)
        assert asyncio.run(run_cycle("cycle_1", parts)) is CycleStage.NO_LESSON
        status = parts.learning_log.status("cycle_1")
        assert status is not None
        assert "no demonstrations to train on" in status.message


@pytest.mark.timeout(600)
def test_the_served_agent_gets_better_and_can_go_back(
    engine: EmbeddedEngine, protocol: ChatProtocol, tmp_path: Path
) -> None:
    with served(parts_of(engine, protocol, tmp_path)) as server:
        parts = cycle_parts(server, tmp_path, objectives=("sft",))
        answer = asyncio.run(parts.endpoint.demonstrate([expert_conversation(n) for n in range(NUM_DEMONSTRATIONS)]))
        assert answer["imported"] == NUM_DEMONSTRATIONS
        parts = cycle_parts(server, tmp_path, objectives=("sft",))
        stage = asyncio.run(run_cycle("cycle_1", parts))
        status = parts.learning_log.status("cycle_1")
        assert status is not None
        assert stage is CycleStage.PROMOTED, status.message

        promoted = status.report["promoted"]
        decisions = {decision["candidate"]: decision for decision in parts.learning_log.decisions("cycle_1")}
        assert len(decisions) == 1
        assert decisions[promoted]["evidence"]["gain_low"] > 0
        rewards = parts.learning_log.rewards("cycle_1")
        agreement = {reward.value for reward in rewards if reward.source is RewardSource.EXPERT_AGREEMENT}
        assert agreement == {0.0, 1.0}

        acting = server.parts.registry.acting()
        assert acting is not None
        assert acting.name == promoted
        question = [{"role": "user", "content": "Order 1000 has come in. Please see to it."}]
        served_by = server.client().chat.completions.with_raw_response.create(model="novice", messages=question)  # type: ignore[arg-type]
        assert served_by.headers["x-adapter"] == promoted
        asyncio.run(cycle_parts(server, tmp_path).endpoint.rollback("a test"))
        assert server.parts.registry.acting() is None
