"""What could poison or kill vLLM through its adapters, each tried on the real engine. One engine for all tests.

What happens without the guard is told in a test's first lines. The tests of places (a full house, evictions, two loads
at once, a folder that is gone) were seen to fail with their guards taken out.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch

from policies.adapters.files import AdapterRefused
from policies.types import Adapter, EngineError, SamplingParams
from runtime.adapters.swap import Swap, SwapError
from runtime.engines.vllm.engine import VllmEngine
from runtime.store.adapter_registry import AdapterRegistry, AdapterState
from tests_vllm.novice_adapters import NoviceAdapters, complete, engine_on, ids_of, rewrite

pytestmark = pytest.mark.asyncio(loop_scope="module")

MAX_ADAPTERS = 3
GREEDY = SamplingParams(max_tokens=12, temperature=0)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(novice: NoviceAdapters) -> AsyncIterator[VllmEngine]:
    async with engine_on(novice.model_folder, max_adapters=MAX_ADAPTERS, max_rank=8) as engine:
        yield engine
        assert engine.health().is_alive, "nothing in this file may have killed the engine"


@asynccontextmanager
async def loaded(engine: VllmEngine, *adapters: Adapter) -> AsyncIterator[None]:
    """The engine with these adapters and no others."""
    for adapter in adapters:
        await engine.load_adapter(adapter)
    try:
        yield
    finally:
        for adapter in engine.loaded_adapters():
            await engine.unload_adapter(adapter)


async def in_vllm(engine: VllmEngine) -> set[int]:
    """Versions that vLLM itself holds."""
    return set(await engine._llm.list_loras())


class House:
    """A registry and a swap on the shared engine."""

    def __init__(self, engine: VllmEngine, novice: NoviceAdapters, folder: Path) -> None:
        self.engine, self.novice = engine, novice
        self.registry = AdapterRegistry(folder / "agent.db")
        self.swap = Swap(engine, self.registry, novice.network)

    def register(self, path: Path) -> str:
        return self.registry.register(path).name

    async def step(self, episode_id: str, **asked: Any) -> tuple[Adapter | None, list[int]]:
        """One step of an episode, and the adapter that it was taken with."""
        async with self.swap.lease(episode_id, **asked) as adapter:
            return adapter, ids_of(await complete(self.engine, self.novice.prompt(40), GREEDY, adapter))


@pytest_asyncio.fixture(loop_scope="module")
async def house(engine: VllmEngine, novice: NoviceAdapters, tmp_path: Path) -> AsyncIterator[House]:
    async with loaded(engine):
        yield House(engine, novice, tmp_path)


# ----------------------------------------------------------------------- never reaching vLLM: broken adapters


def narrow(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[:, :-1] if tensor.shape[1] > tensor.shape[0] else tensor


BREAKAGES = {
    # vLLM loads it with success, and its NaN stay in cache blocks that other requests use later.
    "not finite": lambda path: rewrite(path, lambda tensor: tensor * float("nan")),
    # vLLM loads it with success, and serves something else than was trained.
    "has shape": lambda path: rewrite(path, narrow),
    "damaged": lambda path: (path / "adapter_model.safetensors").write_bytes(b"not a weights file"),
    "no probe.json": lambda path: (path / "probe.json").unlink(),
}


@pytest.mark.parametrize("problem", BREAKAGES)
async def test_a_broken_adapter_never_reaches_the_engine(
    house: House, novice: NoviceAdapters, tmp_path: Path, problem: str
):
    path = shutil.copytree(novice.adapter(1).path, tmp_path / "broken")
    BREAKAGES[problem](path)
    before = await house.step("before")
    name = house.register(path)
    with pytest.raises(AdapterRefused, match=problem):
        await house.swap.promote(name)
    assert house.registry.state(name) is AdapterState.REFUSED
    assert house.engine.loaded_adapters() == ()
    assert await in_vllm(house.engine) == set()
    assert await house.step("after") == before


async def test_an_adapter_of_another_base_of_equal_sizes_is_refused(house: House, novice: NoviceAdapters):
    # vLLM takes it: nothing in its files but the probe's fingerprint tells the bases apart.
    other_folder = house.registry._folder / "other"
    network = novice.network_of(None)
    with torch.no_grad():
        network.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    network.save_pretrained(other_folder)
    stranger = NoviceAdapters(other_folder, house.registry._folder / "strangers").adapter(1)
    with pytest.raises(AdapterRefused, match="another base network"):
        await house.swap.promote(house.register(stranger.path))


async def test_an_adapter_that_is_not_what_was_trained_is_refused_by_its_probe(
    house: House, novice: NoviceAdapters, tmp_path: Path
):
    path = shutil.copytree(novice.adapter(1).path, tmp_path / "other")
    rewrite(path, lambda tensor: tensor * 1.1)
    name = house.register(path)
    with pytest.raises(AdapterRefused, match="does not serve what was trained"):
        await house.swap.promote(name)
    assert await in_vllm(house.engine) == set(), "it was unloaded again"


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"target_modules": ["lm_head"]}, "changes \\['lm_head'\\]"),  # vLLM would leave it out without a word
        ({"r": 16}, "rank 16|16 is greater"),
        ({"use_dora": True}, "(?i)dora"),
    ],
)
async def test_what_vllm_cannot_serve_is_refused_by_the_engine_itself(
    engine: VllmEngine, novice: NoviceAdapters, tmp_path: Path, settings: dict[str, Any], problem: str
):
    novice.write(tmp_path / "odd", 1, **{"target_modules": ["q_proj"], **settings})
    odd = Adapter("odd", 9, tmp_path / "odd", 4, None, "")
    async with loaded(engine):
        with pytest.raises(EngineError, match=problem):
            await engine.load_adapter(odd)
        with pytest.raises(EngineError, match="cannot be read"):
            await engine.load_adapter(Adapter("gone", 10, tmp_path / "gone", 4, None, ""))
        assert engine.loaded_adapters() == ()
        async with loaded(engine, *(novice.adapter(version) for version in range(1, MAX_ADAPTERS + 1))):
            pass  # the refused ones hold no place


# ------------------------------------------------------------------------------------------- places and folders


async def test_a_load_that_would_evict_is_refused(engine: VllmEngine, novice: NoviceAdapters):
    # vLLM would evict the one used least recently, and read it again from its folder when it is asked for.
    adapters = [novice.adapter(version) for version in range(1, MAX_ADAPTERS + 2)]
    async with loaded(engine, *adapters[:MAX_ADAPTERS]):
        with pytest.raises(EngineError, match="all 3 places"):
            await engine.load_adapter(adapters[-1])
        with pytest.raises(EngineError, match="not loaded"):
            await complete(engine, [5], GREEDY, adapters[-1])
        assert await in_vllm(engine) == {1, 2, 3}
        completions = await asyncio.gather(*(complete(engine, [5, 6], GREEDY, one) for one in adapters[:-1]))
        for adapter, tokens in zip(adapters, completions, strict=False):
            novice.expect(adapter, [5, 6], tokens)


async def test_the_base_network_is_served_unchanged_beside_a_full_house(engine: VllmEngine, novice: NoviceAdapters):
    # vLLM's CPU kernels take "no adapter" for the last place, and serve the adapter that lies there as the base.
    adapters = [None, *(novice.adapter(version) for version in range(1, MAX_ADAPTERS + 1))]
    async with loaded(engine, *adapters[1:]):
        for _ in range(2):  # at once, and once more after each place was taken anew
            rows = [(adapters[i % 4], novice.prompt(2 + 9 * i, i)) for i in range(12)]
            completions = await asyncio.gather(*(complete(engine, prompt, GREEDY, one) for one, prompt in rows))
            for (adapter, prompt), tokens in zip(rows, completions, strict=True):
                novice.expect(adapter, prompt, tokens)
            for adapter in adapters[1:]:
                await engine.unload_adapter(adapter)
                await engine.load_adapter(adapter)


async def test_two_loads_at_once_share_the_last_place_fairly(engine: VllmEngine, novice: NoviceAdapters):
    # Counted after vLLM's answer only, both would find room, and one would evict.
    async with loaded(engine, novice.adapter(1), novice.adapter(2)):
        loads = [engine.load_adapter(novice.adapter(version)) for version in (3, 4, 3)]
        results = await asyncio.gather(*loads, return_exceptions=True)
        assert results[0] is None
        assert [type(result) for result in results[1:]] == [EngineError, EngineError]
        assert await in_vllm(engine) == {1, 2, 3}


async def test_a_version_number_is_never_two_adapters(engine: VllmEngine, novice: NoviceAdapters):
    # vLLM goes by the number: the second would be "loaded" and the first served under its name.
    twin = Adapter("agent-twin", 1, novice.adapter(2).path, 4, None, "")
    async with loaded(engine, novice.adapter(1)):
        with pytest.raises(EngineError, match="version 1 is loaded already"):
            await engine.load_adapter(twin)


async def test_a_load_whose_caller_goes_away_is_ended_and_can_be_unloaded(engine: VllmEngine, novice: NoviceAdapters):
    async with loaded(engine):
        load = asyncio.create_task(engine.load_adapter(novice.adapter(1)))
        await asyncio.sleep(0)
        load.cancel()
        with pytest.raises(asyncio.CancelledError):
            await load
        async with asyncio.timeout(10):
            while not engine.loaded_adapters():  # noqa: ASYNC110 (it has no event)
                await asyncio.sleep(0.01)
        await engine.unload_adapter(novice.adapter(1))
        assert await in_vllm(engine) == set()


async def test_a_folder_that_is_gone_after_loading_harms_nobody(
    engine: VllmEngine, novice: NoviceAdapters, tmp_path: Path
):
    # Read again lazily, a missing folder kills the engine, the base network's requests with it.
    path = shutil.copytree(novice.adapter(1).path, tmp_path / "agent-v0011")
    mortal = Adapter("agent-v0011", 11, path, 4, None, "")
    async with loaded(engine, mortal):
        shutil.rmtree(path)
        for version in (2, 3):
            await engine.load_adapter(novice.adapter(version))
        for version in (4, 5):
            with pytest.raises(EngineError, match="places"):
                await engine.load_adapter(novice.adapter(version))
        adapters = [mortal, novice.adapter(2), novice.adapter(3), None]
        completions = await asyncio.gather(*(complete(engine, [7, i], GREEDY, adapters[i % 4]) for i in range(16)))
        for number, tokens in enumerate(completions):
            adapter = novice.adapter(1) if adapters[number % 4] is mortal else adapters[number % 4]
            novice.expect(adapter, [7, number], tokens)


# ------------------------------------------------------------------------------------------------ swaps


async def test_cached_prefixes_never_cross_versions(engine: VllmEngine, novice: NoviceAdapters):
    # With one name, or one folder, for all versions, the second would go on from the first one's cache.
    prompt = novice.prompt(300)
    for version in (None, 1, 2, 4, 1):
        adapters = [] if version is None else [novice.adapter(version)]
        async with loaded(engine, *adapters):
            for _ in range(2):
                adapter = adapters[0] if adapters else None
                novice.expect(adapter, prompt, await complete(engine, prompt, GREEDY, adapter))


async def test_a_running_stream_keeps_its_adapter_across_a_swap(house: House, novice: NoviceAdapters):
    first, second = house.register(novice.adapter(1).path), house.register(novice.adapter(2).path)
    await house.swap.promote(first)
    prompt, tokens = novice.prompt(50), []
    async with house.swap.lease("long") as adapter:
        assert adapter is not None
        async for token in house.engine.generate(prompt, SamplingParams(max_tokens=300, seed=1), adapter):
            tokens.append(token)
            if len(tokens) == 100:
                await house.swap.promote(second)
                with pytest.raises(EngineError, match="in use by 1"):
                    await house.engine.unload_adapter(adapter)
            if len(tokens) == 200:
                assert (await house.step("new"))[0] == house.registry.acting()
    assert len(tokens) == 300
    assert adapter.name == first
    novice.expect(novice.adapter(1), prompt, tokens)
    house.swap.finish("long")
    await house.swap.drain()
    assert [one.name for one in house.engine.loaded_adapters()] == [second]


async def test_many_swaps_under_load_lose_and_mix_nothing(house: House, novice: NoviceAdapters):
    names = [house.register(novice.adapter(version).path) for version in range(1, 5)]
    expected = {name: novice.greedy(novice.adapter(v), novice.prompt(40), 12) for v, name in enumerate(names, 1)}
    await house.swap.promote(names[0])
    served: list[str] = []
    is_over = False

    async def keep_asking(number: int) -> None:
        turn = 0
        while not is_over:
            episode_id = f"ep_{number}_{turn}"
            adapter, token_ids = await house.step(episode_id)
            assert adapter is not None
            assert token_ids == expected[adapter.name]
            served.append(adapter.name)
            house.swap.finish(episode_id)
            turn += 1

    asking = [asyncio.create_task(keep_asking(number)) for number in range(4)]
    for turn in range(12):
        await asyncio.sleep(0.2)
        await house.swap.drain()
        await house.swap.promote(names[(turn + 1) % 4])
    is_over = True
    await asyncio.gather(*asking)
    assert set(served) == set(names)


async def test_rollback_is_served_at_once(house: House, novice: NoviceAdapters):
    first, second = house.register(novice.adapter(1).path), house.register(novice.adapter(2).path)
    await house.swap.promote(first)
    await house.swap.promote(second)
    assert await house.swap.rollback("worse") is not None
    adapter, token_ids = await house.step("ep")
    assert adapter is not None
    assert adapter.name == first
    assert token_ids == novice.greedy(novice.adapter(1), novice.prompt(40), 12)
    assert await house.swap.rollback("worse") is None
    assert (await house.step("ep_2"))[1] == novice.greedy(None, novice.prompt(40), 12)


async def three_acting_in_turn(house: House, novice: NoviceAdapters) -> list[str]:
    """Four versions; the first three have each answered an episode, ep_0 to ep_2, and fill the engine."""
    names = [house.register(novice.adapter(version).path) for version in range(1, 5)]
    for number, name in enumerate(names[:3]):
        await house.swap.promote(name)
        await house.step(f"ep_{number}")
    return names


async def test_where_all_places_have_running_steps_a_promotion_is_refused_in_words(
    house: House, novice: NoviceAdapters
):
    names = await three_acting_in_turn(house, novice)
    async with house.swap.lease("ep_0"), house.swap.lease("ep_1"):
        with pytest.raises(SwapError, match="all 3 slots"):
            await house.swap.promote(names[3])
    assert (await house.step("ep_new"))[0] == house.registry.adapter(names[2])


async def test_an_idle_episode_gives_its_place_to_a_promotion_and_finds_its_adapter_again(
    house: House, novice: NoviceAdapters
):
    names = await three_acting_in_turn(house, novice)
    await house.swap.promote(names[3])
    assert house.registry.state(names[0]) is AdapterState.UNLOADED
    adapter, token_ids = await house.step("ep_0")
    assert adapter == house.registry.adapter(names[0])
    assert token_ids == novice.greedy(novice.adapter(1), novice.prompt(40), 12)
