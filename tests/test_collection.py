"""What a cycle reads of the log: what is new, some of what is old, and nothing of long ago."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from learner.data.collect import collect, dealt_demonstrations, main_line
from learner.data.training_data import NO_ANCESTOR
from learner.options import CollectionOptions
from policies.types import FinalAnswer
from runtime.store.episodes import Actor, Correction, Episode, Outcome, Purpose, Step, new_id
from runtime.store.step_log import StepLog
from tests.logged_episodes import step

LINEAGE = ("agent-v0004", "agent-v0003", "agent-v0001", "base")
OPTIONS = CollectionOptions(
    held_out_share=0.5, max_own_episodes=8, replay_share=0.25, max_versions_old=2, anchor_share=0.0
)


@pytest.fixture
def log(tmp_path: Path) -> Iterator[StepLog]:
    log = StepLog(tmp_path / "agent.db")
    yield log
    log.close()


def episode(
    log: StepLog, adapter: str = "agent-v0004", actor: Actor = Actor.POLICY, purpose: Purpose = Purpose.SERVE
) -> str:
    """An episode of one step; returns its id."""
    new = Episode(new_id("ep"), actor, purpose, adapter)
    log.append(new, step(new.id)).result()
    return new.id


def test_new_episodes_are_collected_and_a_share_of_the_old_ones_is_replayed(log: StepLog) -> None:
    old = {episode(log) for _ in range(10)}
    first = collect(log, None, LINEAGE, OPTIONS, seed=0)
    assert {each.episode.id for each in first.policy_episodes} <= old
    assert len(first.policy_episodes) == OPTIONS.max_own_episodes
    new = {episode(log) for _ in range(3)}
    second = collect(log, first.last_step_id, LINEAGE, OPTIONS, seed=0)
    ids = {each.episode.id for each in second.policy_episodes}
    assert new <= ids
    assert len(ids & old) == 2  # a quarter of eight
    wanted = {"own_new": 3, "own_replayed": 2, "own_too_old": 0, "own_over_limit": 0, "own_held_out": 0}
    assert second.counts == wanted | {"demonstrations": 0, "held_out": 0, "anchors": 0}


def test_what_is_said_of_an_episode_after_it_was_read_is_learned_first(log: StepLog) -> None:
    """Users say on the next day how it went: of a busy server's episodes such a one was hardly ever read again."""
    old = [episode(log) for _ in range(40)]
    elsewhere = episode(log, "agent-v0002")  # of another line
    first = collect(log, None, LINEAGE, OPTIONS, seed=0)
    told = old[7]
    for each, value in ((told, 0.0), (elsewhere, 1.0), (told, 1.0)):
        log.append(Outcome(new_id("out"), each, value, "user")).result()
    for seed in range(5):
        second = collect(log, first.last_step_id, LINEAGE, OPTIONS, seed)
        replayed = {each.episode.id: each.outcome for each in second.policy_episodes}
        assert replayed[told] == 1.0
        assert (len(replayed), second.counts["own_replayed"]) == (2, 2)
    none = collect(log, first.last_step_id, LINEAGE, replace(OPTIONS, replay_share=0.0), seed=0)
    assert none.policy_episodes == []


def test_steps_beside_the_main_line_are_read_to_be_rewarded(log: StepLog) -> None:
    """Of a request with `n` the other choices had no rewards, and neither had a way that its client left."""
    chosen_from = episode(log)
    (first,) = log.steps(chosen_from)
    other, left, chosen, newest = (step(chosen_from, parent) for parent in (None, first, first, first))
    newest = replace(newest, parent_id=chosen.id, index=2)
    log.append(other, left, chosen, newest).result()
    episode(log)
    read = collect(log, None, LINEAGE, OPTIONS, seed=0)
    lines = {each.episode.id: each.path for each in read.policy_episodes}
    assert [step.id for step in lines[chosen_from]] == [first.id, chosen.id, newest.id]
    beside = {tuple(step.id for step in each.path) for each in read.rewarded_alone}
    assert beside == {(other.id,), (left.id,)}


def test_a_demonstration_that_another_one_repeats_is_rewarded_and_learned_once(log: StepLog) -> None:
    """Traces hold a record for each call, with all before it: of a run of three steps the first was learned three
    times."""
    calls = [(5, 6), (5, 6, 7, 8), (5, 6, 7, 8, 9)]
    for number in (1, 3, 2):
        new, path = Episode(f"demo_{number}", Actor.EXPERT, Purpose.SERVE, "expert"), list[Step]()
        for prompt in calls[:number]:
            path.append(replace(step(new.id, path[-1] if path else None), prompt_token_ids=prompt))
        log.append(new, *path).result()
    alone = Episode("demo_alone", Actor.EXPERT, Purpose.SERVE, "expert")
    log.append(alone, replace(step(alone.id), prompt_token_ids=(5, 6, 7))).result()
    read = collect(log, None, LINEAGE, replace(OPTIONS, held_out_share=0.0), seed=0)
    assert {each.episode.id for each in read.demonstrations} == {"demo_3", "demo_alone"}
    assert {each.episode.id for each in read.rewarded_alone} == {"demo_1", "demo_2"}
    assert read.counts["demonstrations_repeated"] == 2
    dealt = dealt_demonstrations(log, replace(OPTIONS, held_out_share=0.0))
    assert {each.episode.id for each in dealt.demonstrations} == {"demo_3", "demo_alone"}


def test_a_demonstration_that_another_one_repeats_names_the_task_of_both(log: StepLog) -> None:
    """Left out of what names tasks, it let go of what was held out with it: the longer one, and own episodes."""
    for name, task, calls in (("demo_short", "ticket-0", [(5, 6)]), ("demo_long", None, [(5, 6), (5, 6, 7, 8)])):
        new, path = Episode(name, Actor.EXPERT, Purpose.SERVE, "expert", task=task), list[Step]()
        for prompt in calls:
            path.append(replace(step(new.id, path[-1] if path else None), prompt_token_ids=prompt))
        log.append(new, *path).result()
    own = Episode("ep_own", Actor.POLICY, Purpose.SERVE, "agent-v0004", task="ticket-0")
    log.append(own, replace(step(own.id), new_messages=({"role": "user", "content": "Other words."},))).result()
    read = collect(log, None, LINEAGE, replace(OPTIONS, held_out_share=1.0), seed=0)
    assert [each.episode.id for each in read.held_out] == ["demo_long"]
    assert [each.episode.id for each in read.own_held_out] == ["ep_own"]


def test_an_episode_that_goes_on_is_new_again(log: StepLog) -> None:
    going_on = episode(log)
    first = collect(log, None, LINEAGE, OPTIONS, seed=0)
    log.append(step(going_on, parent=log.steps(going_on)[0])).result()
    second = collect(log, first.last_step_id, LINEAGE, OPTIONS, seed=0)
    assert [(each.episode.id, len(each.path)) for each in second.policy_episodes] == [(going_on, 2)]
    assert second.counts["own_new"] == 1


def test_what_policies_of_long_ago_did_is_left_out_and_counted(log: StepLog) -> None:
    kept = {episode(log, name): number for number, name in enumerate(LINEAGE[:3])}
    episode(log, "base")  # three versions behind
    episode(log, "agent-v0002")  # of another line
    collected = collect(log, None, LINEAGE, OPTIONS, seed=0)
    assert {each.episode.id: each.num_versions_old for each in collected.policy_episodes} == kept
    assert collected.counts["own_too_old"] == 2


def test_what_a_rolled_back_adapter_did_is_left_out(log: StepLog) -> None:
    """A cycle after a rollback to the base once ended with a KeyError."""
    episode(log, "agent-v0001")
    kept = episode(log, "base")
    collected = collect(log, None, ("base",), OPTIONS, seed=0)
    assert [each.episode.id for each in collected.policy_episodes] == [kept]
    assert collected.counts["own_too_old"] == 1


def test_evaluations_are_not_learned_from(log: StepLog) -> None:
    episode(log, purpose=Purpose.EVALUATION)
    assert collect(log, None, LINEAGE, OPTIONS, seed=0).policy_episodes == []


def test_held_out_demonstrations_stay_held_out(log: StepLog) -> None:
    for _ in range(40):
        episode(log, actor=Actor.EXPERT)
    first = collect(log, None, LINEAGE, OPTIONS, seed=0)
    again = collect(log, first.last_step_id, LINEAGE, OPTIONS, seed=1)
    held_out, trained = ({each.episode.id for each in side} for side in (first.held_out, first.demonstrations))
    assert 5 < len(held_out) < 35
    assert not held_out & trained
    assert {each.episode.id for each in again.held_out} == held_out


def test_what_was_corrected_is_learned_however_old_it_is_and_wherever_it_branched_off(log: StepLog) -> None:
    old = episode(log, "agent-v0002")  # of a line that was rolled back
    branched = episode(log)
    first = log.steps(branched)[0]
    side, newest = step(branched, first), replace(step(branched, first), created_at=1.0)
    log.append(side, newest).result()
    for number, corrected in enumerate((log.steps(old)[0], side)):
        log.append(Correction(f"cor_{number}", corrected.id, FinalAnswer("That."), (9,), "user")).result()
    collected = collect(log, None, LINEAGE, OPTIONS, seed=0)
    found = {each.path[-1].id: each.num_versions_old for each in collected.policy_episodes}
    assert found == {newest.id: 0, side.id: NO_ANCESTOR, log.steps(old)[0].id: NO_ANCESTOR}


def test_a_task_is_held_out_as_a_whole(log: StepLog) -> None:
    """Its demonstrations fall on one side, and what the policy did at it is not learned from either."""
    for number in range(30):
        for actor in (Actor.EXPERT, Actor.EXPERT, Actor.POLICY):
            new = Episode(new_id("ep"), actor, Purpose.SERVE, "agent-v0004", task=f"world/train/{number}")
            log.append(new, step(new.id)).result()
    options = replace(OPTIONS, max_own_episodes=100)
    collected = collect(log, None, LINEAGE, options, seed=0)
    held_out, trained, own = (
        [each.episode.task for each in side]
        for side in (collected.held_out, collected.demonstrations, collected.policy_episodes)
    )
    assert 5 < len(set(held_out)) < 25
    assert len(held_out) == 2 * len(set(held_out))
    assert not set(held_out) & {*trained, *own}
    assert set(own) == set(trained)
    assert collected.counts["own_held_out"] == len(set(held_out))


def test_an_episode_that_was_promoted_to_a_held_out_demonstration_is_not_learned_from(log: StepLog) -> None:
    options = replace(OPTIONS, held_out_share=1.0)
    own = episode(log)
    asked = step(own, asked=f"What next in {own}?")
    promoted = Episode(new_id("ep"), Actor.EXPERT, Purpose.SERVE, "expert")
    log.append(promoted, replace(asked, id=new_id("step"), episode_id=promoted.id)).result()
    collected = collect(log, None, LINEAGE, options, seed=0)
    assert ([each.episode.id for each in collected.held_out], collected.policy_episodes) == ([promoted.id], [])


def test_a_large_import_is_drawn_from(log: StepLog) -> None:
    for _ in range(30):
        episode(log, actor=Actor.EXPERT)
    options = replace(OPTIONS, max_demonstrations=4)
    first, again, other = (collect(log, None, LINEAGE, options, seed=seed) for seed in (0, 0, 1))
    assert len(first.demonstrations) == len(first.held_out) == 4
    assert first.counts["demonstrations"] + first.counts["held_out"] == 30
    assert first.demonstrations == again.demonstrations
    assert first.demonstrations != other.demonstrations


def test_the_newest_outcome_counts(log: StepLog) -> None:
    told = episode(log)
    outcomes = (Outcome(f"out_{n}", told, float(n), "user", created_at=1.0 + n) for n in (0, 1))
    log.append(*outcomes).result()
    assert [each.outcome for each in collect(log, None, LINEAGE, OPTIONS, seed=0).policy_episodes] == [1.0]


def test_the_main_line_leads_to_the_newest_step() -> None:
    first = step("ep", step_id="first")
    left, right = step("ep", first, "left"), replace(step("ep", first, "right"), created_at=1.0)
    last = replace(step("ep", right, "last"), created_at=2.0)
    assert [each.id for each in main_line([first, left, right, last])] == ["first", "right", "last"]
    assert main_line([]) == ()


def test_a_state_is_the_conversation_before_its_step(log: StepLog) -> None:
    told = episode(log)
    log.append(step(told, parent=log.steps(told)[0])).result()
    (own,) = collect(log, None, LINEAGE, OPTIONS, seed=0).policy_episodes
    assert [len(state.messages) for state in own.states()] == [1, 3]
    assert [message["role"] for message in own.states()[1].messages] == ["user", "assistant", "user"]
