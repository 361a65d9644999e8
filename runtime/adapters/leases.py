"""Which episode uses which adapter: the memory behind "an episode keeps the adapter it began with".

A lease is forgotten after an idle time, never while a step of its episode runs. Forgetting one is not a change of
adapter: the step log still tells what the episode began with.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(slots=True)
class _Lease:
    adapter: str
    last_used: float
    num_running: int = 0
    is_finished: bool = False


class Leases:
    """Leases by episode id. Adapters are names here; the base network has one too."""

    def __init__(self, idle_timeout_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._idle_timeout_s = idle_timeout_s
        self._clock = clock
        self._leases: dict[str, _Lease] = {}

    def adapter_of(self, episode_id: str) -> str | None:
        """None for an episode that holds no lease."""
        lease = self._leases.get(episode_id)
        return None if lease is None else lease.adapter

    @contextmanager
    def hold(self, episode_id: str, adapter: str) -> Iterator[None]:
        """Begin or renew an episode's lease; it cannot end inside the `with`."""
        lease = self._leases.setdefault(episode_id, _Lease(adapter, self._clock()))
        assert lease.adapter == adapter, f"episode {episode_id} holds {lease.adapter}, not {adapter}"
        lease.num_running += 1
        lease.is_finished = False
        try:
            yield
        finally:
            lease.num_running -= 1
            lease.last_used = self._clock()
            self._forget_if_over(episode_id, lease)

    def finish(self, episode_id: str) -> None:
        """The episode is over: its lease ends now, or with its running steps."""
        if lease := self._leases.get(episode_id):
            lease.is_finished = True
            self._forget_if_over(episode_id, lease)

    def expire(self) -> None:
        """Forget the leases that were idle for too long."""
        for episode_id, lease in list(self._leases.items()):
            self._forget_if_over(episode_id, lease)

    def num_on(self, adapter: str) -> int:
        return sum(lease.adapter == adapter for lease in self._leases.values())

    def idle_since(self, adapter: str) -> float | None:
        """When the last step under an adapter ended, on the clock; None while one runs. An adapter without leases has
        been idle for ever."""
        leases = [lease for lease in self._leases.values() if lease.adapter == adapter]
        if any(lease.num_running for lease in leases):
            return None
        return max((lease.last_used for lease in leases), default=float("-inf"))

    def _forget_if_over(self, episode_id: str, lease: _Lease) -> None:
        is_idle = self._clock() - lease.last_used > self._idle_timeout_s
        if lease.num_running == 0 and (lease.is_finished or is_idle):
            del self._leases[episode_id]
