"""The learner's objectives: pure functions from logprobs to a loss and what is worth watching.

Every `loss` is a sum over its items (tokens, steps, pairs) and `weight` is the sum of their weights, so that the
packs of one gradient step add up: divide by the total `weight` of the step, whatever pack an item fell into. A mean
for each pack was refused, it would weigh an item by the company it fell into. Diagnostics are detached means over the
same items.

Names: `logprobs` are the policy's, with gradient; `ref_logprobs` the reference's, `behavior_logprobs` those of the
policy that sampled, both constants. Logprobs of an action are the sum over its tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

# -------------------------------------------------------------------------------------------------- likelihood


@dataclass(frozen=True, slots=True, eq=False)
class SftLoss:
    """Negative log-likelihood."""

    loss: Tensor
    """Sum over tokens of weight times -logprob."""
    weight: float
    """Sum of the weights."""
    perplexity: float
    """exp(loss / weight)"""


def sft_loss(logprobs: Tensor, weights: Tensor | None = None) -> SftLoss:
    """-sum_t w_t log pi(a_t | s_t): supervised fine-tuning, the first stage of StepAgent (arXiv 2411.03817).

    logprobs [m] of the expert's tokens; weights [m] (None: 1), of a token or of its whole step.
    """
    weights = _weights(logprobs, weights)
    loss = -(weights * logprobs).sum()
    return SftLoss(loss, weights.sum().item(), _mean(-logprobs, weights).exp().item())


def dft_loss(logprobs: Tensor, weights: Tensor | None = None) -> SftLoss:
    """-sum_t w_t sg(pi(a_t | s_t)) log pi(a_t | s_t): dynamic fine-tuning (arXiv 2508.05629, eq. 9).

    sg: without gradient. The gradient of a token's likelihood goes with 1 / pi, which lets rare tokens pull hardest;
    the factor takes that off. logprobs [m]; weights [m] (None: 1). `weight` is that of `sft_loss`, so that both divide
    alike; `perplexity` that of the tokens.
    """
    weights = _weights(logprobs, weights)
    loss = -(weights * logprobs.detach().exp() * logprobs).sum()
    return SftLoss(loss, weights.sum().item(), _mean(-logprobs, weights).exp().item())


# ------------------------------------------------------------------------------------------------- preferences


@dataclass(frozen=True, slots=True, eq=False)
class PreferenceLoss:
    """A loss over pairs of a chosen and a rejected action, or trajectory."""

    loss: Tensor
    """Sum over pairs of weight times the pair's loss."""
    weight: float
    """Sum of the weights."""
    accuracy: float
    """Share of pairs whose chosen side has the larger implicit reward."""
    chosen_reward: float
    """Mean of beta log pi / ref of the chosen side."""
    rejected_reward: float
    """Mean of beta log pi / ref of the rejected side."""
    chosen_logprob: float
    """Mean of log pi of the chosen side; a preference loss without an anchor lets it fall."""


def implicit_step_loss(
    chosen_logprobs: Tensor,
    chosen_ref_logprobs: Tensor,
    rejected_logprobs: Tensor,
    rejected_ref_logprobs: Tensor,
    *,
    beta: float,
    anchor_weight: float,
    weights: Tensor | None = None,
) -> PreferenceLoss:
    """-log sigmoid(beta log pi(a*|s)/ref(a*|s) - beta log pi(a|s)/ref(a|s)) - anchor_weight log pi(a*|s), a step.

    The implicit-reward variant of StepAgent (arXiv 2411.03817): the expert's action a* against the agent's own a at the
    same state, in the form of DPO (arXiv 2305.18290, eq. 7). The anchor keeps the likelihood of a* from falling; it is
    the SFT term of arXiv 2404.19733 (eq. 1), not divided by length.

    All tensors [p]. K samples at a state are K pairs of weight 1/K (None: 1).
    """
    return _preference_loss(
        chosen_logprobs,
        chosen_ref_logprobs,
        rejected_logprobs,
        rejected_ref_logprobs,
        beta=beta,
        anchor_weight=anchor_weight,
        weights=weights,
    )


def trajectory_preference_loss(
    chosen_logprobs: Tensor,
    chosen_ref_logprobs: Tensor,
    rejected_logprobs: Tensor,
    rejected_ref_logprobs: Tensor,
    *,
    beta: float,
    weights: Tensor | None = None,
) -> PreferenceLoss:
    """-log sigmoid(beta sum_t log pi(a*_t|s*_t)/ref - beta sum_t log pi(a_t|s_t)/ref): ETO (arXiv 2403.02502).

    All tensors [p]: sums over the agent's tokens of a whole trajectory; chosen is the better of two on the same task.
    """
    return _preference_loss(
        chosen_logprobs,
        chosen_ref_logprobs,
        rejected_logprobs,
        rejected_ref_logprobs,
        beta=beta,
        anchor_weight=0.0,
        weights=weights,
    )


def _preference_loss(
    chosen_logprobs: Tensor,
    chosen_ref_logprobs: Tensor,
    rejected_logprobs: Tensor,
    rejected_ref_logprobs: Tensor,
    *,
    beta: float,
    anchor_weight: float,
    weights: Tensor | None,
) -> PreferenceLoss:
    weights = _weights(chosen_logprobs, weights)
    chosen = beta * (chosen_logprobs - chosen_ref_logprobs)
    rejected = beta * (rejected_logprobs - rejected_ref_logprobs)
    pairs = -logsigmoid(chosen - rejected) - anchor_weight * chosen_logprobs
    return PreferenceLoss(
        loss=(weights * pairs).sum(),
        weight=weights.sum().item(),
        accuracy=_mean((chosen > rejected).to(weights), weights).item(),
        chosen_reward=_mean(chosen, weights).item(),
        rejected_reward=_mean(rejected, weights).item(),
        chosen_logprob=_mean(chosen_logprobs, weights).item(),
    )


# --------------------------------------------------------------------------------------------- policy gradient


@dataclass(frozen=True, slots=True, eq=False)
class PolicyGradientLoss:
    """A clipped policy gradient with a penalty on the distance from the reference."""

    loss: Tensor
    """Sum over tokens of weight times (-surrogate + kl_weight times the KL estimate)."""
    weight: float
    """Sum of the weights."""
    kl: float
    """Mean estimate of KL(policy || reference) of a token, in nats."""
    effective_sample_size: float
    """(sum r)^2 / sum r^2 over the tokens' importance ratios r: as many on-policy tokens would say as much."""
    clip_fraction: float
    """Share of tokens whose ratio is clipped or truncated, so that they push the policy no further."""


def clipped_policy_gradient_loss(
    logprobs: Tensor,
    behavior_logprobs: Tensor,
    ref_logprobs: Tensor,
    advantages: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    max_ratio: float,
    kl_weight: float,
    weights: Tensor | None = None,
) -> PolicyGradientLoss:
    """-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) + kl_weight r KL, for each token.

    PPO's clipped objective (arXiv 1707.06347, eq. 7) on the tokens' ratios r = pi / behavior, r truncated at
    `max_ratio`: for A < 0 that is dual-clip PPO (arXiv 1912.09729), which bounds what one stale token can do. KL is
    Schulman's k3, (ref/pi) - 1 - log(ref/pi) ("Approximating KL Divergence", 2020), times r because the behavior policy
    sampled the tokens (arXiv 2512.02556, eq. 7): only so is its gradient that of KL(policy || reference).

    All tensors [m], one entry a token; weights None: 1. Raises ValueError for max_ratio below 1 + clip_high.
    """
    if max_ratio < 1 + clip_high:
        raise ValueError(f"max_ratio {max_ratio} is below 1 + clip_high = {1 + clip_high}: it would hide the clip")
    weights = _weights(logprobs, weights)
    raw_ratios = (logprobs - behavior_logprobs).exp()
    ratios = raw_ratios.clamp(max=max_ratio)
    surrogate = torch.minimum(ratios * advantages, ratios.clamp(1 - clip_low, 1 + clip_high) * advantages)
    kl = ratios * k3(logprobs, ref_logprobs)
    is_stopped = torch.where(advantages > 0, raw_ratios > 1 + clip_high, raw_ratios < 1 - clip_low)
    is_stopped = (is_stopped & (advantages != 0)) | (raw_ratios > max_ratio)
    return PolicyGradientLoss(
        loss=(weights * (kl_weight * kl - surrogate)).sum(),
        weight=weights.sum().item(),
        kl=_mean(kl, weights).item(),
        effective_sample_size=effective_sample_size(raw_ratios),
        clip_fraction=_mean(is_stopped.to(weights), weights).item(),
    )


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Schulman's estimate of KL(policy || reference) from tokens of the policy: unbiased, never negative. [m] -> [m]"""
    log_ratios = ref_logprobs - logprobs
    return log_ratios.expm1() - log_ratios


def effective_sample_size(ratios: Tensor) -> float:
    """Kish: (sum r)^2 / sum r^2, between 1 and len(ratios). ratios [m], not negative, m > 0."""
    ratios = ratios.detach() / ratios.detach().max()  # squares of large ratios would overflow
    return (ratios.sum().square() / ratios.square().sum()).item()


# ----------------------------------------------------------------------------------------------- discriminator


@dataclass(frozen=True, slots=True, eq=False)
class DiscriminatorLoss:
    """How badly expert actions are told from the policy's."""

    loss: Tensor
    """Sum over pairs of weight times the pair's loss."""
    weight: float
    """Sum of the weights."""
    accuracy: float
    """Share of pairs whose expert side has the larger logit."""
    margin: float
    """Mean of expert side minus policy side."""


def expert_logits(logprobs: Tensor, base_logprobs: Tensor, bias: Tensor | float) -> Tensor:
    """0.5 (log q(a|s) - log base(a|s)) + b, [p] -> [p]: above zero where the action looks like the expert's.

    The form of AIRL's discriminator (arXiv 1710.11248), whose logit is f - log pi, with a LoRA q of the base
    network as exp(f) and the base in the place of pi. The bias
    has no part in `pairwise_discriminator_loss`, it cancels.
    """
    return 0.5 * (logprobs - base_logprobs) + bias


def pairwise_discriminator_loss(
    expert_logits: Tensor, policy_logits: Tensor, weights: Tensor | None = None
) -> DiscriminatorLoss:
    """-log sigmoid(expert logit - policy logit): Bradley-Terry on two actions at one state, GAD (arXiv 2511.10643).

    All tensors [p], logits as `expert_logits` gives them, of the expert's action and of the policy's. Weights None: 1.
    """
    weights = _weights(expert_logits, weights)
    margins = expert_logits - policy_logits
    return DiscriminatorLoss(
        loss=-(weights * logsigmoid(margins)).sum(),
        weight=weights.sum().item(),
        accuracy=_mean((margins > 0).to(weights), weights).item(),
        margin=_mean(margins, weights).item(),
    )


def length_controlled(logits: Tensor, num_tokens: Tensor) -> Tensor:
    """The logits without what a straight line in the action's length explains of them. [p], [p] -> [p]

    GAD (arXiv 2511.10643) saw answers grow to the length limit once a discriminator was hacked. What is left here has
    no correlation with length over the given actions, and the same mean as before. It is for rewards: no gradient.
    """
    centered = (num_tokens - num_tokens.to(logits).mean()).to(logits)
    spread = centered.square().sum()
    if spread == 0:
        return logits.detach()
    slope = (logits.detach() * centered).sum() / spread
    return logits.detach() - slope * centered


# ----------------------------------------------------------------------------------------------------- weights


def _weights(items: Tensor, weights: Tensor | None) -> Tensor:
    return torch.ones_like(items) if weights is None else weights.to(items)


def _mean(items: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean without gradient; 0 where all weights are 0."""
    return (weights * items.detach()).sum() / weights.sum().clamp(min=torch.finfo(weights.dtype).tiny)
