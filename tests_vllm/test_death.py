"""Death: vLLM's process is killed under load and replaced; the server is killed and leaves no process behind."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import pytest
import pytest_asyncio

from policies.types import EngineError, SamplingParams
from runtime.adapters.swap import Swap
from runtime.engines.supervised import SupervisedEngine
from runtime.engines.vllm.engine import VllmEngine
from runtime.store.adapter_registry import AdapterRegistry
from tests_vllm.novice_adapters import NoviceAdapters, complete, ids_of, until
from tests_vllm.server_process import engine_processes_of, is_running, serving, wait_until

on_one_loop = pytest.mark.asyncio(loop_scope="module")

GREEDY = SamplingParams(max_tokens=12, temperature=0)
LONG = SamplingParams(max_tokens=1500)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(novice: NoviceAdapters) -> AsyncIterator[SupervisedEngine]:
    start = partial(VllmEngine.start, novice.model_folder, max_batch_size=4, num_threads=1)
    engine = SupervisedEngine(start, first_pause_s=0.1)
    yield engine
    await engine.close()


@on_one_loop
async def test_a_killed_engine_ends_its_requests_at_once_and_is_replaced(
    engine: SupervisedEngine, novice: NoviceAdapters, tmp_path: Path
):
    registry = AdapterRegistry(tmp_path / "agent.db")
    swap = Swap(engine, registry, novice.network)
    await engine.start(swap.restore)
    name = registry.register(novice.adapter(2).path).name
    await swap.promote(name)

    async def step() -> list[int]:
        async with swap.lease("ep") as adapter:
            assert adapter is not None
            assert adapter.name == name
            return ids_of(await complete(engine, novice.prompt(40), GREEDY, adapter))

    expected = novice.greedy(novice.adapter(2), novice.prompt(40), 12)
    assert await step() == expected
    first = engine._usable()
    assert isinstance(first, VllmEngine)
    asked = [asyncio.create_task(complete(engine, [5, i], LONG, registry.acting())) for i in range(6)]
    await until(lambda: (engine.health().num_running, engine.health().num_waiting) == (4, 2))
    began = time.monotonic()
    os.kill(first.process_ids[0], signal.SIGKILL)
    loading = asyncio.create_task(first.load_adapter(novice.adapter(3)))
    results = await asyncio.gather(*asked, loading, return_exceptions=True)
    assert time.monotonic() - began < 2
    assert [type(result) for result in results] == [EngineError] * 7
    await until(lambda: "started again" in engine.health().problem or "starting" in engine.health().problem)
    with pytest.raises(EngineError, match="start"):
        await step()
    await until(lambda: engine.health().is_alive, 120)
    assert await step() == expected, "the acting adapter was loaded and verified again"
    assert engine.num_restarts == 1
    events = [event.state.value for event in registry.events(name)]
    assert events[-5:] == ["unloaded", "validated", "loaded", "verified", "acting"]


@on_one_loop
async def test_a_closed_engine_ends_its_requests_and_refuses_more(engine: SupervisedEngine):
    vllm_engine = engine._usable()
    assert isinstance(vllm_engine, VllmEngine)
    (pid,) = vllm_engine.process_ids
    asked = [asyncio.create_task(complete(vllm_engine, [5, i], LONG)) for i in range(6)]
    await until(lambda: vllm_engine.health().num_running == 4)
    await asyncio.gather(engine.close(), vllm_engine.close())
    results = await asyncio.gather(*asked, return_exceptions=True)
    assert [type(result) for result in results] == [EngineError] * 6
    with pytest.raises(EngineError, match="closed"):
        await complete(vllm_engine, [5], LONG)
    assert not is_running(pid)


@on_one_loop
async def test_an_engine_that_cannot_answer_once_leaves_no_process_behind(novice: NoviceAdapters):
    """It once held the GPU, so that the next try found no memory."""
    before = set(engine_processes_of(os.getpid()))
    with pytest.raises(EngineError, match="logprobs"):
        await VllmEngine.start(novice.model_folder, num_threads=1, engine_args={"max_logprobs": "5"})
    assert set(engine_processes_of(os.getpid())) <= before


@on_one_loop
async def test_a_model_that_vllm_cannot_load_is_told(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}')
    with pytest.raises(EngineError, match="vLLM cannot start"):
        await VllmEngine.start(tmp_path, num_threads=1, max_context_tokens=256)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_no_engine_outlives_its_server(tmp_path: Path, how: signal.Signals):
    with serving(tmp_path / "state") as server:
        server.wait_until_serving()
        engine = server.engine_process()
        server.process.send_signal(how)
        server.process.wait(30)
        wait_until(lambda: not is_running(engine), 5)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_an_engine_that_is_still_starting_does_not_outlive_its_server(tmp_path: Path, how: signal.Signals):
    with serving(tmp_path / "state") as server:
        engine = server.engine_process()
        server.process.send_signal(how)
        server.process.wait(60)
        wait_until(lambda: not is_running(engine), 60)


def test_wrong_engine_arguments_end_the_start_with_a_sentence(tmp_path: Path):
    with serving(tmp_path / "state", "--engine-arg", "tensor_paralel_size=2") as server:
        said, _ = server.process.communicate(timeout=120)
    assert server.process.returncode == 1
    assert said.strip().splitlines()[-1] == "cannot start: tensor_paralel_size is not an argument of vLLM"
