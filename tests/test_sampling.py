"""Drawing tokens: the filters are those of transformers, and the draws follow the distribution."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TopKLogitsWarper, TopPLogitsWarper

from policies.types import SamplingParams
from runtime.engines.embedded.sampling import Sampler, invert_cdf, keep_likeliest

CPU = torch.device("cpu")
INPUT_IDS = torch.zeros(1, 1, dtype=torch.long)  # the warpers want it and do not read it


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10**6), top_p=st.floats(0.05, 1.0), top_k=st.integers(1, 40))
def test_top_k_and_top_p_keep_what_transformers_keeps(seed: int, top_p: float, top_k: int):
    logits = torch.randn(1, 30, generator=torch.Generator().manual_seed(seed)) * 3
    filtered = TopPLogitsWarper(top_p)(INPUT_IDS, TopKLogitsWarper(top_k)(INPUT_IDS, logits))  # type: ignore[arg-type]
    kept = keep_likeliest(logits.softmax(-1), torch.tensor([[top_p]]), torch.tensor([[top_k]]))
    torch.testing.assert_close(kept / kept.sum(), filtered.softmax(-1), atol=1e-6, rtol=1e-5)


def test_draws_follow_the_distribution_and_never_take_what_is_impossible():
    probs = torch.tensor([0.0, 0.5, 0.0, 0.2, 0.3, 0.0])
    uniforms = torch.linspace(0, 1 - 2**-53, 10_001, dtype=torch.float64)
    drawn = invert_cdf(probs.expand(len(uniforms), -1), uniforms)
    shares = torch.bincount(drawn, minlength=6) / len(uniforms)
    torch.testing.assert_close(shares, probs, atol=2e-4, rtol=0)
    assert set(drawn.tolist()) == {1, 3, 4}


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10**6))
def test_a_rows_draw_does_not_depend_on_its_neighbours(seed: int):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(6, 20, generator=generator) * 4
    uniforms = torch.rand(6, generator=generator).tolist()
    rows = [
        SamplingParams(),
        SamplingParams(temperature=0),
        SamplingParams(temperature=2.5),
        SamplingParams(top_p=0.4),
        SamplingParams(top_k=2, num_top_logprobs=3),
        SamplingParams(temperature=0.3, top_p=0.9, top_k=7),
    ]
    together = Sampler(rows, CPU).draw(logits, uniforms)
    for i, params in enumerate(rows):
        alone = Sampler([params], CPU).draw(logits[i : i + 1], uniforms[i : i + 1])
        assert together.token_ids[i] == alone.token_ids[0]
        assert together.logprobs[i] == pytest.approx(alone.logprobs[0], abs=1e-6)
        assert [token_id for token_id, _ in together.top_logprobs[i]] == [t for t, _ in alone.top_logprobs[0]]


def test_a_row_that_is_not_finite_has_a_logprob_of_nan_and_spares_the_others():
    logits = torch.tensor([[0.0, math.inf, 0.0], [0.0, 1.0, 2.0]])
    draws = Sampler([SamplingParams(top_p=0.9), SamplingParams(temperature=0)], CPU).draw(logits, [0.5, 0.5])
    assert math.isnan(draws.logprobs[0])
    assert (draws.token_ids[1], draws.logprobs[1]) == (2, pytest.approx(-0.40760597))


def test_a_bias_changes_the_draw_and_not_the_logprobs() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0]])
    plain = Sampler([SamplingParams(temperature=0)], torch.device("cpu")).draw(logits, [0.0])
    biased = Sampler([SamplingParams(temperature=0, logit_bias=((2, 50.0),))], torch.device("cpu")).draw(logits, [0.0])
    assert (plain.token_ids, biased.token_ids) == ([0], [2])
    assert biased.logprobs[0] == pytest.approx(float(torch.log_softmax(logits, -1)[0, 2]))


def test_min_p_leaves_out_what_is_far_less_likely_than_the_likeliest() -> None:
    logits = torch.log(torch.tensor([[0.6, 0.3, 0.1]]))
    sampler = Sampler([SamplingParams(min_p=0.4)], torch.device("cpu"))
    drawn = {sampler.draw(logits, [uniform / 20]).token_ids[0] for uniform in range(20)}
    assert drawn == {0, 1}
