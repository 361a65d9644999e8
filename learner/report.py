"""Where a cycle is, in the learning log, and what is known of it so far."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from runtime.store.learning_log import CycleStage, LearningLog


class CycleNotes:
    """Of one cycle."""

    PROGRESS_EVERY_S = 1.0

    def __init__(self, cycle: str, log: LearningLog) -> None:
        self.cycle = cycle
        self.report: dict[str, Any] = {"seconds": {}, "diagnostics": {}}
        self._log = log
        self._noted_at = 0.0

    @contextmanager
    def stage(self, stage: CycleStage, message: str = "", total: int = 0) -> Iterator[None]:
        """Note that a stage is reached, and how long it took."""
        self._log.note(self.cycle, stage, message, 0, total, self.report)
        began = time.monotonic()
        try:
            yield
        finally:
            seconds = self.report["seconds"]
            seconds[stage] = round(seconds.get(stage, 0.0) + time.monotonic() - began, 3)

    @contextmanager
    def counted(self, stage: CycleStage, message: str, total: int) -> Iterator[Callable[[], None]]:
        """As `stage`; call what it gives after each unit of the stage's work, of `total`."""
        num_done = 0

        def count() -> None:
            nonlocal num_done
            num_done += 1
            self.progress(stage, message, num_done, total)

        with self.stage(stage, message, total):
            yield count

    def progress(self, stage: CycleStage, message: str, done: int, total: int) -> None:
        """Note how far a stage is, at most once a second: rows are for ever."""
        if done == total or time.monotonic() - self._noted_at > self.PROGRESS_EVERY_S:
            self._noted_at = time.monotonic()
            self._log.note(self.cycle, stage, message, done, total, self.report)

    def measure(self, of: str, values: dict[str, float]) -> None:
        """Learner diagnostics, for the report and the server's metrics."""
        self.report["diagnostics"][of] = {name: round(value, 6) for name, value in values.items()}
