"""What vLLM gives, as the tokens of the `Engine` protocol."""
# pyright: reportMissingImports=false

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from policies.types import EngineError, FinishReason, SampledToken

if TYPE_CHECKING:
    from vllm.logprobs import FlatLogprobs
    from vllm.outputs import CompletionOutput


def sampled_tokens(completion: CompletionOutput, num_top_logprobs: int) -> Iterator[SampledToken]:
    """The tokens of one output; vLLM may put several into it. Raises EngineError where it gave the completion up."""
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


def likeliest(flat: FlatLogprobs, first: int, end: int, num: int) -> tuple[tuple[int, float], ...]:
    """The best of what vLLM reports: the sampled token may be there twice, and a grammar leaves infinities."""
    pairs = dict(zip(flat.token_ids[first:end], flat.logprobs[first:end], strict=True)).items()
    return tuple(sorted((pair for pair in pairs if math.isfinite(pair[1])), key=lambda pair: -pair[1])[:num])
