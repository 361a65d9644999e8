"""Penalties change what is drawn, by the known formulas, and never the logprobs that are told and logged."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import RepetitionPenaltyLogitsProcessor

from policies.chat.chat_protocol import ChatProtocol
from policies.types import SampledToken, SamplingParams
from runtime.engines.embedded.engine import EmbeddedEngine
from runtime.engines.embedded.penalties import Penalties
from runtime.engines.embedded.sampling import Sampler
from tests.serving import MODEL, Served

CPU = torch.device("cpu")
VOCAB = 30
token_ids = st.lists(st.integers(0, VOCAB - 1), max_size=12)


def penalised(logits: torch.Tensor, params: SamplingParams, prompt: list[int], said: list[int]) -> torch.Tensor:
    return Penalties([params], [prompt], [said], VOCAB, CPU).applied(logits)


def some_logits(seed: int) -> torch.Tensor:
    return torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), token_ids, token_ids, st.floats(0.2, 5.0))
def test_repetition_is_that_of_transformers(seed: int, prompt: list[int], said: list[int], penalty: float) -> None:
    logits, known = some_logits(seed), torch.tensor([[*prompt, *said]], dtype=torch.long)
    theirs = RepetitionPenaltyLogitsProcessor(penalty)(known, logits.clone()) if known.numel() else logits  # type: ignore[arg-type]
    ours = penalised(logits, SamplingParams(repetition_penalty=penalty), prompt, said)
    torch.testing.assert_close(ours, theirs)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), token_ids, token_ids, st.floats(-2, 2), st.floats(-2, 2))
def test_frequency_and_presence_are_those_of_openai(
    seed: int, prompt: list[int], said: list[int], frequency: float, presence: float
) -> None:
    """mu[j] - c[j] * frequency - (c[j] > 0) * presence; c counts what was said, and nothing of the prompt."""
    logits = some_logits(seed)
    expected = logits.clone()
    for token_id in range(VOCAB):
        count = said.count(token_id)
        expected[0, token_id] -= count * frequency + (count > 0) * presence
    params = SamplingParams(frequency_penalty=frequency, presence_penalty=presence)
    torch.testing.assert_close(penalised(logits, params, prompt, said), expected)


def test_what_is_drawn_counts_from_then_on_and_other_rows_are_left_alone() -> None:
    rows = [SamplingParams(temperature=0), SamplingParams(temperature=0, presence_penalty=2.0)]
    logits = torch.tensor([[3.0, 2.0, 0.0]] * 2)
    sampler = Sampler(rows, CPU, [[0], [0]], [[], []])
    assert [sampler.draw(logits, ()).token_ids for _ in range(3)] == [[0, 0], [0, 1], [0, 0]]


def test_the_logprobs_that_are_told_stay_the_policys_own() -> None:
    logits = torch.tensor([[3.0, 2.0, 0.0]])
    params = SamplingParams(temperature=0, frequency_penalty=2.0, repetition_penalty=3.0, num_top_logprobs=2)
    draws = Sampler([params], CPU, [[2]], [[0, 0]]).draw(logits, ())
    own = torch.log_softmax(logits, -1)[0].tolist()
    assert draws.token_ids == [1]
    assert draws.logprobs == pytest.approx([own[1]])
    assert dict(draws.top_logprobs[0]) == pytest.approx({0: own[0], 1: own[1]})


def test_two_tokens_with_the_largest_bias_are_drawn_as_they_were_before() -> None:
    """Their exponentials were infinite in 32 bits, and the first of the two was always drawn."""
    logits = torch.tensor([[0.0, 0.0, 5.0]])
    sampler = Sampler([SamplingParams(logit_bias=((0, 100.0), (1, 100.0)))], CPU)
    drawn = [sampler.draw(logits, [place / 10]).token_ids[0] for place in range(10)]
    assert drawn == [0] * 5 + [1] * 5


def test_a_forbidden_token_stays_forbidden() -> None:
    logits = torch.tensor([[float("-inf"), 0.0, 0.0]])
    params = SamplingParams(temperature=0, repetition_penalty=0.5, presence_penalty=-2.0, logit_bias=((0, 100.0),))
    draws = Sampler([params], CPU, [[0]], [[0]]).draw(logits, ())
    assert draws.token_ids[0] != 0


async def completion(engine: EmbeddedEngine, prompt: tuple[int, ...], **params: float) -> list[SampledToken]:
    sampling = SamplingParams(temperature=0, num_top_logprobs=20, **params)  # type: ignore[arg-type]
    return [token async for token in engine.generate(prompt, sampling, None)]


async def test_the_engine_says_nothing_twice_under_a_large_penalty(
    novice_engine: EmbeddedEngine, protocol: ChatProtocol
) -> None:
    prompt = protocol.encode("the shelf and the shelf and the shelf and the")
    plain = await completion(novice_engine, prompt, max_tokens=24)
    varied = await completion(novice_engine, prompt, max_tokens=24, frequency_penalty=100.0)
    ids = [token.token_id for token in varied]
    assert len({token.token_id for token in plain}) < len(plain), "else this test shows nothing"
    assert len(set(ids)) == len(ids) == 24
    for place in (0, 7, 23):
        (alone,) = await completion(novice_engine, (*prompt, *ids[:place]), max_tokens=1)
        assert [each[1] for each in varied[place].top_logprobs] == pytest.approx(
            [each[1] for each in alone.top_logprobs], abs=1e-4
        )


def test_over_http_all_of_them_are_taken_and_logged(novice_server: Served) -> None:
    asked = {"frequency_penalty": 0.5, "presence_penalty": -0.5, "logit_bias": {"5": -100}}
    extra = {"repetition_penalty": 1.1, "min_p": 0.01}
    answer = novice_server.client().chat.completions.with_raw_response.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Hello."}],
        max_tokens=5,
        extra_headers={"x-stepagent-tools": "client"},
        extra_body=asked | extra,
    )
    step = novice_server.parts.log.step(answer.headers["x-step-id"])
    assert step is not None
    assert (step.sampling.frequency_penalty, step.sampling.presence_penalty) == (0.5, -0.5)
    assert (step.sampling.repetition_penalty, step.sampling.min_p) == (1.1, 0.01)
    assert step.sampling.logit_bias == ((5, -100.0),)
    assert not step.sampling.is_policy
