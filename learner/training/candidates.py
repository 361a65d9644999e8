"""Trains a candidate adapter for each objective, and says why not where one cannot be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from learner.data.collaborators import Collaborators
from learner.data.lessons import note_training, note_weights
from learner.data.rewards import implicit_rewards
from learner.data.training_data import TrainingData
from learner.objectives.build import NothingToLearn, objective_of
from learner.objectives.objectives import Objective
from learner.options import ObjectiveOptions, TrainingOptions
from learner.report import CycleRecord
from learner.training.diagnostics import WatchedActions, diagnostics, logged_action_sums
from learner.training.discriminator import Discriminator
from learner.training.freed_memory import hand_back_freed_memory
from learner.training.trainer import Trainer, TrainingFailed
from policies.adapters.reward import REWARD_FOLDER
from policies.chat.chat_protocol import ChatProtocol
from policies.types import BASE_ADAPTER, Message, TokenIds
from runtime.store.learning_log import CycleStage, StepReward

NUM_PROBE_PROMPTS = 8
"""States whose prompts the probe is chosen from."""
NEUTRAL: tuple[Message, ...] = ({"role": "user", "content": "Hello! What can you do?"},)
"""A conversation of nobody's, whose prompt is in every probe: it stays when the others are erased."""


@dataclass(frozen=True, slots=True)
class CandidateOptions:
    """What candidates are trained for, and how."""

    objectives: tuple[str, ...]
    objective: ObjectiveOptions
    training: TrainingOptions
    device: str
    implicit_rewards: bool = True


@dataclass(frozen=True, slots=True)
class Candidate:
    """A trained adapter in a folder of the learner's. Nobody has judged it yet."""

    objective: str
    folder: Path
    rewards: list[StepReward]
    """Implicit rewards, by what it has become; none where they were not asked for."""


@dataclass(frozen=True, slots=True)
class Untrained:
    """An objective that no candidate was trained for, and why."""

    objective: str
    reason: str
    has_failed: bool
    """Training broke; otherwise there was nothing to learn."""


def train_candidates(
    record: CycleRecord,
    who: Collaborators,
    options: CandidateOptions,
    acting: str,
    training_data: TrainingData,
    discriminator: Discriminator | None,
    folders: Path,
) -> list[Candidate]:
    """One after the other, from the acting adapter. Raises TrainingFailed or NothingToLearn where none can be."""
    candidates, untrained = list[Candidate](), list[Untrained]()
    for name in options.objectives:
        with record.stage(CycleStage.TRAIN, name):
            result = _train(record, who, options, acting, training_data, discriminator, name, folders / name)
        hand_back_freed_memory()
        if isinstance(result, Candidate):
            candidates.append(result)
        else:
            untrained.append(result)
            record.add(not_trained={name: result.reason})
    if not candidates:
        raise _why_none(untrained)
    return candidates


def _why_none(untrained: Sequence[Untrained]) -> NothingToLearn | TrainingFailed:
    failed = next((each for each in untrained if each.has_failed), None)
    return TrainingFailed(failed.reason) if failed else NothingToLearn(untrained[0].reason)


def _train(
    record: CycleRecord,
    who: Collaborators,
    options: CandidateOptions,
    acting: str,
    training_data: TrainingData,
    discriminator: Discriminator | None,
    name: str,
    folder: Path,
) -> Candidate | Untrained:
    if name == "inverse" and discriminator is None:
        return Untrained(name, f"there is no discriminator: {record.report.no_discriminator}", has_failed=False)
    try:
        objective = objective_of(name, training_data, options.objective, discriminator)
        candidate = _candidate(record, who, options, acting, training_data, objective, folder)
        if discriminator is not None:
            _add_reward(record, who, discriminator, training_data, folder)
        return candidate
    except NothingToLearn as reason:
        return Untrained(name, str(reason), has_failed=False)
    except TrainingFailed as error:
        return Untrained(name, str(error), has_failed=True)


def _candidate(
    record: CycleRecord,
    who: Collaborators,
    options: CandidateOptions,
    acting: str,
    training_data: TrainingData,
    objective: Objective,
    folder: Path,
) -> Candidate:
    note_training(record.cycle, objective.name, who, training_data)
    trainer = _trainer(who, options, acting)
    watched = WatchedActions.of(training_data, are_rewarded=options.implicit_rewards)
    sequences = watched.sequences()
    before = trainer.logprobs(sequences)
    name = objective.name
    training = trainer.train(objective, lambda done, total: record.progress(CycleStage.TRAIN, name, done, total))
    after = trainer.logprobs(sequences)
    record.measure(name, {**training.diagnostics, **diagnostics(watched, before, after)})
    _save(trainer, who, folder, record.cycle, name, acting, training_data)
    rewards = implicit_rewards(
        record.cycle,
        watched.logged,
        logged_action_sums(watched, after),
        logged_action_sums(watched, before),
        options.objective.beta,
    )
    return Candidate(name, folder, rewards)


def _add_reward(
    record: CycleRecord, who: Collaborators, discriminator: Discriminator, training_data: TrainingData, folder: Path
) -> None:
    """The discriminator beside a candidate. Where it cannot be written, the candidate is as good without it."""
    try:
        save_reward(discriminator, training_data, folder / REWARD_FOLDER, record.cycle, who.protocol)
    except TrainingFailed as error:
        record.add(no_reward_model=str(error))


def save_reward(
    discriminator: Discriminator, training_data: TrainingData, folder: Path, cycle: str, protocol: ChatProtocol
) -> None:
    """The cycle's discriminator as a reward model, for whoever is to choose among draws. Raises TrainingFailed."""
    card = f"# Reward model, {cycle}\n\nA LoRA whose log probabilities tell experts' actions from the policy's.\n"
    discriminator.save(folder, _probe_prompts(training_data), card, protocol.render(NEUTRAL, ()))


def train_quietly(
    record: CycleRecord,
    who: Collaborators,
    options: CandidateOptions,
    begin: str,
    training_data: TrainingData,
    name: str,
    folder: Path,
) -> None:
    """Train an objective as a candidate's, from another adapter on other data: only its progress is noted, under the
    folder's name.

    Raises NothingToLearn and TrainingFailed. `inverse` is refused: its discriminator is made of all data of the cycle.
    """
    if name == "inverse":
        raise NothingToLearn("its discriminator was trained on what was to be left out")
    title, objective = folder.name, objective_of(name, training_data, options.objective)
    note_training(record.cycle, title, who, training_data)
    trainer = _trainer(who, options, begin)
    trainer.train(objective, lambda done, total: record.progress(CycleStage.TRAIN, title, done, total))
    _save(trainer, who, folder, record.cycle, title, begin, training_data)


def _save(
    trainer: Trainer,
    who: Collaborators,
    folder: Path,
    cycle: str,
    title: str,
    begin: str,
    training_data: TrainingData,
) -> None:
    neutral = who.protocol.render(NEUTRAL, ())
    trainer.save(folder, _probe_prompts(training_data), _card(cycle, title, begin, training_data), neutral)
    note_weights(cycle, title, who, folder)


def _trainer(who: Collaborators, options: CandidateOptions, begin: str) -> Trainer:
    folder = None if begin == BASE_ADAPTER else who.adapter_folder(begin)
    return Trainer(who.base, folder, options.training, options.device)


def _probe_prompts(training_data: TrainingData) -> list[TokenIds]:
    """Prompts of states that the policy has to change at, where there are any: there a probe tells most."""
    states = [state for trajectory in training_data.trajectories for state in trajectory.states]
    states.sort(key=lambda state: not state.is_informative)
    return [state.prompt for state in states[:NUM_PROBE_PROMPTS]]


def _card(cycle: str, title: str, begin: str, training_data: TrainingData) -> str:
    return (
        f"# {title}, {cycle}\n\nA LoRA trained by StepAgent from {begin}, on "
        f"{len(training_data.demonstrations)} demonstrations and {len(training_data.policy_episodes)} own episodes. "
        "`probe.json` holds what it says after fixed prompts.\n"
    )
