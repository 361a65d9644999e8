"""The proof that travels with an adapter: what its trainer saw it say, to be seen again from the engine.

For fixed prompts the trainer writes down its own greedy continuation and, at each token of it, the likeliest tokens
with their log probabilities under the adapter and under the base network. Whole distributions are compared, not the
sampled token alone: one logprob can agree by chance, and a near tie would turn a faithful engine's greedy choice.
The first token of a continuation tests the prompt's pass, the later ones the decoding against cached keys.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from policies.types import TokenIds

PROBE_FILE = "probe.json"

MAX_TOLERANCE = 0.5
"""Nats. A probe that forgives more would pass nearly anything."""

FULL_TOLERANCE, HALF_TOLERANCE = 5e-3, 0.15
"""Nats, for numbers of 32 bits and of 16. Other kernels round otherwise. In float32 a small network is off by 1e-5, one
of 30 layers (SmolLM2 on vLLM) by 1e-4, and by 1.2e-3 where little decides. In bfloat16 it is up to 0.09 at tokens that
are LIKELY, and up to 0.25 below, as measured on a trained adapter with vLLM."""

LIKELY = -5.0
"""Log probability below which 16 bits tell nothing: all tokens that are less likely count as this likely."""

MAX_LIKELIEST = 20
"""Most tokens a position may list: an engine reports no more."""


def tolerance_in(dtype: object) -> float:
    """Nats by which two faithful computations may differ in this type (torch.bfloat16, or its name)."""
    return FULL_TOLERANCE if str(dtype).removeprefix("torch.") == "float32" else HALF_TOLERANCE


def difference(one: float, other: float, tolerance: float) -> float:
    """Nats between two log probabilities, as far as a computation of this tolerance can tell them apart."""
    floor = -math.inf if tolerance <= FULL_TOLERANCE else LIKELY
    return abs(max(one, floor) - max(other, floor))


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

    def distance_from_base(self, tolerance: float) -> float:
        """As `Probe.distance_from_base`, of this prompt."""
        tokens = (token for likeliest in self.continuation for token in likeliest)
        return max(difference(token.adapter_logprob, token.base_logprob, tolerance) for token in tokens)


@dataclass(frozen=True, slots=True)
class Probe:
    """The content of `probe.json`."""

    base_fingerprint: str
    """Of the base network the adapter was trained on, see `BaseNetwork.fingerprint`."""
    tolerance: float
    """Nats by which an engine's log probabilities may differ from the trainer's."""
    prompts: tuple[ProbePrompt, ...]

    def __post_init__(self) -> None:
        if not 0.0 < self.tolerance <= MAX_TOLERANCE:
            raise ValueError(f"tolerance must lie in (0, {MAX_TOLERANCE}], got {self.tolerance}")
        if not self.prompts:
            raise ValueError("a probe needs at least one prompt")

    def distance_from_base(self, tolerance: float) -> float:
        """The largest difference, in nats, between adapter and base on any listed token."""
        return max(prompt.distance_from_base(tolerance) for prompt in self.prompts)


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
        return Probe(str(content["base_fingerprint"]), float(content["tolerance"]), prompts)
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
