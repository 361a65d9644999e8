"""What `/metrics` tells Prometheus. One registry a server, so that tests can run many."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from policies.types import Engine, MalformedAction
from runtime.store.damage import StepLogError
from runtime.store.episodes import Step
from runtime.store.learning_log import LearningReader
from runtime.store.step_log import Storage

_log = logging.getLogger(__name__)

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """Counters of a running server."""

    def __init__(self, engine: Engine) -> None:
        self.registry = self._registry = CollectorRegistry()
        """For what others count."""
        self.requests = Counter(
            "stepagent_requests", "Answers by route and status.", ["route", "status"], registry=self._registry
        )
        # The server's own agent has no name: to Prometheus an empty label is none.
        self._steps = Counter(
            "stepagent_steps", "Logged steps.", ["agent", "adapter", "action"], registry=self._registry
        )
        self._tokens = Counter(
            "stepagent_tokens", "Tokens of logged steps.", ["agent", "kind"], registry=self._registry
        )
        self._malformed = Counter(
            "stepagent_malformed_actions", "Actions that could not be read.", ["agent"], registry=self._registry
        )
        self._unjudged = Counter(
            "stepagent_unjudged_episodes",
            "Ends of episodes whose world failed to give an outcome; the log says why.",
            ["agent"],
            registry=self._registry,
        )
        self._latency = Histogram(
            "stepagent_step_seconds", "Seconds from prompt to last token.", buckets=_SECONDS, registry=self._registry
        )
        self._first = Histogram(
            "stepagent_first_token_seconds",
            "Seconds from prompt to first token.",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._tool = Histogram(
            "stepagent_tool_seconds", "Seconds of a server-run tool call.", buckets=_SECONDS, registry=self._registry
        )
        for name, text, field in _GAUGES:
            Gauge(name, text, registry=self._registry).set_function(
                lambda field=field: float(getattr(engine.health(), field))
            )

    def count_step(self, step: Step, agent: str = "", num_beside: int = 0) -> None:
        """`num_beside`: tokens of draws that were not chosen; they are in no answer's usage."""
        self._steps.labels(agent, step.adapter, type(step.action).__name__).inc()
        self._tokens.labels(agent, "prompt").inc(len(step.prompt_token_ids))
        self._tokens.labels(agent, "completion").inc(len(step.completion_token_ids))
        if num_beside:
            self._tokens.labels(agent, "not_chosen").inc(num_beside)
        self._malformed.labels(agent).inc(isinstance(step.action, MalformedAction))
        self._latency.observe(step.latency_ms / 1000)
        self._first.observe(step.first_token_ms / 1000)
        for result in step.tool_results:
            self._tool.observe(result.latency_ms / 1000)

    def count_unjudged(self, is_unjudged: bool, agent: str = "") -> None:
        """A step that ended an episode which its world could not judge."""
        self._unjudged.labels(agent).inc(is_unjudged)

    def show_cycles(self, cycles: LearningReader) -> None:
        """Also tell of the learner, from now on."""
        self._registry.register(_LearnerCollector(cycles))

    def show_storage(self, storage: Callable[[], Storage], num_damaged_rows: Callable[[], int]) -> None:
        """Also tell of the disk, from now on."""
        self._registry.register(_StorageCollector(storage, num_damaged_rows))

    def text(self) -> bytes:
        """Reads from disk: not for the event loop."""
        return generate_latest(self._registry)


class _StorageCollector(Collector):
    """The disk below the log."""

    def __init__(self, storage: Callable[[], Storage], num_damaged_rows: Callable[[], int]) -> None:
        self._storage = storage
        self._num_damaged_rows = num_damaged_rows

    def collect(self) -> Iterator[Metric]:
        now = self._storage()
        yield _gauge("stepagent_log_writable", "1 while steps can be logged, and so answers be given.", now.is_writable)
        yield _gauge("stepagent_state_free_bytes", "Room on the disk of the state folder.", now.free_bytes)
        yield _gauge("stepagent_damaged_rows", "Rows that could not be read since the start.", self._num_damaged_rows())
        failed = CounterMetricFamily("stepagent_log_failed_writes", "Writes of the log that failed since the start.")
        failed.add_metric([], now.num_failed_writes)
        yield failed


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, float(value))


class _LearnerCollector(Collector):
    """The learner's cycles as they stand in the log: nothing of them is kept in memory."""

    def __init__(self, cycles: LearningReader) -> None:
        self._cycles = cycles

    def collect(self) -> Iterator[Metric]:
        try:
            yield from self._collect()
        except (StepLogError, sqlite3.Error) as error:  # a folder that was moved away: the other metrics tell so
            _log.warning("nothing of the learner can be read: %s", error)

    def _collect(self) -> Iterator[Metric]:
        endings = CounterMetricFamily(
            "stepagent_learner_cycles", "Cycles by how they ended.", labels=["agent", "ending"]
        )
        for (agent, ending), number in self._cycles.num_endings().items():
            endings.add_metric([agent, ending], number)
        health = GaugeMetricFamily(
            "stepagent_learner_health", "What the newest cycle measured.", labels=["agent", "of", "measure"]
        )
        for agent in self._cycles.agents():
            for of, measures in self._cycles.diagnostics(agent).items():
                for measure, value in measures.items():
                    health.add_metric([agent, of, measure], value)
        alive = GaugeMetricFamily("stepagent_learner_running", "1 while a cycle runs.")
        alive.add_metric([], self._cycles.is_learner_alive())
        yield from (endings, health, alive)


_GAUGES = (
    ("stepagent_engine_alive", "1 while the engine can answer.", "is_alive"),
    ("stepagent_engine_restarts", "How often a dead engine was replaced.", "num_restarts"),
    ("stepagent_engine_running", "Completions in the batch.", "num_running"),
    ("stepagent_engine_waiting", "Completions that wait for a place in the batch.", "num_waiting"),
)
