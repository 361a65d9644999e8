"""Makes the proof that goes with an adapter: what it says after fixed prompts, token by token, and what the base says.

policies/adapters/probe.py says what the proof is good for, runtime/adapters/verification.py holds it against an engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from learner.packing.scoring import reference
from policies.adapters.probe import HALF_TOLERANCE, MAX_LIKELIEST, LikelyToken, Probe, ProbePrompt, tolerance_in
from policies.types import TokenIds

NUM_PROMPTS = 4
NUM_TOKENS = 8


def make_probe(
    network: Any, base_fingerprint: str, prompts: Sequence[TokenIds], neutral: TokenIds | None = None
) -> Probe:
    """The probe of a PeftModel as it is now, on those of the prompts where it is furthest from its base, and on the
    neutral one."""
    candidates = [_probe_prompt(network, prompt) for prompt in prompts]
    # As the least precise of engines would see it: the trainer does not know where the adapter will be served.
    furthest = sorted(candidates, key=lambda prompt: prompt.distance_from_base(HALF_TOLERANCE), reverse=True)
    kept = furthest[:NUM_PROMPTS] + ([] if neutral is None else [_probe_prompt(network, neutral)])
    return Probe(base_fingerprint, tolerance_in(network.dtype), tuple(kept))


@torch.no_grad()
def _probe_prompt(network: Any, prompt: TokenIds) -> ProbePrompt:
    token_ids, continuation = list(prompt), []
    for _ in range(NUM_TOKENS):
        adapter = _next_logprobs(network, token_ids)
        with reference(network):
            base = _next_logprobs(network, token_ids)
        likeliest = adapter.topk(min(MAX_LIKELIEST, len(adapter))).indices.tolist()
        continuation.append(tuple(LikelyToken(t, adapter[t].item(), base[t].item()) for t in likeliest))
        token_ids.append(likeliest[0])
    return ProbePrompt(prompt, tuple(continuation))


def _next_logprobs(network: Any, token_ids: Sequence[int]) -> torch.Tensor:
    # Without a cache: a probe is a few dozen tokens, and a plain forward pass is beyond doubt.
    logits = network(torch.tensor([token_ids], device=network.device), logits_to_keep=1).logits[0, -1]
    return logits.float().log_softmax(-1).cpu()
