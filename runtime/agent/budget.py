"""The limits of a run of server-run tools, in one object that says when they are spent."""

from __future__ import annotations

import time
from dataclasses import dataclass

from policies.types import FinalAnswer, FinishReason, MalformedAction
from runtime.agent.step import SampledStep
from runtime.store.episodes import StopReason


@dataclass(frozen=True, slots=True)
class RunLimits:
    """Where a run of server-run tools ends, whatever the policy wants."""

    max_steps: int = 16
    max_completion_tokens: int = 8192
    """Of all steps of the run together, with all that was drawn for them."""
    deadline_s: float = 300.0
    tool_timeout_s: float = 30.0
    max_malformed: int = 2
    """Malformed actions in a row before the run is given up."""


class RunBudget:
    """What one run has left of its limits."""

    def __init__(self, limits: RunLimits, max_tokens: int | None = None) -> None:
        """`max_tokens` is what the client wants at most, of all steps together."""
        self.deadline = time.monotonic() + limits.deadline_s
        """A time.monotonic() value."""
        self._limits = limits
        self._max_tokens = max_tokens or limits.max_completion_tokens
        self._num_steps = 0
        self._num_completion_tokens = 0
        self._num_drawn_tokens = 0
        self._num_malformed = 0
        """In a row, the newest steps."""

    @property
    def completion_tokens_left(self) -> int:
        """Of what the client wants, and of what the server draws for it."""
        return self.most_tokens(1)

    def most_tokens(self, num_draws: int) -> int:
        """That each of so many draws for the next step may have."""
        drawn_left = self._limits.max_completion_tokens - self._num_drawn_tokens
        return min(self._max_tokens - self._num_completion_tokens, max(drawn_left // num_draws, min(drawn_left, 1)))

    @property
    def tool_timeout_s(self) -> float:
        """Of a tool that has no time-out of its own."""
        return self._limits.tool_timeout_s

    @property
    def seconds_left(self) -> float:
        """Of the run."""
        return max(0.0, self.deadline - time.monotonic())

    def spend(self, sampled: SampledStep) -> None:
        """Take a step off."""
        self._num_steps += 1
        self._num_completion_tokens += len(sampled.tokens)
        self._num_drawn_tokens += len(sampled.tokens) + sampled.num_beside_tokens
        self._num_malformed = self._num_malformed + 1 if isinstance(sampled.action, MalformedAction) else 0

    def stop_reason(self, sampled: SampledStep, room: int) -> StopReason | None:
        """Why the run ends with this step, the newest one spent; None where it goes on.

        `room` is the number of tokens that the context leaves for the next answer.
        """
        if time.monotonic() >= self.deadline:
            return StopReason.DEADLINE
        if isinstance(sampled.action, FinalAnswer):
            was_cut_off = sampled.finish_reason is FinishReason.LENGTH
            return StopReason.TOKEN_LIMIT if was_cut_off else StopReason.FINAL_ANSWER
        if room < 1 or self.completion_tokens_left < 1:
            return StopReason.TOKEN_LIMIT
        if self._num_malformed >= self._limits.max_malformed:
            return StopReason.MALFORMED
        return StopReason.STEP_LIMIT if self._num_steps >= self._limits.max_steps else None
