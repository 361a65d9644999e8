"""Tokens in, tokens out: what vLLM serves is what transformers and PEFT compute; one engine for all tests."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
import torch

from policies.chat.chat_protocol import ChatProtocol
from policies.chat.grammars import json_grammar, tool_call_grammar
from policies.types import EngineError, FinishReason, SamplingParams, ToolCalls
from runtime.engines.vllm.engine import VllmEngine
from runtime.engines.vllm.settings import parse_engine_args
from tests.serving import NOVICE_FOLDER
from tests_vllm.novice_adapters import TOLERANCE, NoviceAdapters, complete, engine_on, ids_of, until

pytestmark = pytest.mark.asyncio(loop_scope="module")

NOVICE_VOCAB_SIZE = json.loads((NOVICE_FOLDER / "config.json").read_text())["vocab_size"]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(novice: NoviceAdapters) -> AsyncIterator[VllmEngine]:
    async with engine_on(novice.model_folder, max_batch_size=8) as engine:
        for version in (1, 2):
            await engine.load_adapter(novice.adapter(version))
        yield engine


# ------------------------------------------------------------------------------------------------ numerics


async def test_greedy_tokens_equal_those_of_transformers_and_peft(engine: VllmEngine, novice: NoviceAdapters):
    for adapter in (None, novice.adapter(1), novice.adapter(2)):
        for length in (3, 40, 200):
            prompt = novice.prompt(length, length)
            tokens = await complete(engine, prompt, SamplingParams(max_tokens=24, temperature=0), adapter)
            novice.expect(adapter, prompt, tokens)
            novice.expect_likeliest(adapter, prompt, tokens)


async def test_base_and_adapters_in_one_batch_do_not_mix(engine: VllmEngine, novice: NoviceAdapters):
    adapters = [None, novice.adapter(1), novice.adapter(2)] * 3
    samplings = [SamplingParams(max_tokens=10 + 5 * i, seed=i) for i in range(len(adapters))]
    prompts = [novice.prompt(5 + 17 * i, i) for i in range(len(adapters))]
    completions = await asyncio.gather(*map(complete, [engine] * len(adapters), prompts, samplings, adapters))
    for adapter, prompt, sampling, tokens in zip(adapters, prompts, samplings, completions, strict=True):
        assert len(tokens) == sampling.max_tokens
        novice.expect(adapter, prompt, tokens)


async def test_a_given_completion_is_scored_as_transformers_and_peft_do(engine: VllmEngine, novice: NoviceAdapters):
    """Releases of vLLM told wrong logprobs of a prompt under an adapter; also after a cached prefix."""
    scored = [
        (adapter, novice.prompt(length, length), novice.prompt(num, 7 + num))
        for adapter in (None, novice.adapter(1), novice.adapter(2))
        for length, num in ((1, 1), (40, 12), (200, 30), (200, 1))
    ]
    for _ in range(2):
        told = await asyncio.gather(*(engine.score(prompt, tokens, adapter) for adapter, prompt, tokens in scored))
        for (adapter, prompt, tokens), logprobs in zip(scored, told, strict=True):
            of_tokens = novice.logprobs(adapter, prompt, tokens)
            expected = [of_tokens[place, token].item() for place, token in enumerate(tokens)]
            assert list(logprobs) == pytest.approx(expected, abs=TOLERANCE)
    with pytest.raises(EngineError):
        await engine.score([5, 6], [], None)
    with pytest.raises(EngineError):
        await engine.score([5, 6], [NOVICE_VOCAB_SIZE], None)


async def test_logprobs_are_the_policys_own_whatever_temperature_and_filters(
    engine: VllmEngine, novice: NoviceAdapters
):
    sampling = SamplingParams(max_tokens=30, seed=1, temperature=1.7, top_p=0.9, top_k=50)
    novice.expect(novice.adapter(1), [5, 6], await complete(engine, [5, 6], sampling, novice.adapter(1)))


async def test_top_logprobs_are_the_likeliest_best_first(engine: VllmEngine, novice: NoviceAdapters):
    prompt, sampling = novice.prompt(9), SamplingParams(max_tokens=10, seed=3, num_top_logprobs=20)
    tokens = await complete(engine, prompt, sampling)
    expected = novice.logprobs(None, prompt, ids_of(tokens)).topk(20)
    for token, values in zip(tokens, expected.values.tolist(), strict=True):
        assert [logprob for _, logprob in token.top_logprobs] == pytest.approx(values, abs=TOLERANCE)
    assert [token.top_logprobs[0][0] for token in tokens] == expected.indices[:, 0].tolist()
    bare = await complete(engine, prompt, SamplingParams(max_tokens=3))
    assert all(token.top_logprobs == () for token in bare)


# ------------------------------------------------------------------------------------------------ sampling


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "top_p": 0.8}, {"top_k": 5}])
async def test_a_seeded_request_is_the_same_alone_and_in_a_crowd(
    engine: VllmEngine, novice: NoviceAdapters, options: dict[str, Any]
):
    adapter, sampling = novice.adapter(1), SamplingParams(max_tokens=30, seed=-1, **options)
    alone = await complete(engine, novice.prompt(20), sampling, adapter)
    crowd = [complete(engine, novice.prompt(5 + 3 * i, i), SamplingParams(max_tokens=5 + i)) for i in range(6)]
    crowded, *_ = await asyncio.gather(complete(engine, novice.prompt(20), sampling, adapter), *crowd)
    assert ids_of(crowded) == ids_of(alone)


async def test_unseeded_requests_differ(engine: VllmEngine):
    first, second = await asyncio.gather(*(complete(engine, [5], SamplingParams(max_tokens=40)) for _ in range(2)))
    assert ids_of(first) != ids_of(second)


async def test_sampling_follows_the_policys_distribution(engine: VllmEngine, novice: NoviceAdapters):
    prompt, num_draws = novice.prompt(12), 400
    draws = await asyncio.gather(
        *(complete(engine, prompt, SamplingParams(max_tokens=1, seed=seed)) for seed in range(num_draws))
    )
    counts = torch.bincount(torch.tensor([tokens[0].token_id for tokens in draws]), minlength=novice.vocab_size)
    expected = novice.logprobs(None, prompt, [0])[0].exp()
    distance = 0.5 * (counts / num_draws - expected).abs().sum()
    in_the_mean = 0.5 * (2 / torch.pi * expected * (1 - expected) / num_draws).sqrt().sum()
    assert distance < 2 * in_the_mean + 0.02


async def test_finish_reasons_come_with_the_last_token_only(engine: VllmEngine, novice: NoviceAdapters):
    prompt = novice.prompt(10)
    by_length = await complete(engine, prompt, SamplingParams(max_tokens=12, temperature=0))
    stop = ids_of(by_length)[4]
    by_stop = await complete(engine, prompt, SamplingParams(max_tokens=12, temperature=0, stop_token_ids=(stop,)))
    assert [token.finish_reason for token in by_length] == [None] * 11 + [FinishReason.LENGTH]
    assert by_stop[-1].finish_reason == FinishReason.STOP
    assert ids_of(by_stop) == ids_of(by_length)[: ids_of(by_length).index(stop) + 1]


async def test_only_the_stop_tokens_asked_for_end_a_completion(engine: VllmEngine, protocol: ChatProtocol):
    end = protocol.encode("<|im_end|>")[0]
    prompt = protocol.render([{"role": "user", "content": "?"}])
    tokens = await complete(engine, prompt, SamplingParams(max_tokens=200, seed=0))
    assert end in ids_of(tokens)[:-1]
    assert len(tokens) == 200


async def test_the_context_ends_a_completion(engine: VllmEngine, novice: NoviceAdapters):
    tokens = await complete(engine, novice.prompt(2040), SamplingParams(max_tokens=100))
    assert len(tokens) == 8
    assert tokens[-1].finish_reason == FinishReason.LENGTH


# ------------------------------------------------------------------------------------------------- batching


async def test_a_late_request_finishes_while_an_earlier_one_runs_on(engine: VllmEngine):
    long = engine.generate([5], SamplingParams(max_tokens=800), None)
    await anext(long)
    assert len(await complete(engine, [6], SamplingParams(max_tokens=3))) == 3
    assert engine.health().num_running == 1
    assert len([token async for token in long]) == 799


async def test_closing_a_stream_and_leaving_a_queue_free_their_places(engine: VllmEngine):
    streams = [engine.generate([5, i], SamplingParams(max_tokens=2000), None) for i in range(8)]
    for stream in streams:
        await anext(stream)
    waiting = [asyncio.create_task(complete(engine, [7, i], SamplingParams(max_tokens=2))) for i in range(2)]
    await asyncio.sleep(0.1)
    assert (engine.health().num_running, engine.health().num_waiting) == (8, 2)
    waiting[0].cancel()
    await streams[0].aclose()
    assert len(await asyncio.wait_for(waiting[1], 5)) == 2
    for stream in streams:
        await stream.aclose()
    await until(lambda: (engine.health().num_running, engine.health().num_waiting) == (0, 0))
    assert not engine._llm.output_processor.has_unfinished_requests()


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("prompt", "options", "problem"),
    [
        ([], {}, "empty"),
        ([5] * 2048, {}, "2048 tokens"),
        ([5, NOVICE_VOCAB_SIZE], {}, "outside the vocabulary"),
        ([5, -1], {}, "outside the vocabulary"),
        ([5], {"stop_token_ids": (NOVICE_VOCAB_SIZE,)}, "outside the vocabulary"),
        ([5], {"grammar": "start: undefined_rule"}, "rammar"),
        ([5], {"grammar": "%%%"}, "rammar"),
        ([5], {"temperature": 50.0}, "temperature"),
    ],
)
async def test_what_cannot_be_served_is_refused_and_the_engine_lives(
    engine: VllmEngine, prompt: list[int], options: dict[str, Any], problem: str
):
    running = asyncio.create_task(complete(engine, [5, 6], SamplingParams(max_tokens=100)))
    with pytest.raises(EngineError, match=problem):
        await complete(engine, prompt, SamplingParams(**options))
    assert len(await running) == 100
    assert engine.health().is_alive


@pytest.mark.parametrize(
    ("engine_args", "problem"),
    [
        ({"tensor_paralel_size": "2"}, "tensor_paralel_size is not an argument of vLLM"),
        ({"max_loras": "1"}, "max_loras is set by the server"),
        ({"tensor_parallel_size": "many"}, "does not take"),
        ({"enforce_eager": "perhaps"}, "true or false"),
    ],
)
async def test_wrong_engine_arguments_are_refused_in_words(engine_args: dict[str, str], problem: str):
    with pytest.raises(ValueError, match=problem):
        parse_engine_args({}, engine_args)


async def test_engine_arguments_are_passed_on_and_override_ours():
    users = {"tensor-parallel-size": "2", "enforce_eager": "false", "lora_target_modules": "o_proj down_proj"}
    args = parse_engine_args({"model": "a", "enforce_eager": True, "block_size": 32}, users)
    assert (args.tensor_parallel_size, args.enforce_eager, args.block_size) == (2, False, 32)
    assert args.lora_target_modules == ["o_proj", "down_proj"]


# ------------------------------------------------------------------------------------------------- grammars

SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 8}, "boxes": {"enum": [1, 2, 3]}},
    "required": ["city", "boxes"],
    "additionalProperties": False,
}


async def test_a_grammar_is_obeyed_by_its_completions_and_by_no_others(
    engine: VllmEngine, protocol: ChatProtocol, novice: NoviceAdapters
):
    prompt = protocol.render([{"role": "user", "content": "?"}])
    bound = SamplingParams(
        max_tokens=200, grammar=json_grammar(protocol, SCHEMA), stop_token_ids=protocol.stop_token_ids
    )
    *documents, free = await asyncio.gather(
        *(complete(engine, prompt, bound, adapter) for adapter in (None, novice.adapter(1), novice.adapter(2))),
        complete(engine, prompt, SamplingParams(max_tokens=40, seed=1)),
    )
    for tokens in documents:
        if tokens[-1].finish_reason is FinishReason.STOP:
            assert set(json.loads(protocol.decode(ids_of(tokens)[:-1]))) == {"city", "boxes"}
    assert any(tokens[-1].finish_reason is FinishReason.STOP for tokens in documents)
    novice.expect(None, prompt, free)


async def test_under_a_grammar_logprobs_are_of_what_it_leaves(engine: VllmEngine, protocol: ChatProtocol):
    prompt = protocol.render([{"role": "user", "content": "?"}])
    sampling = SamplingParams(temperature=0, grammar='start: "yes" | "no"', num_top_logprobs=20)
    tokens = await complete(engine, prompt, sampling)
    assert protocol.decode(ids_of(tokens)[:-1]) in ("yes", "no")
    assert tokens[-1].token_id in protocol.stop_token_ids
    assert tokens[-1].top_logprobs == ((tokens[-1].token_id, pytest.approx(0.0, abs=1e-5)),)
    assert sum(2.718281828**logprob for _, logprob in tokens[0].top_logprobs) == pytest.approx(1, abs=1e-4)


async def test_a_required_tool_call_is_one(engine: VllmEngine, protocol: ChatProtocol):
    tools = [{"type": "function", "function": {"name": "pick", "parameters": SCHEMA}}]
    prompt = protocol.render([{"role": "user", "content": "?"}], tools)
    grammar = tool_call_grammar(protocol, tools)
    sampling = SamplingParams(max_tokens=300, seed=2, grammar=grammar, stop_token_ids=protocol.stop_token_ids)
    tokens = await complete(engine, prompt, sampling)
    action = protocol.parse(ids_of(tokens), FinishReason.STOP, tools)
    assert isinstance(action, ToolCalls)
    assert action.calls[0].name == "pick"


async def test_a_completion_that_nobody_reads_along_is_the_same_and_comes_in_two_pieces(
    engine: VllmEngine, novice: NoviceAdapters
):
    sampling = SamplingParams(max_tokens=30, seed=4, num_top_logprobs=3)
    streamed = await complete(engine, [5, 6], sampling, novice.adapter(1))
    loop, arrivals, at_once = asyncio.get_running_loop(), [], []
    async for token in engine.generate([5, 6], sampling, novice.adapter(1), stream=False):
        arrivals.append(loop.time())
        at_once.append(token)
    assert ids_of(at_once) == ids_of(streamed)
    assert [token.finish_reason for token in at_once] == [token.finish_reason for token in streamed]
    for one, other in zip(at_once, streamed, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=TOLERANCE)
        assert [token_id for token_id, _ in one.top_logprobs] == [token_id for token_id, _ in other.top_logprobs]
    waits = [after - before for before, after in itertools.pairwise(arrivals)]
    assert max(waits[1:]) < waits[0], "one wait after the first token, and none among the others"
