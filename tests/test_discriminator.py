"""The discriminator on the real novice: it tells an expert's actions from blunders, also where it was not trained."""

from __future__ import annotations

from dataclasses import replace
from statistics import fmean

import pytest
import torch

from learner.data.held_out import is_held_out
from learner.data.training_data import PolicyAction, State, TrainingData, Trajectory
from learner.objectives.build import NothingToLearn, objective_of
from learner.objectives.objectives import action_sequence
from learner.objectives.states import answered_states
from learner.options import ObjectiveOptions, TrainingOptions
from learner.packing.prefix_tree import ScoredSequence
from learner.training.discriminator import Discriminator, DiscriminatorOptions, discriminate
from learner.training.trainer import Trainer
from policies.chat.chat_protocol import ChatProtocol
from tests.expert_sequences import expert_rows
from tests.serving import NOVICE_FOLDER

LESSONS = ObjectiveOptions(anchor_weight=0.0)
TRAINING = TrainingOptions(lr=2e-3, epochs=12, trajectories_per_step=4, rank=8)
OPTIONS = DiscriminatorOptions(training=TRAINING)
BLUNDERS = ("I am sorry, this order has gone wrong.<|im_end|>", "Sadly the silver clock is sold out.<|im_end|>")


def blundering(protocol: ChatProtocol, num_tasks: int, split: str = "train") -> TrainingData:
    """Experts' episodes, at whose states the policy always gives up, in one way or another."""
    by_task: dict[str, list[State]] = {}
    for row in expert_rows(protocol, split, num_tasks):
        task, number = row.owner  # type: ignore[misc]
        prompt, expert = row.token_ids[: row.spans[0].start], row.token_ids[row.spans[0].start :]
        own = tuple(own_action(protocol.encode(text), agrees=False) for text in BLUNDERS)
        by_task.setdefault(str(task), []).append(State(f"{task}/{number}", prompt, expert, own))
    return TrainingData(tuple(Trajectory(task, tuple(states), task, 1.0) for task, states in by_task.items()))


def own_action(token_ids: tuple[int, ...], agrees: bool, num_versions_old: int = 0) -> PolicyAction:
    return PolicyAction("step", token_ids, (-1.0,) * len(token_ids), agrees, num_versions_old)


def sides(training_data: TrainingData) -> tuple[list[ScoredSequence], list[ScoredSequence]]:
    """Rows of the experts' actions, and of the own ones."""
    states = [state for trajectory in training_data.demonstrations for state in trajectory.states]
    experts = [action_sequence(s.prompt, s.expert, (s.id,)) for s in states if s.expert is not None]
    return experts, [action_sequence(s.prompt, own.token_ids, (s.id,)) for s in states for own in s.policy_actions]


def with_own(training_data: TrainingData, own: tuple[PolicyAction, ...], num_states: int | None = None) -> TrainingData:
    """The training data with other own actions, at its first `num_states` states alone."""
    found, place = [], 0
    for trajectory in training_data.demonstrations:
        states = []
        for state in trajectory.states:
            states.append(replace(state, policy_actions=own if num_states is None or place < num_states else ()))
            place += 1
        found.append(replace(trajectory, states=tuple(states)))
    return TrainingData(tuple(found))


@pytest.fixture(scope="module")
def training_data(protocol: ChatProtocol) -> TrainingData:
    return blundering(protocol, 6)


@pytest.fixture(scope="module")
def discriminator(training_data: TrainingData) -> Discriminator:
    return discriminate(training_data, NOVICE_FOLDER, LESSONS, OPTIONS)


def test_it_tells_held_out_pairs_apart(discriminator: Discriminator) -> None:
    assert discriminator.accuracy is not None
    assert discriminator.accuracy > 0.9


def test_it_tells_them_apart_at_tasks_it_never_saw(protocol: ChatProtocol, discriminator: Discriminator) -> None:
    unseen = answered_states(blundering(protocol, 4, "validation"), LESSONS)
    share, num_pairs = discriminator.accuracy_at(unseen)
    assert share > 0.9
    assert num_pairs == len(unseen) * len(BLUNDERS)


def test_experts_have_logits_above_zero_and_blunders_below_at_tasks_it_never_saw(
    protocol: ChatProtocol, discriminator: Discriminator
) -> None:
    experts, own = map(discriminator.expert_logits, sides(blundering(protocol, 4, "validation")))
    assert fmean(logit > 0 for logit in experts) > 0.8
    assert fmean(logit < 0 for logit in own) > 0.8


def test_rewards_are_the_logits_without_their_trend_in_length(
    training_data: TrainingData, discriminator: Discriminator
) -> None:
    rows = [row for side in sides(training_data) for row in side]
    lengths = torch.tensor([float(len(row.token_ids) - row.spans[0].start) for row in rows])
    logits, rewards = torch.tensor(discriminator.expert_logits(rows)), torch.tensor(discriminator.rewards(rows))
    assert torch.corrcoef(torch.stack([logits, lengths]))[0, 1].abs() > 0.05
    assert torch.corrcoef(torch.stack([rewards, lengths]))[0, 1].abs() < 1e-4
    assert rewards.mean().item() == pytest.approx(logits.mean().item(), abs=1e-4)


def test_inverse_makes_what_experts_do_likelier_and_blunders_less_likely(
    training_data: TrainingData, discriminator: Discriminator
) -> None:
    """Without an anchor: the discriminator's rewards alone move the policy, from own actions alone."""
    states = [state for trajectory in training_data.demonstrations for state in trajectory.states]
    right = [own_action(state.expert, agrees=True) for state in states if state.expert is not None]
    tried = replace(
        training_data,
        policy_episodes=tuple(
            Trajectory(
                f"own/{state.id}", (replace(state, expert=None, policy_actions=(*state.policy_actions, expert)),)
            )
            for state, expert in zip(states, right, strict=True)
        ),
    )
    trainer = Trainer(NOVICE_FOLDER, None, TRAINING)
    objective = objective_of("inverse", tried, LESSONS, discriminator)
    behavior = tuple(tuple(tokens.tolist()) for tokens in trainer.logprobs(objective.sequences))
    experts, own = sides(training_data)
    before = [_mean_logprob(trainer, side) for side in (experts, own)]
    trainer.train(replace(objective, behavior_logprobs=behavior))  # type: ignore[type-var]
    after = [_mean_logprob(trainer, side) for side in (experts, own)]
    assert after[0] > before[0]
    assert after[1] < before[1] - 1


def _mean_logprob(trainer: Trainer, rows: list[ScoredSequence]) -> float:
    return fmean(tokens.sum().item() for tokens in trainer.logprobs(rows))


def test_a_seed_decides_it(training_data: TrainingData) -> None:
    rows = sides(training_data)[0]
    quick = replace(TRAINING, epochs=1)
    found = []
    for seed in (1, 1, 2):
        options = replace(OPTIONS, training=replace(quick, seed=seed))
        found.append(discriminate(training_data, NOVICE_FOLDER, LESSONS, options).expert_logits(rows))
    assert found[0] == found[1] != found[2]


def test_tasks_are_held_out_as_a_whole(training_data: TrainingData) -> None:
    """Whoever else went through them: at another state of a task that it knows, it would be right far more often."""
    again = tuple(
        replace(
            each,
            episode_id=f"own/{each.episode_id}",
            states=tuple(replace(state, id=f"own/{state.id}", prompt=(*state.prompt, 1)) for state in each.states),
            is_demonstration=False,
        )
        for each in training_data.demonstrations
    )
    both = TrainingData(training_data.demonstrations, again)
    quick = replace(TRAINING, epochs=1)
    some = discriminate(both, NOVICE_FOLDER, LESSONS, replace(OPTIONS, training=quick))
    whole = discriminate(both, NOVICE_FOLDER, LESSONS, replace(OPTIONS, held_out_share=0.0, training=quick))
    pairs_of = [len(BLUNDERS) * 2 * len(each.states) for each in training_data.demonstrations]
    assert (whole.num_pairs, whole.accuracy) == (sum(pairs_of), None)
    is_kept = [not is_held_out(f"discriminator {each.task}", 0.2) for each in training_data.demonstrations]
    assert 0 < sum(is_kept) < len(is_kept)
    assert some.accuracy is not None
    assert some.num_pairs == sum(number for number, kept in zip(pairs_of, is_kept, strict=True) if kept)


def test_transcripts_without_a_task_are_held_out_by_what_they_demonstrate(training_data: TrainingData) -> None:
    """Copies of one transcript were as many tasks, and its accuracy that at states it had learned of."""
    nameless = TrainingData(tuple(replace(each, task=None) for each in training_data.demonstrations))
    quick = replace(OPTIONS, training=replace(TRAINING, epochs=1), held_out_share=0.5)
    one_task = {each.episode_id: frozenset({"one task"}) for each in nameless.demonstrations}
    told = discriminate(nameless, NOVICE_FOLDER, LESSONS, quick, groups_of=one_task)
    assert told.accuracy is None
    assert discriminate(nameless, NOVICE_FOLDER, LESSONS, quick).accuracy is not None


def test_where_too_few_would_be_left_nothing_is_held_out(training_data: TrainingData) -> None:
    one_task = TrainingData(training_data.demonstrations[:1])
    quick = replace(TRAINING, epochs=1)
    for share in (0.9, 1.0):
        options = replace(OPTIONS, held_out_share=share, training=quick)
        found = discriminate(one_task, NOVICE_FOLDER, LESSONS, options)
        assert found.num_pairs == len(BLUNDERS) * len(one_task.demonstrations[0].states)
        assert found.accuracy is None


# --------------------------------------------------------------------------------- nothing to learn


def test_too_few_disagreements_are_refused(training_data: TrainingData, protocol: ChatProtocol) -> None:
    wrong = own_action(protocol.encode(BLUNDERS[0]), agrees=False)
    few = with_own(training_data, (wrong,), num_states=3)
    with pytest.raises(NothingToLearn, match="needs 4 states where the policy disagrees with an expert, there are"):
        discriminate(few, NOVICE_FOLDER, LESSONS, OPTIONS)


def test_agreeing_and_stale_actions_are_no_counterexamples(training_data: TrainingData, protocol: ChatProtocol) -> None:
    blunder = protocol.encode(BLUNDERS[0])
    useless = own_action(blunder, agrees=True), own_action(blunder, False, LESSONS.max_versions_old + 1)
    with pytest.raises(NothingToLearn, match="there are 0"):
        discriminate(with_own(training_data, useless), NOVICE_FOLDER, LESSONS, OPTIONS)


def test_without_experts_there_is_none() -> None:
    with pytest.raises(NothingToLearn, match="no expert has acted"):
        discriminate(TrainingData(()), NOVICE_FOLDER, LESSONS, OPTIONS)
