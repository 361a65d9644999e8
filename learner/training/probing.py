"""Makes the proof that goes with an adapter: what it says after fixed prompts, token by token, and what the base says.

policies/adapters/probe.py says what the proof is good for, runtime/adapters/verification.py holds it against an engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from learner.packing.scoring import reference
from policies.adapters.probe import MAX_LIKELIEST, LikelyToken, Probe, ProbePrompt, tolerance_in
from policies.types import TokenIds

NUM_PROMPTS = 4
NUM_TOKENS = 8


def make_probe(
    network: Any, base_fingerprint: str, prompts: Sequence[TokenIds], neutral: TokenIds | None = None
) -> Probe:
    """The probe of a PeftModel as it is now, on those of the prompts where it is furthest from its base, and on the
    neutral one."""
    adapter, base = _Reading(network), _Reading(network)
    candidates = [_probe_prompt(prompt, adapter, base) for prompt in sorted(prompts)]  # neighbours begin alike
    furthest = sorted(candidates, key=lambda prompt: prompt.distance_from_base.rms, reverse=True)
    kept = furthest[:NUM_PROMPTS] + ([] if neutral is None else [_probe_prompt(neutral, adapter, base)])
    return Probe(base_fingerprint, tolerance_in(network.dtype), tuple(kept))


class _Reading:
    """What a network says after token ids. What they begin with as the last ones did is not read again: prompts share
    a system message with tools."""

    def __init__(self, network: Any) -> None:
        self.network = network
        self._token_ids: list[int] = []
        self._cache = DynamicCache()

    def logprobs(self, token_ids: list[int], num_last: int = 1) -> Tensor:
        """float32 [num_last, vocabulary]: of the token that follows each of the last ones."""
        num_known = min(_common_prefix(self._token_ids, token_ids), len(token_ids) - num_last)
        if num_known:
            num_dropped = self._cache.get_seq_length() - num_known
            if num_dropped:
                self._cache.crop(-num_dropped)
        else:
            self._cache = DynamicCache()
        ids = torch.tensor([token_ids[num_known:]], device=self.network.device)
        logits = self.network(ids, past_key_values=self._cache, use_cache=True, logits_to_keep=num_last).logits[0]
        self._token_ids = list(token_ids)
        return logits.float().log_softmax(-1).cpu()


@torch.no_grad()
def _probe_prompt(prompt: TokenIds, adapter: _Reading, base: _Reading) -> ProbePrompt:
    """The adapter goes on greedily, token by token; the base reads what it said at once."""
    token_ids, said = list(prompt), list[Tensor]()
    for _ in range(NUM_TOKENS):
        said.append(adapter.logprobs(token_ids)[0])
        token_ids.append(int(said[-1].argmax()))
    with reference(base.network):
        base_said = base.logprobs(token_ids[:-1], NUM_TOKENS)
    return ProbePrompt(prompt, tuple(map(_likeliest, said, base_said)))


def _likeliest(adapter: Tensor, base: Tensor) -> tuple[LikelyToken, ...]:
    tokens = adapter.topk(min(MAX_LIKELIEST, len(adapter))).indices.tolist()
    return tuple(LikelyToken(token, adapter[token].item(), base[token].item()) for token in tokens)


def _common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False)))
