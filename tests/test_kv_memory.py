"""Memory for keys and values: never more than its bytes, and no sequence's tokens among another's."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import runtime.engines.embedded.kv_memory as kv_memory
from runtime.engines.embedded.kv_budget import context_cut, kv_budget, named
from runtime.engines.embedded.kv_memory import MIN_KEPT_TOKENS, CachedSequence, KvMemory, KvShape

SHAPE = KvShape(num_layers=2, num_heads=1, head_dim=1, dtype=torch.float32, device=torch.device("cpu"))
MAX_TOKENS = 256


def memory_of(num_contexts: float, max_kept: int = 100) -> KvMemory:
    return KvMemory(SHAPE, int(num_contexts * MAX_TOKENS * SHAPE.bytes_per_token), MAX_TOKENS, max_kept)


def write(sequence: CachedSequence, token_ids: list[int]) -> None:
    """Compute tokens: a token's key is its id, its value the id's negative."""
    assert sequence.slab is not None
    begin, end = sequence.num_computed, sequence.num_computed + len(token_ids)
    sequence.token_ids += token_ids
    for keys, values in zip(sequence.slab.keys, sequence.slab.values, strict=True):
        keys[sequence.slot, 0, begin:end, 0] = torch.tensor(token_ids, dtype=torch.float32)
        values[sequence.slot, 0, begin:end, 0] = -torch.tensor(token_ids, dtype=torch.float32)
    sequence.num_computed = end


def assert_holds(sequence: CachedSequence) -> None:
    """All that was computed is there, and is its own."""
    assert sequence.slab is not None
    assert sequence.slab.sequences[sequence.slot] is sequence
    expected = torch.tensor(sequence.token_ids[: sequence.num_computed], dtype=torch.float32)
    for keys, values in zip(sequence.slab.keys, sequence.slab.values, strict=True):
        assert torch.equal(keys[sequence.slot, 0, : len(expected), 0], expected)
        assert torch.equal(values[sequence.slot, 0, : len(expected), 0], -expected)


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10**6), num_contexts=st.sampled_from([1, 2, 3.5, 20]))
def test_whatever_comes_and_goes_every_sequence_keeps_its_own(seed: int, num_contexts: float):
    draw = random.Random(seed)
    memory, running = memory_of(num_contexts), []
    for _ in range(120):
        match draw.choice(("join", "join", "write", "write", "end", "fail", "copy")):
            case "join":
                sequence = CachedSequence([], draw.choice((None, "a")))
                if memory.place(sequence, draw.randint(1, MAX_TOKENS)):
                    running.append(sequence)
            case "write" if running:
                sequence = draw.choice(running)
                num_more = draw.randint(0, min(60, MAX_TOKENS - sequence.num_computed))
                if memory.grow(sequence, sequence.num_computed + num_more):
                    write(sequence, [draw.randint(1, 9999) for _ in range(num_more)])
            case "end" if running:
                memory.keep(running.pop(draw.randrange(len(running))))
            case "fail" if running:
                memory.release(running.pop(draw.randrange(len(running))))
            case "copy" if running:
                source = draw.choice(list(memory.sequences()))
                target = CachedSequence([], source.adapter_name)
                if memory.place(target, max(1, source.num_computed)) and source.slab is not None:
                    memory.copy(source, target, source.num_computed)
                    target.token_ids += source.token_ids[: source.num_computed]
                if target.slab is not None:
                    running.append(target)
        assert memory.num_bytes <= num_contexts * MAX_TOKENS * SHAPE.bytes_per_token
        for sequence in memory.sequences():
            assert_holds(sequence)
        for sequence in running:
            assert sequence.slab is not None
            assert sequence.slot < sequence.slab.num_running, "attention reads the running ones as one slice"


def test_a_sequence_of_the_whole_context_fits_once_nothing_else_runs():
    memory = memory_of(1)
    first = CachedSequence([], None)
    assert memory.place(first, 30)
    assert not memory.place(CachedSequence([], None), MAX_TOKENS)
    memory.keep(first)
    assert memory.place(CachedSequence([], None), MAX_TOKENS)


def test_short_sequences_share_what_one_long_one_takes():
    memory = memory_of(1)
    assert sum(memory.place(CachedSequence([], None), 32) for _ in range(20)) == MAX_TOKENS // 32


def kept_in(memory: KvMemory, token_ids: list[int]) -> CachedSequence:
    sequence = CachedSequence([], None)
    assert memory.place(sequence, len(token_ids))
    write(sequence, token_ids)
    memory.keep(sequence)
    return sequence


def test_of_what_is_kept_the_least_recently_used_goes_first():
    memory = memory_of(1)
    kept = [kept_in(memory, [number] * 32) for number in range(8)]
    memory.touch(kept[0])
    assert memory.place(CachedSequence([], None), 32)
    assert [one.slab is None for one in kept] == [False, True, *[False] * 6]


def test_no_more_are_kept_than_are_looked_at():
    memory = memory_of(20, max_kept=3)
    kept = [kept_in(memory, [number] * 32) for number in range(5)]
    assert [one.slab is None for one in kept] == [True, True, False, False, False]


def test_what_a_longer_one_knows_is_not_kept_twice():
    memory = memory_of(4)
    short = kept_in(memory, [7] * 20)
    long = kept_in(memory, [7] * 30)
    again = kept_in(memory, [7] * 25)
    tiny = kept_in(memory, [8] * (MIN_KEPT_TOKENS - 1))
    assert [one.slab is None for one in (short, long, again, tiny)] == [True, False, True, True]


def test_what_failed_leaves_nothing_behind_that_is_not_finite():
    memory = memory_of(1)
    sequences = [CachedSequence([], None) for _ in range(3)]
    for number, sequence in enumerate(sequences):
        assert memory.place(sequence, 32)
        write(sequence, [number] * 5)
    slab = sequences[0].slab
    assert slab is not None
    slab.keys[1][sequences[0].slot] = float("nan")
    memory.release(sequences[0])
    assert all(part.isfinite().all() for part in (*slab.keys, *slab.values))
    assert_holds(sequences[1])
    assert_holds(sequences[2])


def test_where_the_machine_has_less_than_the_budget_what_there_is_must_do(monkeypatch: pytest.MonkeyPatch):
    memory = memory_of(4)
    assert memory.place(CachedSequence([], None), MAX_TOKENS)

    def no_more(*_: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(kv_memory, "Slab", no_more)
    assert not memory.place(CachedSequence([], None), MAX_TOKENS)
    assert memory.num_bytes == MAX_TOKENS * SHAPE.bytes_per_token


# ------------------------------------------------------------------------------------------------- the budget


def test_memory_bounds_the_context_and_the_context_the_memory():
    per_token = SHAPE.bytes_per_token
    assert kv_budget(SHAPE, 100 * per_token, None, 8192, 4) == (100 * per_token, 100)
    assert kv_budget(SHAPE, 5000 * per_token, None, 8192, 4) == (5000 * per_token, 4096)
    assert kv_budget(SHAPE, None, 512, 8192, max_rows=4) == (2 * 4 * 512 * per_token, 512)


def test_a_context_that_memory_cuts_short_is_told_with_the_numbers():
    per_token = SHAPE.bytes_per_token
    assert context_cut(SHAPE, 100 * per_token, 100, None, 8192) == (
        f"{named(100 * per_token)} for keys and values hold 100 tokens; this network could read 4,096: "
        "give more --kv-memory"
    )
    assert "could read 2,048" in context_cut(SHAPE, 100 * per_token, 100, None, 2048)
    assert context_cut(SHAPE, 5000 * per_token, 4096, None, 8192) == ""
    assert context_cut(SHAPE, 5000 * per_token, 512, 512, 8192) == ""


@pytest.mark.parametrize(
    ("num_bytes", "words"),
    [(1, "1 byte"), (1023, "1023 bytes"), (1536, "1.5 KiB"), (1 << 20, "1.0 MiB"), (3 << 29, "1.5 GiB")],
)
def test_memory_is_named_in_a_unit_of_which_there_is_a_whole_one(num_bytes: int, words: str):
    assert named(num_bytes) == words


@pytest.mark.parametrize(("num_bytes", "context"), [(1600, 200), (100, None)])
def test_a_context_that_the_memory_cannot_hold_is_refused_with_the_numbers(num_bytes: int, context: int | None):
    with pytest.raises(ValueError, match=r"hold \d+ tokens of this network .* a context of \d+ .* --kv-memory"):
        kv_budget(SHAPE, num_bytes, context, 8192, 4)
