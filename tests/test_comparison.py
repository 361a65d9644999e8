"""Actions are compared by what they mean; states that teach nothing are dropped, each with its reason."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.data.comparison import (
    Comparison,
    DropReason,
    Verdict,
    compare,
    compare_state,
    report_on,
)
from policies.chat.chat_protocol import message_action
from policies.chat.meaning import canonical_json
from policies.types import Action, FinalAnswer, MalformedAction, ToolCall, ToolCalls
from tools.worlds import load_world
from tools.worlds.world import WorldEpisode


def calling(tool: str, /, **arguments: Any) -> ToolCalls:
    return ToolCalls((ToolCall("c", tool, arguments),))


def verdict(left: Action, right: Action) -> Verdict:
    return compare(left, right).verdict


MALFORMED = MalformedAction("<tool_call>{", "it is not JSON")

# ------------------------------------------------------------------------------------------- made by chance

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
CALLS = st.builds(
    ToolCall,
    id=st.text("abc", max_size=3),
    name=st.sampled_from(["look_up", "pick_item"]),
    arguments=st.dictionaries(st.sampled_from("abc"), JSON_VALUES, max_size=3),
)
SOUND_ACTIONS = st.builds(
    ToolCalls, calls=st.lists(CALLS, min_size=1, max_size=3).map(tuple), text=st.text(max_size=5)
) | st.builds(FinalAnswer, text=st.text(max_size=8))
ACTIONS = SOUND_ACTIONS | st.just(MALFORMED)


def respelled(value: Any) -> Any:
    """The same JSON value, written otherwise: keys in another order, whole numbers with and without a point."""
    match value:
        case dict():
            return {key: respelled(value[key]) for key in reversed(value)}
        case list():
            return [respelled(item) for item in value]
        case bool():
            return value
        case int() if abs(value) < 2**53:
            return float(value)
        case float() if value.is_integer():
            return int(value)
    return value


@settings(max_examples=150, deadline=None)
@given(SOUND_ACTIONS)
def test_an_action_agrees_with_itself(action: Action) -> None:
    assert compare(action, action).agrees


@settings(max_examples=150, deadline=None)
@given(ACTIONS, ACTIONS)
def test_the_verdict_does_not_depend_on_the_side(left: Action, right: Action) -> None:
    assert verdict(left, right) == verdict(right, left)


@settings(max_examples=150, deadline=None)
@given(st.lists(CALLS, min_size=1, max_size=3), st.randoms(use_true_random=False))
def test_spelling_order_ids_and_words_beside_calls_are_of_no_account(calls: list[ToolCall], chance: Any) -> None:
    others = [
        ToolCall(f"id_{n}", call.name, json.loads(json.dumps(respelled(call.arguments), indent=3)))
        for n, call in enumerate(calls)
    ]
    chance.shuffle(others)
    assert verdict(ToolCalls(tuple(calls)), ToolCalls(tuple(others), "Let me see.", "Hm.")) is Verdict.SAME_ACTION


@settings(max_examples=150, deadline=None)
@given(JSON_VALUES, JSON_VALUES)
def test_two_arguments_agree_exactly_when_they_are_the_same_json_value(left: Any, right: Any) -> None:
    assert (canonical_json(left) == canonical_json(right)) == same_json(left, right)


def same_json(left: Any, right: Any) -> bool:
    """Python's equality, but true and false are no numbers."""
    if isinstance(left, bool) or isinstance(right, bool):
        return left is right
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(same_json(left[key], right[key]) for key in left)
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(same_json, left, right))
    return left == right


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=12), st.text(" \t\n", max_size=3))
def test_case_and_white_space_of_an_answer_are_of_no_account(text: str, space: str) -> None:
    assert verdict(FinalAnswer(f"{space}{text}"), FinalAnswer(f"{text.casefold()} {space}")) is Verdict.SAME_TEXT


# ---------------------------------------------------------------------------------------------- by example


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (calling("pick", n=1), calling("pick", n=True)),
        (calling("pick", n=1), calling("pick", n="1")),
        (calling("pick", n=None), calling("pick")),
        (calling("pick", items=[1, 2]), calling("pick", items=[2, 1])),
        (calling("pick", city="Oslo"), calling("pick", city="oslo")),
        (calling("pick", n=1), calling("look", n=1)),
        (calling("pick"), FinalAnswer("pick {}")),
        (ToolCalls(calling("pick").calls * 2), calling("pick")),
        (FinalAnswer("It has left."), FinalAnswer("It has not left.")),
    ],
)
def test_another_value_tool_number_or_kind_is_another_action(left: Action, right: Action) -> None:
    assert verdict(left, right) is Verdict.DIFFERENT


def test_a_malformed_action_never_agrees_not_even_with_itself_or_in_a_world() -> None:
    for other in (MALFORMED, FinalAnswer(MALFORMED.text), calling("pick")):
        comparison = compare(MALFORMED, other, same_effect=lambda a, b: True)
        assert comparison.verdict is Verdict.MALFORMED
        assert not comparison.agrees


def test_unicode_spellings_of_one_answer_agree() -> None:
    assert verdict(FinalAnswer("Zu\u0308rich \u2460"), FinalAnswer("Z\u00fcrich 1")) is Verdict.SAME_TEXT


def test_arguments_nested_too_deeply_to_compare_are_another_action_and_no_crash() -> None:
    assert verdict(calling("pick", a=nested(300)), calling("pick", a=nested(300))) is Verdict.SAME_ACTION
    assert verdict(calling("pick", a=nested(5000)), calling("pick", a=1)) is Verdict.DIFFERENT


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def test_a_world_is_not_asked_where_the_calls_are_the_same() -> None:
    def refuse(_a: Any, _b: Any) -> bool:
        raise AssertionError("asked")

    assert compare(calling("pick", n=1), calling("pick", n=1.0), refuse).verdict is Verdict.SAME_ACTION


# --------------------------------------------------------------------------------------------- order desk


def desk_at_the_parcel() -> WorldEpisode:
    """An order whose item is in the expert's hands: the next step packs it."""
    world = load_world("order_desk")
    episode = world.open(world.task("train", 5))
    while not episode.expert_skill().startswith("pack_parcel"):
        episode.play(episode.expert_action())
    return episode


def expert_of(episode: WorldEpisode) -> ToolCalls:
    action = message_action(episode.expert_action())
    assert isinstance(action, ToolCalls)
    return action


def test_the_desk_says_that_other_spellings_of_a_name_lead_to_the_same_place() -> None:
    world = load_world("order_desk")
    episode = world.open(world.task("train", 5))
    expert = expert_of(episode)
    name = expert.calls[0].arguments["name"]
    shouted = calling("look_up_customer", name=f" {name.upper()} ")
    assert compare(shouted, expert, episode.same_effect).verdict is Verdict.SAME_EFFECT
    assert compare(shouted, expert).verdict is Verdict.DIFFERENT
    stranger = calling("look_up_customer", name="Nobody Atall")
    assert compare(stranger, expert, episode.same_effect).verdict is Verdict.DIFFERENT


def test_the_desk_tells_the_right_box_from_the_wrong_one() -> None:
    episode = desk_at_the_parcel()
    expert = expert_of(episode)
    right = expert.calls[0].arguments["box"]
    for box in ("padded", "wooden", "plain"):
        expected = Verdict.SAME_ACTION if box == right else Verdict.DIFFERENT
        assert compare(calling("pack_parcel", box=box), expert, episode.same_effect).verdict is expected
    assert compare(FinalAnswer("Done."), expert, episode.same_effect).verdict is Verdict.DIFFERENT


def test_the_desk_takes_any_words_for_its_last_answer() -> None:
    episode = desk_at_the_parcel()
    while not episode.is_done:
        episode.play(episode.expert_action())
    expert = message_action(episode.expert_action())
    assert compare(FinalAnswer("All settled."), expert, episode.same_effect).verdict is Verdict.SAME_EFFECT
    assert compare(FinalAnswer("All settled."), expert).verdict is Verdict.DIFFERENT
    assert compare(calling("check_item", item="x"), expert, episode.same_effect).verdict is Verdict.DIFFERENT


def test_asking_the_desk_changes_nothing_in_it() -> None:
    episode = desk_at_the_parcel()
    before = episode.expert_action()
    compare(calling("ship_parcel", city="Oslo", by="air"), expert_of(episode), episode.same_effect)
    assert episode.expert_action() == before


# ------------------------------------------------------------------------------------------------- states

EXPERT = calling("pick", n=1)
SAME, OTHER = calling("pick", n=1.0), calling("pick", n=2)


@pytest.mark.parametrize(
    ("samples", "expert", "rate", "drop_reason"),
    [
        ([SAME, SAME], EXPERT, 1.0, DropReason.MASTERED),
        ([SAME], EXPERT, 1.0, DropReason.MASTERED),
        ([SAME, OTHER], EXPERT, 0.5, None),
        ([SAME, SAME, SAME, MALFORMED], EXPERT, 0.75, None),
        ([OTHER, OTHER], EXPERT, 0.0, None),
        ([MALFORMED, MALFORMED], EXPERT, 0.0, None),
        ([], EXPERT, None, DropReason.NO_SAMPLES),
        ([SAME], MALFORMED, 0.0, DropReason.EXPERT_MALFORMED),
        ([], MALFORMED, None, DropReason.EXPERT_MALFORMED),
    ],
)
def test_a_state_is_kept_where_not_all_samples_agree_with_the_expert(
    samples: list[Action], expert: Action, rate: float | None, drop_reason: DropReason | None
) -> None:
    state = compare_state(samples, expert)
    assert state.agreement_rate == rate
    assert state.drop_reason is drop_reason


def test_samples_keep_their_order() -> None:
    assert [comparison.agrees for comparison in compare_state([SAME, OTHER, SAME], EXPERT).comparisons] == [
        True,
        False,
        True,
    ]


def test_the_report_counts_every_state_once_and_every_reason() -> None:
    states = [
        compare_state([SAME, SAME], EXPERT),
        compare_state([SAME, OTHER], EXPERT),
        compare_state([MALFORMED, MALFORMED], EXPERT),
        compare_state([], EXPERT),
        compare_state([OTHER], MALFORMED),
    ]
    report = report_on(states)
    assert json.loads(json.dumps(report.to_json())) == {
        "num_states": 5,
        "num_kept": 2,
        "num_dropped": {"mastered": 1, "no_samples": 1, "expert_malformed": 1},
        "num_verdicts": {"malformed": 2, "same_action": 3, "same_effect": 0, "same_text": 0, "different": 1},
        "num_all_malformed": 1,
        "agreement_rate": 0.5,
    }


def test_a_report_on_nothing_has_no_rate() -> None:
    report = report_on([])
    assert report.num_states == report.num_kept == 0
    assert report.agreement_rate is None


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.lists(st.sampled_from([SAME, OTHER, MALFORMED]), max_size=3), st.sampled_from([EXPERT, MALFORMED]))
    )
)
def test_kept_and_dropped_add_up_to_all_states(cases: list[tuple[list[Action], Action]]) -> None:
    report = report_on(compare_state(samples, expert) for samples, expert in cases)
    assert report.num_kept + sum(report.num_dropped.values()) == report.num_states == len(cases)


def test_a_comparison_keeps_both_actions() -> None:
    other = replace(EXPERT, text="Now.")
    assert compare(other, EXPERT) == Comparison(other, EXPERT, Verdict.SAME_ACTION)
