"""Grammars that completions must follow, on llguidance.

A grammar is compiled once and copied for each request that brings it again.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import llguidance
import llguidance.hf
import llguidance.numpy
import numpy as np

from policies.types import GrammarFailed


class Grammars:
    """Compiles grammars for one tokenizer, and tells which tokens they allow."""

    def __init__(self, tokenizer: Any, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._tokenizer = llguidance.hf.from_tokenizer(tokenizer, n_vocab=vocab_size)
        self._executor = llguidance.LLExecutor(num_threads=1)
        self._eos_token_id: int = tokenizer.eos_token_id
        self._compile = lru_cache(maxsize=64)(self._compile_once)

    def start(self, grammar: str, stop_token_ids: Sequence[int]) -> GrammarState:
        """Begin a completion under a Lark grammar. Raises GrammarFailed where it does not compile."""
        return GrammarState(self._compile(grammar).deep_copy(), tuple(stop_token_ids) or (self._eos_token_id,))

    def _compile_once(self, grammar: str) -> llguidance.LLMatcher:
        matcher = llguidance.LLMatcher(self._tokenizer, llguidance.LLMatcher.grammar_from_lark(grammar))
        if matcher.is_error():
            raise GrammarFailed(f"the grammar does not compile: {matcher.get_error()}")
        return matcher

    def allowed_tokens(self, states: Sequence[GrammarState]) -> np.ndarray:
        """(states, vocabulary) of bool: what each may sample next. Stop tokens count only where it may end."""
        words = llguidance.numpy.allocate_token_bitmask(len(states), self._vocab_size)
        going_on = [(state.matcher, row) for row, state in enumerate(states) if not state.matcher.is_stopped()]
        if going_on:
            llguidance.numpy.fill_next_token_bitmask_par(self._executor, going_on, words)
        bits = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little", count=self._vocab_size)
        allowed = bits.astype(bool)
        for row, state in enumerate(states):
            allowed[row] &= not state.matcher.is_stopped()
            allowed[row, [self._eos_token_id, *state.stop_token_ids]] = False
            if state.may_end:
                allowed[row, state.stop_token_ids] = True
        return allowed


class GrammarState:
    """Where one completion stands in its grammar."""

    def __init__(self, matcher: llguidance.LLMatcher, stop_token_ids: tuple[int, ...]) -> None:
        self.matcher = matcher
        self.stop_token_ids = stop_token_ids
        """End the completion; the tokenizer's own end token where the request named none."""

    @property
    def may_end(self) -> bool:
        return self.matcher.is_stopped() or self.matcher.is_accepting()

    def advance(self, token_id: int) -> None:
        """Take a sampled token. Stop tokens are not the grammar's business. Raises GrammarFailed where it is stuck."""
        if token_id not in self.stop_token_ids and not self.matcher.consume_token(token_id):
            raise GrammarFailed(f"the grammar does not go on after token {token_id}: {self.matcher.get_error()}")
