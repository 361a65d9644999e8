"""Proves that what the engine serves under an adapter's name is that adapter, by its trainer's probe.

The engine goes on greedily from each of the probe's prompts and reports its 20 likeliest tokens at each place. As long
as it walks the trainer's path, the tokens that the trainer listed must have the trainer's log probabilities: all of
them together as the root of the mean square within tolerance, each within some times that. By the furthest token
alone right adapters were refused in 16 bits: of hundreds of tokens one is often far off. Unlikely tokens count as much
as likely ones: what an adapter has learned moves them most. The base network, as the same engine serves it, must lie
more than twice as far off. This excludes the silent failure that users of other systems complain of most: the adapter
loads with success and the base is served.

Not covered: two adapters that lie within tolerance of each other on all prompts of the probe, up to where the engine
leaves the trainer's path: in 16 bits, versions that are a few gradient steps apart.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from policies.adapters.files import AdapterRefused
from policies.adapters.probe import MAX_LIKELIEST, Deviation, LikelyToken, Probe, ProbePrompt
from policies.types import Adapter, Engine, SampledToken, SamplingParams

LEAST_LEFT = 1e-2
"""Of a probability: what is listed adds up to one with some rounding."""


@dataclass(frozen=True, slots=True)
class ServedToken:
    """A token that the trainer listed, as the engine finds it."""

    expected: LikelyToken
    logprob: float
    place: int
    """In the continuation, from 0."""
    is_listed: bool
    """By the engine; else its log probability is a bound."""

    @property
    def off(self) -> float:
        """Nats from what the trainer saw."""
        return abs(self.expected.adapter_logprob - self.logprob)


async def verify_adapter(engine: Engine, adapter: Adapter, probe: Probe) -> None:
    """Compare a loaded adapter with its probe. Raises AdapterRefused where they differ; EngineError passes through."""
    tolerance = require_told_apart(engine, probe, "adapter")
    served = await served_tokens(engine, adapter, probe)
    off = deviation_of(served)
    if not off.is_within(tolerance):
        raise AdapterRefused(_mismatch(served, off, tolerance))
    base = deviation_of(await served_tokens(engine, None, probe))
    if not base.tells_apart(tolerance):
        raise AdapterRefused(too_alike(base, tolerance, "adapter"))


def require_told_apart(engine: Engine, probe: Probe, kind: str) -> float:
    """The tolerance by which the engine is held against the probe. Raises AdapterRefused where the base network could
    be served in the adapter's place and nobody would see it.

    The less precise of the two, trainer and engine, decides what may differ: an adapter that was trained on a CPU is
    served on a GPU in half its bits.
    """
    tolerance = max(probe.tolerance, engine.limits.logprob_tolerance)
    if not probe.distance_from_base.tells_apart(tolerance):
        raise AdapterRefused(too_alike(probe.distance_from_base, tolerance, kind))
    return tolerance


def too_alike(distance: Deviation, tolerance: float, kind: str) -> str:
    """What is told where the base network could pass for it."""
    return (
        f"the probe cannot tell the {kind} from the base network: they are {distance.rms:.2g} nats apart, where "
        f"{2 * tolerance:.2g} can be told in the engine's precision; the {kind} has learned too little, or its probe "
        "has the wrong prompts"
    )


async def served_tokens(engine: Engine, adapter: Adapter | None, probe: Probe) -> list[ServedToken]:
    """What the engine says of the probe's tokens under the adapter, or under the base network."""
    served = list[ServedToken]()
    # One after the other: verification shares the engine with users, and is in no hurry.
    for prompt in probe.prompts:
        served += _compared(prompt, await _go_on(engine, adapter, prompt))
    return served


def deviation_of(served: Sequence[ServedToken]) -> Deviation:
    """How far that is from what the trainer saw."""
    return Deviation.between((each.expected.adapter_logprob, each.logprob) for each in served)


async def _go_on(engine: Engine, adapter: Adapter | None, prompt: ProbePrompt) -> list[SampledToken]:
    sampling = SamplingParams(max_tokens=len(prompt.continuation), temperature=0.0, num_top_logprobs=MAX_LIKELIEST)
    return [token async for token in engine.generate(prompt.prompt_token_ids, sampling, adapter, stream=False)]


def _compared(prompt: ProbePrompt, served: Sequence[SampledToken]) -> Iterator[ServedToken]:
    """The trainer's tokens as far as the engine walks the trainer's path."""
    if not served:
        raise AdapterRefused("the engine said nothing after a probe's prompt")
    for place, (likeliest, token) in enumerate(zip(prompt.continuation, served, strict=False)):
        reported = {**dict(token.top_logprobs), token.token_id: token.logprob}
        if not all(map(math.isfinite, reported.values())):
            raise AdapterRefused(f"the engine says what is no log probability, at place {place} after a probe's prompt")
        for expected in likeliest:
            yield ServedToken(expected, _logprob_of(expected, reported), place, expected.token_id in reported)
        if token.token_id != likeliest[0].token_id:
            return  # between two that are equally likely; another path from here on: nothing to hold it against


def _logprob_of(expected: LikelyToken, reported: Mapping[int, float]) -> float:
    """Of a token that the engine does not list we know that it is at most as likely as the last one listed, and as all
    that is left."""
    if expected.token_id in reported:
        return reported[expected.token_id]
    left = 1.0 - sum(map(math.exp, reported.values()))
    return min(expected.adapter_logprob, min(reported.values()), math.log(max(left, LEAST_LEFT)))


def _mismatch(served: Sequence[ServedToken], off: Deviation, tolerance: float) -> str:
    base = Deviation.between((each.expected.base_logprob, each.logprob) for each in served if each.is_listed)
    furthest = max(served, key=lambda each: each.off)
    return (
        f"the engine does not serve what was trained: {off.in_words(tolerance)}: token {furthest.expected.token_id} at "
        f"place {furthest.place} after a probe's prompt has {furthest.logprob:.4f}, the trainer saw "
        f"{furthest.expected.adapter_logprob:.4f}"
        + ("; it is what the base network says" if base.is_within(tolerance) else "")
    )
