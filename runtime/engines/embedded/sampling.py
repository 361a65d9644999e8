"""Drawing one token for every row of a batch.

Each row has its own stream of uniforms and is drawn by inverse CDF: what a seeded request draws depends on its own
logits and uniforms only. `torch.multinomial` was refused: one generator serves the whole batch there, so a row's
tokens would depend on its neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from policies.types import SamplingParams
from runtime.engines.embedded.penalties import Penalties

TopLogprobs = tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Draws:
    """One token per row; all three are parallel to the rows."""

    token_ids: list[int]
    logprobs: list[float]
    """At temperature 1, before biases, penalties, top-p and top-k. NaN where the row's logits were not finite."""
    top_logprobs: list[TopLogprobs]


class Sampler:
    """Draws tokens for a fixed set of rows. Make a new one when a row joins or leaves."""

    def __init__(
        self,
        sampling: Sequence[SamplingParams],
        device: torch.device,
        prompts: Sequence[Sequence[int]] = (),
        said: Sequence[Sequence[int]] = (),
    ) -> None:
        """`prompts` and `said`, parallel to the rows, are read where a row has penalties: its prompt's token ids, and
        what was drawn for it so far."""
        self._sampling, self._prompts, self._said = sampling, prompts, said
        self._has_penalties = any(params.has_penalties for params in sampling)
        self._penalties: Penalties | None = None
        self._is_greedy = torch.tensor([params.temperature == 0 for params in sampling], device=device)
        temperatures = [params.temperature or 1.0 for params in sampling]
        self._temperatures = torch.tensor(temperatures, device=device)[:, None]
        self._has_temperature = any(temperature != 1.0 for temperature in temperatures)
        self._num_top = [params.num_top_logprobs for params in sampling]
        self.draws_randomly = any(params.temperature > 0 for params in sampling)
        self._is_all_random = all(params.temperature > 0 for params in sampling)
        biases = [(row, *bias) for row, params in enumerate(sampling) for bias in params.logit_bias]
        self._biased = torch.tensor([bias[:2] for bias in biases], device=device).T if biases else None
        self._biases = torch.tensor([bias[2] for bias in biases], device=device)
        filtered = [row for row, params in enumerate(sampling) if _filters(params)]
        self._filtered = torch.tensor(filtered, device=device) if filtered else None
        self._min_p = torch.tensor([sampling[row].min_p for row in filtered], device=device)[:, None]
        self._top_p = torch.tensor([sampling[row].top_p for row in filtered], device=device)[:, None]
        self._top_k = torch.tensor([sampling[row].top_k or 2**62 for row in filtered], device=device)[:, None]

    def draw(self, logits: torch.Tensor, uniforms: Sequence[float]) -> Draws:
        """Draw from float logits (rows, vocabulary); `uniforms` in [0, 1) are read where a row is not greedy."""
        all_logprobs = torch.log_softmax(logits, dim=-1)
        chosen = self._choose(self._drawn_from(logits, all_logprobs), uniforms)
        if self._penalties is not None:
            self._penalties.note(chosen)
        logprobs = all_logprobs.gather(1, chosen[:, None])[:, 0]
        return Draws(chosen.tolist(), logprobs.tolist(), self._top_logprobs(all_logprobs))

    def _drawn_from(self, logits: torch.Tensor, logprobs: torch.Tensor) -> torch.Tensor:
        """The log distribution with biases and penalties, before temperature."""
        if self._biased is None and not self._has_penalties:
            return logprobs
        if self._biased is not None:
            logits = logits.index_put(tuple(self._biased), self._biases, accumulate=True)
        if self._has_penalties:
            if self._penalties is None:
                vocab_size, device = logits.shape[-1], logits.device
                self._penalties = Penalties(self._sampling, self._prompts, self._said, vocab_size, device)
            logits = self._penalties.applied(logits)
        return torch.log_softmax(logits, dim=-1)  # else the exponential of a large bias is infinite

    def _choose(self, logprobs: torch.Tensor, uniforms: Sequence[float]) -> torch.Tensor:
        if not self.draws_randomly:
            return logprobs.argmax(dim=-1)
        # logprobs / T and logits / T differ by a constant, which the softmax drops.
        probs = torch.softmax(logprobs / self._temperatures, dim=-1) if self._has_temperature else logprobs.exp()
        if self._filtered is not None:
            kept = drop_unlikely(probs[self._filtered], self._min_p)
            probs[self._filtered] = keep_likeliest(kept, self._top_p, self._top_k)
        drawn = invert_cdf(probs, torch.tensor(uniforms, dtype=torch.float64, device=probs.device))
        return drawn if self._is_all_random else torch.where(self._is_greedy, logprobs.argmax(dim=-1), drawn)

    def _top_logprobs(self, logprobs: torch.Tensor) -> list[TopLogprobs]:
        most = min(max(self._num_top), logprobs.shape[-1])
        if most == 0:
            return [()] * len(self._num_top)
        values, token_ids = (part.tolist() for part in logprobs.topk(most, dim=-1))
        rows = zip(token_ids, values, self._num_top, strict=True)
        # What a grammar forbids has no probability, and is nobody's alternative.
        return [tuple(p for p in zip(ids[:n], row[:n], strict=True) if p[1] > float("-inf")) for ids, row, n in rows]


def _filters(params: SamplingParams) -> bool:
    return params.top_p < 1 or params.top_k > 0 or params.min_p > 0


def drop_unlikely(probs: torch.Tensor, min_p: torch.Tensor) -> torch.Tensor:
    """Zero each row's tokens below `min_p` times its likeliest. `probs` is (rows, vocabulary), `min_p` (rows, 1)."""
    return probs.masked_fill(probs < min_p * probs.amax(dim=-1, keepdim=True), 0.0)


def keep_likeliest(probs: torch.Tensor, top_p: torch.Tensor, top_k: torch.Tensor) -> torch.Tensor:
    """Zero all but each row's top-k tokens, and of these all beyond the smallest set that reaches top-p.

    `probs` is (rows, vocabulary), `top_p` and `top_k` (rows, 1). The likeliest token always stays.
    """
    ordered, order = probs.sort(dim=-1, descending=True, stable=True)
    ordered.masked_fill_(torch.arange(probs.shape[-1], device=probs.device) >= top_k, 0.0)
    ordered /= ordered.sum(dim=-1, keepdim=True)
    mass_before = ordered.cumsum(dim=-1) - ordered
    beyond = mass_before >= top_p
    beyond[:, 0] = False
    return torch.zeros_like(probs).scatter_(1, order, ordered.masked_fill_(beyond, 0.0))


def invert_cdf(probs: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """The token at which each row's cumulative probability passes its uniform; a token of probability 0 never is.

    `probs` is (rows, vocabulary) and need not sum to 1; `uniforms` is (rows,) of float64 in [0, 1).
    """
    cdf = probs.cumsum(dim=-1, dtype=torch.float64)
    total = cdf[:, -1]
    target = torch.minimum(uniforms * total, torch.nextafter(total, torch.zeros_like(total)))
    token_ids = torch.searchsorted(cdf, target[:, None], right=True)[:, 0]
    return token_ids.clamp_(max=probs.shape[-1] - 1)  # beyond the end only where probs hold NaN
