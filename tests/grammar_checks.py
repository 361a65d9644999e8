"""Which texts a grammar lets through."""

from __future__ import annotations

import llguidance
import llguidance.hf

from policies.chat.chat_protocol import ChatProtocol


def admits(protocol: ChatProtocol, grammar: str, token_ids: tuple[int, ...]) -> bool:
    """Whether the grammar lets a completion be exactly these tokens, the stop token left away."""
    tokenizer = llguidance.hf.from_tokenizer(protocol.tokenizer, n_vocab=len(protocol.tokenizer))
    matcher = llguidance.LLMatcher(tokenizer, llguidance.LLMatcher.grammar_from_lark(grammar))
    assert not matcher.is_error(), matcher.get_error()
    return all(matcher.consume_token(token_id) for token_id in token_ids) and matcher.is_accepting()
