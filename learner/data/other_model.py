"""A model of somebody else's, behind an OpenAI-compatible URL: whatever it answers, or does not, a cycle goes on.

Nothing is believed of the other side. A body that is no chat completion, an answer that was cut off, and silence are
counted as problems. Who does not answer at all is not asked for ever: each of a thousand states would wait for him.
Neither is one that refuses every question for a reason of its own: a wrong key, a quota that is used up, an error
inside; one that is only asked too often, or begins anew, has some minutes to come back.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Annotated, Any

from openai import APIConnectionError, APIStatusError, AsyncOpenAI, OpenAIError
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from learner.api_key import without_key
from policies.types import Message

MOST_SILENCES = 8
"""In a row, after which it is not asked any more, if that takes as long as it is waited for."""
NUM_RETRIES = 5
"""Of a question that the endpoint does not take now. An endpoint that says when to come again is asked then."""
MOST_BYTES = 4 * 2**20
"""Of one answer."""
MOST_LETTERS_TOLD = 200
"""Of a problem."""

_REFUSED_QUESTIONS = frozenset({400, 413, 422})
"""Statuses by which an endpoint refuses this question, as a rule because it is too long; the next one may be taken."""

_LASTING = frozenset({401, 402, 404, 405})
"""Statuses that the next question would get as well: nothing is waited for."""
_PASSING = frozenset({408, 409, 429})
"""Statuses, and all from 500 on, at which the same question is asked again."""

_MEANINGS = {
    401: "it refuses the key (STEPAGENT_EXPERT_API_KEY, STEPAGENT_JUDGE_API_KEY)",
    402: "its quota is used up",
    403: "it does not let this key in",
    404: "it has no such address or no such model",
    405: "it has no such address",
    429: "it is asked too often, or its quota is used up",
}
"""What a status says of the endpoint, for whoever gave its address, name and key."""


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
    """Of one answer, with all that is tried again: one that comes byte by byte ends there, too."""
    patience_s: float = 120.0
    """Without any answer to any question, before it is given up: a rate limit or a new start takes that long."""
    problems: Counter[str] = field(default_factory=Counter)
    """Why there was no answer, counted."""
    _num_open: int = 0
    """Questions that are asked now."""
    _num_silences: int = 0
    _last_silence: str = ""
    _is_lasting: bool = False
    _answered_at: float = field(default_factory=time.monotonic)
    """When it last said anything; first when it was made."""
    _changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def message(self, messages: Sequence[Message], **options: Any) -> Message | None:
        """What it says to these messages; None where it does not answer, or not with a whole message."""
        async with self.places:
            if not await self._begin():
                return None
            try:
                return await self._answer(messages, options)
            finally:
                await self._end()

    async def _begin(self) -> bool:
        """Whether it is asked once more. Where all that are asked now may be silences, and too many, nobody else asks
        before one of them has ended: each could cost the whole patience again."""
        async with self._changed:
            if self._num_silences == self._num_open == 0:
                self._answered_at = time.monotonic()
            await self._changed.wait_for(
                lambda: self._num_silences >= MOST_SILENCES or self._num_silences + self._num_open < MOST_SILENCES
            )
            if self._is_given_up:
                told = f"it was not asked any more after {MOST_SILENCES} questions without any answer"
                self.problems[f"{told}, the last one: {self._last_silence}"] += 1
                return False
            self._num_open += 1
            return True

    @property
    def _is_given_up(self) -> bool:
        has_waited = self._is_lasting or time.monotonic() - self._answered_at >= self.patience_s
        return self._num_silences >= MOST_SILENCES and has_waited

    async def _end(self) -> None:
        async with self._changed:
            self._num_open -= 1
            self._changed.notify_all()

    async def _answer(self, messages: Sequence[Message], options: dict[str, Any]) -> Message | None:
        try:
            said = await self._patiently(messages, options)
        except (OpenAIError, ConnectionError, TimeoutError, ValueError) as error:
            said, self._last_silence = None, self.note(error)
            self._is_lasting = isinstance(error, APIStatusError) and error.status_code in _LASTING
            if _is_silence(error):
                self._num_silences += 1
                return None
        self._num_silences, self._answered_at = 0, time.monotonic()
        return said

    async def _patiently(self, messages: Sequence[Message], options: dict[str, Any]) -> Message:
        """What it says, if need be when it is asked again, its whole answer too. Raises why it did not at last."""
        failed: Exception = TimeoutError(f"no whole answer in {self.timeout_s:g} s")
        with suppress(TimeoutError):
            async with asyncio.timeout(self.timeout_s):
                for number in range(self.client.max_retries + 1):
                    await asyncio.sleep(_pause_s(failed, number))
                    try:
                        return await self._asked(messages, options)
                    except (OpenAIError, ConnectionError) as error:
                        failed = error
                        if not _may_pass(error):
                            break
        raise failed

    def note(self, error: Exception) -> str:
        """Count an error among the problems; gives what is told of it. Errors come uncut: of half a key nobody knows
        that it is one."""
        meaning = _meaning(error, self.client.base_url.netloc.decode())
        told = without_key(f"{meaning}{type(error).__name__}: {error}", self.client.api_key)[:MOST_LETTERS_TOLD]
        self.problems[told] += 1
        return told

    async def _asked(self, messages: Sequence[Message], options: dict[str, Any]) -> Message:
        sent: Any = list(messages)
        completions = self.client.with_options(max_retries=0).chat.completions.with_streaming_response
        async with completions.create(model=self.model, messages=sent, temperature=0.0, **options) as answer:
            body = await _read(answer.iter_bytes())
        try:
            choice = _Completion.model_validate_json(body).choices[0]
        except ValidationError as error:
            raise ValueError(f"its answer is no chat completion: {body!r}") from error
        if choice.finish_reason in ("length", "content_filter"):
            raise ValueError(f"its answer was cut off ({choice.finish_reason})")
        return choice.message.model_dump(exclude_none=True)


async def _read(parts: AsyncIterator[bytes]) -> bytes:
    """The whole body. Raises ConnectionError where it breaks off, ValueError for one too large to be an answer."""
    body = bytearray()
    while len(body) <= MOST_BYTES:
        try:
            body += await anext(parts)
        except StopAsyncIteration:
            return bytes(body)
        except Exception as error:  # of whichever HTTP library the client uses: it passes them on here
            raise ConnectionError(f"its answer broke off: {error}") from error
    raise ValueError(f"its answer is larger than {MOST_BYTES // 2**20} MiB")


def _may_pass(error: Exception) -> bool:
    """Whether the same question may be answered a little later."""
    if isinstance(error, APIStatusError):
        return error.status_code in _PASSING or error.status_code >= 500
    return isinstance(error, APIConnectionError | ConnectionError)


def _pause_s(failed: Exception, number: int) -> float:
    """Before a question is asked for the `number`th time again: as the endpoint says, else 0.5, 1, 2, 4, 8 seconds."""
    if number == 0:
        return 0.0
    said = failed.response.headers.get("retry-after", "") if isinstance(failed, APIStatusError) else ""
    return float(said) if said.isdecimal() else min(0.5 * 2 ** (number - 1), 8.0)


def _is_silence(error: Exception) -> bool:
    """Whether the endpoint answers nothing now, whatever is asked: not whether it refuses this question."""
    if isinstance(error, APIStatusError):
        return error.status_code not in _REFUSED_QUESTIONS
    return isinstance(error, APIConnectionError | ConnectionError | TimeoutError)


def _meaning(error: Exception, place: str) -> str:
    """What an error says of the endpoint, to stand before it; empty where the error says it itself."""
    if isinstance(error, APIConnectionError):
        return f"nobody answers at {place}: "
    if isinstance(error, APIStatusError) and error.status_code in _MEANINGS:
        return f"{_MEANINGS[error.status_code]}: "
    return ""
