"""Packed scores, losses and LoRA gradients equal those of a plain pass over each row alone."""

from __future__ import annotations

import random
from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from peft import PeftModel
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
)

import learner.packing.scoring
from learner.objectives.losses import (
    clipped_policy_gradient_loss,
    expert_logits,
    implicit_step_loss,
    pairwise_discriminator_loss,
    sft_loss,
    trajectory_preference_loss,
)
from learner.packing.prefix_tree import ScoredSequence, Span, pack_sequences
from learner.packing.scoring import SequenceLogprobs, reference, score, to_batch
from learner.packing.tree_attention import TREE_ATTENTION
from tests.networks import ARCHITECTURES, NETWORKS, SIZES, plain_logprobs

torch.set_num_threads(1)


def random_rows(seed: int, num_steps: int = 3, num_trajectories: int = 2) -> list[ScoredSequence]:
    """Two branches at every step of trajectories that begin alike: rows 2k (expert) and 2k + 1 (agent) are a pair."""
    draw = random.Random(seed)

    def tokens() -> tuple[int, ...]:
        return tuple(draw.randrange(40) for _ in range(draw.randint(1, 5)))

    prompt, rows = tokens(), []
    for _ in range(num_trajectories):
        context = prompt
        for _ in range(num_steps):
            context += tokens()
            expert, agent = tokens(), tokens()
            weight, owner = draw.uniform(0.1, 2.0), len(rows)
            rows += [
                ScoredSequence(context + action, (Span(len(context), len(context) + len(action), weight),), owner)
                for action in (expert, agent)
            ]
            context += expert
    return rows


def packed_logprobs(network: PeftModel, rows: list[ScoredSequence], budget: int) -> list[Tensor]:
    """Each row's token logprobs, in the order of `rows`."""
    logprobs: dict[int, Tensor] = {}
    for pack in pack_sequences(rows, budget):
        scores = score(network, to_batch(pack, "cpu"))
        for place, row in enumerate(scores.sequences):
            logprobs[row] = scores.tokens[scores.sequence_of_token == place]
    return [logprobs[row].to(torch.float64) for row in range(len(rows))]


# ------------------------------------------------------------------------------------------- every loss


def _constants(like: Tensor, seed: int) -> Tensor:
    return 0.1 * torch.randn(like.shape, generator=torch.Generator().manual_seed(seed), dtype=like.dtype)


def _preference_sides(tokens: list[Tensor], ref: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sums, ref_sums = torch.stack([row.sum() for row in tokens]), torch.stack([row.sum() for row in ref])
    return sums[::2], ref_sums[::2], sums[1::2], ref_sums[1::2]


def _sft(tokens: list[Tensor], ref: list[Tensor], rows: list[ScoredSequence]) -> Tensor:
    weights = [span.weight for row in rows for span in row.spans for _ in range(span.start, span.stop)]
    return sft_loss(torch.cat(tokens), torch.tensor(weights)).loss


def _implicit(tokens: list[Tensor], ref: list[Tensor], rows: list[ScoredSequence]) -> Tensor:
    return implicit_step_loss(*_preference_sides(tokens, ref), beta=0.3, anchor_weight=0.5).loss


def _trajectory(tokens: list[Tensor], ref: list[Tensor], rows: list[ScoredSequence]) -> Tensor:
    chosen, chosen_ref, rejected, rejected_ref = (side.sum()[None] for side in _preference_sides(tokens, ref))
    return trajectory_preference_loss(chosen, chosen_ref, rejected, rejected_ref, beta=0.1).loss


def _policy_gradient(tokens: list[Tensor], ref: list[Tensor], rows: list[ScoredSequence]) -> Tensor:
    logprobs = torch.cat(tokens)
    behavior = torch.cat(ref) + _constants(logprobs, 1)
    return clipped_policy_gradient_loss(
        logprobs,
        behavior,
        torch.cat(ref),
        _constants(logprobs, 2),
        clip_low=0.2,
        clip_high=0.3,
        max_ratio=5.0,
        kl_weight=0.1,
    ).loss


def _discriminator(tokens: list[Tensor], ref: list[Tensor], rows: list[ScoredSequence]) -> Tensor:
    expert, expert_ref, policy, policy_ref = _preference_sides(tokens, ref)
    sides = expert_logits(expert, expert_ref, 0.1), expert_logits(policy, policy_ref, 0.1)
    return pairwise_discriminator_loss(*sides).loss


LOSSES = {
    "sft": _sft,
    "implicit": _implicit,
    "trajectory": _trajectory,
    "policy_gradient": _policy_gradient,
    "discriminator": _discriminator,
}


def loss_and_gradients(
    network: PeftModel, loss: Callable[..., Tensor], rows: list[ScoredSequence], logprobs: Callable[[], list[Tensor]]
) -> tuple[float, dict[str, Tensor]]:
    with reference(network):
        ref = logprobs()
    network.zero_grad()
    value = loss(logprobs(), ref, rows)
    value.backward()
    gradients = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
    return value.item(), gradients


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@given(seed=st.integers(0, 10_000))
@example(seed=3391)
@settings(deadline=None, max_examples=2)
def test_packed_loss_and_lora_gradients_equal_row_by_row(architecture: str, loss: str, seed: int) -> None:
    """In 64 bits: in 32 the rounding of a gradient may be as large as what a mistake makes (seed 3391)."""
    network, rows = deepcopy(NETWORKS[architecture]).double(), random_rows(seed)
    budget = 10_000 if loss == "trajectory" else 60
    packed = loss_and_gradients(network, LOSSES[loss], rows, lambda: packed_logprobs(network, rows, budget))
    plain = loss_and_gradients(network, LOSSES[loss], rows, lambda: [plain_logprobs(network, row) for row in rows])
    assert packed[0] == pytest.approx(plain[0], rel=1e-6, abs=1e-6)
    assert packed[1].keys() == plain[1].keys()
    assert all(".policy." in name and "lora_" in name for name in packed[1])
    scale = max(gradient.abs().max().item() for gradient in plain[1].values())
    for name, gradient in plain[1].items():
        torch.testing.assert_close(packed[1][name], gradient, rtol=1e-6, atol=1e-6 * scale)


# -------------------------------------------------------------------------------------------- scoring


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logprobs_are_those_of_the_row_alone(architecture: str) -> None:
    network, rows = NETWORKS[architecture], random_rows(seed=7, num_steps=6)
    with torch.no_grad():
        for packed, row in zip(packed_logprobs(network, rows, budget=100), rows, strict=True):
            torch.testing.assert_close(packed, plain_logprobs(network, row), rtol=1e-5, atol=1e-5)


@given(seed=st.integers(0, 10_000), shuffler=st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=20)
def test_the_order_of_the_rows_does_not_matter(seed: int, shuffler: random.Random) -> None:
    rows, network = random_rows(seed), NETWORKS["qwen2"]
    order = list(range(len(rows)))
    shuffler.shuffle(order)
    with torch.no_grad():
        straight = packed_logprobs(network, rows, budget=60)
        shuffled = packed_logprobs(network, [rows[index] for index in order], budget=60)
    for place, index in enumerate(order):
        torch.testing.assert_close(shuffled[place], straight[index])


def test_prompt_tokens_get_no_loss() -> None:
    """Only what stands in a span is predicted, each (context, token) once, however many rows share it."""
    rows = random_rows(seed=3)
    [pack] = pack_sequences(rows, token_budget=1000)
    batch = to_batch(pack, "cpu")
    expected = {
        (row.token_ids[:place], row.token_ids[place])
        for row in rows
        for place in range(row.spans[0].start, row.spans[0].stop)
    }
    predicted = [
        (tuple(ids for place, ids in enumerate(pack.token_ids[: at + 1]) if at < pack.subtree_ends[place]), target)
        for at, target in zip(batch.pair_positions.tolist(), batch.pair_targets.tolist(), strict=True)
    ]
    assert len(predicted) == len(set(predicted))
    assert set(predicted) == expected


def test_sums_and_weights_belong_to_their_rows() -> None:
    scores = SequenceLogprobs(
        sequences=(4, 9),
        tokens=torch.tensor([-1.0, -2.0, -4.0]),
        sequence_of_token=torch.tensor([0, 1, 1]),
        weights=torch.ones(3),
    )
    assert scores.sums().tolist() == [-1.0, -6.0]


def test_a_row_with_several_spans_carries_each_span_s_weight() -> None:
    row = ScoredSequence(tuple(range(10)), (Span(2, 4, 0.5), Span(6, 9, 2.0)), owner=0)
    batch = to_batch(pack_sequences([row], 10)[0], "cpu")
    assert batch.weights.tolist() == [0.5, 0.5, 2.0, 2.0, 2.0]
    with torch.no_grad():
        scores = score(NETWORKS["qwen3"], batch)
        torch.testing.assert_close(scores.tokens.double(), plain_logprobs(NETWORKS["qwen3"], row), rtol=1e-5, atol=1e-5)


def test_reference_is_the_base_or_another_adapter_and_the_policy_is_back_after() -> None:
    network, rows = NETWORKS["qwen2"], random_rows(seed=1)

    def first_row() -> Tensor:
        return packed_logprobs(network, rows, 1000)[0]

    policy = first_row()
    with reference(network):
        base, plain_base = first_row(), plain_logprobs(network, rows[0])
    with reference(network, "other"):
        other, plain_other = first_row(), plain_logprobs(network, rows[0])
    torch.testing.assert_close(base, plain_base, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(other, plain_other, rtol=1e-5, atol=1e-5)
    assert not base.requires_grad
    assert not other.requires_grad
    assert (policy - base).abs().max() > 1e-3
    assert (policy - other).abs().max() > 1e-3
    assert network.active_adapter == "policy"
    assert first_row().requires_grad
    torch.testing.assert_close(first_row(), policy)


def test_switching_the_adapter_between_forward_and_backward_keeps_the_gradient() -> None:
    network, rows = NETWORKS["qwen2"], random_rows(seed=2)
    gradients = []
    for uses_other in (False, True):
        network.zero_grad()
        loss = -torch.cat(packed_logprobs(network, rows, 1000)).sum()
        if uses_other:
            with reference(network, "other"):
                packed_logprobs(network, rows, 1000)
        loss.backward()
        gradients.append([p.grad.clone() for p in network.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 0
    assert all(torch.equal(*both) for both in zip(*gradients, strict=True))


def test_a_network_without_peft_is_scored_too() -> None:
    base, rows = NETWORKS["qwen2"].get_base_model(), random_rows(seed=1)
    with torch.no_grad():
        [pack] = pack_sequences(rows, 1000)
        assert torch.isfinite(score(base, to_batch(pack, "cpu")).tokens).all()


def test_logits_in_pieces_give_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    network, rows = NETWORKS["gemma3_softcap"], random_rows(seed=5)
    results = []
    for max_logits in (learner.packing.scoring.MAX_LOGITS, 3 * SIZES["vocab_size"]):
        monkeypatch.setattr(learner.packing.scoring, "MAX_LOGITS", max_logits)
        results.append(loss_and_gradients(network, _implicit, rows, lambda: packed_logprobs(network, rows, 1000)))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], gradient, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=40), "gpt2: only gemma2, gemma3_text, llama"),
        (Gemma2Config(**SIZES), "softcap of its attention logits"),
        (Gemma3TextConfig(**SIZES, use_bidirectional_attention=True), "see later ones"),
        (
            LlamaConfig(**SIZES, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
            "'dynamic' depends on the length",
        ),
    ],
)
def test_a_network_whose_packed_scores_may_be_wrong_is_refused(config: PreTrainedConfig, problem: str) -> None:
    network = AutoModelForCausalLM.from_config(config, attn_implementation=TREE_ATTENTION)
    [pack] = pack_sequences(random_rows(seed=1), token_budget=1000)
    with pytest.raises(ValueError, match=problem):
        score(network, to_batch(pack, "cpu"))


def test_a_network_that_would_not_see_the_tree_is_refused() -> None:
    network = AutoModelForCausalLM.from_config(ARCHITECTURES["qwen2"](), attn_implementation="sdpa")
    [pack] = pack_sequences(random_rows(seed=1), token_budget=1000)
    with pytest.raises(ValueError, match="load it with attn_implementation='tree_attention', not 'sdpa'"):
        score(network, to_batch(pack, "cpu"))
