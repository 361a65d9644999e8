"""What was said before makes a token less likely, or more: presence, frequency and repetition penalties.

They change what is drawn, never the logprobs that are told and logged: those stay the policy's own.

    logit[j] <- logit[j] / r  where it is positive, logit[j] * r  where it is negative      (j in the prompt or said)
    logit[j] <- logit[j] - count[j] * frequency - (count[j] > 0) * presence                 (count: of what was said)

The first is Keskar et al. 2019 (CTRL, arXiv 1909.05858), section 4.1, as transformers and vLLM have it; the second is
OpenAI's ("Frequency and presence penalties" in its documentation of text generation). The order is vLLM's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from policies.types import SamplingParams


class Penalties:
    """Of the rows of a batch that have any. Counts what is drawn."""

    def __init__(
        self,
        sampling: Sequence[SamplingParams],
        prompts: Sequence[Sequence[int]],
        said: Sequence[Sequence[int]],
        vocab_size: int,
        device: torch.device,
    ) -> None:
        """All three are parallel to the rows: `prompts` and `said` are token ids, `said` what was drawn so far."""
        places = [place for place, params in enumerate(sampling) if params.has_penalties]
        chosen = [sampling[place] for place in places]
        self._places = torch.tensor(places, dtype=torch.long, device=device)
        self._repetition = torch.tensor([params.repetition_penalty for params in chosen], device=device)[:, None]
        self._frequency = torch.tensor([params.frequency_penalty for params in chosen], device=device)[:, None]
        self._presence = torch.tensor([params.presence_penalty for params in chosen], device=device)[:, None]
        self._counts = _counts([said[place] for place in places], vocab_size, device)
        self._is_in_prompt = _counts([prompts[place] for place in places], vocab_size, device) > 0

    def applied(self, logits: torch.Tensor) -> torch.Tensor:
        """The logits (rows, vocabulary) that are drawn from; those given stay as they are."""
        own = logits[self._places]
        is_said = self._counts > 0
        scaled = torch.where(own > 0, own / self._repetition, own * self._repetition)
        own = torch.where(is_said | self._is_in_prompt, scaled, own)
        own = own - self._counts * self._frequency - is_said * self._presence
        return logits.index_copy(0, self._places, own)

    def note(self, token_ids: torch.Tensor) -> None:
        """Count what was drawn: (rows,), of the whole batch."""
        drawn = token_ids[self._places]
        self._counts[torch.arange(len(drawn), device=drawn.device), drawn] += 1.0


def _counts(rows: Sequence[Sequence[int]], vocab_size: int, device: torch.device) -> torch.Tensor:
    """How often each row has each token: (rows, vocabulary) of float."""
    counts = [torch.bincount(torch.tensor(list(row), dtype=torch.long), minlength=vocab_size) for row in rows]
    return torch.stack(counts).to(device, torch.float32) if counts else torch.zeros(0, vocab_size, device=device)
