"""Who is served next when more is asked than can be done, and when somebody has had enough for today.

As many requests run as the engine has places; the others wait, but not without bound: a client that is told 429 at
once is better off than one that waits for minutes. A free place goes to the key that has the fewest, and where the
queue is full, a newcomer takes the place of the last who waits with the key that has most of them: one busy client
keeps nobody else out. The server's own learner stands back for whoever is served: of a real model on a CPU its trials
are prompts of a thousand tokens, sixteen at a time, and a user waited 105 seconds behind them.

What a key with a quota has used up is logged together with the step that it was used for, and a start goes on from
there. Not covered: requests that ended without a step, since the last step of that key, are forgotten by a kill.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Gauge
from prometheus_client import Counter as CounterMetric

from runtime.http.shutdown import Cutting
from runtime.store.episodes import KeyUsage, Step
from runtime.store.keys import LEARNER, Key, Quota

DAY_S = 24 * 3600

BESIDE_USERS = 1 / 8
"""Share of the places that the server's own learner takes while others are served; one in any case."""
USERS_PAUSE_S = 5.0
"""Others count as served so long after their last request, too: they run a tool, or read."""


class Refused(Exception):
    """Too much is asked; `retry_after_s` says when it makes sense to ask again."""

    def __init__(self, message: str, code: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.code = code
        self.retry_after_s = max(1, round(retry_after_s))


@dataclass(slots=True)
class Usage:
    """What a key has used up today."""

    day: int
    requests: int = 0
    steps: int = 0
    tokens: int = 0
    unlogged_requests: int = 0
    """Of `requests`, those that no logged step has carried to disk yet."""


def today(clock: Callable[[], float] = time.time) -> int:
    """Days since 1970, UTC."""
    return int(clock() // DAY_S)


class Load:
    """The places, the queue for them, and what each key has used up. Used on the event loop alone."""

    def __init__(
        self,
        places: int = 32,
        most_waiting: int = 1000,
        cutting: Cutting | None = None,
        metrics: CollectorRegistry | None = None,
        clock: Callable[[], float] = time.time,
        used: Iterable[KeyUsage] = (),
    ) -> None:
        """`used` is what was used up before this start."""
        self._free = places
        self._places = places
        self._most_waiting = most_waiting
        self._cutting = cutting or Cutting()
        self._clock = clock
        self._running: Counter[str] = Counter()
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}
        self._served_at: dict[str, int] = {}
        """By key, the number of the turn that it was given last: who was served longer ago comes first."""
        self._num_turns = 0
        self._users_until = -math.inf
        """Until then (time.monotonic) users count as served who have no request running."""
        self._is_watching = False
        """A timer will look whether they have gone."""
        self._usage = {each.key: Usage(each.day, each.requests, each.steps, each.tokens) for each in used}
        self._mean_s = 1.0
        """How long a request has held its place lately."""
        registry = metrics or CollectorRegistry()
        self._used = {
            what: CounterMetric(f"stepagent_key_{what}", f"The {what} of each key.", ["key"], registry=registry)
            for what in ("requests", "steps", "tokens")
        }
        self._refused = CounterMetric(
            "stepagent_refused_requests", "Requests refused for load or quota.", ["key", "reason"], registry=registry
        )
        Gauge("stepagent_requests_waiting", "Requests that wait for a place.", registry=registry).set_function(
            lambda: float(self.num_waiting)
        )

    @property
    def num_waiting(self) -> int:
        return sum(map(len, self._waiting.values()))

    @asynccontextmanager
    async def place(self, key: Key, num_completions: int = 1) -> AsyncIterator[None]:
        """Hold places for a request's completions. Raises Refused where the queue is full or the key's day is over,
        and ServerStopping."""
        self._require_quota(key)
        self._hand_on()  # to the learner, where users have gone meanwhile
        if self._free < 1 or not self._may_start(key.name):
            await self._wait(key)
        else:
            self._take(key.name, 1)
        self._take(key.name, num_completions - 1)  # perhaps more than are free: else who asks for many never came in
        self._num_turns += 1
        self._served_at[key.name] = self._num_turns
        usage = self._today(key)
        usage.requests += 1
        usage.unlogged_requests += 1
        self._used["requests"].labels(key.name).inc()
        began = time.monotonic()
        try:
            yield
        finally:
            self._mean_s += 0.1 * (time.monotonic() - began - self._mean_s)
            self._take(key.name, -num_completions)
            if key.name != LEARNER:
                self._users_until = time.monotonic() + USERS_PAUSE_S
            self._hand_on()

    def usage_of(self, key: Key, step: Step, num_beside: int = 0) -> tuple[KeyUsage, ...]:
        """What is to be logged beside a step that is taken for this key; nothing for a key without a quota.

        `num_beside`: tokens that were drawn for it and not chosen; here and below.
        """
        if key.quota == Quota():
            return ()
        usage = self._today(key)
        num_requests, usage.unlogged_requests = usage.unlogged_requests, 0
        return (KeyUsage(key.name, usage.day, num_requests, 1, _num_tokens(step) + num_beside),)

    def count(self, key: Key, step: Step, num_beside: int = 0) -> None:
        """A step was taken for this key."""
        num_tokens = _num_tokens(step) + num_beside
        usage = self._today(key)
        usage.steps += 1
        usage.tokens += num_tokens
        self._used["steps"].labels(key.name).inc()
        self._used["tokens"].labels(key.name).inc(num_tokens)

    # ------------------------------------------------------------------------------------------- the queue

    async def _wait(self, key: Key) -> None:
        # The learner stands back by itself, and never has more than some dozen requests under way.
        if self.num_waiting >= self._most_waiting and key.name != LEARNER:
            self._make_room(key)
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(key.name, deque()).append(turn)
        if LEARNER in self._waiting and not self._is_watching:
            self._watch_users()
        try:
            with self._cutting.waiting():
                await turn
            self._require_quota(key)  # others of this key may have used it up meanwhile
        except BaseException:
            if turn.done() and not turn.cancelled() and turn.exception() is None:  # given, but no longer wanted
                self._take(key.name, -1)
                self._hand_on()
            else:
                self._forget(key.name, turn)
            raise

    def _make_room(self, key: Key) -> None:
        """Send the last of the busiest key away, or the newcomer where it is of that key itself."""
        num_waiting = {key.name: 0} | {name: len(turns) for name, turns in self._waiting.items()}
        busiest = max(num_waiting, key=lambda name: num_waiting[name])
        if num_waiting[busiest] <= num_waiting[key.name] + 1:
            raise self._refusal(key.name)
        last = self._waiting[busiest][-1]
        self._forget(busiest, last)
        last.set_exception(self._refusal(busiest))

    def _refusal(self, name: str) -> Refused:
        self._refused.labels(name, "queue_full").inc()
        message = f"{self.num_waiting} requests wait already, as many as this server lets wait: ask again later"
        return Refused(message, "queue_full", self.num_waiting * self._mean_s / self._places)

    def _hand_on(self) -> None:
        """Give free places to those who wait: first to the key with the fewest."""
        while self._free > 0 and (names := list(filter(self._may_start, self._waiting))):
            name = min(names, key=lambda each: (self._running[each], self._served_at.get(each, 0)))
            turn = self._waiting[name][0]
            self._forget(name, turn)
            if not turn.done():
                self._take(name, 1)
                turn.set_result(None)

    def _take(self, name: str, num_places: int) -> None:
        self._free -= num_places
        self._running[name] += num_places

    def _may_start(self, name: str) -> bool:
        return (
            name != LEARNER
            or self._running[LEARNER] < max(1, BESIDE_USERS * self._places)
            or not self._are_users_served()
        )

    def _are_users_served(self) -> bool:
        return self._running.total() > self._running[LEARNER] or time.monotonic() < self._users_until

    def _watch_users(self) -> None:
        """Let the learner in when they have gone, which nothing else tells."""
        self._hand_on()
        self._is_watching = LEARNER in self._waiting
        if self._is_watching:
            asyncio.get_running_loop().call_later(USERS_PAUSE_S / 5, self._watch_users)

    def _forget(self, name: str, turn: asyncio.Future[None]) -> None:
        queue = self._waiting.get(name)
        if queue is not None and turn in queue:
            queue.remove(turn)
            if not queue:
                del self._waiting[name]

    # -------------------------------------------------------------------------------------------- the quota

    def _today(self, key: Key) -> Usage:
        day = today(self._clock)
        usage = self._usage.get(key.name)
        if usage is None or usage.day != day:
            usage = self._usage[key.name] = Usage(day)
        return usage

    def _require_quota(self, key: Key) -> None:
        usage = self._today(key)
        for what in ("requests", "steps", "tokens"):
            used, bound = getattr(usage, what), getattr(key.quota, what)
            if bound is not None and used >= bound:
                self._refused.labels(key.name, "quota").inc()
                message = f"the key {key.name!r} has used up its {bound} {what} of today (UTC): ask again tomorrow"
                raise Refused(message, "quota_exceeded", DAY_S - self._clock() % DAY_S)


def _num_tokens(step: Step) -> int:
    return len(step.prompt_token_ids) + len(step.completion_token_ids)
