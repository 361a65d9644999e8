"""Objectives made of training data: what is scored, what is held against what, and why there may be nothing to
learn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from learner.data.training_data import PolicyAction, State, TrainingData, Trajectory
from learner.objectives.build import OBJECTIVES, NothingToLearn, objective_of
from learner.objectives.objectives import Likelihood, Objective, PolicyGradient, StepPreference, TrajectoryPreference
from learner.objectives.successes import success_counts
from learner.options import OBJECTIVE_NAMES, ObjectiveOptions
from learner.packing.prefix_tree import ScoredSequence, pack_sequences
from learner.packing.scoring import SequenceLogprobs, score, to_batch
from tests.networks import NETWORKS, plain_logprobs

torch.set_num_threads(1)

OPTIONS = ObjectiveOptions()
RIGHT, WRONG, WORSE = (7, 2), (8, 9, 2), (5, 2)


def test_the_options_know_every_objective_by_name() -> None:
    assert set(OBJECTIVE_NAMES) == OBJECTIVES.keys()


def own(token_ids: tuple[int, ...], agrees: bool | None = None, num_versions_old: int = 0) -> PolicyAction:
    logprobs = tuple(-0.5 - 0.1 * place for place in range(len(token_ids)))
    return PolicyAction("step", token_ids, logprobs, agrees, num_versions_old)


def demonstration(name: str, *sampled: tuple[PolicyAction, ...], task: str | None = None) -> Trajectory:
    """An expert's episode with the policy's samples at each state."""
    first = 10 + sum(map(ord, name)) % 20
    states = tuple(
        State(f"{name}-{at}", (first, *(3,) * (at + 1)), RIGHT, samples) for at, samples in enumerate(sampled)
    )
    return Trajectory(name, states, task, 1.0)


def attempt(
    name: str, outcome: float | None, actions: Sequence[PolicyAction], task: str | None = None, expert: bool = False
) -> Trajectory:
    """An own episode; with `expert`, one answered at each of its states."""
    first = 10 + sum(map(ord, name)) % 20
    states = tuple(
        State(f"{name}-{at}", (first, *(4,) * (at + 1)), RIGHT if expert else None, (action,))
        for at, action in enumerate(actions)
    )
    return Trajectory(name, states, task, outcome)


class CountingRewards:
    """Rewards an action by its length."""

    def rewards(self, sequences: Sequence[ScoredSequence]) -> Sequence[float]:
        return [float(len(sequence.token_ids) - sequence.spans[0].start) for sequence in sequences]


class EqualRewards:
    def rewards(self, sequences: Sequence[ScoredSequence]) -> Sequence[float]:
        return [0.5] * len(sequences)


def rich_training_data() -> TrainingData:
    """Something for every objective."""
    return TrainingData(
        demonstrations=(
            demonstration("a", (own(RIGHT, True), own(WRONG, False)), (own(RIGHT, True),), task="t1"),
            demonstration("b", (own(WRONG, False), own(WORSE, False)), (), task="t2"),
        ),
        policy_episodes=(
            attempt("c", 0.0, [own(RIGHT, True), own(WRONG, False)], task="t1", expert=True),
            attempt("d", 1.0, [own(RIGHT), own(RIGHT), own(WORSE)], task="t1"),
            attempt("e", 0.0, [own(WORSE)], task="t2"),
            attempt("f", None, [own(WRONG)], task="t2"),
        ),
    )


def make(name: str, training_data: TrainingData, options: ObjectiveOptions = OPTIONS) -> Objective:
    return objective_of(name, training_data, options, CountingRewards())


def completions(objective: Objective, indexes: Sequence[int] | None = None) -> list[tuple[int, ...]]:
    """The scored tokens of the objective's rows."""
    rows = objective.sequences if indexes is None else [objective.sequences[index] for index in indexes]
    return [row.token_ids[span.start : span.stop] for row in rows for span in row.spans]


# ------------------------------------------------------------------------------------ what is scored


@pytest.mark.parametrize("name", OBJECTIVES)
def test_only_actions_are_scored_and_never_a_prompt(name: str) -> None:
    training_data = rich_training_data()
    prompts = {state.prompt for trajectory in training_data.trajectories for state in trajectory.states}
    objective = make(name, training_data)
    for row in objective.sequences:
        [span] = row.spans
        assert row.token_ids[: span.start] in prompts
        assert row.token_ids[span.start : span.stop] in {RIGHT, WRONG, WORSE}
        assert span.stop == len(row.token_ids)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_trainer_batches_rows_by_the_trajectory_or_task_that_owns_them(name: str) -> None:
    names = {"a", "b", "c", "d", "e", "f", "t1", "t2"}
    assert {row.owner[0] for row in make(name, rich_training_data()).sequences} <= names  # type: ignore[index]


def test_sft_learns_experts_actions_at_demonstrations_and_where_asked_at_own_states() -> None:
    for own_states, num_states in ((False, 4), (True, 6)):
        objective = make("sft", rich_training_data(), replace(OPTIONS, own_states=own_states))
        assert isinstance(objective, Likelihood)
        assert completions(objective) == [RIGHT] * num_states


@pytest.mark.parametrize("versions_old", [0, 9])
def test_behind_the_first_slip_of_an_own_episode_only_what_people_corrected_is_learned(versions_old: int) -> None:
    said = ((RIGHT, True), (WRONG, False), (WRONG, False), (RIGHT, True), (WORSE, False))
    episode = attempt("c", 0.0, [own(tokens, agrees, versions_old) for tokens, agrees in said], expert=True)
    states = list(episode.states)
    states[3] = replace(states[3], is_correction=True)
    objective = make("sft", TrainingData((), (replace(episode, states=tuple(states)),)))
    assert [row.owner for row in objective.sequences] == [("c", "c-0"), ("c", "c-1"), ("c", "c-3")]


def test_behind_the_first_slip_of_a_success_its_own_steps_are_learned_since_no_expert_s_are() -> None:
    said = ((RIGHT, True), (WRONG, False), (WORSE, False), (RIGHT, True))
    episode = attempt("c", 1.0, [own(tokens, agrees) for tokens, agrees in said], expert=True)
    objective = make("sft_rft", TrainingData((), (episode,)))
    assert completions(objective) == [RIGHT, RIGHT, RIGHT, WORSE, RIGHT]  # two experts' answers, then own steps


def test_informative_only_leaves_out_what_the_policy_masters_or_was_never_asked() -> None:
    objective = make("sft", rich_training_data(), replace(OPTIONS, informative_only=True))
    assert [row.owner for row in objective.sequences] == [("a", "a-0"), ("b", "b-0"), ("c", "c-1")]


def test_a_state_that_many_episodes_share_counts_once_with_all_its_own_actions() -> None:
    shared = State("x", (10, 3), RIGHT, (own(WRONG, False),))
    again = State("y", (10, 3), RIGHT, (own(WORSE, False), own(RIGHT, True)))
    training_data = TrainingData((Trajectory("a", (shared,)),), (Trajectory("b", (again,)), Trajectory("c", (again,))))
    assert completions(make("sft", training_data)) == [RIGHT]
    implicit = make("implicit", training_data)
    assert isinstance(implicit, StepPreference)
    assert completions(implicit) == [RIGHT, WRONG, WORSE, WORSE]
    assert [pair.weight for pair in implicit.pairs] == [pytest.approx(1 / 3)] * 3


def test_implicit_prefers_the_expert_s_action_to_each_disagreeing_own_one_at_the_same_state() -> None:
    objective = make("implicit", rich_training_data())
    assert isinstance(objective, StepPreference)
    pairs = [(completions(objective, pair.chosen), completions(objective, pair.rejected)) for pair in objective.pairs]
    assert pairs == [([RIGHT], [WRONG]), ([RIGHT], [WRONG]), ([RIGHT], [WORSE]), ([RIGHT], [WRONG])]
    assert [pair.weight for pair in objective.pairs] == [1.0, 0.5, 0.5, 1.0]
    for pair in objective.pairs:
        chosen, rejected = objective.sequences[pair.chosen[0]], objective.sequences[pair.rejected[0]]
        assert chosen.owner == rejected.owner
        assert chosen.token_ids[: chosen.spans[0].start] == rejected.token_ids[: rejected.spans[0].start]
    assert {completions(objective, [index])[0] for index in objective.anchored} == {RIGHT}
    assert len(objective.anchored) == 6  # every taught state is anchored, also where nothing is rejected


def test_inverse_rewards_every_own_action_and_anchors_experts_actions() -> None:
    objective = make("inverse", rich_training_data())
    assert isinstance(objective, PolicyGradient)
    rewarded = [index for index in range(len(objective.sequences)) if index not in objective.anchored]
    assert len(rewarded) == 5 + 7
    assert len(objective.anchored) == 6
    for index in rewarded:
        [tokens] = completions(objective, [index])
        assert len(objective.behavior_logprobs[index]) == len(tokens)
        assert (objective.advantages[index] > 0) == (len(tokens) == 3)  # as the rewards stand to their mean


@pytest.mark.parametrize("name", ["inverse", "ppo"])
def test_rewarded_objectives_need_no_expert_and_without_an_anchor_take_none(name: str) -> None:
    own_episodes = attempt("c", 0.0, [own(RIGHT), own(WRONG)]), attempt("d", 1.0, [own(RIGHT)])
    assert completions(make(name, TrainingData((), own_episodes))) == [RIGHT, WRONG, RIGHT]
    training_data = replace(rich_training_data(), policy_episodes=own_episodes)
    assert not (held := make(name, training_data, replace(OPTIONS, anchor_weight=0.0))).anchored  # type: ignore[attr-defined]
    assert completions(held)[-3:] == [RIGHT, WRONG, RIGHT]


def test_eto_pairs_a_demonstration_with_failures_on_the_same_task_alone() -> None:
    objective = make("eto", rich_training_data())
    assert isinstance(objective, TrajectoryPreference)
    assert [completions(objective, pair.rejected) for pair in objective.pairs] == [[RIGHT, WRONG], [WORSE]]
    assert [completions(objective, pair.chosen) for pair in objective.pairs] == [[RIGHT] * 2, [RIGHT] * 2]
    for pair, task in zip(objective.pairs, ("t1", "t2"), strict=True):
        assert {objective.sequences[index].owner for index in (*pair.chosen, *pair.rejected)} == {(task,)}


def test_the_failures_on_one_task_weigh_as_one() -> None:
    failures = tuple(attempt(name, 0.0, [own(WRONG)], task="t") for name in "xyz")
    objective = make("eto", TrainingData((demonstration("a", (), task="t"),), failures))
    assert isinstance(objective, TrajectoryPreference)
    assert [pair.weight for pair in objective.pairs] == [pytest.approx(1 / 3)] * 3
    assert len(objective.sequences) == 1 + 3  # the demonstration's rows stand once


def test_rft_imitates_own_successes_and_nothing_else() -> None:
    assert completions(make("rft", rich_training_data())) == [RIGHT, RIGHT, WORSE]


def test_sft_rft_imitates_experts_and_own_successes_alike() -> None:
    objective = make("sft_rft", rich_training_data())
    assert isinstance(objective, Likelihood)
    assert completions(objective) == [RIGHT] * 6 + [RIGHT, RIGHT, WORSE]
    assert [row.owner[0] for row in objective.sequences][-3:] == ["d"] * 3  # type: ignore[index]


@pytest.mark.parametrize(("max_success_length", "learned"), [(1.0, {"short"}), (2.0, {"short", "detour"})])
def test_sft_rft_leaves_out_successes_that_took_longer_than_demonstrations_allow(
    max_success_length: float, learned: set[str]
) -> None:
    successes = tuple(
        attempt(name, 1.0, [own(RIGHT)] * num) for name, num in (("short", 2), ("detour", 4), ("lost", 5))
    )
    data = replace(rich_training_data(), policy_episodes=successes)  # its longest demonstration has two steps
    rows = make("sft_rft", data, replace(OPTIONS, max_success_length=max_success_length)).sequences
    assert {row.owner[0] for row in rows} == {"a", "b"} | learned  # type: ignore[index]
    counts = success_counts(data, replace(OPTIONS, max_success_length=max_success_length))
    assert counts == {"num_successes": 3.0, "num_detours": 3.0 - len(learned)}


@pytest.mark.parametrize("name", ["rft", "sft_rft"])
def test_what_nobody_could_read_is_no_example_though_its_episode_succeeded(name: str) -> None:
    success = attempt("a", 1.0, [own(RIGHT), replace(own(WRONG), is_malformed=True)])
    assert completions(make(name, TrainingData((), (success,)))) == [RIGHT]
    silent = attempt("b", 1.0, [replace(own(WRONG), is_malformed=True)])
    with pytest.raises(NothingToLearn):
        make(name, TrainingData((), (silent,)))


def test_sft_rft_is_sft_without_outcomes_and_rft_without_experts() -> None:
    rich = rich_training_data()
    unjudged = replace(rich, policy_episodes=tuple(replace(each, outcome=None) for each in rich.policy_episodes))
    assert make("sft_rft", unjudged).sequences == make("sft", unjudged).sequences
    alone = TrainingData((), tuple(each for each in rich.policy_episodes if each.episode_id == "d"))
    assert make("sft_rft", alone).sequences == make("rft", alone).sequences


def test_sft_rft_learns_the_expert_s_action_and_not_the_step_that_it_contradicts() -> None:
    success = attempt("c", 1.0, [own(RIGHT, True), own(WRONG, False)], expert=True)
    assert completions(make("sft_rft", TrainingData((), (success,)))) == [RIGHT, RIGHT, RIGHT]
    assert completions(make("rft", TrainingData((), (success,)))) == [RIGHT, WRONG]


@pytest.mark.parametrize("name", ["rft", "sft_rft", "ppo", "eto"])
def test_an_outcome_speaks_of_the_actions_that_were_taken_and_not_of_samples_beside_them(name: str) -> None:
    rich = rich_training_data()

    def sampled_besides(trajectory: Trajectory) -> Trajectory:
        states = (replace(s, policy_actions=(*s.policy_actions, own((6, 2)))) for s in trajectory.states)
        return replace(trajectory, states=tuple(states))

    judged = tuple(each for each in rich.policy_episodes if each.outcome is not None)
    besides = tuple(map(sampled_besides, judged))
    plain = make(name, replace(rich, policy_episodes=judged))
    assert make(name, replace(rich, policy_episodes=besides)).sequences == plain.sequences


def test_pivot_rewards_agreement_within_a_state_where_samples_differ_and_anchors_experts_everywhere() -> None:
    objective = make("pivot", rich_training_data())
    assert isinstance(objective, PolicyGradient)
    rewarded = [index for index in range(len(objective.sequences)) if index not in objective.anchored]
    assert [completions(objective, [index])[0] for index in rewarded] == [RIGHT, WRONG]
    assert [objective.sequences[index].owner for index in rewarded] == [("a", "a-0")] * 2
    assert [objective.advantages[index] for index in rewarded] == pytest.approx([1.0, -1.0])
    assert len(objective.anchored) == 6


def test_ppo_gives_every_action_its_episode_s_outcome_against_the_mean() -> None:
    objective = make("ppo", rich_training_data())
    assert isinstance(objective, PolicyGradient)
    assert completions(objective, sorted(objective.anchored)) == [RIGHT] * 6
    by_episode = {
        row.owner[0]: objective.advantages[index]  # type: ignore[index]
        for index, row in enumerate(objective.sequences)
        if index not in objective.anchored
    }
    assert by_episode == pytest.approx({"c": -(0.5**0.5), "d": 2**0.5, "e": -(0.5**0.5)})


@pytest.mark.parametrize("name", ["implicit", "inverse", "ppo"])
def test_own_actions_of_too_old_a_policy_are_left_out(name: str) -> None:
    def aged(trajectory: Trajectory, num_versions: int) -> Trajectory:
        states = [
            replace(
                state,
                policy_actions=tuple(replace(action, num_versions_old=num_versions) for action in state.policy_actions),
            )
            for state in trajectory.states
        ]
        return replace(trajectory, states=tuple(states))

    fresh = rich_training_data()
    training_data = replace(
        fresh, policy_episodes=tuple(aged(each, OPTIONS.max_versions_old) for each in fresh.policy_episodes)
    )
    assert make(name, training_data).sequences == make(name, fresh).sequences
    stale = replace(
        fresh, policy_episodes=tuple(aged(each, OPTIONS.max_versions_old + 1) for each in fresh.policy_episodes)
    )
    if name == "ppo":
        with pytest.raises(NothingToLearn):
            make(name, stale)
    else:
        without = replace(
            fresh,
            policy_episodes=tuple(
                replace(e, states=tuple(replace(s, policy_actions=()) for s in e.states)) for e in fresh.policy_episodes
            ),
        )
        assert make(name, stale).sequences == make(name, without).sequences != make(name, fresh).sequences


# ------------------------------------------------------------------------------- nothing to learn

UNSAMPLED = demonstration("b", ())
MASTERED = TrainingData(
    (demonstration("a", (own(RIGHT, True),), task="t1"),), (attempt("c", 1.0, [own(RIGHT)], task="t1"),)
)


@pytest.mark.parametrize(
    ("name", "training_data", "reason"),
    [
        ("sft", TrainingData(()), "no expert has acted or answered at any state"),
        (
            "implicit",
            TrainingData((), (attempt("c", 0.0, [own(WRONG)]),)),
            "no expert has acted or answered at any state",
        ),
        ("implicit", MASTERED, "did what the experts do at all 1 states"),
        ("implicit", TrainingData((demonstration("a", ()),)), "nobody knows what the policy does at the 1 states"),
        ("implicit", TrainingData((*MASTERED.demonstrations, UNSAMPLED)), "at all 1 states .* not sampled at 1 more"),
        ("inverse", TrainingData((demonstration("a", ()),)), "no own action"),
        ("eto", MASTERED, "no own episode failed on a demonstrated task: 1 own episodes, 1 succeeded, 0 failed"),
        (
            "eto",
            TrainingData((demonstration("a", ()),), (attempt("c", 0.0, [own(WRONG)]),)),  # neither says its task
            "no own episode failed on a demonstrated task: 1 own episodes, 0 succeeded, 1 failed, 0 demonstrated tasks",
        ),
        (
            "rft",
            TrainingData((), (attempt("c", 0.0, [own(WRONG)]), attempt("d", None, [own(RIGHT)]))),
            "no own success can be imitated: 2 own",
        ),
        ("dft", TrainingData(()), "no expert has acted or answered at any state"),
        (
            "sft_rft",
            TrainingData((), (attempt("c", 0.0, [own(WRONG)]),)),
            "no own success can be imitated: 1 own episodes",
        ),
        ("pivot", MASTERED, "no pivot among 1 states"),
        ("pivot", TrainingData((demonstration("a", (own(WRONG, False), own(WORSE, False))),)), "no pivot among 1"),
        ("ppo", MASTERED, "the outcomes of all own episodes are equal: 1 own episodes, 1 succeeded"),
        (
            "ppo",  # each was chosen among several draws
            TrainingData(
                (), tuple(attempt(of, float(of == "c"), [replace(own(RIGHT), behavior_logprobs=())]) for of in "cd")
            ),
            "no step of the 2 own episodes with an outcome is fresh enough and was drawn",
        ),
        ("ppo", TrainingData((demonstration("a", ()),)), "the outcomes of all own episodes are equal: 0 own episodes"),
    ],
)
def test_material_without_a_lesson_is_refused_with_the_reason(
    name: str, training_data: TrainingData, reason: str
) -> None:
    with pytest.raises(NothingToLearn, match=reason):
        make(name, training_data)


def test_informative_only_finds_nothing_where_all_is_mastered() -> None:
    with pytest.raises(NothingToLearn, match="did what the experts do at all 1 states"):
        make("sft", MASTERED, replace(OPTIONS, informative_only=True))


def test_outcomes_that_are_nearly_a_success_are_told_to_be_none() -> None:
    """Of a hundred episodes rated 0.95 it was said that all had failed, and not that 1 alone is a success."""
    nearly = TrainingData((), tuple(attempt(f"own {value}", value, [own(RIGHT)]) for value in (0.95, 0.3, 0.0)))
    with pytest.raises(NothingToLearn) as refusal:
        make("rft", nearly)
    assert str(refusal.value).endswith(
        "3 own episodes, 0 succeeded, 3 failed, 2 of them in part (only an outcome of exactly 1 is a success)"
    )


def test_equal_rewards_are_no_lesson() -> None:
    with pytest.raises(NothingToLearn, match="rewards all 12 own actions alike"):
        objective_of("inverse", rich_training_data(), OPTIONS, EqualRewards())


def test_an_unknown_objective_is_refused_with_the_known_ones() -> None:
    with pytest.raises(
        ValueError, match="no objective is called 'dpo'; there are: sft, sft_rft, dft, implicit, inverse"
    ):
        make("dpo", rich_training_data())


# ------------------------------------------------------------------------ packed equals row by row


@st.composite
def materials(draw: st.DrawFn) -> TrainingData:
    """Random training data with a lesson for every objective."""
    token = st.integers(0, 39)
    tokens = st.lists(token, min_size=1, max_size=5).map(tuple)

    def states(name: str, is_own: bool) -> tuple[State, ...]:
        prompt, found = draw(tokens), []
        for at in range(draw(st.integers(1, 3))):
            expert, num_own = draw(tokens), 1 if is_own else draw(st.integers(0, 2))
            actions = [draw(tokens) for _ in range(num_own)]
            agree = [own(action, draw(st.booleans())) for action in actions]
            is_answered = not is_own or draw(st.booleans())
            found.append(State(f"{name}-{at}", prompt, expert if is_answered else None, tuple(agree)))
            prompt += (actions[0] if is_own else expert) + draw(tokens)
        return tuple(found)

    demonstrations = [Trajectory(f"d{at}", states(f"d{at}", False), f"t{at}", 1.0) for at in range(2)]
    disagreeing = State("d2-0", draw(tokens), (1, 2), (own((3,), False),))
    episodes = [Trajectory(f"o{at}", states(f"o{at}", True), f"t{at % 2}", float(at == 2)) for at in range(4)]
    pivot = State("d3-0", draw(tokens), (1, 2), (own((1, 2), True), own((3,), False)))
    further = Trajectory("d2", (disagreeing,), "t2", 1.0), Trajectory("d3", (pivot,), "t3", 1.0)
    return TrainingData((*demonstrations, *further), tuple(episodes))


class HashedRewards:
    def rewards(self, sequences: Sequence[ScoredSequence]) -> Sequence[float]:
        return [hash(sequence.token_ids) % 101 / 101 for sequence in sequences]


@pytest.mark.parametrize("name", OBJECTIVES)
@given(training_data=materials())
@settings(deadline=None, max_examples=8)
def test_packed_loss_and_gradients_equal_row_by_row(name: str, training_data: TrainingData) -> None:
    network = NETWORKS["qwen2"]
    objective = objective_of(name, training_data, OPTIONS, HashedRewards())
    with torch.no_grad():
        reference = [plain_logprobs(network, row).float() - 0.05 for row in objective.sequences]

    def packed() -> Tensor:
        totals = [
            objective.loss(score(network, to_batch(pack, "cpu")), reference).total
            for pack in pack_sequences(objective.sequences, 400)
        ]
        return torch.stack(totals).sum()

    def row_by_row() -> Tensor:
        tokens = [plain_logprobs(network, row).float() for row in objective.sequences]
        sequence_of_token = torch.repeat_interleave(torch.arange(len(tokens)), torch.tensor(list(map(len, tokens))))
        joined = torch.cat(tokens)
        scored = SequenceLogprobs(tuple(range(len(tokens))), joined, sequence_of_token, torch.ones_like(joined))
        return objective.loss(scored, reference).total

    (packed_loss, packed_gradients), (plain_loss, plain_gradients) = map(_with_gradients, (packed, row_by_row))
    assert packed_loss == pytest.approx(plain_loss, rel=1e-4, abs=1e-4)
    scale = max(gradient.abs().max().item() for gradient in plain_gradients)
    for left, right in zip(packed_gradients, plain_gradients, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4 * scale)


def _with_gradients(loss: Callable[[], Tensor]) -> tuple[float, list[Tensor]]:
    network = NETWORKS["qwen2"]
    network.zero_grad()
    value = loss()
    value.backward()
    return value.item(), [p.grad.clone() for p in network.parameters() if p.grad is not None]
