"""Live evidence: what does worse than its parent by more than the noise is taken back, and nothing else is."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from runtime.adapters.live_guard import Watch, WatchOptions, is_worse
from runtime.adapters.swap import Swap, SwapError
from runtime.store.adapter_registry import AdapterRegistry, AdapterState
from runtime.store.episodes import Actor, Episode, Outcome, Purpose, Role, Withdrawal, new_id
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

    def went(
        self,
        adapter: str,
        outcomes: list[float],
        purpose: Purpose = Purpose.SERVE,
        is_assigned: bool = True,
        key: str = "",
        role: Role = Role.ADMIN,
    ) -> list[str]:
        """Log an episode under an adapter for each outcome; returns their steps."""
        steps = []
        for outcome in outcomes:
            episode = Episode(new_id("ep"), Actor.POLICY, purpose, adapter, owner=key, is_assigned=is_assigned)
            taken = replace(step(episode.id), adapter=adapter)
            said = Outcome(new_id("out"), episode.id, outcome, "user", key=key, role=role)
            self.log.append(episode, taken, said).result()
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
    assert desk.swap.canary_of() is None


async def test_a_rollback_that_comes_too_late_changes_nothing(desk: Desk) -> None:
    first, second = await desk.promoted(1), await desk.promoted(2)
    with pytest.raises(SwapError, match="does not act any more"):
        await desk.swap.rollback("too late", expected_acting=first)
    assert desk.acting() == second


# ------------------------------------------------------------------------------ feedback is no weapon


async def test_what_a_client_pinned_is_no_evidence(desk: Desk) -> None:
    """32 good outcomes pinned to the base and 32 bad ones pinned to what acts used to take it back."""
    name = await desk.promoted(1)
    desk.went("base", [1.0] * 40, is_assigned=False)
    desk.went(name, [0.0] * 40)
    assert await desk.watch.look() is None
    desk.went("base", [1.0] * 40)
    assert await desk.watch.look() is not None


async def test_it_takes_more_than_one_feedback_key_to_take_an_adapter_back(desk: Desk) -> None:
    desk.went("base", [1.0] * 40)
    name = await desk.promoted(1)
    desk.went(name, [0.0] * 200, key="mallory", role=Role.FEEDBACK)
    assert await desk.watch.look() is None
    [live, _] = desk.watch.evidence()
    assert live.by_key == {"mallory": 10}
    desk.went(name, [0.0] * 10, key="ann", role=Role.FEEDBACK)
    assert await desk.watch.look() is not None


async def test_a_teachers_word_counts_in_full(desk: Desk) -> None:
    desk.went("base", [1.0] * 40)
    name = await desk.promoted(1)
    desk.went(name, [0.0] * 40, key="tess", role=Role.TEACH)
    assert await desk.watch.look() is not None


async def test_an_episode_counts_once_however_often_somebody_speaks_of_it(desk: Desk) -> None:
    desk.went("base", [1.0] * 40)
    name = await desk.promoted(1)
    desk.went(name, [1.0])
    episode = desk.log.episodes(adapter=name)[0].id
    for _ in range(60):
        desk.log.append(Outcome(new_id("out"), episode, 0.0, "user")).result()
    assert [outcome.value for outcome in desk.log.live_outcomes(name, 100)] == [0.0]
    assert await desk.watch.look() is None


async def test_what_was_taken_back_is_no_evidence(desk: Desk) -> None:
    desk.went("base", [1.0] * 40)
    name = await desk.promoted(1)
    desk.went(name, [0.0] * 40)
    for outcome in desk.log.live_outcomes(name, 100):
        desk.log.append(Withdrawal(new_id("wd"), outcome.id)).result()
    assert await desk.watch.look() is None


async def test_what_is_promoted_again_is_judged_by_what_comes_after(desk: Desk) -> None:
    """The same old evidence used to take it back after each re-promotion."""
    desk.went("base", [1.0] * 40)
    name = await desk.promoted(1)
    desk.went(name, [0.0] * 40)
    assert await desk.watch.look() is not None
    await desk.swap.promote(name)
    assert await desk.watch.look() is None
    desk.went(name, [0.0] * 40)
    assert await desk.watch.look() is not None


async def test_a_paused_watch_changes_nothing_and_stays_paused_after_a_restart(desk: Desk, tmp_path: Path) -> None:
    desk.went("base", [1.0] * 40)
    name = await desk.promoted(1)
    desk.went(name, [0.0] * 40)
    desk.registry.record_watch(True, "a poll went wrong", "ann")
    assert await desk.watch.look() is None
    assert [evidence.is_worse for evidence in desk.watch.evidence()] == [True, False]
    again = AdapterRegistry(tmp_path / "agent.db")
    assert (again.watch().is_paused, again.watch().key) == (True, "ann")
    again.record_watch(False, "", "ann")
    assert await desk.watch.look() is not None


def test_equal_adapters_are_hardly_ever_found_worse() -> None:
    draw = random.Random(0)

    def outcomes() -> list[float]:
        return [float(draw.random() < 0.8) for _ in range(100)]

    assert sum(is_worse(outcomes(), outcomes(), OPTIONS) for _ in range(1000)) <= 5
    assert is_worse([0.0] * 30, [1.0] * 30, OPTIONS)
    assert not is_worse([0.0] * 5, [1.0] * 100, OPTIONS)
