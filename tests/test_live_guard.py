"""Live evidence: what does worse than its parent by more than the noise is taken back, and nothing else is."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from runtime.adapters.live_guard import Watch, WatchOptions, is_worse
from runtime.adapters.swap import Swap, SwapError
from runtime.store.adapter_registry import AdapterRegistry, AdapterState
from runtime.store.episodes import Actor, Episode, Outcome, Purpose, new_id
from runtime.store.learning_log import CycleStage, LearningLog, LearningReader, RewardSource, StepReward
from runtime.store.step_log import StepLog
from tests.logged_episodes import step
from tests.scripted_engine import ScriptedEngine
from tests.tiny_adapters import TinyNetwork, faithful_script

OPTIONS = WatchOptions(least_values=20, canary_values=40)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyNetwork:
    return TinyNetwork(tmp_path_factory.mktemp("tiny"))


class Desk:
    """A registry with adapters, a log that tells how they do, and the watch over them."""

    def __init__(self, folder: Path, tiny: TinyNetwork) -> None:
        self.log = StepLog(folder / "agent.db")
        self.registry = AdapterRegistry(folder / "agent.db")
        self.swap = Swap(ScriptedEngine(faithful_script(self.registry)), self.registry, tiny.network)
        self.learning_log = LearningLog(folder)
        self.watch = Watch(self.log, LearningReader(folder), self.registry, self.swap, OPTIONS)
        self._tiny = tiny

    async def promoted(self, seed: int, parent: str | None = None) -> str:
        name = self.registry.register(self._tiny.adapter(seed), parent).name
        await self.swap.promote(name)
        return name

    def went(self, adapter: str, outcomes: list[float], purpose: Purpose = Purpose.SERVE) -> list[str]:
        """Log an episode under an adapter for each outcome; returns their steps."""
        steps = []
        for outcome in outcomes:
            episode = Episode(new_id("ep"), Actor.POLICY, purpose, adapter)
            taken = replace(step(episode.id), adapter=adapter)
            self.log.append(episode, taken, Outcome(new_id("out"), episode.id, outcome, "user")).result()
            steps.append(taken.id)
        return steps

    def acting(self) -> str:
        acting = self.registry.acting()
        return acting.name if acting else "base"


@pytest.fixture
def desk(tmp_path: Path, tiny: TinyNetwork) -> Desk:
    return Desk(tmp_path, tiny)


async def test_an_adapter_that_does_worse_live_than_its_parent_is_rolled_back(desk: Desk) -> None:
    first = await desk.promoted(1)
    desk.went(first, [1.0, 0.0] * 20)
    second = await desk.promoted(2, first)
    desk.went(second, [0.0] * 19)
    assert await desk.watch.look() is None  # not enough is known yet
    desk.went(second, [0.0] * 11)
    reason = await desk.watch.look()
    assert reason is not None
    assert "live outcome is 0.000 over 30, against 0.500 over 40" in reason
    assert desk.acting() == first
    assert await desk.watch.look() is None


async def test_noise_and_evaluations_roll_nothing_back(desk: Desk) -> None:
    name = await desk.promoted(1)
    desk.went("base", [1.0, 0.0] * 30)
    desk.went(name, [1.0, 0.0, 0.0, 1.0, 0.0] * 10)
    desk.went(name, [0.0] * 60, purpose=Purpose.EVALUATION)
    assert await desk.watch.look() is None
    assert desk.acting() == name


async def test_steps_that_experts_disagree_with_roll_back_too(desk: Desk) -> None:
    name = await desk.promoted(1)
    desk.learning_log.note("c1", CycleStage.REWARD)
    for adapter, agrees in (("base", 0.9), (name, 0.2)):
        steps = desk.went(adapter, [1.0] * 40)
        values = [1.0] * int(agrees * 40) + [0.0] * (40 - int(agrees * 40))
        desk.learning_log.add_rewards(
            StepReward(step_id, "c1", RewardSource.EXPERT_AGREEMENT, value)
            for step_id, value in zip(steps, values, strict=True)
        )
    reason = await desk.watch.look()
    assert reason is not None
    assert "step reward is 0.200 over 40" in reason
    assert desk.acting() == "base"


async def test_a_canary_that_does_worse_is_refused_and_one_that_does_not_acts(desk: Desk) -> None:
    desk.went("base", [1.0, 0.0] * 30)
    bad, good = (desk.registry.register(desk._tiny.adapter(seed)).name for seed in (1, 2))
    await desk.swap.start_canary(bad, 0.5)
    desk.went(bad, [0.0] * 30)
    assert await desk.watch.look() is not None
    assert desk.registry.state(bad) is AdapterState.REFUSED
    await desk.swap.start_canary(good, 0.5)
    desk.went(good, [1.0, 0.0] * 15)
    assert await desk.watch.look() is None  # as good, but not for long enough
    desk.went(good, [1.0, 0.0] * 5)
    assert await desk.watch.look() is not None
    assert desk.acting() == good
    assert desk.swap.canary is None


async def test_a_rollback_that_comes_too_late_changes_nothing(desk: Desk) -> None:
    first, second = await desk.promoted(1), await desk.promoted(2)
    with pytest.raises(SwapError, match="does not act any more"):
        await desk.swap.rollback("too late", expected_acting=first)
    assert desk.acting() == second


def test_equal_adapters_are_hardly_ever_found_worse() -> None:
    draw = random.Random(0)

    def outcomes() -> list[float]:
        return [float(draw.random() < 0.8) for _ in range(100)]

    assert sum(is_worse(outcomes(), outcomes(), OPTIONS) for _ in range(1000)) <= 5
    assert is_worse([0.0] * 30, [1.0] * 30, OPTIONS)
    assert not is_worse([0.0] * 5, [1.0] * 100, OPTIONS)
