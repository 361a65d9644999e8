"""Rows that share prefixes share tokens, and nothing is lost, doubled or seen that should not be."""

from __future__ import annotations

import random
import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.packing.prefix_tree import Pack, ScoredSequence, Span, pack_sequences


@st.composite
def forests(draw: st.DrawFn) -> list[ScoredSequence]:
    """Rows that branch off each other at random places, some of them equal, some the prefix of another."""
    rows: list[ScoredSequence] = []
    for number in range(draw(st.integers(1, 12))):
        stem = draw(st.sampled_from(rows)).token_ids if rows and draw(st.booleans()) else ()
        stem = stem[: draw(st.integers(0, len(stem)))]
        tail = draw(st.lists(st.integers(0, 3), min_size=0 if len(stem) > 1 else 2, max_size=8))
        rows.append(
            ScoredSequence(
                stem + tuple(tail), draw(spans_of(len(stem) + len(tail))), owner=draw(st.integers(0, number))
            )
        )
    return rows


@st.composite
def spans_of(draw: st.DrawFn, length: int) -> tuple[Span, ...]:
    cuts = sorted(draw(st.sets(st.integers(1, length), min_size=2, max_size=6)))
    weights = st.floats(0.0, 2.0)
    return tuple(Span(cuts[i], cuts[i + 1], draw(weights)) for i in range(0, len(cuts) - 1, 2))


def ancestors(pack: Pack, position: int) -> list[int]:
    """The positions a token sees, itself last."""
    return [other for other in range(position + 1) if position < pack.subtree_ends[other]]


def trie_size(rows: list[ScoredSequence]) -> int:
    """The number of different prefixes: what a tree of these rows must have."""
    return len({row.token_ids[:length] for row in rows for length in range(1, len(row.token_ids) + 1)})


def owner_sizes(rows: list[ScoredSequence]) -> dict[object, int]:
    return {owner: trie_size([row for row in rows if row.owner == owner]) for owner in {row.owner for row in rows}}


def targets_of(row: ScoredSequence) -> list[int]:
    return [place for span in row.spans for place in range(span.start, span.stop)]


@given(forests(), st.integers(0, 20))
@settings(deadline=None, max_examples=150)
def test_every_row_is_scored_once_from_exactly_its_own_context(rows: list[ScoredSequence], slack: int) -> None:
    packs = pack_sequences(rows, token_budget=max(owner_sizes(rows).values()) + slack)
    assert Counter(scored.sequence for pack in packs for scored in pack.packed_sequences) == Counter(range(len(rows)))
    for pack in packs:
        for scored in pack.packed_sequences:
            row = rows[scored.sequence]
            weights = [span.weight for span in row.spans for _ in range(span.start, span.stop)]
            assert scored.weights.tolist() == weights
            for place, position, target in zip(targets_of(row), scored.positions, scored.target_ids, strict=True):
                seen = ancestors(pack, position)
                assert tuple(pack.token_ids[seen]) == row.token_ids[:place]
                assert pack.depths[seen].tolist() == list(range(place))
                assert target == row.token_ids[place]


@given(forests(), st.integers(0, 20))
@settings(deadline=None, max_examples=150)
def test_packs_keep_the_budget_share_all_they_can_and_part_no_owner(rows: list[ScoredSequence], slack: int) -> None:
    budget = max(owner_sizes(rows).values()) + slack
    packs = pack_sequences(rows, budget)
    home: dict[object, int] = {}
    for number, pack in enumerate(packs):
        assert pack.num_tokens <= budget
        assert pack.num_tokens == trie_size([rows[scored.sequence] for scored in pack.packed_sequences])
        for scored in pack.packed_sequences:
            assert home.setdefault(rows[scored.sequence].owner, number) == number


@given(forests(), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=50)
def test_the_order_of_the_rows_does_not_matter(rows: list[ScoredSequence], shuffler: random.Random) -> None:
    order = list(range(len(rows)))
    shuffler.shuffle(order)
    [pack] = pack_sequences(rows, token_budget=1000)
    [shuffled] = pack_sequences([rows[index] for index in order], token_budget=1000)
    assert pack.token_ids.tolist() == shuffled.token_ids.tolist()
    assert pack.depths.tolist() == shuffled.depths.tolist()
    assert pack.subtree_ends.tolist() == shuffled.subtree_ends.tolist()
    positions = {scored.sequence: scored.positions.tolist() for scored in pack.packed_sequences}
    assert {order[scored.sequence]: scored.positions.tolist() for scored in shuffled.packed_sequences} == positions


def trajectory(num_steps: int, seed: int = 0) -> list[ScoredSequence]:
    """32 tokens of observation and 16 of action a step; at every step the expert's and the agent's action."""
    draw = random.Random(seed)
    context: tuple[int, ...] = ()
    rows = []
    for step in range(num_steps):
        context += tuple(draw.randrange(1000) for _ in range(32))
        actions = [tuple(draw.randrange(1000) for _ in range(16)) for _ in range(2)]
        span = (Span(len(context), len(context) + 16),)
        rows += [ScoredSequence(context + action, span, owner=(seed, step)) for action in actions]
        context += actions[0]
    return rows


@pytest.mark.parametrize("num_steps", [1, 5, 40])
def test_a_trajectory_with_two_branches_a_step_takes_linear_tokens(num_steps: int) -> None:
    [pack] = pack_sequences(trajectory(num_steps), token_budget=10_000)
    assert pack.num_tokens == num_steps * (32 + 16 + 16)


def test_packs_are_filled_with_whole_trajectories_where_they_fit() -> None:
    rows = [row for seed in range(6) for row in trajectory(5, seed)]  # 320 tokens each, nothing in common
    sizes = [pack.num_tokens for pack in pack_sequences(rows, token_budget=700)]
    assert sizes == [640, 640, 640]


def test_a_trajectory_larger_than_the_budget_fills_its_packs_and_repeats_only_its_context() -> None:
    packs = pack_sequences(trajectory(20), token_budget=1100)
    first_steps = [min(scored.sequence for scored in pack.packed_sequences) // 2 for pack in packs]
    assert first_steps == [0, 17]  # 17 * 64 = 1088
    assert [pack.num_tokens for pack in packs] == [17 * 64, 17 * 48 + 3 * 64]


def test_many_trajectories_under_one_system_prompt_are_cut_between_them() -> None:
    prompt = tuple(range(2000, 2100))
    rows = []
    for seed in range(12):
        for row in trajectory(5, seed):
            spans = (Span(row.spans[0].start + 100, row.spans[0].stop + 100),)
            rows.append(ScoredSequence(prompt + row.token_ids, spans, row.owner))
    sizes = [pack.num_tokens for pack in pack_sequences(rows, token_budget=1500)]
    assert sizes == [100 + 4 * 320] * 3


def test_an_owner_larger_than_the_budget_is_named() -> None:
    with pytest.raises(ValueError, match=r"sequences of \(0, 4\) need 256 tokens, the budget is 250"):
        pack_sequences(trajectory(5), token_budget=250)


def test_no_rows_give_no_packs() -> None:
    assert pack_sequences([], token_budget=10) == []


def test_large_token_ids_sort_and_survive() -> None:
    rows = [ScoredSequence((0, token, 7), (Span(1, 3),), owner=token) for token in (255, 256, 65_536, 200_000)]
    [pack] = pack_sequences(rows, token_budget=9)
    assert pack.num_tokens == 9
    assert pack.token_ids.tolist() == [0, 255, 7, 256, 7, 65_536, 7, 200_000, 7]


@pytest.mark.parametrize(
    ("spans", "problem"),
    [
        ((), "no span"),
        ((Span(1, 3), Span(2, 4)), "overlap"),
        ((Span(3, 4), Span(1, 2)), "out of order"),
        ((Span(1, 6),), "passes the sequence's 5 tokens"),
    ],
)
def test_a_row_refuses_spans_that_cannot_be_scored(spans: tuple[Span, ...], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        ScoredSequence((1, 2, 3, 4, 5), spans, owner="pair 3")


@pytest.mark.parametrize(("start", "stop"), [(0, 2), (2, 2), (3, 2)])
def test_a_span_refuses_the_first_token_and_emptiness(start: int, stop: int) -> None:
    with pytest.raises(ValueError, match="1 <= start < stop"):
        Span(start, stop)


def test_equal_rows_cost_one_and_are_scored_each() -> None:
    row = trajectory(1)[0]
    [pack] = pack_sequences([row, replace(row, owner="other"), row], token_budget=48)
    assert pack.num_tokens == 48
    assert [scored.sequence for scored in pack.packed_sequences] == [0, 1, 2]
    assert all(np.array_equal(scored.positions, pack.packed_sequences[0].positions) for scored in pack.packed_sequences)


def test_time_grows_about_linearly_with_the_number_of_trajectories() -> None:
    def seconds(num_trajectories: int) -> float:
        rows = [row for seed in range(num_trajectories) for row in trajectory(10, seed)]
        times = []
        for _ in range(3):
            began = time.perf_counter()
            pack_sequences(rows, token_budget=4096)
            times.append(time.perf_counter() - began)
        return min(times)

    assert seconds(80) < 4 * 8 * seconds(10)  # quadratic would be 64 times
