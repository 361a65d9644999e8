"""What one append to the step log costs, and how many a second it takes: group commit beside a commit of one's own.

    python -m benchmarks.step_log [seconds per cell] [folder on the disk to measure]

Callers append one step, wait for it, and append the next. The rows of the table alternate, so that a noisy machine
hurts all alike. `own commit` is the peer: the same facts, a transaction for each caller under a lock.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from policies.types import FinishReason, SamplingParams, ToolCall, ToolCalls
from runtime.store.episodes import Actor, Episode, Fact, Purpose, Step, new_id
from runtime.store.step_log import StepLog

NUM_CALLERS = (1, 8, 32)
ROUNDS = 3
TOOLS = tuple(
    {"type": "function", "function": {"name": f"tool_{n}", "description": "What it does. " * 10, "parameters": {}}}
    for n in range(6)
)


def next_step(episode: Episode, parent: Step | None) -> Step:
    """A step as a server logs it: 80 new prompt tokens, 40 sampled, six tools on offer."""
    seen = parent.prompt_token_ids + parent.completion_token_ids if parent else ()
    return Step(
        id=new_id("step"),
        episode_id=episode.id,
        parent_id=parent.id if parent else None,
        index=parent.index + 1 if parent else 0,
        new_messages=({"role": "user", "content": "What is in stock today, and what does it cost? " * 5},),
        tools=TOOLS,
        prompt_token_ids=seen + tuple(range(1000, 1080)),
        completion_token_ids=tuple(range(2000, 2040)),
        behavior_logprobs=(-0.5,) * 40,
        sampling=SamplingParams(),
        adapter="base",
        action=ToolCalls((ToolCall("call_1", "tool_1", {"item": "mug", "count": 2}),)),
        finish_reason=FinishReason.STOP,
        stop_reason=None,
        tool_results=(),
        conversation_digest=new_id("digest"),
        created_at=time.time(),
        first_token_ms=1.0,
        latency_ms=2.0,
    )


def measure(append: Callable[..., None], num_callers: int, duration_s: float) -> list[float]:
    """Latencies in milliseconds of all appends of so many callers, who take ten steps an episode."""
    latencies_ms: list[float] = []
    end = time.perf_counter() + duration_s

    def call() -> None:
        while time.perf_counter() < end:
            episode, step = Episode(new_id("ep"), Actor.POLICY, Purpose.SERVE, "base"), None
            facts: list[Fact] = [episode]
            for _ in range(10):
                step = next_step(episode, step)
                begin = time.perf_counter()
                append(*facts, step)
                latencies_ms.append((time.perf_counter() - begin) * 1000)
                facts = []

    callers = [threading.Thread(target=call) for _ in range(num_callers)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    return latencies_ms


def grouped_commits(log: StepLog) -> Callable[..., None]:
    return lambda *facts: log.append(*facts).result()


def own_commits(log: StepLog) -> Callable[..., None]:
    lock = threading.Lock()

    def append(*facts: Fact) -> None:
        with lock:
            log.append(*facts).result()

    return append


def run(duration_s: float, folder: str | None) -> None:
    names = ("group commit, FULL", "group commit, NORMAL", "own commit, FULL")
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        logs = {name: StepLog(Path(scratch) / f"{number}.db") for number, name in enumerate(names)}
        writer = logs[names[1]]._writer
        assert writer is not None
        writer.connection.execute("PRAGMA synchronous = NORMAL")
        appends = {name: grouped_commits(logs[name]) for name in names[:2]}
        appends[names[2]] = own_commits(logs[names[2]])
        print(f"{'':22}{'callers':>8}{'appends/s':>11}{'median ms':>11}{'p99 ms':>9}")
        for num_callers in NUM_CALLERS:
            latencies_ms: dict[str, list[float]] = {name: [] for name in names}
            for _ in range(ROUNDS):
                for name in names:
                    latencies_ms[name] += measure(appends[name], num_callers, duration_s)
            for name, values in latencies_ms.items():
                p99_ms = statistics.quantiles(values, n=100)[98]
                rate = len(values) / (ROUNDS * duration_s)
                print(f"{name:22}{num_callers:8}{rate:11.0f}{statistics.median(values):11.2f}{p99_ms:9.2f}")
        for log in logs.values():
            with closing(log):
                assert log.verify() == []


if __name__ == "__main__":
    run(float(sys.argv[1]) if len(sys.argv) > 1 else 1.0, sys.argv[2] if len(sys.argv) > 2 else None)
