"""The whole way on the real engine: PEFT writes an adapter, the engine loads it, its trainer's probe says it is it."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from itertools import count
from pathlib import Path

import pytest

from policies.adapters.files import WEIGHTS_FILE, AdapterRefused
from policies.adapters.probe import read_probe
from policies.types import Adapter, SamplingParams
from runtime.adapters.swap import Swap
from runtime.engines.embedded.engine import EmbeddedEngine
from runtime.store.adapter_registry import AdapterRegistry, AdapterState
from tests.tiny_adapters import TOLERANCE, TinyNetwork


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyNetwork:
    return TinyNetwork(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def registry(tmp_path: Path) -> AdapterRegistry:
    return AdapterRegistry(tmp_path / "agent.db")


@pytest.fixture
async def engine(tiny: TinyNetwork) -> AsyncIterator[EmbeddedEngine]:
    engine = EmbeddedEngine(tiny.model_folder, device="cpu", max_adapters=3, max_rank=16, num_threads=1)
    yield engine
    await engine.close()


async def deviation(engine: EmbeddedEngine, adapter: Adapter, proof: Path) -> float:
    """By how many nats the engine's first token after each of a probe's prompts differs from the trainer's."""
    deviations = []
    for prompt in read_probe(proof).prompts:
        sampling = SamplingParams(max_tokens=1, temperature=0.0, num_top_logprobs=20)
        async for token in engine.generate(prompt.prompt_token_ids, sampling, adapter):
            reported = dict(token.top_logprobs)
            deviations += [abs(reported[t.token_id] - t.adapter_logprob) for t in prompt.continuation[0][:4]]
    return max(deviations)


async def test_the_served_adapter_is_the_trained_one(
    tiny: TinyNetwork, engine: EmbeddedEngine, registry: AdapterRegistry
):
    swap = Swap(engine, registry, tiny.network)
    names = [registry.register(tiny.adapter(seed)).name for seed in (1, 2)]
    for name in names:
        await swap.promote(name)
    async with swap.lease("ep_1") as adapter:
        assert adapter is not None
        assert await deviation(engine, adapter, tiny.adapter(2)) < TOLERANCE
    assert await swap.rollback("worse") == registry.adapter(names[0])
    assert await deviation(engine, registry.adapter(names[0]), tiny.adapter(1)) < TOLERANCE


async def test_other_weights_under_the_same_probe_are_refused(
    tiny: TinyNetwork, engine: EmbeddedEngine, registry: AdapterRegistry, tmp_path: Path
):
    swap = Swap(engine, registry, tiny.network)
    made = tiny.copy(1, tmp_path / "made")
    shutil.copyfile(tiny.adapter(2) / WEIGHTS_FILE, made / WEIGHTS_FILE)
    name = registry.register(made).name
    with pytest.raises(AdapterRefused, match="does not serve what was trained"):
        await swap.bring_up(name)
    assert registry.state(name) is AdapterState.REFUSED
    assert engine.loaded_adapters() == ()


async def test_swaps_under_running_streams_leave_each_stream_on_its_adapter(
    tiny: TinyNetwork, engine: EmbeddedEngine, registry: AdapterRegistry
):
    """Each stream is greedy: a token of another adapter in the midst of it would change the rest."""
    swap = Swap(engine, registry, tiny.network)
    names = [registry.register(tiny.adapter(seed)).name for seed in (1, 2)]
    taken: dict[str, set[tuple[int, ...]]] = {name: set() for name in names}
    await swap.promote(names[0])

    async def talk(speaker: int) -> None:
        for turn in count():
            if turn >= 12 and all(taken.values()):  # on a slow machine all twelve may fall to one of them
                break
            async with swap.lease(f"ep_{speaker}_{turn}") as adapter:
                assert adapter is not None
                sampling = SamplingParams(max_tokens=24, temperature=0.0)
                stream = engine.generate((3, 1, 4, 1, 5), sampling, adapter)
                taken[adapter.name].add(tuple([token.token_id async for token in stream]))
            swap.finish(f"ep_{speaker}_{turn}")

    speakers = asyncio.gather(*(talk(speaker) for speaker in range(4)))
    num_swaps = 0
    async with asyncio.timeout(60):
        while not speakers.done():
            num_swaps += 1
            await swap.promote(names[num_swaps % 2])
            await swap.drain()
            await asyncio.sleep(0.01)  # a flip between two that are loaded never waits: give the streams their turn
        await speakers
    assert num_swaps >= 5
    assert [len(completions) for completions in taken.values()] == [1, 1]
