"""Proves that what the engine serves under an adapter's name is that adapter, by its trainer's probe.

The engine goes on greedily from each of the probe's prompts and reports its 20 likeliest tokens at each place. As long
as it walks the trainer's path, every token the trainer listed must have the trainer's log probability, within
tolerance; in 16 bits, where unlikely tokens tell nothing, only likely ones count. Together with a probe on which
adapter and base lie more than twice the tolerance apart, this excludes the silent failure that users of other systems
complain of most: the adapter loads with success and the base is served.

Not covered: two adapters that lie within tolerance of each other on all prompts of the probe.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from policies.adapters.files import AdapterRefused
from policies.adapters.probe import MAX_LIKELIEST, LikelyToken, Probe, ProbePrompt, difference
from policies.types import Adapter, Engine, SampledToken, SamplingParams


async def verify_adapter(engine: Engine, adapter: Adapter, probe: Probe) -> None:
    """Compare a loaded adapter with its probe. Raises AdapterRefused where they differ; EngineError passes through.

    The less precise of the two, trainer and engine, decides what may differ: an adapter that was trained on a CPU is
    served on a GPU in half its bits.
    """
    tolerance = max(probe.tolerance, engine.limits.logprob_tolerance)
    distance = probe.distance_from_base(tolerance)
    if distance <= 2 * tolerance:
        raise AdapterRefused(
            f"the probe cannot tell the adapter from the base network: they differ by {distance:.2g} "
            f"nats at most, with a tolerance of {tolerance:.2g}; the adapter has learned nothing, or its probe "
            "has the wrong prompts"
        )
    # One after the other: verification shares the engine with users, and is in no hurry.
    for prompt in probe.prompts:
        _compare(prompt, await _go_on(engine, adapter, prompt), tolerance)


async def _go_on(engine: Engine, adapter: Adapter, prompt: ProbePrompt) -> list[SampledToken]:
    sampling = SamplingParams(max_tokens=len(prompt.continuation), temperature=0.0, num_top_logprobs=MAX_LIKELIEST)
    return [token async for token in engine.generate(prompt.prompt_token_ids, sampling, adapter, stream=False)]


def _compare(prompt: ProbePrompt, served: Sequence[SampledToken], tolerance: float) -> None:
    if not served:
        raise AdapterRefused("the engine said nothing after a probe's prompt")
    for place, (likeliest, token) in enumerate(zip(prompt.continuation, served, strict=False)):
        reported = {**dict(token.top_logprobs), token.token_id: token.logprob}
        for expected in likeliest:
            if not _agrees(expected, reported, tolerance):
                raise AdapterRefused(_mismatch(expected, reported.get(expected.token_id), tolerance, place))
        if token.token_id != likeliest[0].token_id:
            _require_tie(likeliest[0], token, tolerance, place)
            return  # another path from here on: nothing to hold it against


def _agrees(expected: LikelyToken, reported: Mapping[int, float], tolerance: float) -> bool:
    logprob = reported.get(expected.token_id)
    if logprob is None:  # then it is at most as likely as the last token that the engine did list
        logprob = min(expected.adapter_logprob, min(reported.values()))
    return difference(logprob, expected.adapter_logprob, tolerance) <= tolerance


def _mismatch(expected: LikelyToken, logprob: float | None, tolerance: float, place: int) -> str:
    is_base = logprob is not None and difference(logprob, expected.base_logprob, tolerance) <= tolerance
    return (
        f"the engine does not serve what was trained: token {expected.token_id} at place {place} after a probe's "
        f"prompt has log probability {'below its likeliest 20' if logprob is None else f'{logprob:.4f}'}, the trainer "
        f"saw {expected.adapter_logprob:.4f} (tolerance {tolerance:.2g})"
        + ("; it is what the base network says" if is_base else "")
    )


def _require_tie(expected: LikelyToken, token: SampledToken, tolerance: float, place: int) -> None:
    """Two faithful engines choose differently only between tokens that are equally likely to both."""
    gap = expected.adapter_logprob - token.logprob
    if not gap <= 2 * tolerance:
        raise AdapterRefused(
            f"the engine chose token {token.token_id} at place {place} after a probe's prompt, where the trainer's "
            f"choice {expected.token_id} is likelier by {gap:.4f} nats"
        )
