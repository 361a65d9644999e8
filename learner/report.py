"""What is known of a cycle: one frozen report that grows by stages, and where the cycle is, in the learning log."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from runtime.store.learning_log import CycleStage, LearningLog

NOT_ASKED = "over the limit of groups"
"""Among a judge's problems, the one that is none of its own."""


@dataclass(frozen=True, slots=True)
class CycleReport:
    """Everything a cycle tells of itself. Empty fields: the cycle did not get there."""

    acting: str = ""
    """The adapter that acted when the cycle began."""
    collected: Mapping[str, int] = field(default_factory=dict)
    """Episodes by where they went: to train on, held out, left out and why."""
    outlook: Mapping[str, Any] = field(default_factory=dict)
    """What the gate's evidence could show, as it was known before anything was trained."""
    doubts: Sequence[Mapping[str, Any]] = ()
    """The first steps of demonstrations that corrections, outcomes or other demonstrations contradict."""
    inspection: Mapping[str, Any] = field(default_factory=dict)
    """How the policy's actions compare with the experts', and which experts answered."""
    expert_problems: Mapping[str, int] = field(default_factory=dict)
    """Why a model expert did not answer, counted."""
    judge: Mapping[str, Any] = field(default_factory=dict)
    """What a judge model did: episodes that it scored, the mean, and why groups went without."""
    no_discriminator: str = ""
    """Why there is none; empty where there is one."""
    no_reward_model: str = ""
    """Why the discriminator does not lie beside the candidates, though there is one; empty where it does."""
    diagnostics: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """What was measured, by what it is of: the training data, the discriminator, an objective."""
    not_trained: Mapping[str, str] = field(default_factory=dict)
    """Why, for each objective that no candidate was trained for, or none without a fold."""
    not_registered: Mapping[str, str] = field(default_factory=dict)
    """Why, for each objective whose candidate, or the one without a fold, the runtime did not take in."""
    gate: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """By candidate: the evidence, the decision and its reason."""
    promoted: str | None = None
    """The adapter that acts since, or is a canary."""
    proposed: str | None = None
    """The adapter that waits for somebody's yes since."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """By stage."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class CycleRecord:
    """The rows of one cycle: each stage, its progress, and the report so far."""

    PROGRESS_EVERY_S = 1.0

    def __init__(self, cycle: str, log: LearningLog, agent: str = "") -> None:
        self.cycle = cycle
        self._agent = agent
        self.report = CycleReport()
        self._log = log
        self._last_step_id: str | None = None
        self._noted_at = 0.0

    def add(self, **fields: Any) -> None:
        """Set fields of the report; mappings are merged into what they hold already."""
        held = {name: getattr(self.report, name) for name in fields}
        merged = {n: {**held[n], **v} if isinstance(v, Mapping) else v for n, v in fields.items()}
        self.report = replace(self.report, **merged)

    def measure(self, of: str, values: Mapping[str, float]) -> None:
        """Add diagnostics, for the report and the server's metrics."""
        self.add(diagnostics={of: {name: round(value, 6) for name, value in values.items()}})

    def has_read_to(self, last_step_id: str | None) -> None:
        """The log was read up to this step: the next cycle goes on from there if this one comes to an end."""
        self._last_step_id = last_step_id

    @contextmanager
    def stage(self, stage: CycleStage, message: str = "", total: int = 0) -> Iterator[None]:
        """Note that a stage is reached, and how long it took."""
        self._note(stage, message, 0, total)
        began = time.monotonic()
        try:
            yield
        finally:
            spent = self.report.seconds.get(stage, 0.0) + time.monotonic() - began
            self.add(seconds={str(stage): round(spent, 3)})

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
            self._note(stage, message, done, total)

    def end(self, ending: CycleStage, message: str) -> None:
        self._note(ending, message, 0, 0)

    def _note(self, stage: CycleStage, message: str, done: int, total: int) -> None:
        self._log.note(self.cycle, stage, message, done, total, self.report.to_json(), self._last_step_id, self._agent)
