"""Steps of demonstrations that a network does not expect which was trained on the other demonstrations.

Cross-fitting: the demonstrations are dealt into folds, by task; a network is trained by imitation without each fold and
scores the steps of that fold. What it finds far less likely than it finds the other steps is listed: the small-loss
criterion of learning from noisy labels (Co-teaching, arXiv 1804.06872), on data that the network has not seen
(confident learning, arXiv 1911.00068). Trained on all of them instead, a network repeats its demonstrations, mistakes
included, and finds nothing unlikely.

Not covered: with few demonstrations the network knows little, and what is rare but right is listed with what is wrong.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from learner.data.training_data import TrainingData, Trajectory
from learner.objectives.build import objective_of
from learner.objectives.objectives import action_sequence
from learner.options import ObjectiveOptions, TrainingOptions
from learner.training.trainer import Trainer

MOST_DEVIATIONS = 3.0
"""Robust standard deviations above the median surprise at which a step is doubted."""
LEAST_SURPRISE = math.log(100)
"""Nats: what the network would do itself one time in a hundred is never doubted. Set on a seed of its own: at 4, a
third more of what is listed was right."""


@dataclass(frozen=True, slots=True)
class Surprise:
    """How little a network that was trained on the others expects an expert's step."""

    episode_id: str
    step_id: str
    index: int
    nats: float
    """-log p of the whole action; larger is less expected."""
    is_doubted: bool


def surprises(
    demonstrations: Sequence[Trajectory],
    groups: Mapping[str, str],
    base: Path,
    training: TrainingOptions,
    num_folds: int = 3,
    device: str = "auto",
) -> list[Surprise]:
    """Of every step, in order. `groups` names by episode id what is to lie in one fold, as a task does.

    Raises TrainingFailed, and ValueError where there is only one group: then nothing can be left out.
    """
    names = sorted({groups[each.episode_id] for each in demonstrations})
    if len(names) < 2:
        raise ValueError("cross-fitting needs demonstrations of two tasks at least: one is left out, the other taught")
    fold = {name: number % min(num_folds, len(names)) for number, name in enumerate(names)}
    found: dict[str, float] = {}
    for left_out in sorted(set(fold.values())):
        inside = [each for each in demonstrations if fold[groups[each.episode_id]] == left_out]
        others = tuple(each for each in demonstrations if fold[groups[each.episode_id]] != left_out)
        found |= _scored(inside, others, base, training, device)
    return _judged(demonstrations, found)


def _scored(
    inside: Sequence[Trajectory], others: tuple[Trajectory, ...], base: Path, training: TrainingOptions, device: str
) -> dict[str, float]:
    """-log p of each step inside, by its id, under a network that was trained on the others."""
    trainer = Trainer(base, None, training, device)
    trainer.train(objective_of("sft", TrainingData(others), ObjectiveOptions()))
    states = [(state, state.expert) for each in inside for state in each.states if state.expert is not None]
    sequences = [action_sequence(state.prompt, expert, (state.id,)) for state, expert in states]
    logprobs = trainer.logprobs(sequences)
    return {state.id: -tokens.sum().item() for (state, _), tokens in zip(states, logprobs, strict=True)}


def _judged(demonstrations: Sequence[Trajectory], nats: Mapping[str, float]) -> list[Surprise]:
    values = list(nats.values())
    middle = median(values)
    # 1.4826 makes the median absolute deviation a standard deviation, where values are normal.
    deviation = 1.4826 * median(abs(value - middle) for value in values)
    bound = max(middle + MOST_DEVIATIONS * deviation, LEAST_SURPRISE)
    return [
        Surprise(each.episode_id, state.id, index, nats[state.id], nats[state.id] > bound)
        for each in demonstrations
        for index, state in enumerate(each.states)
        if state.id in nats
    ]
