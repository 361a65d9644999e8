"""A model of somebody else's, behind an OpenAI-compatible URL: whatever it answers, or does not, a cycle goes on.

Nothing is believed of the other side. A body that is no chat completion, an answer that was cut off, and silence are
counted as problems. Who does not answer at all is not asked for ever: each of a thousand states would wait for him.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from openai import APIConnectionError, AsyncOpenAI, OpenAIError
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from policies.types import Message

MOST_SILENCES = 8
"""In a row, after which it is not asked any more."""


class _Said(BaseModel):
    """The message of a chat completion, as far as anything is read of it."""

    model_config = ConfigDict(extra="allow")

    role: str = "assistant"
    content: str | list[dict[str, Any]] | None = None
    tool_calls: list[dict[str, Any]] | None = None


class _Choice(BaseModel):
    message: _Said
    finish_reason: str | None = None


class _Completion(BaseModel):
    choices: Annotated[list[_Choice], Field(min_length=1)]


@dataclass(slots=True)
class OtherModel:
    """Ask it with `message`."""

    client: AsyncOpenAI
    model: str
    """Its name there."""
    places: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(8))
    """Questions at once."""
    timeout_s: float = 300.0
    """Of one answer, with all that the client tries again: one that comes byte by byte ends there, too."""
    problems: Counter[str] = field(default_factory=Counter)
    """Why there was no answer, counted."""
    _num_silences: int = 0

    async def message(self, messages: Sequence[Message], **options: Any) -> Message | None:
        """What it says to these messages; None where it does not answer, or not with a whole message."""
        async with self.places:
            if self._num_silences >= MOST_SILENCES:
                self.problems[f"it was not asked any more after {MOST_SILENCES} questions without any answer"] += 1
                return None
            try:
                async with asyncio.timeout(self.timeout_s):
                    said = await self._asked(messages, options)
            except (APIConnectionError, TimeoutError) as error:
                self._num_silences += 1
                self.note(error)
                return None
            except (OpenAIError, ValueError) as error:
                said = None
                self.note(error)
            self._num_silences = 0
            return said

    def note(self, error: Exception) -> None:
        """Count an error among the problems."""
        if isinstance(error, TimeoutError):
            error = TimeoutError(f"no whole answer in {self.timeout_s:g} s")
        self.problems[f"{type(error).__name__}: {error}"[:200]] += 1

    async def _asked(self, messages: Sequence[Message], options: dict[str, Any]) -> Message:
        sent: Any = list(messages)
        completions = self.client.chat.completions.with_raw_response
        answer = await completions.create(model=self.model, messages=sent, temperature=0.0, **options)
        try:
            choice = _Completion.model_validate_json(answer.content).choices[0]
        except ValidationError as error:
            raise ValueError(f"its answer is no chat completion: {answer.content[:80]!r}") from error
        if choice.finish_reason in ("length", "content_filter"):
            raise ValueError(f"its answer was cut off ({choice.finish_reason})")
        return choice.message.model_dump(exclude_none=True)
