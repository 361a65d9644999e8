"""What a candidate is trained for. Each objective is a set of sequences to score and a loss over their logprobs.

`sft`, `implicit` and `inverse` are StepAgent's; `eto` (trajectory preference), `rft` (own successes) and `ppo` (outcome
reward) are here to be compared with. An objective knows nothing of networks: the trainer scores its sequences, under
the policy and, once before training, under the reference, which is the policy that the cycle began with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean, pstdev
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from learner.objectives.losses import (
    clipped_policy_gradient_loss,
    implicit_step_loss,
    sft_loss,
    trajectory_preference_loss,
)
from learner.packing.prefix_tree import ScoredSequence, Span
from learner.packing.scoring import SequenceLogprobs
from policies.types import TokenIds


@dataclass(frozen=True, slots=True, eq=False)
class Loss:
    """The loss of some of an objective's sequences."""

    total: Tensor
    """Sum over items; divide by the weight of the whole gradient step."""
    weight: float
    diagnostics: dict[str, float] = field(default_factory=dict)
    """What is worth watching, as means over the same items."""


class Objective(Protocol):
    """Rows, how they go together, and the loss over their logprobs."""

    @property
    def name(self) -> str: ...

    @property
    def sequences(self) -> Sequence[ScoredSequence]: ...

    needs_reference: ClassVar[bool]
    """Whether the loss looks at `reference`: where it does not, a pass over all sequences is spared."""

    def loss(self, scored: SequenceLogprobs, reference: Sequence[Tensor]) -> Loss:
        """Of some of the sequences, whole owners; `reference` holds the reference's token logprobs of every
        sequence, and nothing where it is not needed."""
        ...


def action_sequence(
    prompt: TokenIds, completion: TokenIds, owner: tuple[object, ...], weight: float = 1.0
) -> ScoredSequence:
    """One action in its context. Only the completion is scored: prompt and tool output are never learned from.

    `owner[0]` names the trajectory, by which the trainer batches; sequences of one whole owner are scored together.
    """
    return ScoredSequence(prompt + completion, (Span(len(prompt), len(prompt) + len(completion), weight),), owner)


# ------------------------------------------------------------------------------------------------ likelihood


@dataclass(frozen=True, slots=True)
class Likelihood:
    """Supervised fine-tuning on the sequences: `sft` on experts' actions, `rft` on those of the policy's own
    successes."""

    name: str
    sequences: tuple[ScoredSequence, ...]
    needs_reference: ClassVar[bool] = False

    def loss(self, scored: SequenceLogprobs, reference: Sequence[Tensor]) -> Loss:
        fit = sft_loss(scored.tokens, scored.weights)
        return Loss(fit.loss, fit.weight, {"perplexity": fit.perplexity})


# ----------------------------------------------------------------------------------------------- preferences


@dataclass(frozen=True, slots=True)
class Pair:
    """A chosen and a rejected side, each the sum over some sequences (indexes into the objective's sequences)."""

    chosen: tuple[int, ...]
    rejected: tuple[int, ...]
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class StepPreference:
    """StepAgent's implicit reward: the expert's action against the policy's own at the same state, and an anchor.

    The anchor is the negative log-likelihood of every expert action, also where nothing is rejected: without it the
    likelihood of the chosen actions falls while their advantage grows.
    """

    sequences: tuple[ScoredSequence, ...]
    pairs: tuple[Pair, ...]
    anchored: frozenset[int]
    """The sequences that are experts' actions."""
    beta: float
    anchor_weight: float
    name: str = "implicit"
    needs_reference: ClassVar[bool] = True

    def loss(self, scored: SequenceLogprobs, reference: Sequence[Tensor]) -> Loss:
        place = {sequence: at for at, sequence in enumerate(scored.sequences)}
        sums, ref_sums = scored.sums(), _reference_sums(scored, reference)
        anchored = [place[sequence] for sequence in scored.sequences if sequence in self.anchored]
        anchor = -self.anchor_weight * sums[anchored].sum()
        pairs = [pair for pair in self.pairs if pair.chosen[0] in place]
        diagnostics = {"chosen_logprob": _mean(sums[anchored])}
        if not pairs:
            return Loss(anchor, len(anchored), diagnostics)
        chosen, rejected = _sides(pairs, place)
        preferred = implicit_step_loss(
            _summed(sums, chosen),
            _summed(ref_sums, chosen),
            _summed(sums, rejected),
            _summed(ref_sums, rejected),
            beta=self.beta,
            anchor_weight=0.0,
            weights=torch.tensor([pair.weight for pair in pairs]).to(sums),
        )
        diagnostics |= {
            "preference_accuracy": preferred.accuracy,
            "implicit_margin": preferred.chosen_reward - preferred.rejected_reward,
        }
        return Loss(preferred.loss + anchor, len(anchored), diagnostics)


@dataclass(frozen=True, slots=True)
class TrajectoryPreference:
    """ETO: the expert's whole trajectory against the policy's failed ones on the same task."""

    sequences: tuple[ScoredSequence, ...]
    pairs: tuple[Pair, ...]
    beta: float
    name: str = "eto"
    needs_reference: ClassVar[bool] = True

    def loss(self, scored: SequenceLogprobs, reference: Sequence[Tensor]) -> Loss:
        place = {sequence: at for at, sequence in enumerate(scored.sequences)}
        sums, ref_sums = scored.sums(), _reference_sums(scored, reference)
        pairs = [pair for pair in self.pairs if pair.chosen[0] in place]
        chosen, rejected = _sides(pairs, place)
        preferred = trajectory_preference_loss(
            _summed(sums, chosen),
            _summed(ref_sums, chosen),
            _summed(sums, rejected),
            _summed(ref_sums, rejected),
            beta=self.beta,
            weights=torch.tensor([pair.weight for pair in pairs]).to(sums),
        )
        diagnostics = {"preference_accuracy": preferred.accuracy, "chosen_logprob": preferred.chosen_logprob}
        return Loss(preferred.loss, preferred.weight, diagnostics)


def _sides(pairs: Sequence[Pair], place: dict[int, int]) -> tuple[list[list[int]], list[list[int]]]:
    chosen = [[place[sequence] for sequence in pair.chosen] for pair in pairs]
    return chosen, [[place[sequence] for sequence in pair.rejected] for pair in pairs]


def _summed(sums: Tensor, sides: list[list[int]]) -> Tensor:
    return torch.stack([sums[side].sum() for side in sides])


def _reference_sums(scored: SequenceLogprobs, reference: Sequence[Tensor]) -> Tensor:
    return torch.stack([reference[sequence].sum() for sequence in scored.sequences]).to(scored.tokens)


# ------------------------------------------------------------------------------------------- policy gradient


@dataclass(frozen=True, slots=True)
class PolicyGradient:
    """A clipped policy gradient on the policy's own logged actions: `inverse` with the discriminator's rewards, `ppo`
    with outcomes. Actions of older adapters are weighed by the ratio to the logged behavior logprobs, truncated.
    """

    name: str
    sequences: tuple[ScoredSequence, ...]
    advantages: tuple[float, ...]
    """One for each sequence; normalised by whoever gives them."""
    behavior_logprobs: tuple[tuple[float, ...], ...]
    """For each sequence, of each completion token, as logged."""
    anchored: frozenset[int] = frozenset()
    """Rows that are experts' actions: they have no behavior logprobs and are held by likelihood."""
    anchor_weight: float = 0.0
    clip_low: float = 0.2
    clip_high: float = 0.28
    max_ratio: float = 4.0
    kl_weight: float = 0.02
    needs_reference: ClassVar[bool] = True

    def loss(self, scored: SequenceLogprobs, reference: Sequence[Tensor]) -> Loss:
        tokens = scored.tokens
        is_expert = torch.tensor([sequence in self.anchored for sequence in scored.sequences], device=tokens.device)[
            scored.sequence_of_token
        ]
        own = ~is_expert
        anchor = -self.anchor_weight * tokens[is_expert].sum()
        weight = float(own.sum()) + self.anchor_weight * float(is_expert.sum())
        if not own.any():
            return Loss(anchor, weight)
        behavior = torch.cat(
            [
                torch.tensor(self.behavior_logprobs[sequence])
                for sequence in scored.sequences
                if sequence not in self.anchored
            ]
        )
        ref = torch.cat([reference[sequence] for sequence in scored.sequences if sequence not in self.anchored])
        advantages = torch.tensor([self.advantages[sequence] for sequence in scored.sequences]).to(tokens)[
            scored.sequence_of_token
        ]
        gradient = clipped_policy_gradient_loss(
            tokens[own],
            behavior.to(tokens),
            ref.to(tokens),
            advantages[own],
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            max_ratio=self.max_ratio,
            kl_weight=self.kl_weight,
        )
        diagnostics = {
            "kl_to_reference": gradient.kl,
            "clip_rate": gradient.clip_fraction,
            "effective_sample_share": gradient.effective_sample_size / float(own.sum()),
        }
        return Loss(gradient.loss + anchor, weight, diagnostics)


def normalised(values: Sequence[float]) -> tuple[float, ...]:
    """Advantages from rewards: mean 0 and deviation 1; all zero where the rewards are all equal."""
    middle, spread = (fmean(values), pstdev(values)) if values else (0.0, 0.0)
    return tuple((value - middle) / spread if spread > 1e-9 else 0.0 for value in values)


def trajectories_of(sequences: Sequence[ScoredSequence]) -> list[list[int]]:
    """Row indexes grouped by the trajectory that their owner names, in order of first appearance."""
    groups: dict[object, list[int]] = {}
    for index, sequence in enumerate(sequences):
        groups.setdefault(sequence.owner[0], []).append(index)  # type: ignore[index]
    return list(groups.values())


def _mean(items: Tensor) -> float:
    return items.detach().mean().item() if len(items) else 0.0
