"""One step: the policy is sampled until it has acted, and what it writes becomes visible on the way."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, replace

from policies.chat.chat_protocol import CallDelta, TextDelta
from policies.types import (
    Action,
    EngineError,
    FinalAnswer,
    FinishReason,
    MalformedAction,
    SampledToken,
    SamplingParams,
    TokenIds,
    ToolCalls,
)
from runtime.agent.bursts import Bursts
from runtime.agent.conversation import Digests
from runtime.agent.stop_texts import StopTexts
from runtime.agent.turn import Policy, Turn
from runtime.store.episodes import Step, StepCandidate, StopReason, ToolResult

BURST_S = 0.01
"""Tokens that come quicker than this are read and shown together: a hundred times a second is smooth to any reader."""


Delta = TextDelta | CallDelta
"""What becomes visible: text, thinking, or a piece of a call that the client is to run."""


class ContextFull(Exception):
    """The conversation leaves no room for an answer in the model's context."""


@dataclass(frozen=True, slots=True)
class Progress:
    """Sampled tokens, and what they make visible to the client."""

    choice: int
    """Which of the answer's choices they belong to."""
    tokens: tuple[SampledToken, ...]
    """None of them for text that was held back until the last token was known."""
    deltas: tuple[Delta, ...]

    @property
    def text(self) -> str:
        return "".join(delta.text for delta in self.deltas if isinstance(delta, TextDelta) and delta.kind == "text")

    @property
    def calls(self) -> list[CallDelta]:
        return [delta for delta in self.deltas if isinstance(delta, CallDelta)]


@dataclass(frozen=True, slots=True)
class SampledStep:
    """What the policy chose in one step, token-exact. What it led to is not known yet, so it is no `Step`."""

    turn: Turn
    prompt_token_ids: TokenIds
    tokens: tuple[SampledToken, ...]
    sampling: SamplingParams
    adapter: str
    action: Action
    finish_reason: FinishReason
    created_at: float
    first_token_ms: float
    latency_ms: float
    candidates: tuple[StepCandidate, ...] = ()
    """What it was chosen among, itself included; empty where nothing else was drawn."""

    @property
    def num_beside_tokens(self) -> int:
        """Of what was drawn for it and not chosen."""
        return sum(len(each.completion_token_ids) for each in self.candidates if not each.is_chosen)

    @property
    def completion_token_ids(self) -> TokenIds:
        return tuple(token.token_id for token in self.tokens)

    def led_to(
        self, stop_reason: StopReason | None, digests: Digests, tool_results: tuple[ToolResult, ...] = ()
    ) -> Step:
        """The whole step, with what followed from it."""
        return Step(
            id=self.turn.step_id,
            episode_id=self.turn.episode.id,
            parent_id=self.turn.parent_id,
            index=self.turn.index,
            new_messages=self.turn.new_messages,
            tools=self.turn.tools,
            prompt_token_ids=self.prompt_token_ids,
            completion_token_ids=self.completion_token_ids,
            behavior_logprobs=tuple(token.logprob for token in self.tokens),
            sampling=self.sampling,
            adapter=self.adapter,
            action=self.action,
            finish_reason=self.finish_reason,
            stop_reason=stop_reason,
            tool_results=tool_results,
            conversation_digest=digests.conversation,
            created_at=self.created_at,
            first_token_ms=self.first_token_ms,
            latency_ms=self.latency_ms,
            prompt_change=self.turn.prompt_change,
            thread_digest=digests.thread,
            tail_digest=digests.tail,
        )


class StepSampler:
    """Lets the policy act once: iterate `progress`, then take `sampled`."""

    def __init__(
        self, policy: Policy, turn: Turn, prompt: TokenIds, deadline: float | None = None, shows_calls: bool = False
    ) -> None:
        """`deadline` is a time.monotonic() value; `shows_calls`: calls become visible as they are written.

        Raises ContextFull where the prompt leaves no room to answer.
        """
        self._policy = policy
        self._turn = turn
        self._prompt = prompt
        self._deadline = deadline
        self._sampling = _within_context(turn.sampling, policy, prompt)
        self._reader = policy.protocol.reader(turn.tools, streams_calls=shows_calls)
        self._ending = StopTexts(turn.stop)
        self._tokens: list[SampledToken] = []
        self._is_cut = False
        """By a stop text, or after the only call that is wanted."""
        self._sampled: SampledStep | None = None

    @property
    def sampled(self) -> SampledStep:
        """What was chosen; there once `progress` has ended."""
        assert self._sampled is not None, "the step is sampled to its end first"
        return self._sampled

    async def progress(self, choice: int) -> AsyncGenerator[Progress, None]:
        """Sample until the policy has acted. Raises EngineError where the engine fails."""
        created_at, began, first_token_ms = time.time(), time.perf_counter(), 0.0
        # A stop text and a deadline may end the step before its last token: then each token is wanted at once.
        stream = self._turn.stream or self._may_be_cut or self._deadline is not None
        tokens = self._policy.engine.generate(self._prompt, self._sampling, self._policy.adapter, stream=stream)
        async with aclosing(Bursts(tokens, BURST_S, self._deadline)) as bursts:
            async for burst in bursts:
                first_token_ms = first_token_ms or (time.perf_counter() - began) * 1000
                for part in [[token] for token in burst] if self._turn.tells_tokens else [burst]:
                    yield self._read(choice, part)
                    if self._is_cut:
                        break
                if self._is_cut or self._is_late():
                    break
        self._require_tokens()
        latency_ms = (time.perf_counter() - began) * 1000
        action, finish_reason, unshown = self._finish()
        if unshown:
            yield Progress(choice, (), unshown)
        self._sampled = SampledStep(
            turn=self._turn,
            prompt_token_ids=self._prompt,
            tokens=tuple(self._tokens),
            sampling=self._sampling,
            adapter=self._policy.adapter_name,
            action=action,
            finish_reason=finish_reason,
            created_at=created_at,
            first_token_ms=first_token_ms,
            latency_ms=latency_ms,
        )

    @property
    def _may_be_cut(self) -> bool:
        return bool(self._turn.stop) or self._turn.one_call

    def _is_late(self) -> bool:
        return self._deadline is not None and time.monotonic() >= self._deadline

    def _require_tokens(self) -> None:
        if self._tokens:
            return
        if self._is_late():
            raise EngineError(
                "no token came before the run's deadline; the engine is busy: try again, or raise --deadline"
            )
        raise EngineError("the engine's stream ended without a token")

    def _read(self, choice: int, burst: list[SampledToken]) -> Progress:
        """Read a burst, up to the token where the step is cut: what was sampled after it is not in the step."""
        if not self._may_be_cut:
            deltas = self._ending.cut(self._reader.feed(*(token.token_id for token in burst)))
        else:
            burst, deltas = self._read_until_cut(burst)
        self._tokens += burst
        return Progress(choice, tuple(burst), deltas)

    def _read_until_cut(self, burst: list[SampledToken]) -> tuple[list[SampledToken], tuple[Delta, ...]]:
        deltas: list[Delta] = []
        for num_read, token in enumerate(burst, 1):
            deltas += self._ending.cut(self._reader.feed(token.token_id))
            has_called = self._turn.one_call and self._reader.num_calls > 0
            if self._ending.is_reached or has_called:
                self._is_cut = True
                return burst[:num_read], tuple(deltas)
        return burst, tuple(deltas)

    def _finish(self) -> tuple[Action, FinishReason, tuple[Delta, ...]]:
        """The action, why it ended, and text that was held back until now."""
        finish_reason = FinishReason.STOP if self._is_cut else self._tokens[-1].finish_reason or FinishReason.LENGTH
        action, unshown = self._reader.finish(finish_reason)
        if isinstance(action, ToolCalls) and not self._turn.may_call:
            action = MalformedAction(self._reader.written, "it calls a tool, and no tool may be called now")
        if isinstance(action, ToolCalls) and self._turn.one_call:
            action = replace(action, calls=action.calls[:1])
        shown = self._ending.cut(unshown, is_last=True)
        return FinalAnswer(self._ending.text) if self._ending.is_reached else action, finish_reason, shown


def _within_context(sampling: SamplingParams, policy: Policy, prompt: TokenIds) -> SamplingParams:
    room = policy.room_after(prompt)
    if room < 1:
        raise ContextFull(
            f"the conversation is {len(prompt)} tokens long and {policy.engine.limits.context}; shorten it"
        )
    stops = sampling.stop_token_ids or policy.protocol.stop_token_ids
    return replace(sampling, max_tokens=min(sampling.max_tokens, room), stop_token_ids=stops)
