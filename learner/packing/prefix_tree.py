"""Merges sequences of tokens that share prefixes into trees, and lays the trees out in packs.

A sequence is a context with the completions in it that are to be scored. Rows of one trajectory repeat each other's
prefixes; in a pack every shared prefix stands once, so that one forward pass scores them all. The sequences of a pack
are sorted and each adds only what its predecessor does not have: that is the tree in preorder. A token then sees
exactly the earlier tokens whose subtree has not ended, and one number for each token (where its subtree ends) is the
whole structure. A trie of linked nodes was refused: it says the same in more code, one Python object for each token.

Only whole numbers live here; `learner/packing/scoring.py` makes tensors of a pack.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from policies.types import TokenIds


@dataclass(frozen=True, slots=True)
class Span:
    """The tokens `start` up to, not including, `stop` of a sequence: a completion, or a part of one."""

    start: int
    stop: int
    weight: float = 1.0
    """Of each token's loss, where the loss takes weights."""

    def __post_init__(self) -> None:
        if not 1 <= self.start < self.stop:
            raise ValueError(f"a span needs 1 <= start < stop (the first token has no context), got {self}")


@dataclass(frozen=True, slots=True)
class ScoredSequence:
    """Token ids, and which of them are scored. Prompt and tool output lie outside every span."""

    token_ids: TokenIds
    spans: tuple[Span, ...]
    """In order, without overlap."""
    owner: Hashable
    """What the sequence belongs to: a preference pair, a step, an episode. Sequences of one owner are never parted
    between packs, so that a loss over all of them can be computed from one forward pass."""

    def __post_init__(self) -> None:
        if not self.spans:
            raise ValueError(f"a sequence of {self.owner!r} has no span to score")
        if any(left.stop > right.start for left, right in pairwise(self.spans)):
            raise ValueError(f"spans of {self.owner!r} overlap or are out of order: {self.spans}")
        if self.spans[-1].stop > len(self.token_ids):
            raise ValueError(
                f"span {self.spans[-1]} of {self.owner!r} passes the sequence's {len(self.token_ids)} tokens"
            )


@dataclass(frozen=True, slots=True, eq=False)
class PackedSequence:
    """Where a sequence's scored tokens are predicted in its pack. The arrays are parallel: one entry a scored token."""

    sequence: int
    """The sequence's index in the sequence that was packed."""
    positions: np.ndarray
    """int64: the packed position whose output predicts the token, that is its predecessor's."""
    target_ids: np.ndarray
    """int64: the token."""
    weights: np.ndarray
    """float64: its span's weight."""


@dataclass(frozen=True, slots=True, eq=False)
class Pack:
    """Trees laid out as one sequence of n tokens in preorder. Trees, and branches of a tree, do not see each other."""

    token_ids: np.ndarray
    """int64 [n]"""
    depths: np.ndarray
    """int64 [n]: a token's place in its own sequence, its position id."""
    subtree_ends: np.ndarray
    """int64 [n]: token i sees token j exactly if `j <= i < subtree_ends[j]`."""
    packed_sequences: tuple[PackedSequence, ...]
    """One for each sequence of the pack, ordered by `sequence`."""

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)


def pack_sequences(sequences: Sequence[ScoredSequence], token_budget: int) -> list[Pack]:
    """Lay all sequences out in packs of at most `token_budget` tokens each; every sequence is in exactly one.

    Owners go into packs in the order of their tokens, so that those who share much meet; a full pack is cut where
    little is shared. Takes a sort of the sequences and time linear in their total length. The packs do not depend on
    the order of `sequences`, except that `ScoredRow.sequence` names them by it.

    Raises ValueError where one owner's sequences alone pass the budget.
    """
    tokens = [np.asarray(sequence.token_ids, dtype=np.int64) for sequence in sequences]
    by_owner: dict[Hashable, list[int]] = {}
    for index in _sorted_by_tokens(tokens, range(len(sequences))):
        by_owner.setdefault(sequences[index].owner, []).append(index)
    owners = _split(list(by_owner.items()), tokens, token_budget)
    return [_lay_out(sequences, tokens, _sorted_by_tokens(tokens, members)) for members in owners]


def num_packed_tokens(sequences: Sequence[ScoredSequence]) -> int:
    """How many tokens the sequences need in a pack of their own."""
    return _OpenPack([np.asarray(sequence.token_ids, dtype=np.int64) for sequence in sequences]).add(
        range(len(sequences))
    )


# --------------------------------------------------------------------------------------------- filling packs


class _OpenPack:
    """Sorted sequences of a pack that is being filled, and how many tokens their trees have."""

    def __init__(self, tokens: Sequence[np.ndarray]) -> None:
        self._tokens = tokens
        self._keys: list[bytes] = []
        self._sequences: list[int] = []
        self.num_tokens = 0

    def add(self, sequences: Sequence[int]) -> int:
        """Add the sequences; returns how many tokens they bring that were not there."""
        before = self.num_tokens
        for sequence in sequences:
            key = _sort_key(self._tokens[sequence])
            place = bisect_left(self._keys, key)
            neighbours = self._sequences[max(place - 1, 0) : place + 1]
            shared = max(
                (_shared_prefix(self._tokens[sequence], self._tokens[other]) for other in neighbours), default=0
            )
            self._keys.insert(place, key)
            self._sequences.insert(place, sequence)
            self.num_tokens += len(self._tokens[sequence]) - shared
        return self.num_tokens - before


def _split(
    owners: Sequence[tuple[Hashable, list[int]]], tokens: Sequence[np.ndarray], token_budget: int
) -> list[list[int]]:
    """Part the owners, in order, into runs whose trees fit the budget; returns the sequences of each run."""
    alone = [_OpenPack(tokens).add(sequences) for _, sequences in owners]
    for (owner, _), num_tokens in zip(owners, alone, strict=True):
        if num_tokens > token_budget:
            raise ValueError(f"the sequences of {owner!r} need {num_tokens} tokens, the budget is {token_budget}")
    runs, start = [], 0
    while start < len(owners):
        stop = _end_of_run(owners, alone, tokens, token_budget, start)
        runs.append([sequence for _, sequences in owners[start:stop] for sequence in sequences])
        start = stop
    return runs


def _end_of_run(
    owners: Sequence[tuple[Hashable, list[int]]],
    alone: Sequence[int],
    tokens: Sequence[np.ndarray],
    token_budget: int,
    start: int,
) -> int:
    """Where the run of owners from `start` ends: at the cut that wastes least for each token of the run.

    A cut wastes the tokens that the next run must repeat, and a forward pass, counted as an eighth of the budget.
    """
    pack = _OpenPack(tokens)
    best, least_waste = start, float("inf")
    for place in range(start, len(owners)):
        filled = pack.num_tokens
        repeated = alone[place] - pack.add(owners[place][1])
        waste = (repeated + token_budget / 8) / filled if filled else float("inf")
        if waste < least_waste:
            best, least_waste = place, waste
        if pack.num_tokens > token_budget:
            return best
    return len(owners)


# ----------------------------------------------------------------------------------------------- one pack


def _lay_out(sequences: Sequence[ScoredSequence], tokens: Sequence[np.ndarray], members: Sequence[int]) -> Pack:
    """The pack of these sequences, which come sorted by their tokens."""
    shared = [0] + [_shared_prefix(tokens[left], tokens[right]) for left, right in pairwise(members)]
    num_tokens = sum(len(tokens[sequence]) - skip for sequence, skip in zip(members, shared, strict=True))
    subtree_ends = np.full(num_tokens, num_tokens, dtype=np.int64)
    path = np.empty(0, dtype=np.int64)
    scored, start = [], 0
    for sequence, skip in zip(members, shared, strict=True):
        subtree_ends[path[skip:]] = start
        stop = start + len(tokens[sequence]) - skip
        path = np.concatenate([path[:skip], np.arange(start, stop)])
        scored.append(_packed(sequences[sequence], sequence, tokens[sequence], path))
        start = stop
    return Pack(
        token_ids=np.concatenate([tokens[sequence][skip:] for sequence, skip in zip(members, shared, strict=True)]),
        depths=np.concatenate(
            [np.arange(skip, len(tokens[sequence])) for sequence, skip in zip(members, shared, strict=True)]
        ),
        subtree_ends=subtree_ends,
        packed_sequences=tuple(sorted(scored, key=lambda packed_sequence: packed_sequence.sequence)),
    )


def _packed(sequence: ScoredSequence, index: int, tokens: np.ndarray, path: np.ndarray) -> PackedSequence:
    """Where the sequence's scored tokens are predicted, given the packed positions of all its tokens."""
    targets = np.concatenate([np.arange(span.start, span.stop) for span in sequence.spans])
    weights = np.repeat([span.weight for span in sequence.spans], [span.stop - span.start for span in sequence.spans])
    return PackedSequence(index, positions=path[targets - 1], target_ids=tokens[targets], weights=weights)


# --------------------------------------------------------------------------------------------------- order


def _sort_key(tokens: np.ndarray) -> bytes:
    """Big-endian bytes: they compare as the token ids do, a prefix before what extends it."""
    return tokens.astype(">u4").tobytes()


def _sorted_by_tokens(tokens: Sequence[np.ndarray], sequences: Sequence[int]) -> list[int]:
    return sorted(sequences, key=lambda sequence: _sort_key(tokens[sequence]))


def _shared_prefix(left: np.ndarray, right: np.ndarray) -> int:
    """How many first tokens two sequences have in common."""
    length = min(len(left), len(right))
    differs = left[:length] != right[:length]
    return int(differs.argmax()) if differs.any() else length
