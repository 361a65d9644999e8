"""An engine that dies is replaced, and nobody sees the new one before the acting adapter is verified on it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from policies.chat.chat_protocol import ChatProtocol
from policies.types import Adapter, EngineError, SampledToken, SamplingParams
from runtime.adapters.swap import Swap
from runtime.engines.supervised import SupervisedEngine
from runtime.store.adapter_registry import AdapterRegistry
from tests.scripted_engine import ScriptedEngine
from tests.serving import MODEL, Served, parts_of, served
from tests.tiny_adapters import TinyNetwork, faithful_script

PAUSE_S = 0.05


class House:
    """A supervised engine with a swap on it. Every engine it ever had is in `engines`."""

    def __init__(self, tiny: TinyNetwork, folder: Path) -> None:
        self.registry = AdapterRegistry(folder / "agent.db")
        self.tiny = tiny
        self.engines: list[ScriptedEngine] = []
        self.failures: list[Exception] = []
        """What the next starts raise."""
        self.may_start = asyncio.Event()
        self.may_start.set()
        self.engine = SupervisedEngine(self.start_engine, first_pause_s=PAUSE_S)
        self.swap = Swap(self.engine, self.registry, tiny.network)

    async def start_engine(self, tell_stage: Callable[[str], None]) -> ScriptedEngine:
        tell_stage("it warms up")
        await self.may_start.wait()
        if self.failures:
            raise self.failures.pop(0)
        self.engines.append(ScriptedEngine(faithful_script(self.registry)))
        return self.engines[-1]

    async def say(self, adapter: Adapter | None = None) -> list[SampledToken]:
        return [token async for token in self.engine.generate((1, 2), SamplingParams(), adapter)]

    async def step(self, episode_id: str) -> str:
        async with self.swap.lease(episode_id) as adapter:
            await self.say(adapter)
            return "base" if adapter is None else adapter.name


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyNetwork:
    return TinyNetwork(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
async def house(tiny: TinyNetwork, tmp_path: Path) -> AsyncIterator[House]:
    house = House(tiny, tmp_path)
    await house.engine.start(house.swap.restore)
    yield house
    await house.engine.close()


async def eventually(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not is_so():  # noqa: ASYNC110 (what is waited for has no event)
            await asyncio.sleep(0.005)


async def test_a_dead_engine_is_replaced_and_episodes_go_on_with_their_adapter(house: House):
    name = house.registry.register(house.tiny.adapter(1)).name
    await house.swap.promote(name)
    assert await house.step("ep_1") == name
    house.engines[0].is_alive = False
    with pytest.raises(EngineError, match="died"):
        await house.step("ep_1")
    assert not house.engine.health().is_alive
    await eventually(lambda: house.engine.health().is_alive)
    assert await house.step("ep_1") == name
    assert [adapter.name for adapter in house.engines[1].loaded_adapters()] == [name]
    assert house.engine.num_restarts == 1


async def test_while_the_adapter_is_restored_nobody_else_sees_the_engine(tiny: TinyNetwork, tmp_path: Path):
    house, may_end = House(tiny, tmp_path), asyncio.Event()

    async def restore() -> None:
        assert house.engine.health().is_alive, "who restores sees the engine"
        await may_end.wait()

    starting = asyncio.create_task(house.engine.start(restore))
    await eventually(lambda: bool(house.engines))
    await asyncio.sleep(0)
    health = house.engine.health()
    assert not health.is_alive
    assert "being loaded" in health.problem
    with pytest.raises(EngineError, match="being loaded"):
        await house.say()
    may_end.set()
    await starting
    assert await house.say()
    await house.engine.close()


def told_by(server: Served) -> tuple[int, dict[str, Any], dict[str, float]]:
    """Status and body of /health, and the engine's gauges of /metrics."""
    health = httpx.get(f"{server.url}/health")
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    gauges = [line.removeprefix("stepagent_engine_").split() for line in lines if line.startswith("stepagent_engine_")]
    return health.status_code, health.json(), {name: float(value) for name, value in gauges}


async def ask_over_http(server: Served) -> httpx.Response:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "tools": []}
    return await asyncio.to_thread(httpx.post, f"{server.url}/v1/chat/completions", json=body)


async def test_health_and_metrics_tell_the_truth_through_start_death_and_replacement(
    tiny: TinyNetwork, protocol: ChatProtocol, tmp_path: Path
):
    house = House(tiny, tmp_path)
    parts = parts_of(house.engine, protocol, tmp_path / "served", swap=house.swap, registry=house.registry)
    house.may_start.clear()
    with served(parts) as server:
        starting = asyncio.create_task(house.engine.start(house.swap.restore))
        await asyncio.sleep(0.05)
        status, health, gauges = await asyncio.to_thread(told_by, server)
        assert (status, health["status"], gauges["alive"], gauges["restarts"]) == (503, "starting", 0, 0)
        assert "the engine is starting: it warms up (0 s so far)" in health["engine"]["problem"]
        refused = await ask_over_http(server)
        assert (refused.status_code, "the engine is starting" in refused.text) == (503, True)
        house.may_start.set()
        await starting
        status, health, gauges = await asyncio.to_thread(told_by, server)
        assert (status, health["status"], gauges["alive"], gauges["restarts"]) == (200, "ok", 1, 0)
        house.may_start.clear()
        house.engines[-1].is_alive = False
        assert (await ask_over_http(server)).status_code == 503
        await eventually(lambda: house.engine.health().is_starting)
        status, health, gauges = await asyncio.to_thread(told_by, server)
        assert (status, health["status"], gauges["alive"], gauges["restarts"]) == (503, "starting", 0, 0)
        house.may_start.set()
        await eventually(lambda: house.engine.health().is_alive)
        status, health, gauges = await asyncio.to_thread(told_by, server)
        assert (status, health["status"], gauges["alive"], gauges["restarts"]) == (200, "ok", 1, 1)
        assert health["engine"]["num_restarts"] == 1
        await house.engine.close()
        status, health, gauges = await asyncio.to_thread(told_by, server)
        assert (status, health["status"], gauges["alive"]) == (503, "down", 0)


async def test_a_start_that_fails_is_tried_again_and_health_says_why(house: House):
    house.failures = [EngineError("no memory"), OSError("no space")]
    house.engines[0].is_alive = False
    await eventually(lambda: "no memory" in house.engine.health().problem)
    await eventually(lambda: house.engine.health().is_alive)
    assert house.engine.num_restarts == 1


async def test_a_first_start_that_fails_is_told_and_not_tried_again(tiny: TinyNetwork, tmp_path: Path):
    house = House(tiny, tmp_path)
    house.failures = [EngineError("no such model")]
    with pytest.raises(EngineError, match="no such model"):
        await house.engine.start(house.swap.restore)
    await asyncio.sleep(3 * PAUSE_S)
    assert house.engines == []


async def test_an_engine_that_dies_while_the_adapter_is_restored_is_replaced_too(house: House):
    name = house.registry.register(house.tiny.adapter(1)).name
    await house.swap.promote(name)
    deaths = iter([True, False])
    load = ScriptedEngine.load_adapter

    async def load_and_perhaps_die(engine: ScriptedEngine, adapter: Adapter) -> None:
        engine.is_alive = not next(deaths)
        await load(engine, adapter)

    ScriptedEngine.load_adapter = load_and_perhaps_die
    try:
        house.engines[0].is_alive = False
        await eventually(lambda: len(house.engines) == 3 and house.engine.health().is_alive)
    finally:
        ScriptedEngine.load_adapter = load
    assert await house.step("ep_1") == name, "the engine's death was not held against the adapter"


async def test_a_closed_engine_stays_closed(house: House):
    await house.engine.close()
    await asyncio.sleep(3 * PAUSE_S)
    assert len(house.engines) == 1
    assert house.engine.health().problem == "the engine is closed"
    with pytest.raises(EngineError, match="closed"):
        await house.say()
