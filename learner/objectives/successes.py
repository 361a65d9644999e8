"""Own successes, imitated: alone (`rft`), or beside the experts' actions in one objective (`sft_rft`)."""

from __future__ import annotations

from learner.data.training_data import TrainingData
from learner.objectives.objectives import Likelihood
from learner.objectives.states import ActionRewards, NothingToLearn, answered_states, outcome_counts, taken_actions
from learner.options import ObjectiveOptions
from learner.packing.prefix_tree import ScoredSequence


def rft(training_data: TrainingData, options: ObjectiveOptions, discriminator: ActionRewards | None) -> Likelihood:
    """Own successes, imitated: rejection sampling fine-tuning (arXiv 2308.01825)."""
    sequences = _successes(training_data, contradicted=True)
    if not sequences:
        raise NothingToLearn(f"no own episode succeeded: {outcome_counts(training_data.policy_episodes)}")
    return Likelihood("rft", sequences)


def sft_rft(training_data: TrainingData, options: ObjectiveOptions, discriminator: ActionRewards | None) -> Likelihood:
    """Experts' actions and own successes, imitated alike: one likelihood over both.

    It is the improvement step of expert iteration (arXiv 1705.08439) with the demonstrations kept in every step. An own
    success shows what demonstrations leave out, the ways of tasks nobody demonstrated; the experts' actions hold what
    the policy never succeeds at by itself. Where an expert contradicts a step of a success, the expert's action alone
    is learned. Without outcomes it is `sft`; without experts `rft`.
    """
    experts = tuple(labelled.expert_sequence for labelled in answered_states(training_data, options))
    sequences = (*experts, *_successes(training_data, contradicted=False))
    if not sequences:
        own = outcome_counts(training_data.policy_episodes)
        raise NothingToLearn(f"no expert has acted or answered at any state, and no own episode succeeded: {own}")
    return Likelihood("sft_rft", sequences)


def _successes(training_data: TrainingData, contradicted: bool) -> tuple[ScoredSequence, ...]:
    """Own actions of the episodes that somebody called a success; `contradicted`: also where an expert would have
    chosen otherwise."""
    successes = [own for own in training_data.policy_episodes if own.outcome == 1.0]
    return tuple(sequence for sequence, own in taken_actions(successes) if contradicted or own.agrees is not False)
