"""The proof that travels with an adapter: what its trainer saw it say, to be seen again from the engine.

For fixed prompts the trainer writes down its own greedy continuation and, at each token of it, the likeliest tokens
with their log probabilities under the adapter and under the base network. Whole distributions are compared, not the
sampled token alone: one logprob can agree by chance, and a near tie would turn a faithful engine's greedy choice.
The first token of a continuation tests the prompt's pass, the later ones the decoding against cached keys.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from policies.types import TokenIds

PROBE_FILE = "probe.json"

MAX_TOLERANCE = 0.5
"""Nats, as below. A probe that forgives more would pass nearly anything."""

FULL_TOLERANCE, HALF_TOLERANCE = 1.25e-3, 0.3
"""Nats, for numbers of 32 bits and of 16: how far what two faithful computations say of a probe's tokens may lie apart,
as the root of the mean square over all of them. Other kernels round otherwise: ten adapters of SmolLM2 were 0.13 to
0.20 off in bfloat16 on vLLM, four of them below 5e-4 in float32. Versions of the same training, of twice the gradient
steps each, were 1.4 and more off each other's probes, and the base network 1.6 and more; of the novice, neighbours a
few steps apart are 0.17 to 0.34 (benchmarks/RESULTS.md, benchmarks/verification.py)."""

SINGLE = 5.0
"""So many tolerances may a single token be off: of hundreds one is often far off, by up to 1.16 with those ten."""

OLD_HALF_TOLERANCE = 0.15
"""What probes that were made in 16 bits say until 2026-11-28, of the furthest likely token."""

MAX_LIKELIEST = 20
"""Most tokens a position may list: an engine reports no more."""


def tolerance_in(dtype: object) -> float:
    """Nats by which two faithful computations may differ in this type (torch.bfloat16, or its name)."""
    return FULL_TOLERANCE if str(dtype).removeprefix("torch.") == "float32" else HALF_TOLERANCE


@dataclass(frozen=True, slots=True)
class Deviation:
    """How far two computations' log probabilities of the same tokens lie apart, in nats."""

    rms: float
    """The root of the mean square; 0 of no tokens."""
    largest: float

    @staticmethod
    def between(pairs: Iterable[tuple[float, float]]) -> Deviation:
        """Of one pair a token."""
        apart = [abs(one - other) for one, other in pairs]
        return Deviation(math.sqrt(fmean(each * each for each in apart)), max(apart)) if apart else Deviation(0.0, 0.0)

    def is_within(self, tolerance: float) -> bool:
        """Whether two faithful computations may lie so far apart."""
        return self.rms <= tolerance and self.largest <= SINGLE * tolerance

    def in_words(self, tolerance: float) -> str:
        """Beside what is allowed."""
        allowed = f"{tolerance:.2g} are allowed, {SINGLE * tolerance:.2g} for a single one"
        return f"log probabilities are {self.rms:.2g} nats off, the furthest {self.largest:.2g} ({allowed})"

    def tells_apart(self, tolerance: float) -> bool:
        """Whether no faithful computation of the one can be taken for the other: twice as far as it may be off."""
        return not self.is_within(2 * tolerance)


@dataclass(frozen=True, slots=True)
class LikelyToken:
    """One candidate for the next token. Natural logarithms, temperature 1."""

    token_id: int
    adapter_logprob: float
    base_logprob: float

    def __post_init__(self) -> None:
        if self.token_id < 0:
            raise ValueError(f"token id {self.token_id} is negative")
        for logprob in (self.adapter_logprob, self.base_logprob):
            if not (math.isfinite(logprob) and logprob <= 1e-3):
                raise ValueError(f"{logprob} is not a log probability")


@dataclass(frozen=True, slots=True)
class ProbePrompt:
    """One fixed prompt and how the trained policy goes on from it."""

    prompt_token_ids: TokenIds
    continuation: tuple[tuple[LikelyToken, ...], ...]
    """For each token of the greedy continuation the likeliest tokens under the adapter, best first: the first is it."""

    def __post_init__(self) -> None:
        if not self.prompt_token_ids or not self.continuation:
            raise ValueError("a probe needs a prompt and at least one token after it")
        for likeliest in self.continuation:
            if not 1 <= len(likeliest) <= MAX_LIKELIEST:
                raise ValueError(f"a position lists 1 to {MAX_LIKELIEST} tokens, not {len(likeliest)}")

    @property
    def tokens(self) -> Iterator[LikelyToken]:
        """All that are listed, place by place."""
        return (token for likeliest in self.continuation for token in likeliest)

    @property
    def distance_from_base(self) -> Deviation:
        """As `Probe.distance_from_base`, of this prompt."""
        return _distance_from_base(self.tokens)


def _distance_from_base(tokens: Iterable[LikelyToken]) -> Deviation:
    return Deviation.between((token.adapter_logprob, token.base_logprob) for token in tokens)


@dataclass(frozen=True, slots=True)
class Probe:
    """The content of `probe.json`."""

    base_fingerprint: str
    """Of the base network the adapter was trained on, see `BaseNetwork.fingerprint`."""
    tolerance: float
    """Nats by which an engine's log probabilities may differ from the trainer's: see FULL_TOLERANCE."""
    prompts: tuple[ProbePrompt, ...]

    def __post_init__(self) -> None:
        if not 0.0 < self.tolerance <= MAX_TOLERANCE:
            raise ValueError(f"tolerance must lie in (0, {MAX_TOLERANCE}], got {self.tolerance}")
        if not self.prompts:
            raise ValueError("a probe needs at least one prompt")

    @property
    def distance_from_base(self) -> Deviation:
        """How far adapter and base lie apart on the listed tokens."""
        return _distance_from_base(token for prompt in self.prompts for token in prompt.tokens)


def write_probe(folder: Path, probe: Probe) -> None:
    """Write `probe.json` beside an adapter."""
    content = {
        "base_fingerprint": probe.base_fingerprint,
        "tolerance": probe.tolerance,
        "prompts": [_prompt_as_json(prompt) for prompt in probe.prompts],
    }
    (folder / PROBE_FILE).write_text(json.dumps(content), encoding="utf-8")


def read_probe(folder: Path) -> Probe:
    """Read `probe.json`. Raises FileNotFoundError, or ValueError with what is wrong in it."""
    try:
        content = json.loads((folder / PROBE_FILE).read_text(encoding="utf-8"))
        prompts = tuple(_prompt_from_json(prompt) for prompt in content["prompts"])
        tolerance = float(content["tolerance"])
        if tolerance >= OLD_HALF_TOLERANCE:
            tolerance = max(tolerance, HALF_TOLERANCE)
        return Probe(str(content["base_fingerprint"]), tolerance, prompts)
    except KeyError as error:
        raise ValueError(f"{PROBE_FILE} lacks {error}") from error
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{PROBE_FILE} cannot be read: {error}") from error


def _prompt_as_json(prompt: ProbePrompt) -> dict[str, Any]:
    return {
        "prompt_token_ids": list(prompt.prompt_token_ids),
        "continuation": [
            [[token.token_id, token.adapter_logprob, token.base_logprob] for token in likeliest]
            for likeliest in prompt.continuation
        ],
    }


def _prompt_from_json(content: dict[str, Any]) -> ProbePrompt:
    return ProbePrompt(
        prompt_token_ids=tuple(int(token_id) for token_id in content["prompt_token_ids"]),
        continuation=tuple(
            tuple(LikelyToken(int(token_id), float(adapter), float(base)) for token_id, adapter, base in likeliest)
            for likeliest in content["continuation"]
        ),
    )
