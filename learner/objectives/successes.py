"""Own successes, imitated: alone (`rft`), or beside the experts' actions in one objective (`sft_rft`)."""

from __future__ import annotations

from collections.abc import Sequence

from learner.data.training_data import PolicyAction, TrainingData, Trajectory
from learner.objectives.objectives import Likelihood
from learner.objectives.states import ActionRewards, NothingToLearn, answered_states, outcome_counts, taken_actions
from learner.options import ObjectiveOptions
from learner.packing.prefix_tree import ScoredSequence


def rft(training_data: TrainingData, options: ObjectiveOptions, discriminator: ActionRewards | None) -> Likelihood:
    """Own successes, imitated: rejection sampling fine-tuning (arXiv 2308.01825)."""
    own = _readable_actions(_successes(training_data))
    if not own:
        raise NothingToLearn(f"no own success can be imitated: {outcome_counts(training_data.policy_episodes)}")
    return Likelihood("rft", tuple(sequence for sequence, _ in own))


def sft_rft(training_data: TrainingData, options: ObjectiveOptions, discriminator: ActionRewards | None) -> Likelihood:
    """Experts' actions and own successes, imitated alike: one likelihood over both.

    It is the improvement step of expert iteration (arXiv 1705.08439) with the demonstrations kept in every step. An own
    success shows what demonstrations leave out, the ways of tasks nobody demonstrated; the experts' actions hold what
    the policy never succeeds at by itself. Where an expert contradicts a step of a success, the expert's action alone
    is learned; and a success that took far longer than any demonstration is no example: most of its steps are detours
    (benchmarks/RESULTS.md tells how far that was measured). Without outcomes it is `sft`; without experts `rft`.
    """
    experts = tuple(labelled.expert_sequence for labelled in answered_states(training_data, options))
    examples = _straight(_successes(training_data), training_data.demonstrations, options.max_success_length)
    own = tuple(sequence for sequence, action in _readable_actions(examples) if action.agrees is not False)
    if not (sequences := (*experts, *own)):
        counts = outcome_counts(training_data.policy_episodes)
        raise NothingToLearn(
            f"no expert has acted or answered at any state, and no own success can be imitated: {counts}"
        )
    return Likelihood("sft_rft", sequences)


def success_counts(training_data: TrainingData, options: ObjectiveOptions) -> dict[str, float]:
    """How many own episodes succeeded, and how many of them `sft_rft` leaves out for the detours they took."""
    successes = _successes(training_data)
    straight = _straight(successes, training_data.demonstrations, options.max_success_length)
    return {"num_successes": float(len(successes)), "num_detours": float(len(successes) - len(straight))}


def _successes(training_data: TrainingData) -> list[Trajectory]:
    """Own episodes that somebody called a success."""
    return [own for own in training_data.policy_episodes if own.outcome == 1.0]


def _straight(
    successes: Sequence[Trajectory], demonstrations: Sequence[Trajectory], max_length: float
) -> list[Trajectory]:
    """Those of at most `max_length` times the steps of the longest demonstration; without demonstrations all."""
    longest = max((len(each.states) for each in demonstrations), default=None)
    return [each for each in successes if longest is None or len(each.states) <= max_length * longest]


def _readable_actions(episodes: Sequence[Trajectory]) -> list[tuple[ScoredSequence, PolicyAction]]:
    """What was done in them: a success may have come in spite of words that nobody could read."""
    return [(sequence, action) for sequence, action in taken_actions(episodes) if not action.is_malformed]
