"""Tells experts' actions from the policy's, and rewards the policy for what looks like an expert's.

The discriminator is itself a language model: a fresh LoRA q on the base network, trained pairwise on the expert's
action and a disagreeing own one at the same state. Its logit of an action is 0.5 (log q - log base): AIRL's form
(arXiv 1710.11248). A classification head on the network was tried and refused, it did not learn to tell them apart.

It is made anew for each cycle, of that cycle's samples: a discriminator that outlives the policy it was trained
against gets hacked (GAD, arXiv 2511.10643).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import ClassVar

import torch
from torch import Tensor

from learner.data.held_out import is_held_out
from learner.data.rewards import discriminator_rewards, logged_actions_of
from learner.data.training_data import TrainingData, Trajectory
from learner.objectives.losses import expert_logits, length_controlled, pairwise_discriminator_loss
from learner.objectives.objectives import Loss, Pair, action_sequence
from learner.objectives.states import LabelledState, NothingToLearn, labelled_states, without_stale_actions
from learner.options import ObjectiveOptions, TrainingOptions
from learner.packing.prefix_tree import ScoredSequence, Span
from learner.packing.scoring import SequenceLogprobs
from learner.training.trainer import Trainer
from policies.adapters.reward import RewardCard, write_reward_card
from policies.types import TokenIds
from runtime.store.learning_log import StepReward


@dataclass(frozen=True, slots=True)
class DiscriminatorOptions:
    """How a discriminator is trained."""

    anchor_weight: float = 0.1
    """Of the likelihood of experts' actions: without it q may push the policy's actions down by forgetting all."""
    held_out_share: float = 0.2
    """Of the tasks, whose informative states are kept for the accuracy: at another state of a task that it has learned
    of, it is right far more often (benchmarks/RESULTS.md)."""
    min_states: int = 4
    """Informative states to train on: with fewer, it would know them by heart."""
    training: TrainingOptions = field(default_factory=TrainingOptions)


@dataclass(frozen=True, slots=True)
class Discrimination:
    """The objective: at each informative state the expert's action has a larger logit than each own one."""

    sequences: tuple[ScoredSequence, ...]
    pairs: tuple[Pair, ...]
    """Those of one state weigh 1 together."""
    anchor_weight: float
    name: str = "discriminator"
    needs_reference: ClassVar[bool] = True

    def loss(self, scored: SequenceLogprobs, reference: Sequence[Tensor]) -> Loss:
        place = {sequence: at for at, sequence in enumerate(scored.sequences)}
        sums = scored.sums()
        base_sums = torch.stack([reference[sequence].sum() for sequence in scored.sequences]).to(sums)
        pairs = [pair for pair in self.pairs if pair.chosen[0] in place]
        experts, own = ([place[side[0]] for side in sides] for sides in zip(*map(_sides, pairs), strict=True))
        logits = expert_logits(sums, base_sums, 0.0)
        weights = torch.tensor([pair.weight for pair in pairs]).to(sums)
        told = pairwise_discriminator_loss(logits[experts], logits[own], weights)
        anchor = -self.anchor_weight * (weights * sums[experts]).sum()
        diagnostics = {"discriminator_accuracy": told.accuracy, "discriminator_margin": told.margin}
        return Loss(told.loss + anchor, told.weight, diagnostics)


def _sides(pair: Pair) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return pair.chosen, pair.rejected


class Discriminator:
    """Trained, and ready to judge any action at any state."""

    def __init__(self, trainer: Trainer, training_pairs: Discrimination, held_out: Discrimination | None) -> None:
        """`trainer` holds q, trained on `training_pairs`. None: no pair was held out."""
        self._trainer = trainer
        self._known: dict[tuple[TokenIds, tuple[Span, ...]], float] = {}
        """Logits without bias: the pairs it was trained on, those held out and the actions to reward overlap."""
        self.num_pairs = len(training_pairs.pairs)
        self._bias = _balancing_bias(*map(torch.tensor, zip(*self._pair_logits(training_pairs), strict=True)))
        self.accuracy = self._accuracy(held_out) if held_out else None
        """Share of held-out pairs whose expert side has the larger logit; None where no pair was held out."""

    def expert_logits(self, sequences: Sequence[ScoredSequence]) -> list[float]:
        """Of each sequence's action: above zero where it is nearer to the experts' actions than to the policy's."""
        return self._logits(sequences, self._bias).tolist()

    def accuracy_at(self, states: Sequence[LabelledState]) -> tuple[float, int]:
        """Of the pairs of the expert's action and a disagreeing own one at these states, at least one, the share that
        is ranked rightly, which is the area under the ROC curve at one state; and how many pairs there are."""
        pairs = _pairs(states, DiscriminatorOptions())
        return self._accuracy(pairs), len(pairs.pairs)

    def rewards(self, sequences: Sequence[ScoredSequence]) -> list[float]:
        """The logits without what the actions' lengths explain of them."""
        num_tokens = torch.tensor([sum(span.stop - span.start for span in sequence.spans) for sequence in sequences])
        return length_controlled(self._logits(sequences, self._bias), num_tokens).tolist()

    def rewards_of(self, cycle: str, training_data: TrainingData) -> list[StepReward]:
        """The reward of every logged step of the training data."""
        found = logged_actions_of(training_data)
        sequences = [action_sequence(each.state.prompt, each.token_ids, (each.state.id,)) for each in found]
        return discriminator_rewards(cycle, found, self.rewards(sequences))

    def save(
        self, folder: Path, probe_prompts: Sequence[TokenIds], card: str, neutral_prompt: TokenIds | None = None
    ) -> None:
        """Write it as a reward model (`policies/adapters/reward.py`). Raises as `Trainer.save`."""
        self._trainer.save(folder, probe_prompts, card, neutral_prompt)
        write_reward_card(folder, RewardCard(self.accuracy, self.num_pairs))

    def measures(self) -> dict[str, float]:
        """For the cycle's report."""
        accuracy = {} if self.accuracy is None else {"accuracy": self.accuracy}
        return {"num_pairs": float(self.num_pairs), **accuracy}

    def _logits(self, sequences: Sequence[ScoredSequence], bias: float) -> Tensor:
        places = {(sequence.token_ids, sequence.spans): sequence for sequence in sequences}
        unknown = [sequence for place, sequence in places.items() if place not in self._known]
        if unknown:
            q, base = (
                torch.stack([tokens.sum() for tokens in self._trainer.logprobs(unknown, is_base)])
                for is_base in (False, True)
            )
            logits = expert_logits(q, base, 0.0).tolist()
            self._known |= {(each.token_ids, each.spans): logit for each, logit in zip(unknown, logits, strict=True)}
        return torch.tensor([self._known[sequence.token_ids, sequence.spans] for sequence in sequences]) + bias

    def _accuracy(self, pairs: Discrimination) -> float:
        return fmean(expert > own for expert, own in self._pair_logits(pairs))

    def _pair_logits(self, pairs: Discrimination) -> list[tuple[float, float]]:
        logits = self._logits(pairs.sequences, 0.0).tolist()
        return [(logits[pair.chosen[0]], logits[pair.rejected[0]]) for pair in pairs.pairs]


def discriminate(
    training_data: TrainingData,
    base: Path,
    objectives: ObjectiveOptions,
    options: DiscriminatorOptions,
    device: str = "auto",
    groups_of: Mapping[str, Collection[str]] | None = None,
) -> Discriminator:
    """A discriminator of the training data's experts from its own actions. Raises NothingToLearn with too few pairs,
    and as `Trainer.train` does.

    `groups_of` names by episode the demonstrated tasks that it is of (`Collected.groups_of`); else its own task tells,
    which transcripts mostly have none of.
    """
    labelled = labelled_states(without_stale_actions(training_data, objectives), objectives)
    tasks = {each.episode_id: _task_of(each, groups_of or {}) for each in training_data.trajectories}
    kept, held_out = list[LabelledState](), list[LabelledState]()
    for each in labelled:
        if each.state.is_informative:
            is_kept = not is_held_out(f"discriminator {tasks[each.episode_id]}", options.held_out_share)
            (kept if is_kept else held_out).append(each)
    if len(kept) < options.min_states:  # better one whose accuracy nobody knows than none
        kept, held_out = kept + held_out, []
    if len(kept) < options.min_states:
        raise NothingToLearn(
            f"a discriminator needs {options.min_states} states where the policy disagrees with an expert, "
            f"there are {len(kept)}"
        )
    pairs = _pairs(kept, options)
    trainer = Trainer(base, None, options.training, device)
    trainer.train(pairs)
    return Discriminator(trainer, pairs, _pairs(held_out, options) if held_out else None)


def _task_of(trajectory: Trajectory, groups_of: Mapping[str, Collection[str]]) -> str:
    return min(groups_of.get(trajectory.episode_id, ()), default=trajectory.task or trajectory.episode_id)


def _balancing_bias(expert_logits: Tensor, own_logits: Tensor) -> float:
    """The bias at which both sides are mistaken for the other equally often, by the logits' own probabilities.

    It is that of a logistic regression with slope 1; the pairwise loss leaves the bias open. Both [p].
    """
    low, high = -own_logits.max().item() - 20.0, -expert_logits.min().item() + 20.0
    for _ in range(50):
        bias = (low + high) / 2
        is_too_small = torch.sigmoid(-expert_logits - bias).mean() > torch.sigmoid(own_logits + bias).mean()
        low, high = (bias, high) if is_too_small else (low, bias)
    return low


def _pairs(states: Sequence[LabelledState], options: DiscriminatorOptions) -> Discrimination:
    """At each state the expert's action with each own one that disagrees. Those that agree are no counterexamples."""
    sequences, pairs = list[ScoredSequence](), list[Pair]()
    for labelled in states:
        expert, rejected = len(sequences), labelled.state.disagreeing
        sequences.append(labelled.expert_sequence)
        for action in rejected:
            pairs.append(Pair((expert,), (len(sequences),), 1.0 / len(rejected)))
            sequences.append(labelled.sequence_of(action.token_ids))
    return Discrimination(tuple(sequences), tuple(pairs), options.anchor_weight)
