"""Swaps under running episodes, on a scripted engine: what a lease promises, what is refused, what a restart finds."""

from __future__ import annotations

import asyncio
import json
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import AsyncExitStack, closing
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from policies.adapters.files import WEIGHTS_FILE, AdapterRefused
from policies.adapters.probe import PROBE_FILE, read_probe
from policies.types import BASE_ADAPTER, Adapter, EngineError, SampledToken, SamplingParams, TokenIds
from runtime.adapters.swap import Swap, SwapError
from runtime.store.adapter_registry import AdapterRegistry, AdapterState, RegistryError, UnknownAdapter
from tests.scripted_engine import Script, ScriptedEngine
from tests.tiny_adapters import TinyNetwork, faithful_script, forgetful_script

LEASE_IDLE_S, SLOT_WAIT_S = 100.0, 0.5


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyNetwork:
    return TinyNetwork(tmp_path_factory.mktemp("tiny"))


class House:
    """A registry's file with an engine and a swap on it; `restart` is a crash and a new start."""

    def __init__(self, tiny: TinyNetwork, folder: Path, script: Script | None = None) -> None:
        self.tiny, self.folder, self.now = tiny, folder, 0.0
        self.start(script)

    def start(self, script: Script | None = None) -> None:
        self.registry = AdapterRegistry(self.folder / "agent.db")
        self.engine = ScriptedEngine(script or faithful_script(self.registry))
        self.swap = Swap(self.engine, self.registry, self.tiny.network, LEASE_IDLE_S, SLOT_WAIT_S, lambda: self.now)

    async def restart(self) -> Adapter | None:
        self.registry.close()
        self.start()
        await self.swap.restore()
        return self.registry.acting()

    def register(self, seed: int) -> str:
        return self.registry.register(self.tiny.adapter(seed)).name

    def loaded(self) -> list[str]:
        return [adapter.name for adapter in self.engine.loaded_adapters()]

    async def step(self, episode_id: str, **asked: str) -> str:
        """One step of an episode: under the name of which adapter was it taken?"""
        async with self.swap.lease(episode_id, **asked) as adapter:
            tokens = [token async for token in self.engine.generate((1, 2), SamplingParams(), adapter)]
            assert tokens
            return "base" if adapter is None else adapter.name


@pytest.fixture
def house(tiny: TinyNetwork, tmp_path: Path) -> House:
    return House(tiny, tmp_path)


async def eventually(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not is_so():  # noqa: ASYNC110 (what is waited for has no event)
            await asyncio.sleep(0)


def states(house: House, name: str) -> list[str]:
    return [event.state.value for event in house.registry.events(name)]


# ------------------------------------------------------------------------------------------- the way up


async def test_a_life_from_registered_to_unloaded(house: House):
    first, second = house.register(1), house.register(2)
    await house.swap.promote(first, "better")
    assert await house.step("ep_1") == first
    await house.swap.promote(second, "better still")
    assert await house.step("ep_1") == first, "an episode keeps the adapter it began with"
    assert await house.step("ep_2") == second
    await house.swap.drain()
    assert house.loaded() == [first, second], "it is leased"
    house.swap.finish("ep_1")
    await house.swap.drain()
    assert house.loaded() == [second]
    assert states(house, first) == [
        "registered", "validated", "loaded", "verified", "acting", "draining", "unloaded",
    ]  # fmt: skip


async def test_who_hangs_up_while_his_adapter_comes_up_again_leaves_it_served(
    house: House, monkeypatch: pytest.MonkeyPatch
):
    """The engine does what it has begun, though nobody waits for it: the next who asked found an adapter that was
    loaded and not served, which was refused for ever."""
    first, second = house.register(1), house.register(2)
    await house.swap.promote(first, "better")
    assert await house.step("ep_1") == first
    await house.swap.promote(second, "better still")
    await house.swap.unload(first, "its slot was needed")
    load, has_begun = house.engine.load_adapter, asyncio.Event()

    async def slow_load(adapter: Adapter) -> None:
        has_begun.set()
        await asyncio.shield(asyncio.create_task(later(adapter)))

    async def later(adapter: Adapter) -> None:
        await asyncio.sleep(0.05)
        await load(adapter)

    monkeypatch.setattr(house.engine, "load_adapter", slow_load)
    impatient = asyncio.create_task(house.step("ep_1"))
    await has_begun.wait()
    impatient.cancel()
    await asyncio.wait({impatient})
    assert await house.step("ep_1") == first
    assert "refused" not in states(house, first)


async def test_the_base_network_serves_where_nothing_was_promoted(house: House):
    assert await house.step("ep_1") == "base"
    await house.swap.bring_up(house.register(1))
    assert await house.step("ep_2") == "base"


async def test_bringing_up_twice_is_the_same_as_once(house: House):
    name = house.register(1)
    assert await house.swap.bring_up(name) == await house.swap.bring_up(name)
    assert states(house, name).count("loaded") == 1


async def test_an_unknown_name_is_an_error(house: House):
    for change in (house.swap.bring_up, house.swap.promote):
        with pytest.raises(UnknownAdapter):
            await change("agent-v0404")
    with pytest.raises(UnknownAdapter):
        await house.step("ep_1", pinned="agent-v0404")


# ----------------------------------------------------------------------------------------------- refusals


def fill_with_nan(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS_FILE)
    save_file({name: np.full_like(tensor, np.nan) for name, tensor in tensors.items()}, folder / WEIGHTS_FILE)


def lie_in_probe(folder: Path) -> None:
    probe = json.loads((folder / PROBE_FILE).read_text())
    for likeliest in probe["prompts"][0]["continuation"]:
        likeliest[0][1] -= 0.01
    (folder / PROBE_FILE).write_text(json.dumps(probe))


def learn_nothing(folder: Path) -> None:
    probe = json.loads((folder / PROBE_FILE).read_text())
    for prompt in probe["prompts"]:
        prompt["continuation"] = [[[t, adapter, adapter] for t, adapter, _ in ls] for ls in prompt["continuation"]]
    (folder / PROBE_FILE).write_text(json.dumps(probe))


@pytest.mark.parametrize(
    ("break_it", "reason"),
    [
        (fill_with_nan, "not finite"),
        (learn_nothing, "cannot tell the adapter from the base"),
        (lambda folder: (folder / PROBE_FILE).unlink(), "has no probe.json"),
        (lambda folder: (folder / WEIGHTS_FILE).write_bytes(b"short"), "damaged or cut short"),
    ],
)
async def test_a_broken_candidate_is_refused_on_record_and_serving_is_untouched(
    house: House, tiny: TinyNetwork, tmp_path: Path, break_it, reason: str
):
    await house.swap.promote(house.register(1))
    break_it(tiny.copy(2, tmp_path / "made"))
    name = house.registry.register(tmp_path / "made").name
    for ask in (house.swap.bring_up, house.swap.promote):
        with pytest.raises((AdapterRefused, SwapError), match=reason):
            await ask(name)
    assert house.registry.events(name)[-1].state is AdapterState.REFUSED
    assert reason in house.registry.events(name)[-1].reason
    assert house.loaded() == ["agent-v0001"]
    assert await house.step("ep_1") == "agent-v0001"
    with pytest.raises(SwapError, match="cannot be pinned"):
        await house.step("ep_2", pinned=name)


async def test_a_folder_removed_after_registering_is_refused(house: House):
    name = house.register(1)
    shutil.rmtree(house.registry.adapter(name).path)
    with pytest.raises(AdapterRefused, match="does not exist"):
        await house.swap.bring_up(name)


async def test_weights_exchanged_after_registering_are_refused(house: House, tiny: TinyNetwork):
    adapter = house.registry.adapter(house.register(1))
    shutil.copyfile(tiny.adapter(2) / WEIGHTS_FILE, adapter.path / WEIGHTS_FILE)
    with pytest.raises(AdapterRefused, match="not those that were registered"):
        await house.swap.bring_up(adapter.name)


async def test_an_engine_that_silently_serves_the_base_is_found_out(house: House):
    house.start(forgetful_script(house.registry))
    name = house.register(1)
    with pytest.raises(AdapterRefused, match=r"does not serve what was trained.*it is what the base network says"):
        await house.swap.bring_up(name)
    assert house.loaded() == []
    assert states(house, name) == ["registered", "validated", "loaded", "refused"]


async def test_an_engine_that_serves_another_adapter_is_found_out(house: House):
    say = faithful_script(house.registry)
    assert callable(say)
    house.start(lambda prompt, name: say(prompt, name if name == "base" else "agent-v0001"))
    await house.swap.bring_up(house.register(1))
    with pytest.raises(AdapterRefused, match="does not serve what was trained"):
        await house.swap.bring_up(house.register(2))


async def test_a_probe_that_is_off_by_more_than_its_tolerance_is_found_out(
    house: House, tiny: TinyNetwork, tmp_path: Path
):
    say = faithful_script(house.registry)
    assert callable(say)
    house.start(lambda prompt, name: say(prompt, name if name == "base" else "agent-v0001"))
    await house.swap.bring_up(house.register(1))
    lie_in_probe(tiny.copy(1, tmp_path / "made"))
    with pytest.raises(AdapterRefused, match="does not serve what was trained"):
        await house.swap.bring_up(house.registry.register(tmp_path / "made").name)


async def test_an_engine_that_says_what_is_no_number_is_found_out(house: House):
    """As vLLM tells it: of a token without numbers nothing but the chosen one is listed."""
    house.start(lambda prompt, name: [SampledToken(1, float("nan"), ())] * 3)
    with pytest.raises(AdapterRefused, match="no log probability"):
        await house.swap.bring_up(house.register(1))


async def test_a_base_that_would_pass_is_found_out_though_the_trainer_tells_it_apart(house: House):
    """The engine serves the base network under both names, and leaves the trainer's path before they differ."""
    probe = read_probe(house.registry.adapter(house.register(1)).path)

    def say(prompt: TokenIds, name: str) -> list[int | SampledToken]:
        continued = next(p for p in probe.prompts if p.prompt_token_ids == prompt)
        first = continued.continuation[0]
        pairs = tuple((token.token_id, token.adapter_logprob) for token in first)
        other = next(token_id for token_id in range(64) if token_id not in dict(pairs))
        return [SampledToken(other, min(dict(pairs).values()), pairs)]

    house.start(say)
    with pytest.raises(AdapterRefused, match="cannot tell the adapter from the base"):
        await house.swap.bring_up("agent-v0001")


async def test_a_refused_candidate_never_acts(house: House):
    name = house.register(1)
    await house.swap.bring_up(name)
    await house.swap.refuse(name, "the gate: not better")
    assert house.loaded() == []
    for change in (house.swap.promote(name), house.swap.start_canary(name, 0.5), house.swap.bring_up(name)):
        with pytest.raises(SwapError, match="was refused: the gate: not better"):
            await change
    with pytest.raises(SwapError):
        await house.step("ep_1", pinned=name)
    assert house.registry.acting() is None


async def test_the_acting_adapter_cannot_be_refused(house: House):
    name = house.register(1)
    await house.swap.promote(name)
    with pytest.raises(RegistryError, match="acting and cannot become refused"):
        await house.swap.refuse(name, "why not")
    assert await house.step("ep_1") == name


async def test_a_dead_engine_says_nothing_against_the_adapter(house: House):
    name = house.register(1)
    house.engine.is_alive = False
    with pytest.raises(EngineError):
        await house.swap.bring_up(name)
    await house.restart()
    await house.swap.bring_up(name)
    assert house.loaded() == [name]


async def test_who_asks_for_a_swap_and_goes_away_leaves_no_half_loaded_adapter(house: House):
    name = house.register(1)
    asked = asyncio.create_task(house.swap.bring_up(name))
    await eventually(lambda: bool(house.loaded()))
    asked.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asked
    assert house.loaded() == []
    await house.swap.bring_up(name)
    assert house.loaded() == [name]


# -------------------------------------------------------------------------------------------------- slots


async def test_a_load_that_would_evict_is_refused_and_says_who_holds_the_slots(house: House):
    async with AsyncExitStack() as running:
        for seed, episode in ((1, "ep_1"), (2, "ep_2"), (3, "ep_3")):
            await house.swap.promote(house.register(seed))
            await running.enter_async_context(house.swap.lease(episode))
        late = house.register(4)
        with pytest.raises(SwapError, match=r"all 3 slots.*v0001 \(draining, 1 episodes\).*v0003 \(acting"):
            await house.swap.bring_up(late)
        assert house.registry.state(late) is AdapterState.REGISTERED, "that is no fault of the adapter"
    house.swap.finish("ep_1")
    await house.swap.bring_up(late)
    assert house.loaded() == ["agent-v0002", "agent-v0003", late]


async def test_a_load_takes_the_slot_of_the_adapter_whose_episodes_were_idle_longest(house: House):
    """Episodes left open held every slot for a quarter of an hour, and no version could be brought up meanwhile."""
    for seed, episode in ((1, "ep_1"), (2, "ep_2"), (3, "ep_3")):
        await house.swap.promote(house.register(seed))
        house.now += 1
        await house.step(episode)
    house.now += 1
    assert await house.step("ep_1") == "agent-v0001"
    late = house.register(4)
    await house.swap.bring_up(late)
    assert house.loaded() == ["agent-v0001", "agent-v0003", late]
    await house.swap.promote(late)
    assert await house.step("ep_2", began_with="agent-v0002") == "agent-v0002", "it keeps the adapter it began with"
    assert house.loaded() == ["agent-v0001", late, "agent-v0002"]


async def test_an_episode_that_comes_back_waits_for_a_slot_that_a_running_step_holds(house: House):
    async with AsyncExitStack() as running:
        for seed, episode in ((1, "ep_1"), (2, "ep_2"), (3, "ep_3"), (4, "ep_4")):
            await house.swap.promote(house.register(seed))
            if seed > 1:
                await running.enter_async_context(house.swap.lease(episode))
        with pytest.raises(SwapError, match="began with agent-v0001, which is no longer served: all 3 slots"):
            await house.step("ep_1", began_with="agent-v0001")
        coming_back = asyncio.create_task(house.step("ep_1", began_with="agent-v0001"))
        await asyncio.sleep(0.1)
        assert not coming_back.done()
    assert await coming_back == "agent-v0001"


async def test_what_acts_and_what_is_being_judged_is_never_displaced(house: House):
    acting, canary, candidate, late = (house.register(seed) for seed in (1, 2, 3, 4))
    await house.swap.promote(acting)
    await house.swap.start_canary(canary, 0.5)
    await house.swap.bring_up(candidate)
    async with house.swap.lease("ep_trial", pinned=candidate):
        with pytest.raises(SwapError, match="all 3 slots"):
            await house.swap.bring_up(late)
    assert house.loaded() == [acting, canary, candidate]


async def test_a_candidate_that_nobody_judges_gives_way_and_can_be_promoted_all_the_same(house: House):
    """Candidates of cycles that broke held their slots until the server restarted, and every further cycle failed."""
    acting, *forgotten = (house.register(seed) for seed in (1, 2, 3))
    await house.swap.promote(acting)
    for candidate in forgotten:
        await house.swap.bring_up(candidate)
    late = house.register(4)
    await house.swap.bring_up(late)
    assert house.loaded() == [acting, forgotten[1], late]
    await house.swap.promote(forgotten[0])
    assert await house.step("ep_new") == forgotten[0]


async def test_a_promotion_is_for_what_the_adapter_was_compared_with(house: House):
    """A cycle that began before a rollback put the child of what had been rolled back into its place."""
    first, second, child = (house.register(seed) for seed in (1, 2, 3))
    await house.swap.promote(first, expected_acting=BASE_ADAPTER)
    await house.swap.promote(second, expected_acting=first)
    await house.swap.rollback("worse")
    for change in (
        house.swap.promote(child, expected_acting=second),
        house.swap.start_canary(child, 0.5, expected_acting=second),
    ):
        with pytest.raises(SwapError, match=f"{second} does not act any more: {first} does"):
            await change
    assert await house.step("ep_new") == first


async def test_an_adapter_whose_unloading_could_not_be_written_can_be_brought_up_again(house: House):
    first, second = house.register(1), house.register(2)
    await house.swap.promote(first)
    await house.swap.promote(second)
    await house.engine.unload_adapter(house.registry.adapter(first))  # and then the disk was full
    house.swap._served.pop(first)
    await house.swap.promote(first)
    assert await house.step("ep_new") == first


async def test_draining_goes_on_after_an_error(house: House, monkeypatch: pytest.MonkeyPatch):
    third_look, looks = asyncio.Event(), count(1)

    async def look() -> None:
        if next(looks) == 3:
            third_look.set()
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(house.swap, "drain", look)
    draining = asyncio.create_task(house.swap.keep_draining(0.001))
    await asyncio.wait_for(third_look.wait(), 10)
    draining.cancel()


async def test_two_swaps_at_once_happen_one_after_the_other(house: House):
    first, second = house.register(1), house.register(2)
    await asyncio.gather(house.swap.promote(first), house.swap.promote(second))
    assert [one.name if one else None for one in house.registry.rollback_chain()] == [second, first, None]


async def test_fifty_swaps_under_running_steps_fail_none_and_mix_none(house: House):
    names = [house.register(seed) for seed in (1, 2)]
    taken: dict[str, set[str]] = {}

    async def talk(episode_id: str) -> None:
        for _ in range(5):
            taken.setdefault(episode_id, set()).add(await house.step(episode_id))
        house.swap.finish(episode_id)

    async def talk_on(speaker: int) -> None:
        for episode in count():
            if is_over.is_set():
                return
            await talk(f"ep_{speaker}_{episode}")

    is_over = asyncio.Event()
    speakers = asyncio.gather(*(talk_on(speaker) for speaker in range(4)))
    for swaps in range(50):
        await house.swap.promote(names[swaps % 2])
        await house.swap.drain()
        num_begun = len(taken)
        await eventually(lambda seen=num_begun: len(taken) > seen)
    is_over.set()
    await speakers
    assert all(len(adapters) == 1 for adapters in taken.values())
    assert set(names) <= set.union(*taken.values()), "the swaps were seen"


# ------------------------------------------------------------------------------------------------- leases


class SlowToLoad(ScriptedEngine):
    def __init__(self, script: Script) -> None:
        super().__init__(script)
        self.may_load = asyncio.Event()

    async def load_adapter(self, adapter: Adapter) -> None:
        await self.may_load.wait()
        await super().load_adapter(adapter)


async def test_a_lease_does_not_wait_for_a_load(house: House):
    engine = SlowToLoad(faithful_script(house.registry))
    swap = Swap(engine, house.registry, house.tiny.network)
    loading = asyncio.create_task(swap.promote(house.register(1)))
    await eventually(lambda: house.registry.state("agent-v0001") is AdapterState.VALIDATED)
    async with asyncio.timeout(1), swap.lease("ep_1") as adapter:
        assert adapter is None
    assert not loading.done()
    engine.may_load.set()
    await loading
    async with swap.lease("ep_2") as adapter:
        assert adapter == house.registry.adapter("agent-v0001")


async def test_nothing_but_the_change_itself_waits_for_a_slow_disk(house: House):
    """Each write of the registry held the event loop, and with it every stream, for as long as the disk took."""
    first, second = house.register(1), house.register(2)
    await house.swap.promote(first)
    with closing(sqlite3.connect(house.folder / "agent.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")  # as a learner that writes
        promoting = asyncio.create_task(house.swap.promote(second))
        async with asyncio.timeout(5):
            for episode in range(20):
                assert await house.step(f"ep_{episode}") == first
                await asyncio.sleep(0.01)
        assert [adapter.name for adapter in house.registry.adapters()] == [first, second]
        assert not promoting.done()
        other.execute("ROLLBACK")
    await promoting
    assert await house.step("ep_new") == second


async def test_who_asks_for_a_promotion_and_goes_away_leaves_it_settled(house: House):
    first, second = house.register(1), house.register(2)
    await house.swap.bring_up(first)
    with closing(sqlite3.connect(house.folder / "agent.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        promoting = asyncio.create_task(house.swap.promote(first))
        await asyncio.sleep(0.05)
        promoting.cancel()
        after = asyncio.create_task(house.swap.promote(second))
        await asyncio.sleep(0.05)
        other.execute("ROLLBACK")
    with pytest.raises(asyncio.CancelledError):
        await promoting
    await after
    assert [one.name if one else None for one in house.registry.rollback_chain()] == [second, first, None]


async def test_a_lease_ends_with_its_idle_time_but_never_under_a_running_step(house: House):
    first, second = house.register(1), house.register(2)
    await house.swap.promote(first)
    async with house.swap.lease("ep_1"):
        await house.swap.promote(second)
        house.now += 10 * LEASE_IDLE_S
        await house.swap.drain()
        assert first in house.loaded()
    house.now += LEASE_IDLE_S - 1
    await house.step("ep_1")
    house.now += LEASE_IDLE_S - 1
    await house.swap.drain()
    assert first in house.loaded(), "a step renews the lease"
    house.now += 2
    await house.swap.drain()
    assert house.loaded() == [second]


async def test_an_episode_that_comes_back_late_finds_its_adapter_loaded_again(house: House):
    first, second = house.register(1), house.register(2)
    await house.swap.promote(first)
    await house.step("ep_1")
    await house.swap.promote(second)
    house.now += LEASE_IDLE_S + 1
    await house.swap.drain()
    assert await house.step("ep_1", began_with=first) == first
    assert house.registry.state(first) is AdapterState.DRAINING
    house.swap.finish("ep_1")
    await house.swap.drain()
    assert house.loaded() == [second]


async def test_an_episode_whose_adapter_is_gone_is_told_so_and_is_given_no_other(house: House):
    name = house.register(1)
    shutil.rmtree(house.registry.adapter(name).path)
    for _ in range(2):
        with pytest.raises(SwapError, match="began with agent-v0001, which is no longer served"):
            await house.step("ep_1", began_with=name)
    with pytest.raises(SwapError, match="began with agent-v0404, which is no longer served"):
        await house.step("ep_2", began_with="agent-v0404")


async def test_a_pin_holds_for_a_new_episode_and_cannot_change_an_old_one(house: House):
    acting, candidate = house.register(1), house.register(2)
    await house.swap.promote(acting)
    with pytest.raises(SwapError, match="registered and cannot be pinned"):
        await house.step("ep_1", pinned=candidate)
    await house.swap.bring_up(candidate)
    assert await house.step("ep_1", pinned=candidate) == candidate
    assert await house.step("ep_1") == candidate
    assert await house.step("ep_2", pinned="base") == "base"
    with pytest.raises(SwapError, match="keeps it"):
        await house.step("ep_2", pinned=candidate)


# ------------------------------------------------------------------------------------------------- canary


async def test_a_canary_gets_its_share_of_new_episodes_and_keeps_them(house: House):
    acting, canary = house.register(1), house.register(2)
    await house.swap.promote(acting)
    await house.step("ep_old")
    await house.swap.start_canary(canary, share=0.25)
    episodes = [f"ep_{i}" for i in range(200)]
    first = [await house.step(episode) for episode in episodes]
    assert 25 <= first.count(canary) <= 75
    assert [await house.step(episode) for episode in episodes] == first
    assert await house.step("ep_old") == acting
    with pytest.raises(SwapError, match="canary already"):
        await house.swap.start_canary(house.register(3), share=0.5)
    await house.swap.promote(canary)
    assert [await house.step(episode) for episode in episodes] == first
    assert await house.step("ep_new") == canary


async def test_a_refused_canary_serves_its_episodes_to_their_end_and_no_new_one(house: House):
    canary = house.register(1)
    await house.swap.start_canary(canary, share=1.0)
    assert await house.step("ep_1") == canary
    await house.swap.refuse(canary, "worse")
    assert await house.step("ep_1") == canary
    assert await house.step("ep_2") == "base"
    house.swap.finish("ep_1")
    await house.swap.drain()
    assert house.loaded() == []


@pytest.mark.parametrize("share", [0.0, -0.1, 1.1, float("nan")])
async def test_a_share_that_is_none_is_an_error(house: House, share: float):
    with pytest.raises(SwapError, match="share"):
        await house.swap.start_canary(house.register(1), share)


# ----------------------------------------------------------------------------------- rollback and restart


async def test_a_rollback_is_a_flip_where_the_one_before_is_still_loaded(house: House):
    first, second = house.register(1), house.register(2)
    await house.swap.promote(first)
    await house.swap.promote(second)
    assert await house.swap.rollback("worse") == house.registry.adapter(first)
    assert await house.step("ep_1") == first
    assert states(house, first).count("loaded") == 1


async def test_a_rollback_loads_again_what_was_unloaded_and_ends_at_the_base(house: House):
    first, second = house.register(1), house.register(2)
    await house.swap.promote(first)
    await house.swap.promote(second)
    await house.swap.drain()
    assert house.loaded() == [second]
    assert await house.swap.rollback("worse") == house.registry.adapter(first)
    assert await house.step("ep_1") == first
    assert await house.swap.rollback("worse too") is None
    assert await house.step("ep_2") == "base"
    assert await house.step("ep_1") == first
    with pytest.raises(SwapError, match="nothing to roll back to"):
        await house.swap.rollback("and again")


async def test_a_rollback_goes_past_what_cannot_be_served_any_more(house: House):
    names = [house.register(seed) for seed in (1, 2, 3)]
    for name in names:
        await house.swap.promote(name)
    await house.swap.drain()
    shutil.rmtree(house.registry.adapter(names[1]).path)
    assert await house.swap.rollback("worse") == house.registry.adapter(names[0])
    assert house.registry.state(names[1]) is AdapterState.REFUSED


async def test_after_a_restart_the_acting_adapter_is_served_again(house: House):
    first, second, candidate = house.register(1), house.register(2), house.register(3)
    await house.swap.promote(first)
    await house.step("ep_1")
    await house.swap.promote(second)
    await house.swap.bring_up(candidate)
    assert await house.restart() == house.registry.adapter(second)
    assert house.loaded() == [second]
    assert await house.step("ep_2") == second
    assert await house.step("ep_1", began_with=first) == first
    assert house.registry.state(candidate) is AdapterState.UNLOADED
    await house.swap.promote(candidate)
    assert await house.step("ep_3") == candidate


@pytest.mark.parametrize("num_broken", [1, 2])
async def test_a_restart_falls_back_to_the_last_that_works_at_worst_to_the_base(house: House, num_broken: int, caplog):
    names = [house.register(seed) for seed in (1, 2)]
    for name in names:
        await house.swap.promote(name)
    for name in names[2 - num_broken :]:
        fill_with_nan(house.registry.adapter(name).path)
    await house.restart()
    survivor = names[0] if num_broken == 1 else "base"
    assert await house.step("ep_1") == survivor
    assert f"{names[1]} is refused" in caplog.text
    assert "rolled back to" in caplog.text
    await house.restart()
    assert await house.step("ep_2") == survivor


async def test_a_restart_on_a_dead_engine_changes_nothing(house: House):
    name = house.register(1)
    await house.swap.promote(name)
    house.start()
    house.engine.is_alive = False
    with pytest.raises(EngineError):
        await house.swap.restore()
    assert await house.restart() == house.registry.adapter(name)


async def test_the_background_drain_survives_an_engine_that_cannot_unload(house: House, caplog):
    first, second = house.register(1), house.register(2)
    await house.swap.promote(first)
    await house.swap.promote(second)
    unleased = house.engine.generate((1, 2), SamplingParams(), house.registry.adapter(first))
    await anext(unleased)
    draining = asyncio.create_task(house.swap.keep_draining(every_s=0.001))
    await eventually(lambda: "could not unload" in caplog.text)
    await unleased.aclose()  # type: ignore[attr-defined]
    await eventually(lambda: house.registry.state(first) is AdapterState.UNLOADED)
    draining.cancel()
    assert first not in house.loaded()
