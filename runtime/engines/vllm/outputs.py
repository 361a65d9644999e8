"""What vLLM gives, as the tokens of the `Engine` protocol."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from policies.types import EngineError, FinishReason, SampledToken


def sampled_tokens(completion: Any, num_top_logprobs: int) -> Iterator[SampledToken]:
    """The tokens of one `CompletionOutput`, which may be several. Raises EngineError where vLLM gave it up."""
    reason = completion.finish_reason
    if reason not in (None, "stop", "length"):
        raise EngineError(f"vLLM ended the completion: {reason}")
    flat, last = completion.logprobs, len(completion.token_ids) - 1
    for place, token_id in enumerate(completion.token_ids):
        first, end = flat.start_indices[place], flat.end_indices[place]
        yield SampledToken(
            token_id,
            flat.logprobs[first],  # the sampled token's comes first, the likeliest tokens' behind it
            likeliest(flat, first, end, num_top_logprobs) if num_top_logprobs else (),
            FinishReason(reason) if reason is not None and place == last else None,
        )


def scored_tokens(prompt_logprobs: Any, token_ids: Sequence[int], num: int) -> tuple[float, ...]:
    """The logprobs of a prompt's last `num` tokens. Raises EngineError where vLLM does not tell them."""
    if prompt_logprobs is None or len(prompt_logprobs) != len(token_ids):
        raise EngineError("vLLM gave no logprobs of the prompt's tokens")
    places = range(len(token_ids) - num, len(token_ids))
    return tuple(prompt_logprobs[place][token_ids[place]].logprob for place in places)


def likeliest(flat: Any, first: int, end: int, num: int) -> tuple[tuple[int, float], ...]:
    """The best of one token's `FlatLogprobs`: the sampled one may be there twice, and a grammar leaves infinities."""
    pairs = dict(zip(flat.token_ids[first:end], flat.logprobs[first:end], strict=True)).items()
    return tuple(sorted((pair for pair in pairs if math.isfinite(pair[1])), key=lambda pair: -pair[1])[:num])
