"""Learning the world before its tasks: the likelihood of what own actions led to (arXiv 2510.08558).

An experiment of the benchmark, and no objective of the learner: it trains on tool output, which the product promises
never to do (promise 2 in docs/DESIGN.md).
"""

from __future__ import annotations

from learner.data.training_data import TrainingData, Trajectory
from learner.objectives.objectives import Likelihood
from learner.objectives.states import NothingToLearn
from learner.packing.prefix_tree import ScoredSequence, Span


def experience(training_data: TrainingData) -> Likelihood:
    """The next observation after each own action. Raises NothingToLearn where no own episode has two steps."""
    sequences = tuple(each for own in training_data.policy_episodes for each in _observations(own))
    if not sequences:
        raise NothingToLearn("there is no own step with an observation after it")
    return Likelihood("experience", sequences)


def _observations(trajectory: Trajectory) -> list[ScoredSequence]:
    found = []
    for state, following in zip(trajectory.states, trajectory.states[1:], strict=False):
        known = state.prompt + state.policy_actions[0].token_ids
        if following.prompt[: len(known)] == known and len(following.prompt) > len(known):
            span = Span(len(known), len(following.prompt), 1.0)
            found.append(ScoredSequence(following.prompt, (span,), (trajectory.episode_id, state.id)))
    return found
