"""The embedded engine against transformers and PEFT: small random networks, real adapter folders, no mocks."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from policies.types import Adapter, EngineError, FinishReason, SamplingParams
from runtime.engines.embedded.engine import EmbeddedEngine
from tests.small_networks import (
    CONFIGS,
    VOCAB_SIZE,
    assert_as_plain,
    complete,
    engine_on,
    ids_of,
    make_adapter,
    make_network,
    prompt_of,
    rewrite,
    until,
)


@pytest.fixture(scope="module")
def network_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_network(CONFIGS["qwen2"](), tmp_path_factory.mktemp("network"))


@pytest.fixture(scope="module")
def adapters(network_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Adapter]:
    """Three adapters of different ranks and target modules."""
    folder = tmp_path_factory.mktemp("adapters")
    return [
        make_adapter(network_folder, folder / "1", 1),
        make_adapter(network_folder, folder / "2", 2, r=6, use_rslora=True, target_modules=["o_proj", "gate_proj"]),
        make_adapter(network_folder, folder / "3", 3, r=2, lora_alpha=3),
    ]


# ------------------------------------------------------------------------------------------------ numerics


@pytest.mark.parametrize("family", CONFIGS)
async def test_every_family_serves_base_and_adapters_in_one_batch_as_plain_forwards_do(family: str, tmp_path: Path):
    folder = make_network(CONFIGS[family](), tmp_path / "network")
    first = make_adapter(folder, tmp_path / "1", 1)
    second = make_adapter(folder, tmp_path / "2", 2, r=6, target_modules=["k_proj", "o_proj", "up_proj"])
    rows = [(None, 5, 30), (first, 40, 20), (second, 17, 25), (first, 3, 10), (None, 64, 15)]
    async with engine_on(folder, first, second) as engine:
        completions = await asyncio.gather(
            *(
                complete(engine, prompt_of(length, seed), SamplingParams(max_tokens=made, seed=seed), adapter)
                for seed, (adapter, length, made) in enumerate(rows)
            )
        )
    for seed, ((adapter, length, made), tokens) in enumerate(zip(rows, completions, strict=True)):
        assert len(tokens) == made
        assert_as_plain(folder, adapter, prompt_of(length, seed), tokens)


async def test_adapters_with_scalings_of_their_own_are_served_as_peft_does(
    network_folder: Path, adapters: list[Adapter]
):
    async with engine_on(network_folder, *adapters) as engine:
        completions = await asyncio.gather(
            *(complete(engine, prompt_of(20), SamplingParams(max_tokens=12, seed=1), one) for one in adapters)
        )
    for adapter, tokens in zip(adapters, completions, strict=True):
        assert_as_plain(network_folder, adapter, prompt_of(20), tokens)


async def test_greedy_tokens_equal_those_of_generate(network_folder: Path):
    prompts = [prompt_of(length, length) for length in (4, 30, 90)]
    async with engine_on(network_folder) as engine:
        sampling = SamplingParams(max_tokens=40, temperature=0)
        completions = await asyncio.gather(*(complete(engine, prompt, sampling) for prompt in prompts))
    network = AutoModelForCausalLM.from_pretrained(network_folder).eval()
    for prompt, tokens in zip(prompts, completions, strict=True):
        options = {"max_new_tokens": 40, "min_new_tokens": 40, "do_sample": False, "eos_token_id": None}
        expected = network.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist()
        assert ids_of(tokens) == expected


async def test_a_sequence_that_outgrows_its_slot_keeps_what_it_held(network_folder: Path):
    prompt = prompt_of(200)
    async with engine_on(network_folder) as engine:
        tokens = await complete(engine, prompt, SamplingParams(max_tokens=120, seed=3))
    assert_as_plain(network_folder, None, prompt, tokens)


# ------------------------------------------------------------------------------------------------ sampling


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "top_p": 0.8}, {"top_k": 5}])
async def test_a_seeded_request_is_the_same_alone_and_in_a_crowd(
    network_folder: Path, adapters: list[Adapter], options: dict[str, Any]
):
    sampling = SamplingParams(max_tokens=30, seed=7, **options)
    async with engine_on(network_folder, *adapters) as engine:
        alone = await complete(engine, prompt_of(20), sampling, adapters[0])
    async with engine_on(network_folder, *adapters) as engine:
        crowd = [
            complete(engine, prompt_of(5 + 3 * i, i), SamplingParams(max_tokens=5 + i), [None, *adapters][i % 4])
            for i in range(20)
        ]
        crowded, *_ = await asyncio.gather(complete(engine, prompt_of(20), sampling, adapters[0]), *crowd)
    assert ids_of(crowded) == ids_of(alone)


async def test_unseeded_requests_differ(network_folder: Path):
    async with engine_on(network_folder) as engine:
        sampling = SamplingParams(max_tokens=30)
        first, second = await asyncio.gather(*(complete(engine, prompt_of(8), sampling) for _ in range(2)))
    assert ids_of(first) != ids_of(second)


async def test_logprobs_are_the_policys_own_whatever_temperature_and_filters(network_folder: Path):
    async with engine_on(network_folder) as engine:
        sampling = SamplingParams(max_tokens=20, seed=1, temperature=1.7, top_p=0.9, top_k=50)
        tokens = await complete(engine, prompt_of(9), sampling)
    assert_as_plain(network_folder, None, prompt_of(9), tokens)


async def test_top_logprobs_are_sorted_and_begin_with_the_greedy_token(network_folder: Path):
    async with engine_on(network_folder) as engine:
        sampling = SamplingParams(max_tokens=10, temperature=0, num_top_logprobs=5)
        tokens, bare = await asyncio.gather(
            complete(engine, prompt_of(9), sampling),
            complete(engine, prompt_of(9), SamplingParams(max_tokens=10, temperature=0)),
        )
    for token in tokens:
        values = [logprob for _, logprob in token.top_logprobs]
        assert len(values) == 5
        assert values == sorted(values, reverse=True)
        assert token.top_logprobs[0] == (token.token_id, token.logprob)
    assert all(token.top_logprobs == () for token in bare)


# ------------------------------------------------------------------------------------------------- endings


async def test_finish_reasons_come_with_the_last_token_only(network_folder: Path):
    greedy = {"temperature": 0.0}
    async with engine_on(network_folder, max_context_tokens=40) as engine:
        by_length = await complete(engine, prompt_of(10), SamplingParams(max_tokens=12, **greedy))
        stop = ids_of(by_length)[4]
        by_stop = await complete(engine, prompt_of(10), SamplingParams(max_tokens=12, stop_token_ids=(stop,), **greedy))
        by_context = await complete(engine, prompt_of(35), SamplingParams(max_tokens=12, **greedy))
    assert [token.finish_reason for token in by_length] == [None] * 11 + [FinishReason.LENGTH]
    assert by_stop[-1].finish_reason == FinishReason.STOP
    assert ids_of(by_stop) == ids_of(by_length)[: ids_of(by_length).index(stop) + 1]
    assert len(by_context) == 5
    assert by_context[-1].finish_reason == FinishReason.LENGTH


async def test_a_late_request_finishes_while_an_earlier_one_runs_on(network_folder: Path):
    async with engine_on(network_folder) as engine:
        long = engine.generate(prompt_of(5), SamplingParams(max_tokens=400), None)
        await anext(long)
        late = await complete(engine, prompt_of(6), SamplingParams(max_tokens=3))
        assert len(late) == 3
        assert engine.health().num_running == 1
        assert len([token async for token in long]) == 399


@contextmanager
def forward_by_forward(engine: EmbeddedEngine) -> Iterator[threading.Semaphore]:
    """The network waits before each forward until the test releases it."""
    allowed = threading.Semaphore(0)
    hook = engine._network.register_forward_pre_hook(lambda *_: allowed.acquire() and None)
    try:
        yield allowed
    finally:
        hook.remove()
        allowed.release(1000)


async def test_closing_the_stream_frees_its_row_at_the_next_step(network_folder: Path):
    async with engine_on(network_folder, max_batch_size=1) as engine:
        with forward_by_forward(engine) as allowed:
            stream = engine.generate(prompt_of(5), SamplingParams(max_tokens=500), None)
            allowed.release()
            await anext(stream)
            waiting = asyncio.create_task(complete(engine, prompt_of(6), SamplingParams(max_tokens=2)))
            await until(lambda: engine.health().num_waiting == 1)
            await stream.aclose()
            allowed.release(1 + 2)  # the step that may have begun already, then the two of the next
            assert len(await asyncio.wait_for(waiting, 10)) == 2
        await until(lambda: engine.health().num_running == 0)


async def test_a_request_cancelled_while_it_waits_never_runs(network_folder: Path):
    async with engine_on(network_folder, max_batch_size=1) as engine:
        stream = engine.generate(prompt_of(5), SamplingParams(max_tokens=1), None)
        with forward_by_forward(engine) as allowed:
            first = asyncio.create_task(anext(stream))
            await until(lambda: engine.health().num_waiting == 0)
            gone = asyncio.create_task(complete(engine, prompt_of(6), SamplingParams(max_tokens=2)))
            await until(lambda: engine.health().num_waiting == 1)
            gone.cancel()
            await asyncio.wait([gone])
            allowed.release()
            await first
        await complete(engine, prompt_of(7), SamplingParams(max_tokens=1))  # its turn would have come after
        assert engine.num_prefilled_tokens == 5 + 7
        await stream.aclose()


async def test_more_requests_than_rows_wait_in_order_and_all_finish(network_folder: Path):
    ended: list[int] = []

    async def run(number: int) -> None:
        await complete(engine, prompt_of(5, number), SamplingParams(max_tokens=4))
        ended.append(number)

    async with engine_on(network_folder, max_batch_size=2) as engine:
        await asyncio.gather(*(run(number) for number in range(8)))
    assert ended == list(range(8))


# ------------------------------------------------------------------------------------------------ KV reuse


async def test_a_continued_conversation_computes_only_what_is_new(network_folder: Path, adapters: list[Adapter]):
    async with engine_on(network_folder, adapters[0]) as engine:
        prompt = prompt_of(50)
        first = await complete(engine, prompt, SamplingParams(max_tokens=20, seed=1), adapters[0])
        assert engine.num_prefilled_tokens == 50
        longer = prompt + ids_of(first) + prompt_of(10, 1)
        second = await complete(engine, longer, SamplingParams(max_tokens=20, seed=2), adapters[0])
        # The last token of the first completion was never fed: it is computed now, with the 10 new ones.
        assert engine.num_prefilled_tokens == 50 + 11
        assert engine.num_reused_tokens == 69
    assert_as_plain(network_folder, adapters[0], longer, second)


async def test_keys_and_values_never_cross_adapters_nor_outlive_them(network_folder: Path, adapters: list[Adapter]):
    prompt, sampling = prompt_of(50), SamplingParams(max_tokens=5, seed=1)
    async with engine_on(network_folder, adapters[0], adapters[1]) as engine:
        for adapter in (adapters[0], adapters[1], None):
            assert_as_plain(network_folder, adapter, prompt, await complete(engine, prompt, sampling, adapter))
        assert engine.num_reused_tokens == 0
        await engine.unload_adapter(adapters[0])
        reborn = Adapter(adapters[0].name, 9, adapters[2].path, 4, None, "1" * 64)
        await engine.load_adapter(reborn)
        assert_as_plain(network_folder, reborn, prompt, await complete(engine, prompt, sampling, reborn))
        assert engine.num_reused_tokens == 0


async def test_samples_of_one_prompt_compute_it_once(network_folder: Path):
    prompt = prompt_of(60)
    async with engine_on(network_folder) as engine:
        samples = await asyncio.gather(
            *(complete(engine, prompt, SamplingParams(max_tokens=6, seed=seed)) for seed in range(4))
        )
        assert engine.num_prefilled_tokens == 60 + 3
        assert engine.num_reused_tokens == 3 * 59
    for tokens in samples:
        assert_as_plain(network_folder, None, prompt, tokens)


async def test_kept_prefixes_make_room_for_newer_ones(network_folder: Path):
    async with engine_on(network_folder, max_batch_size=2) as engine:
        for seed in range(3):
            await complete(engine, prompt_of(30, seed), SamplingParams(max_tokens=1))
        await complete(engine, prompt_of(30, 1), SamplingParams(max_tokens=1))
        assert engine.num_reused_tokens == 29
        await complete(engine, prompt_of(30, 0), SamplingParams(max_tokens=1))
        assert engine.num_reused_tokens == 29


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("prompt", "sampling", "problem"),
    [
        ([], SamplingParams(), "empty"),
        ([5] * 64, SamplingParams(), "64 tokens"),
        ([5, VOCAB_SIZE], SamplingParams(), "outside the vocabulary"),
        ([5, -1], SamplingParams(), "outside the vocabulary"),
        ([5], SamplingParams(stop_token_ids=(VOCAB_SIZE,)), "outside the vocabulary"),
        ([5], SamplingParams(grammar='start: "a"'), "tokenizer"),
    ],
)
async def test_what_cannot_be_served_is_refused_and_the_engine_lives(
    network_folder: Path, prompt: list[int], sampling: SamplingParams, problem: str
):
    async with engine_on(network_folder, max_context_tokens=64) as engine:
        with pytest.raises(EngineError, match=problem):
            await complete(engine, prompt, sampling)
        assert len(await complete(engine, [5, 6], SamplingParams(max_tokens=3))) == 3


async def test_adapters_are_loaded_and_unloaded_but_never_evicted(network_folder: Path, adapters: list[Adapter]):
    async with engine_on(network_folder, max_adapters=2) as engine:
        with pytest.raises(EngineError, match="not loaded"):
            await complete(engine, [5], SamplingParams(), adapters[0])
        await engine.load_adapter(adapters[0])
        with pytest.raises(EngineError, match="loaded already"):
            await engine.load_adapter(adapters[0])
        await engine.load_adapter(adapters[1])
        with pytest.raises(EngineError, match="all 2 places"):
            await engine.load_adapter(adapters[2])
        assert engine.loaded_adapters() == (adapters[0], adapters[1])

        stream = engine.generate(prompt_of(5), SamplingParams(max_tokens=500), adapters[0])
        await anext(stream)
        with pytest.raises(EngineError, match="in use"):
            await engine.unload_adapter(adapters[0])
        await stream.aclose()
        await until(lambda: engine.health().num_running == 0)
        await engine.unload_adapter(adapters[0])
        with pytest.raises(EngineError, match="not loaded"):
            await engine.unload_adapter(adapters[0])
        assert engine.loaded_adapters() == (adapters[1],)
        await engine.load_adapter(adapters[2])
        tokens = await complete(engine, prompt_of(5), SamplingParams(max_tokens=5), adapters[2])
    assert_as_plain(network_folder, adapters[2], prompt_of(5), tokens)


async def test_broken_adapter_folders_are_refused_and_the_engine_lives(network_folder: Path, tmp_path: Path):
    def broken(name: str, **options: Any) -> Adapter:
        return make_adapter(network_folder, tmp_path / name, 1, **options)

    truncated, not_finite, narrow = broken("truncated"), broken("not_finite"), broken("narrow")
    weights = truncated.path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    rewrite(not_finite.path, lambda tensor: tensor * float("nan"))
    rewrite(narrow.path, lambda tensor: tensor[:, :-1])
    refused = {
        "cannot be read": [truncated, narrow, Adapter("gone", 1, tmp_path / "gone", 4, None, "")],
        "not finite": [not_finite],
        "rank 8": [broken("too_big", r=8)],
        "use_dora": [broken("dora", use_dora=True)],
        "rank_pattern": [broken("ranks", rank_pattern={"down_proj": 2})],
        "alpha_pattern": [broken("alphas", alpha_pattern={"down_proj": 2})],
        "modules_to_save": [broken("saved", modules_to_save=["lm_head"])],
    }
    async with engine_on(network_folder, max_rank=4) as engine:
        before = await complete(engine, prompt_of(30), SamplingParams(max_tokens=5, seed=1))
        for problem, several in refused.items():
            for adapter in several:
                with pytest.raises(EngineError, match=problem):
                    await engine.load_adapter(adapter)
        assert engine.loaded_adapters() == ()
        assert await complete(engine, prompt_of(30, 5), SamplingParams(max_tokens=5, seed=1))
        assert_as_plain(network_folder, None, prompt_of(30), before)


# ------------------------------------------------------------------------------------------------- failures


@contextmanager
def raising_on_token(engine: EmbeddedEngine, token_id: int, error: BaseException) -> Iterator[None]:
    """The network breaks whenever this token is fed."""

    def check(_: PreTrainedModel, args: Any, kwargs: dict[str, Any]) -> None:
        if (kwargs["input_ids"] == token_id).any():
            raise error

    hook = engine._network.register_forward_pre_hook(check, with_kwargs=True)
    yield
    hook.remove()


async def test_a_failing_prompt_ends_alone(network_folder: Path):
    async with engine_on(network_folder) as engine:
        stream = engine.generate(prompt_of(5), SamplingParams(max_tokens=200, temperature=0), None)
        tokens = [await anext(stream)]
        unused = next(iter(set(range(3, VOCAB_SIZE)) - set(prompt_of(5))))
        with raising_on_token(engine, unused, RuntimeError("boom")), pytest.raises(EngineError, match="boom"):
            await complete(engine, [unused, unused], SamplingParams(max_tokens=2))
        tokens += [token async for token in stream]
    assert_as_plain(network_folder, None, prompt_of(5), tokens)


async def test_a_failing_step_ends_the_batch_and_the_engine_goes_on(network_folder: Path):
    async with engine_on(network_folder) as engine:
        expected = await complete(engine, prompt_of(30), SamplingParams(max_tokens=9, temperature=0))
        with raising_on_token(engine, ids_of(expected)[3], RuntimeError("boom")):
            with pytest.raises(EngineError, match="boom"):
                await complete(engine, prompt_of(30), SamplingParams(max_tokens=9, temperature=0))
            assert engine.health().is_alive
        again = await complete(engine, prompt_of(30), SamplingParams(max_tokens=9, temperature=0))
    assert ids_of(again) == ids_of(expected)


async def test_a_row_whose_numbers_overflow_ends_alone_and_leaves_nothing_behind(network_folder: Path, tmp_path: Path):
    overflowing = make_adapter(network_folder, tmp_path / "overflowing", 1)
    rewrite(overflowing.path, lambda tensor: tensor.sign() * 1e38)
    sampling = SamplingParams(max_tokens=20, seed=1)
    async with engine_on(network_folder, overflowing, max_batch_size=2) as engine:
        sound, poisoned = await asyncio.gather(
            complete(engine, prompt_of(20), sampling),
            complete(engine, prompt_of(60), sampling, overflowing),
            return_exceptions=True,
        )
        assert isinstance(poisoned, EngineError)
        assert isinstance(sound, list)
        assert_as_plain(network_folder, None, prompt_of(20), sound)
        # A short row in the same slot, beside a long one: attention passes over the rest of its slot too.
        long = engine.generate(prompt_of(70), SamplingParams(max_tokens=300), None)
        await anext(long)
        short = await complete(engine, prompt_of(10), sampling)
        await long.aclose()
    assert_as_plain(network_folder, None, prompt_of(10), short)


async def test_when_the_thread_dies_everyone_is_told(network_folder: Path):
    async with engine_on(network_folder, max_batch_size=1) as engine:
        running = asyncio.create_task(complete(engine, prompt_of(5), SamplingParams(max_tokens=500)))
        waiting = asyncio.create_task(complete(engine, prompt_of(6), SamplingParams(max_tokens=5)))
        await until(lambda: engine.health().num_running == 1 and engine.health().num_waiting == 1)
        engine._network.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(SystemExit("killed")))
        for task in (running, waiting):
            with pytest.raises(EngineError, match="killed"):
                await task
        health = engine.health()
        assert not health.is_alive
        assert "killed" in health.problem
        with pytest.raises(EngineError, match="killed"):
            await complete(engine, [5], SamplingParams())


async def test_close_ends_running_and_waiting_requests_and_may_be_called_twice(network_folder: Path):
    async with engine_on(network_folder, max_batch_size=1) as engine:
        tasks = [
            asyncio.create_task(complete(engine, prompt_of(5, i), SamplingParams(max_tokens=500))) for i in range(2)
        ]
        await until(lambda: engine.health().num_running == 1 and engine.health().num_waiting == 1)
        await engine.close()
        for task in tasks:
            with pytest.raises(EngineError, match="closed"):
                await task
        await engine.close()
        with pytest.raises(EngineError, match="closed"):
            await complete(engine, [5], SamplingParams())
        with pytest.raises(EngineError, match="closed"):
            await engine.unload_adapter(Adapter("a", 1, Path(), 1, None, ""))


# ------------------------------------------------------------------------------------------------- grammars

JSON_GRAMMAR = r"""
start: "{" pair ("," pair)* "}"
pair: /"[a-c]{1,3}"/ ":" value
value: /[1-9][0-9]{0,2}/ | "true" | start
"""


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens, after <pad>, <bos>, <eos>."""
    special = ["<pad>", "<bos>", "<eos>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(special + letters)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


async def test_a_grammar_is_obeyed_by_its_rows_and_by_no_others(
    network_folder: Path, tokenizer: PreTrainedTokenizerFast
):
    async with engine_on(network_folder, tokenizer=tokenizer) as engine:
        assert engine.limits.supports_grammar
        bound = SamplingParams(max_tokens=200, grammar=JSON_GRAMMAR, stop_token_ids=(2,), top_p=0.95)
        free = SamplingParams(max_tokens=20, seed=1)
        *documents, unbound = await asyncio.gather(
            *(complete(engine, prompt_of(5, i), bound) for i in range(4)), complete(engine, prompt_of(5), free)
        )
    for tokens in documents:
        assert tokens[-1].finish_reason == FinishReason.STOP
        assert tokens[-1].token_id == 2
        assert isinstance(json.loads(tokenizer.decode(ids_of(tokens)[:-1])), dict)
    assert_as_plain(network_folder, None, prompt_of(5), unbound)


@pytest.mark.parametrize(("stop_token_ids", "last"), [((), 2), ((7, 9), 7)])
async def test_when_a_grammar_is_complete_only_stop_tokens_remain(
    network_folder: Path, tokenizer: PreTrainedTokenizerFast, stop_token_ids: tuple[int, ...], last: int
):
    async with engine_on(network_folder, tokenizer=tokenizer) as engine:
        sampling = SamplingParams(
            temperature=0, grammar='start: "yes" | "no"', stop_token_ids=stop_token_ids, num_top_logprobs=5
        )
        tokens = await complete(engine, prompt_of(5), sampling)
    assert tokenizer.decode(ids_of(tokens)[:-1]) in ("yes", "no")
    assert tokens[-1].token_id in (stop_token_ids or (last,))
    assert {token_id for token_id, _ in tokens[-1].top_logprobs} == set(stop_token_ids or (last,))
    # Logprobs are of the distribution that the grammar leaves.
    assert sum(2.718281828**logprob for _, logprob in tokens[0].top_logprobs) == pytest.approx(1, abs=1e-5)


async def test_a_grammar_that_does_not_compile_is_refused_and_the_engine_lives(
    network_folder: Path, tokenizer: PreTrainedTokenizerFast
):
    async with engine_on(network_folder, tokenizer=tokenizer) as engine:
        with pytest.raises(EngineError, match="does not compile"):
            await complete(engine, [5], SamplingParams(grammar="start: undefined_rule"))
        assert len(await complete(engine, [5, 6], SamplingParams(max_tokens=3))) == 3
