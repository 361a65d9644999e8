"""The embedded engine within its memory: what waits, what leaves and comes back, what is computed once."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

import runtime.engines.embedded.batch as batch
import runtime.engines.embedded.prefill as prefill
import runtime.engines.embedded.shared_prefix as shared_prefix
from policies.types import Adapter, EngineError, SamplingParams
from runtime.engines.embedded.engine import EmbeddedEngine
from tests.small_networks import (
    CONFIGS,
    assert_as_plain,
    complete,
    engine_on,
    ids_of,
    make_adapter,
    make_network,
    prompt_of,
    until,
)

BYTES_PER_TOKEN = 2 * 2 * 2 * 8 * 4
"""Of the small network: 2 layers, keys and values, 2 heads of 8 channels, 4 bytes."""


@pytest.fixture(scope="module")
def network_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_network(CONFIGS["qwen2"](), tmp_path_factory.mktemp("network"))


@pytest.fixture(scope="module")
def adapters(network_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Adapter]:
    folder = tmp_path_factory.mktemp("adapters")
    return [make_adapter(network_folder, folder / str(version), version) for version in (1, 2)]


# -------------------------------------------------------------------------------------------------- bytes


async def test_memory_for_keys_and_values_never_exceeds_its_bytes(network_folder: Path):
    """64 slots once grew to the longest sequence: a prompt of 500 tokens took the memory of 32,000."""
    num_bytes = 2048 * BYTES_PER_TOKEN
    async with engine_on(network_folder, kv_memory_bytes=num_bytes) as engine:
        completions = await asyncio.gather(
            *(complete(engine, prompt_of(20 + 13 * i, i), SamplingParams(max_tokens=30, seed=i)) for i in range(36))
        )
        assert 0 < engine.kv_memory_bytes <= num_bytes
    for i, tokens in enumerate(completions):
        assert len(tokens) == 30
        assert_as_plain(network_folder, None, prompt_of(20 + 13 * i, i), tokens)


async def test_short_sequences_take_little_though_long_ones_may_come(network_folder: Path):
    num_bytes = 64 * 512 * BYTES_PER_TOKEN
    async with engine_on(network_folder, kv_memory_bytes=num_bytes) as engine:
        await asyncio.gather(*(complete(engine, prompt_of(5, i), SamplingParams(max_tokens=5)) for i in range(32)))
        assert engine.kv_memory_bytes <= num_bytes / 8


async def test_what_does_not_fit_now_waits_its_turn(network_folder: Path):
    async with engine_on(network_folder, kv_memory_bytes=512 * BYTES_PER_TOKEN) as engine:
        first = engine.generate(prompt_of(400), SamplingParams(max_tokens=100, seed=1), None)
        await anext(first)
        second = asyncio.create_task(complete(engine, prompt_of(300, 1), SamplingParams(max_tokens=4, seed=2)))
        await until(lambda: engine.health().num_waiting == 1)
        assert len([token async for token in first]) == 99
        assert_as_plain(network_folder, None, prompt_of(300, 1), await second)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.0}])
async def test_who_must_leave_for_want_of_memory_comes_back_and_goes_on_as_if_nothing_had_been(
    network_folder: Path, adapters: list[Adapter], options: dict[str, float]
):
    """All outgrow what the memory holds: those who came last leave, and compute anew what was theirs."""
    samplings = [SamplingParams(max_tokens=200, seed=i, **options) for i in range(6)]
    who = [None, *adapters] * 2
    async with engine_on(network_folder, *adapters, max_batch_size=1) as engine:
        alone = [
            await complete(engine, prompt_of(40, i), sampling, adapter)
            for i, (sampling, adapter) in enumerate(zip(samplings, who, strict=True))
        ]
    async with engine_on(network_folder, *adapters, kv_memory_bytes=600 * BYTES_PER_TOKEN) as engine:
        crowded = await asyncio.gather(
            *(
                complete(engine, prompt_of(40, i), sampling, adapter)
                for i, (sampling, adapter) in enumerate(zip(samplings, who, strict=True))
            )
        )
        assert engine.num_prefilled_tokens > 6 * 40, "nobody had to leave: the test shows nothing"
    for one, other in zip(alone, crowded, strict=True):
        assert ids_of(one) == ids_of(other)
        assert [token.logprob for token in one] == pytest.approx([token.logprob for token in other], abs=1e-4)


async def test_what_can_never_fit_is_refused_with_the_numbers_and_what_just_fits_is_served(network_folder: Path):
    async with engine_on(network_folder, kv_memory_bytes=100 * BYTES_PER_TOKEN) as engine:
        assert engine.limits.max_context_tokens == 100
        with pytest.raises(EngineError, match="200 tokens; the context of 100"):
            await complete(engine, prompt_of(200), SamplingParams())
        tokens = await complete(engine, prompt_of(90), SamplingParams(max_tokens=50, seed=1))
    assert len(tokens) == 10
    assert_as_plain(network_folder, None, prompt_of(90), tokens)


def test_a_context_beyond_the_memory_is_refused_at_the_start(network_folder: Path):
    with pytest.raises(ValueError, match=r"hold 100 tokens .* a context of 200"):
        EmbeddedEngine(network_folder, device="cpu", kv_memory_bytes=100 * BYTES_PER_TOKEN, max_context_tokens=200)


# ------------------------------------------------------------------------------------- what is computed once


async def test_states_that_extend_each_other_are_computed_once_whatever_their_order(
    network_folder: Path, adapters: list[Adapter]
):
    """An inspection asks at once for all states of its demonstrations, several samples each."""
    rules = prompt_of(60)
    stories = [rules + prompt_of(100, seed) for seed in (1, 2, 3)]
    states = [story[:length] for length in (160, 120, 80, 140, 100) for story in stories]
    async with engine_on(network_folder, *adapters) as engine:
        for adapter in (None, adapters[0]):
            before = engine.num_prefilled_tokens
            completions = await asyncio.gather(
                *(
                    complete(engine, state, SamplingParams(max_tokens=4, seed=seed), adapter)
                    for state in states
                    for seed in range(2)
                )
            )
            # The last token of each prompt is always computed: its logits are wanted.
            assert engine.num_prefilled_tokens - before <= 60 + 3 * 100 + 2 * len(states)
            for place, tokens in enumerate(completions):
                assert_as_plain(network_folder, adapter, states[place // 2], tokens)


# ------------------------------------------------------------------------------------------- prompts in pieces


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a network that computes 16 tokens in a quarter of a second."""
    monkeypatch.setattr(prefill.ChunkSize, "tokens", lambda self, is_waited_for: 16)
    return


async def test_a_long_prompt_does_not_stop_those_who_run(network_folder: Path, small_chunks: None):
    async with engine_on(network_folder) as engine:
        running = engine.generate(prompt_of(5), SamplingParams(max_tokens=400, seed=1), None)
        tokens = [await anext(running)]
        long = asyncio.create_task(complete(engine, prompt_of(320, 1), SamplingParams(max_tokens=1, seed=2)))
        while not long.done():
            tokens.append(await anext(running))
        assert len(tokens) >= 320 // 16, "a token for each piece of the prompt"
        tokens += [token async for token in running]
    assert_as_plain(network_folder, None, prompt_of(320, 1), await long)
    assert_as_plain(network_folder, None, prompt_of(5), tokens)


@pytest.mark.parametrize("family", ["qwen2-window", "gemma3", "llama"])
async def test_prompts_read_in_pieces_say_the_same(family: str, tmp_path: Path, small_chunks: None):
    folder = make_network(CONFIGS[family](), tmp_path / "network")
    lengths = (3, 100, 17, 16, 33, 64)
    async with engine_on(folder) as engine:
        completions = await asyncio.gather(
            *(complete(engine, prompt_of(length, length), SamplingParams(max_tokens=9, seed=1)) for length in lengths)
        )
    for length, tokens in zip(lengths, completions, strict=True):
        assert_as_plain(folder, None, prompt_of(length, length), tokens)


def test_the_slower_the_network_the_smaller_the_piece():
    size = prefill.ChunkSize()
    for _ in range(8):
        size.note(200, seconds=1.0)
    assert 45 <= size.tokens(is_waited_for=False) // 4 <= 55
    assert size.tokens(is_waited_for=True) == prefill.MIN_CHUNK
    size.note(5, seconds=5.0)  # a small prompt says nothing
    assert 190 <= size.tokens(is_waited_for=False) <= 205


# ------------------------------------------------------------------------------- a prefix that several rows share


@pytest.fixture
def shared_prefixes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Prefixes are shared however little that spares; how many tokens of each, as they are."""
    seen: list[int] = []

    def noting(rows: Any, bytes_per_token: int) -> Any:
        groups = shared_prefix.groups_by_prefix(rows, bytes_per_token)
        seen.extend(group.num_tokens for group in groups)
        return groups

    monkeypatch.setattr(shared_prefix, "MIN_SPARED_BYTES", 1)
    monkeypatch.setattr(batch, "groups_by_prefix", noting)
    return seen


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
async def test_rows_that_read_their_common_beginning_together_say_the_same(
    family: str, tmp_path: Path, shared_prefixes: list[int]
):
    folder = make_network(CONFIGS[family](), tmp_path / "network")
    adapter = make_adapter(folder, tmp_path / "1", 1)
    tools, other_tools = prompt_of(90, 1), prompt_of(70, 2)
    prompts = [tools + prompt_of(5 + 11 * i, i) for i in range(6)] + [[*other_tools, i] for i in range(3, 6)]
    prompts.append(prompt_of(80, 9))
    async with engine_on(folder, adapter) as engine:
        completions = await asyncio.gather(
            *(
                complete(engine, prompt, SamplingParams(max_tokens=8 + place, seed=place), [None, adapter][place % 2])
                for place, prompt in enumerate(prompts)
            )
        )
    assert {90, 70} <= set(shared_prefixes)
    for place, (prompt, tokens) in enumerate(zip(prompts, completions, strict=True)):
        assert_as_plain(folder, [None, adapter][place % 2], prompt, tokens)


@pytest.mark.parametrize("family", ["qwen2-window", "mistral-window", "gemma3"])
async def test_where_a_layer_sees_its_last_tokens_alone_nothing_is_shared(
    family: str, tmp_path: Path, shared_prefixes: list[int]
):
    folder = make_network(CONFIGS[family](), tmp_path / "network")
    async with engine_on(folder) as engine:
        await asyncio.gather(
            *(complete(engine, [*prompt_of(90), i], SamplingParams(max_tokens=5)) for i in range(4, 8))
        )
    assert not shared_prefixes
