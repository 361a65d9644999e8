"""The objectives against values by hand, numerical derivatives, and what is known of them in theory."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from learner.objectives.losses import (
    clipped_policy_gradient_loss,
    dft_loss,
    effective_sample_size,
    expert_logits,
    implicit_step_loss,
    k3,
    length_controlled,
    pairwise_discriminator_loss,
    sft_loss,
    trajectory_preference_loss,
)

torch.set_num_threads(1)


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def draws(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def policy_gradient(logprobs: Tensor, behavior: Tensor, advantages: Tensor, kl_weight: float = 0.0, **changes: Tensor):
    return clipped_policy_gradient_loss(
        logprobs,
        behavior,
        changes.get("ref", behavior),
        advantages,
        clip_low=0.2,
        clip_high=0.3,
        max_ratio=3.0,
        kl_weight=kl_weight,
        weights=changes.get("weights"),
    )


# ---------------------------------------------------------------------------------------------- by hand


def test_dft_by_hand_and_its_gradient_goes_with_the_probability() -> None:
    logprobs = doubles(-1.0, -2.0, -3.0).requires_grad_()
    result = dft_loss(logprobs, doubles(1.0, 0.5, 0.0))
    result.loss.backward()
    assert result.loss.item() == pytest.approx(math.exp(-1.0) + 0.5 * 2.0 * math.exp(-2.0))
    assert result.weight == pytest.approx(1.5)
    assert result.perplexity == pytest.approx(math.exp(2.0 / 1.5))
    assert logprobs.grad is not None
    torch.testing.assert_close(logprobs.grad, doubles(-math.exp(-1.0), -0.5 * math.exp(-2.0), 0.0))


def test_sft_by_hand() -> None:
    result = sft_loss(doubles(-1.0, -2.0, -3.0), doubles(1.0, 0.5, 0.0))
    assert result.loss.item() == pytest.approx(1.0 + 1.0)
    assert result.weight == pytest.approx(1.5)
    assert result.perplexity == pytest.approx(math.exp(2.0 / 1.5))


def test_implicit_step_loss_by_hand() -> None:
    sides = doubles(-2.0, -4.0), doubles(-3.0, -4.0), doubles(-5.0, -1.0), doubles(-4.0, -2.0)
    result = implicit_step_loss(*sides, beta=0.5, anchor_weight=0.1, weights=doubles(1.0, 2.0))
    # margins: 0.5 * (1 - (-1)) = 1 and 0.5 * (0 - 1) = -0.5
    expected = math.log1p(math.exp(-1.0)) + 0.1 * 2.0 + 2.0 * (math.log1p(math.exp(0.5)) + 0.1 * 4.0)
    assert result.loss.item() == pytest.approx(expected)
    assert result.weight == 3.0
    assert result.accuracy == pytest.approx(1 / 3)
    assert result.chosen_reward == pytest.approx(0.5 / 3)
    assert result.rejected_reward == pytest.approx((-0.5 + 2 * 0.5) / 3)
    assert result.chosen_logprob == pytest.approx((-2.0 - 8.0) / 3)


def test_trajectory_preference_is_the_implicit_loss_without_its_anchor() -> None:
    sides = draws(0, 4, 3).unbind()
    trajectory = trajectory_preference_loss(*sides, beta=0.7)
    assert trajectory.loss.item() == pytest.approx(implicit_step_loss(*sides, beta=0.7, anchor_weight=0.0).loss.item())
    margins = 0.7 * ((sides[0] - sides[1]) - (sides[2] - sides[3]))
    assert trajectory.loss.item() == pytest.approx(sum(math.log1p(math.exp(-margin)) for margin in margins.tolist()))


@pytest.mark.parametrize(
    ("ratio", "advantage", "surrogate", "pushes", "is_clipped"),
    [
        (1.0, 2.0, 2.0, True, False),
        (1.2, 2.0, 2.4, True, False),
        (1.5, 2.0, 1.3 * 2.0, False, True),  # good and already likelier: no further
        (1.5, -2.0, -3.0, True, False),  # bad and likelier: pushed back
        (5.0, -2.0, 3.0 * -2.0, False, True),  # beyond max_ratio: bounded
        (0.5, 2.0, 1.0, True, False),  # good and less likely: pushed back
        (0.5, -2.0, 0.8 * -2.0, False, True),  # bad and already less likely: no further
        (0.5, 0.0, 0.0, False, False),
    ],
)
def test_the_clip_by_hand(ratio: float, advantage: float, surrogate: float, pushes: bool, is_clipped: bool) -> None:
    logprobs = doubles(math.log(ratio) - 1.0).requires_grad_()
    result = policy_gradient(logprobs, doubles(-1.0), doubles(advantage))
    result.loss.backward()
    assert result.loss.item() == pytest.approx(-surrogate)
    assert logprobs.grad is not None
    assert logprobs.grad.item() == pytest.approx(-surrogate if pushes else 0.0)
    assert result.clip_fraction == float(is_clipped)


def test_the_kl_penalty_by_hand() -> None:
    result = policy_gradient(
        doubles(-1.0), doubles(-1.5), doubles(0.0), kl_weight=0.2, ref=doubles(-0.4), weights=doubles(2.0)
    )
    kl = math.exp(0.5) * (math.exp(0.6) - 1.0 - 0.6)
    assert result.loss.item() == pytest.approx(2.0 * 0.2 * kl)
    assert result.kl == pytest.approx(kl)
    assert result.weight == 2.0


def test_a_ratio_bound_that_would_hide_the_clip_is_refused() -> None:
    one = doubles(-1.0)
    with pytest.raises(ValueError, match=r"max_ratio 1.1 is below 1 \+ clip_high"):
        clipped_policy_gradient_loss(one, one, one, one, clip_low=0.2, clip_high=0.2, max_ratio=1.1, kl_weight=0.0)


def test_effective_sample_size_counts_what_the_weights_leave() -> None:
    assert effective_sample_size(doubles(2.0, 2.0, 2.0)) == pytest.approx(3.0)
    assert effective_sample_size(doubles(1.0, 0.0, 0.0)) == pytest.approx(1.0)
    assert effective_sample_size(doubles(1.0, 3.0)) == pytest.approx(16 / 10)
    assert effective_sample_size(torch.tensor([1e30, 1e30])) == pytest.approx(2.0)


def test_the_discriminator_by_hand() -> None:
    expert, policy = (expert_logits(doubles(-2.0), doubles(base), 0.3) for base in (-6.0, -1.0))
    assert expert.item() == pytest.approx(2.3)
    assert policy.item() == pytest.approx(-0.2)
    result = pairwise_discriminator_loss(expert, policy)
    assert result.loss.item() == pytest.approx(math.log1p(math.exp(-2.5)))
    assert result.accuracy == 1.0
    assert result.margin == pytest.approx(2.5)


def test_the_bias_has_no_part_in_the_pairwise_loss() -> None:
    q, base, bias = draws(1, 2, 4), draws(2, 2, 4), doubles(0.7).requires_grad_()
    sides = expert_logits(q[0], base[0], bias), expert_logits(q[1], base[1], bias)
    pairwise_discriminator_loss(*sides).loss.backward()
    assert bias.grad is not None
    assert bias.grad.item() == pytest.approx(0.0, abs=1e-12)


# ------------------------------------------------------------------------------------------ length control


def test_length_control_leaves_no_trend_and_keeps_the_mean() -> None:
    num_tokens = torch.tensor([4, 8, 15, 16, 23, 42])
    logits = (0.2 * num_tokens + draws(3, 6)).requires_grad_()
    controlled = length_controlled(logits, num_tokens)
    assert torch.corrcoef(torch.stack([logits.detach(), num_tokens.double()]))[0, 1] > 0.9
    assert torch.corrcoef(torch.stack([controlled, num_tokens.double()]))[0, 1].abs() < 1e-9
    assert controlled.mean().item() == pytest.approx(logits.mean().item())
    assert not controlled.requires_grad


def test_length_control_leaves_actions_of_one_length_as_they_are() -> None:
    logits = draws(4, 3)
    assert torch.equal(length_controlled(logits, torch.tensor([5, 5, 5])), logits)


def test_length_control_takes_nothing_from_what_length_does_not_explain() -> None:
    logits, num_tokens = doubles(1.0, -1.0, -1.0, 1.0), torch.tensor([1, 2, 3, 4])
    torch.testing.assert_close(length_controlled(logits, num_tokens), logits)


# ------------------------------------------------------------------------------------------- derivatives

POLICY = draws(10, 6)


@pytest.mark.parametrize(
    "loss",
    [
        lambda x: sft_loss(x, doubles(1, 2, 0, 1, 1, 0.5)).loss,
        lambda x: (
            implicit_step_loss(
                x[:3], POLICY[:3], x[3:], POLICY[3:], beta=0.3, anchor_weight=0.2, weights=doubles(1, 0.5, 2)
            ).loss
        ),
        lambda x: trajectory_preference_loss(x[:3], POLICY[:3], x[3:], POLICY[3:], beta=0.1).loss,
        lambda x: policy_gradient(x, POLICY, draws(11, 6), kl_weight=0.3, ref=POLICY + 0.2).loss,
        lambda x: (
            pairwise_discriminator_loss(
                expert_logits(x[:3], POLICY[:3], 0.1), expert_logits(x[3:], POLICY[3:], 0.1)
            ).loss
        ),
    ],
    ids=["sft", "implicit", "trajectory", "policy_gradient", "discriminator"],
)
def test_gradients_are_the_numerical_ones(loss: Callable[[Tensor], Tensor]) -> None:
    point = (POLICY + 0.1 * draws(12, 6)).requires_grad_()
    assert torch.autograd.gradcheck(loss, (point,))


@given(seed=st.integers(0, 1000), cut=st.integers(1, 5))
@settings(deadline=None, max_examples=20)
def test_losses_and_weights_of_packs_add_up(seed: int, cut: int) -> None:
    logprobs, ref, weights = -draws(seed, 6).abs(), -draws(seed + 1, 6).abs(), draws(seed + 2, 6).abs()
    parts = slice(0, cut), slice(cut, 6)
    for loss in (
        lambda at: sft_loss(logprobs[at], weights[at]),
        lambda at: implicit_step_loss(
            logprobs[at], ref[at], ref[at], logprobs[at], beta=0.3, anchor_weight=0.2, weights=weights[at]
        ),
        lambda at: policy_gradient(logprobs[at], ref[at], weights[at] - 1, kl_weight=0.1, weights=weights[at]),
        lambda at: pairwise_discriminator_loss(logprobs[at], ref[at], weights[at]),
    ):
        whole, left, right = loss(slice(0, 6)), *map(loss, parts)
        assert whole.loss.item() == pytest.approx(left.loss.item() + right.loss.item())
        assert whole.weight == pytest.approx(left.weight + right.weight)


def test_all_weights_zero_give_zero_and_no_nan() -> None:
    zero = doubles(0.0)
    result = implicit_step_loss(*(doubles(-1.0),) * 4, beta=1.0, anchor_weight=1.0, weights=zero)
    assert (result.loss.item(), result.weight, result.accuracy, result.chosen_logprob) == (0.0, 0.0, 0.0, 0.0)


# --------------------------------------------------------------------------------- what theory says of them


def distributions(seed: int, num_actions: int = 5) -> tuple[Tensor, Tensor]:
    """The policy's logits and the expert's probabilities at one state."""
    return draws(seed, num_actions).requires_grad_(), draws(seed + 1, num_actions).softmax(0)


def expected_implicit_loss(logits: Tensor, ref: Tensor, expert: Tensor, beta: float) -> Tensor:
    """Over every pair of an expert's action and one of the reference's own, weighted by its probability."""
    size = len(logits)
    chosen, rejected = torch.arange(size).repeat_interleave(size), torch.arange(size).repeat(size)
    logprobs = logits.log_softmax(0)
    return implicit_step_loss(
        logprobs[chosen],
        ref[chosen],
        logprobs[rejected],
        ref[rejected],
        beta=beta,
        anchor_weight=0.0,
        weights=expert[chosen] * ref.exp()[rejected],
    ).loss


@pytest.mark.parametrize("beta", [0.1, 0.5, 2.0])
def test_at_the_reference_the_implicit_gradient_is_half_beta_times_that_of_sft(beta: float) -> None:
    logits, expert = distributions(seed=20)
    implicit = expected_implicit_loss(logits, logits.detach().log_softmax(0), expert, beta)
    [implicit_gradient] = torch.autograd.grad(implicit, logits)
    [sft_gradient] = torch.autograd.grad(sft_loss(logits.log_softmax(0), expert).loss, logits)
    assert sft_gradient.abs().max() > 0.01
    torch.testing.assert_close(implicit_gradient, beta / 2 * sft_gradient)


@pytest.mark.parametrize("beta", [0.5, 1.0, 2.0])
def test_fully_optimised_the_implicit_loss_gives_pi_times_expert_over_pi_to_the_one_over_beta(beta: float) -> None:
    logits, expert = distributions(seed=30)
    ref = logits.detach().log_softmax(0)
    optimizer = torch.optim.LBFGS([logits], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-14)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = expected_implicit_loss(logits, ref, expert, beta)
        loss.backward()
        return loss

    optimizer.step(closure)
    expected = (ref + (expert.log() - ref) / beta).softmax(0)
    torch.testing.assert_close(logits.detach().softmax(0), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("is_on_policy", [True, False])
def test_the_kl_estimate_is_unbiased_and_so_is_its_gradient(is_on_policy: bool) -> None:
    logits, _ = distributions(seed=40)
    logprobs, ref = logits.log_softmax(0), draws(42, 5).log_softmax(0)
    behavior = logprobs.detach() if is_on_policy else (logits.detach() + 0.1 * draws(43, 5)).log_softmax(0)
    exact = (logprobs.exp() * (logprobs - ref)).sum()
    estimate = policy_gradient(logprobs, behavior, torch.zeros(5), kl_weight=1.0, ref=ref, weights=behavior.exp())
    assert estimate.kl == pytest.approx(exact.item())
    [expected] = torch.autograd.grad(exact, logits, retain_graph=True)
    [gradient] = torch.autograd.grad(estimate.loss, logits)
    torch.testing.assert_close(gradient, expected)


@given(seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=20)
def test_k3_is_never_negative_and_zero_only_where_the_two_agree(seed: int) -> None:
    logprobs, ref = draws(seed, 2, 5)
    assert (k3(logprobs, ref) > 0).all()
    assert (k3(ref, ref) == 0).all()


def test_on_policy_the_gradient_is_the_policy_gradient() -> None:
    logits, _ = distributions(seed=50)
    logprobs, rewards = logits.log_softmax(0), draws(52, 5)
    loss = policy_gradient(logprobs, logprobs.detach(), rewards, weights=logprobs.detach().exp()).loss
    [gradient] = torch.autograd.grad(loss, logits, retain_graph=True)
    [expected] = torch.autograd.grad(-(logprobs.exp() * rewards).sum(), logits)
    torch.testing.assert_close(gradient, expected)


def test_the_best_discriminator_is_the_log_ratio_of_expert_and_policy() -> None:
    """At the Bradley-Terry optimum the logit is log expert / policy up to a constant: what AIRL's form can express."""
    _, expert = distributions(seed=60)
    policy = draws(62, 5).softmax(0)
    optimal = (expert.log() - policy.log()).requires_grad_()
    chosen, rejected = torch.arange(5).repeat_interleave(5), torch.arange(5).repeat(5)
    weights = expert[chosen] * policy[rejected]
    pairwise_discriminator_loss(optimal[chosen], optimal[rejected], weights).loss.backward()
    assert optimal.grad is not None
    assert optimal.grad.abs().max() < 1e-12
