"""Logprobs in OpenAI's form, of those tokens that the client sees as text.

Thoughts, calls and the end of a turn are no content: their tokens have no place beside it.
"""

from __future__ import annotations

from typing import Any

from policies.chat.chat_protocol import ChatProtocol
from policies.types import SampledToken
from runtime.agent.step import Progress


class Logprobs:
    """Those of an answer, gathered token by token (`Turn.tells_tokens`)."""

    def __init__(self, protocol: ChatProtocol) -> None:
        self.told: list[dict[str, Any]] = []
        self._protocol = protocol
        self._unseen: list[SampledToken] = []
        """Tokens of which nothing is visible yet: their text may be held back."""

    def take(self, progress: Progress) -> list[dict[str, Any]]:
        """The logprobs of the tokens that the text now shown was made of."""
        stops = self._protocol.stop_token_ids
        self._unseen += [token for token in progress.tokens if token.token_id not in stops]
        if not progress.deltas:
            return []
        # An empty line between two steps is in no token.
        tokens = self._tokens_of(progress.text) or self._tokens_of(progress.text.strip())
        self._unseen = []
        entries = [self._entry(token) for token in tokens]
        self.told += entries
        return entries

    def end_step(self) -> None:
        """What was not shown by now never is."""
        self._unseen = []

    def _tokens_of(self, text: str) -> list[SampledToken]:
        """The newest of the unseen tokens that spell the text; none for no text."""
        for start in range(len(self._unseen) - 1, -1, -1) if text else ():
            if text in self._protocol.decode([token.token_id for token in self._unseen[start:]]):
                return self._unseen[start:]
        return []

    def _entry(self, sampled: SampledToken) -> dict[str, Any]:
        likeliest = [self._token(token_id, logprob) for token_id, logprob in sampled.top_logprobs]
        return self._token(sampled.token_id, sampled.logprob) | {"top_logprobs": likeliest}

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        text = self._protocol.decode([token_id])
        # JSON has no minus infinity; this is what OpenAI sends for a token of probability zero.
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(text.encode())}
