"""The whole loop by its effect: a served agent gets better from demonstrations, and goes back when it is told to."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from learner.options import CycleOptions, TrainingOptions
from policies.chat.chat_protocol import ChatProtocol
from runtime.engines.embedded.engine import EmbeddedEngine
from runtime.store.learning_log import CycleStage, RewardSource
from tests.cycles import collaborators, run
from tests.demonstrations import expert_demonstration, post
from tests.serving import MODEL, parts_of, served

TRAINING = TrainingOptions(lr=2e-3, epochs=6, trajectories_per_step=8)


@pytest.mark.timeout(600)
def test_the_served_agent_gets_better_and_can_go_back(
    engine: EmbeddedEngine, protocol: ChatProtocol, tmp_path: Path
) -> None:
    with served(parts_of(engine, protocol, tmp_path)) as server:
        answer = post(server, *(expert_demonstration(number) for number in range(32)))
        assert answer.json()["imported"] == 32
        options = CycleOptions(objectives=("sft",), gate_tasks=60, training=TRAINING)
        status = run(server, tmp_path, options=options)
        assert status.stage is CycleStage.PROMOTED, status.message

        who, promoted = collaborators(server, tmp_path), status.report["promoted"]
        (decision,) = who.learning_log.decisions("cycle_1")
        assert decision["candidate"] == promoted
        assert decision["evidence"]["gain_low"] > 0
        rewards = who.learning_log.rewards("cycle_1")
        agreement = {reward.value for reward in rewards if reward.source is RewardSource.EXPERT_AGREEMENT}
        assert agreement == {0.0, 1.0}

        acting = server.parts.registry.acting()
        assert acting is not None
        assert acting.name == promoted
        served_by = server.client().chat.completions.with_raw_response.create(
            model=MODEL, messages=[{"role": "user", "content": "Order 1000 has come in. Please see to it."}]
        )
        assert served_by.headers["x-adapter"] == promoted
        asyncio.run(who.endpoint.rollback("a test"))
        assert server.parts.registry.acting() is None
