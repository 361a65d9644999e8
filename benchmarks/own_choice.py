"""Own states that nobody answered or judged: one of the policy's samples there is chosen, and imitated beside the
experts' actions. The policy chooses itself (`majority`), or a discriminator does (`raft`).

Experiments of the benchmark, and no objectives of the learner: neither beat imitation alone.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from learner.data.training_data import State, TrainingData
from learner.objectives.build import objective_of
from learner.objectives.objectives import Likelihood, action_sequence
from learner.objectives.states import ActionRewards, NothingToLearn, answered_states
from learner.options import ObjectiveOptions
from learner.packing.prefix_tree import ScoredSequence
from policies.types import TokenIds

MIN_VOTES = 2
"""A discriminator chooses among what was sampled so often at least: what is sampled once may be any slip, and the
rarest slips are what its logit, a ratio to the base's probability, likes best."""


@dataclass(frozen=True, slots=True)
class Sampled:
    """An own state with how often each action was sampled there."""

    episode_id: str
    state: State
    votes: Counter[TokenIds]

    def sequence_of(self, action: TokenIds) -> ScoredSequence:
        return action_sequence(self.state.prompt, action, (self.episode_id, self.state.id))


def majority(training_data: TrainingData, options: ObjectiveOptions) -> Likelihood:
    """The commonest sample of each own state, imitated: self-training by self-consistency (arXiv 2210.11610).

    It takes no outcome and no expert: what the policy does mostly is made what it does, at tasks nobody demonstrated.
    """
    chosen = majority_choices(training_data)
    if not chosen:
        raise NothingToLearn(_NOTHING_SAMPLED)
    return Likelihood("majority", (*_experts(training_data, options), *chosen))


def raft(training_data: TrainingData, options: ObjectiveOptions, discriminator: ActionRewards) -> Likelihood:
    """The best-rewarded sample of each own state, imitated: RAFT (arXiv 2304.06767, algorithm 1).

    The reward is the discriminator's, StepAgent's inverse reward (arXiv 2411.03817), used to choose where a policy
    gradient would follow it: a choice among what the policy says more than once cannot run away from it.
    """
    groups = [
        [each.sequence_of(action) for action, votes in each.votes.items() if votes >= MIN_VOTES]
        for each in _sampled(training_data)
    ]
    groups = [group for group in groups if group]
    if not groups:
        raise NothingToLearn(_NOTHING_SAMPLED)
    rewards = iter(discriminator.rewards([sequence for group in groups for sequence in group]))
    chosen = []
    for group in groups:
        rewarded = [(next(rewards), place) for place in range(len(group))]
        chosen.append(group[max(rewarded, key=lambda each: each[0])[1]])
    return Likelihood("raft", (*_experts(training_data, options), *chosen))


def sft_rft_majority(training_data: TrainingData, options: ObjectiveOptions) -> Likelihood:
    """Experts' actions, own successes, and the commonest sample where nobody judged."""
    judged = objective_of("sft_rft", training_data, options)
    return Likelihood("sft_rft, majority", (*judged.sequences, *majority_choices(training_data)))


_NOTHING_SAMPLED = "at no own state that nobody judged was the policy sampled more than once"


def majority_choices(training_data: TrainingData) -> tuple[ScoredSequence, ...]:
    """The commonest sample of each own state that nobody answered or judged; the first of equals."""
    return tuple(each.sequence_of(each.votes.most_common(1)[0][0]) for each in _sampled(training_data))


def _experts(training_data: TrainingData, options: ObjectiveOptions) -> list[ScoredSequence]:
    return [labelled.expert_sequence for labelled in answered_states(training_data, options)]


def _sampled(training_data: TrainingData) -> list[Sampled]:
    found = []
    for trajectory in training_data.policy_episodes:
        for state in trajectory.states if trajectory.outcome is None else ():
            votes = Counter(action.token_ids for action in state.policy_actions)
            if state.expert is None and votes.total() > 1:
                found.append(Sampled(trajectory.episode_id, state, votes))
    return found
