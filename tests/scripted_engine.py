"""An engine that replays a script: the whole Engine protocol in a page, for tests that are not about networks."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import replace

from policies.types import (
    BASE_ADAPTER,
    Adapter,
    EngineError,
    EngineHealth,
    EngineLimits,
    FinishReason,
    SampledToken,
    SamplingParams,
    TokenIds,
)

Tokens = Sequence[int | SampledToken]
Script = Mapping[tuple[TokenIds, str], Tokens] | Callable[[TokenIds, str], Tokens]
"""What is said after a prompt under an adapter's name (`base` for none). A bare token id gets SCRIPTED_LOGPROB."""

SCRIPTED_LOGPROB = -0.5

LIMITS = EngineLimits(
    max_context_tokens=512, max_adapters=3, max_rank=16, vocab_size=512, supports_grammar=False, logprob_tolerance=1e-3
)


class ScriptedEngine:
    """Keeps the protocol's promises about limits, slots and errors; yields to the event loop before each token."""

    def __init__(self, script: Script, limits: EngineLimits = LIMITS) -> None:
        self.limits = limits
        self.is_alive = True
        """Set to False by a test: the engine has died."""
        self.scored: Callable[[TokenIds, str], Sequence[float]] = lambda tokens, _: [SCRIPTED_LOGPROB] * len(tokens)
        """The logprobs of a given completion under an adapter's name."""
        self._script = script if callable(script) else lambda prompt, name: script[prompt, name]
        self._loaded: dict[str, Adapter] = {}
        self._running: Counter[str] = Counter()

    async def generate(
        self, prompt_token_ids: Sequence[int], sampling: SamplingParams, adapter: Adapter | None, *, stream: bool = True
    ) -> AsyncIterator[SampledToken]:
        name = BASE_ADAPTER if adapter is None else adapter.name
        self._require_servable(prompt_token_ids, adapter)
        tokens = self._completion(tuple(prompt_token_ids), name, sampling)
        self._running[name] += 1
        try:
            for token in tokens:
                await asyncio.sleep(0)
                self._require_alive()
                yield token
        finally:
            self._running[name] -= 1

    async def score(
        self, prompt_token_ids: Sequence[int], completion_token_ids: Sequence[int], adapter: Adapter | None
    ) -> tuple[float, ...]:
        await asyncio.sleep(0)
        self._require_servable(prompt_token_ids, adapter)
        return tuple(self.scored(tuple(completion_token_ids), BASE_ADAPTER if adapter is None else adapter.name))

    async def load_adapter(self, adapter: Adapter) -> None:
        await asyncio.sleep(0)
        self._require_alive()
        if adapter.name in self._loaded or len(self._loaded) >= self.limits.max_adapters:
            raise EngineError(f"cannot load {adapter.name} beside {', '.join(self._loaded)}")
        self._loaded[adapter.name] = adapter

    async def unload_adapter(self, adapter: Adapter) -> None:
        await asyncio.sleep(0)
        if adapter.name not in self._loaded or self._running[adapter.name]:
            raise EngineError(f"cannot unload {adapter.name}: {self._running[adapter.name]} completions run on it")
        del self._loaded[adapter.name]

    def loaded_adapters(self) -> tuple[Adapter, ...]:
        return tuple(self._loaded.values())

    def health(self) -> EngineHealth:
        return EngineHealth(self.is_alive, self._running.total(), 0, "" if self.is_alive else "ended by its test")

    async def close(self) -> None:
        self.is_alive = False

    def _completion(self, prompt: TokenIds, name: str, sampling: SamplingParams) -> list[SampledToken]:
        tokens = [_as_sampled(token, sampling) for token in self._script(prompt, name)]
        stops = [index for index, token in enumerate(tokens) if token.token_id in sampling.stop_token_ids]
        num_tokens = min(len(tokens), stops[0] + 1 if stops else len(tokens))
        is_cut = num_tokens > sampling.max_tokens
        completion = tokens[: min(num_tokens, sampling.max_tokens)]
        if completion:
            finish_reason = FinishReason.LENGTH if is_cut or not stops else FinishReason.STOP
            completion[-1] = replace(completion[-1], finish_reason=finish_reason)
        return completion

    def _require_alive(self) -> None:
        if not self.is_alive:
            raise EngineError("the engine has died")

    def _require_servable(self, prompt: Sequence[int], adapter: Adapter | None) -> None:
        self._require_alive()
        if not 1 <= len(prompt) < self.limits.max_context_tokens:
            raise EngineError(f"a prompt of {len(prompt)} tokens; the context takes {self.limits.max_context_tokens}")
        if not all(0 <= token_id < self.limits.vocab_size for token_id in prompt):
            raise EngineError("a token id outside the vocabulary")
        if adapter is not None and adapter.name not in self._loaded:
            raise EngineError(f"{adapter.name} is not loaded")


def _as_sampled(token: int | SampledToken, sampling: SamplingParams) -> SampledToken:
    if isinstance(token, int):
        token = SampledToken(token, SCRIPTED_LOGPROB, ((token, SCRIPTED_LOGPROB),))
    return replace(token, top_logprobs=token.top_logprobs[: sampling.num_top_logprobs])
