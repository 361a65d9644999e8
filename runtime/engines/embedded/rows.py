"""One sequence on its way through the batch, and what a step gives it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from policies.types import Adapter, EngineError, SampledToken, SamplingParams, TokenIds
from runtime.engines.embedded.grammar import GrammarState
from runtime.engines.embedded.kv_memory import CachedSequence

TokenLogprobs = tuple[float, ...]
"""Of a row's scored tokens, all of them."""

EngineEvent = SampledToken | TokenLogprobs | EngineError
"""What a step gave a row: its next token, the logprobs that it came for, or why the row cannot go on."""


@dataclass(eq=False, slots=True)
class BatchRow:
    """One sequence on its way through the batch."""

    prompt_token_ids: TokenIds
    sampling: SamplingParams
    adapter: Adapter | None
    grammar: GrammarState | None
    num_scored: int = 0
    """Above 0: the logprobs of so many tokens at the prompt's end are wanted, and none is sampled."""
    token_ids: list[int] = field(init=False)
    """The prompt and what was sampled so far."""
    uniforms: random.Random = field(init=False)
    cached: CachedSequence | None = field(init=False, default=None)
    """Its keys and values; None: it waits."""
    logprobs: list[float] = field(init=False, default_factory=list)
    """Of the scored tokens, those that are known so far."""

    def __post_init__(self) -> None:
        assert 0 <= self.num_scored < len(self.prompt_token_ids)
        self.token_ids = list(self.prompt_token_ids)
        self.uniforms = random.Random(self.sampling.seed)

    @property
    def adapter_name(self) -> str | None:
        return self.adapter.name if self.adapter else None

    @property
    def num_sampled(self) -> int:
        return len(self.token_ids) - len(self.prompt_token_ids)

    @property
    def num_reusable(self) -> int:
        """How many of its first tokens may come out of a cache: the logits after the others are wanted."""
        return len(self.token_ids) - 1 - self.num_scored

    @property
    def num_computed(self) -> int:
        """Tokens whose keys and values it has."""
        assert self.cached is not None
        return self.cached.num_computed

    @property
    def num_left(self) -> int:
        """Tokens to compute before the next one can be sampled: 1 while it decodes, more while its prompt is read."""
        return len(self.token_ids) - self.num_computed


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """Length of the longest common prefix, by bisection: comparing slices is many times faster than a loop."""
    if not left or not right or left[0] != right[0]:
        return 0
    low, high = 0, min(len(left), len(right))
    if left[:high] == right[:high]:
        return high
    while low + 1 < high:
        middle = (low + high) // 2
        if left[low:middle] == right[low:middle]:
            low = middle
        else:
            high = middle
    return low
