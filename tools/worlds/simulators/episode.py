"""An episode that a pool of simulators plays."""

from __future__ import annotations

from typing import Any, ClassVar

from tools.worlds.reading import Call, ReadingEpisode
from tools.worlds.simulators.live import Frame, Settings
from tools.worlds.simulators.pool import SimulatorPool


class SimulatedEpisode(ReadingEpisode):
    """One attempt at a task whose state lives in one of the pool's processes."""

    max_calls: ClassVar[int]
    """The episode is over after so many calls, where the package does not end it earlier."""

    def __init__(self, pool: SimulatorPool, settings: Settings) -> None:
        super().__init__()
        self._pool, self._settings = pool, settings
        self._frame: Frame = pool.frame(settings, ())

    @property
    def is_done(self) -> bool:
        """The package has ended the episode, its simulator has failed, or the calls are used up."""
        return self._frame.is_done or len(self.calls) >= self.max_calls

    @property
    def failure(self) -> str:
        """Why the simulator could not go on; empty where it could."""
        return self._frame.failure

    def outcome(self) -> float:
        return self._frame.outcome

    def do(self, call: Call) -> str:
        self._frame = self._pool.frame(self._settings, self._raw_calls(call))
        return self._frame.observation

    def expert_call(self) -> Call | None:
        raw_call = self._pool.expert(self._settings, self._raw_calls())
        return None if raw_call is None else Call(*raw_call)

    def reopened(self) -> SimulatedEpisode:
        return type(self)(self._pool, self._settings)

    def is_where(self, other: SimulatedEpisode) -> bool:
        return (self._frame.state, self.is_done, self.outcome()) == (other._frame.state, other.is_done, other.outcome())

    def _raw_calls(self, *more: Call) -> list[tuple[str, Any]]:
        return [(call.name, call.arguments) for call in (*self.calls, *more)]
