"""What a long log costs: start, chat, stitching, lists, collection, the watch, and its size on disk.

    python -m benchmarks.large_log --steps 10000 200000 2000000

Fills a log as serving would have (five steps an episode), without waiting for the disk at each, then asks of it what
a server and a cycle ask. One row a size; each figure is the median of five, in milliseconds.
"""

from __future__ import annotations

import argparse
import random
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from learner.data.collect import collect
from learner.options import CollectionOptions
from policies.types import FinalAnswer, FinishReason, SamplingParams, ToolCall, ToolCalls
from runtime.agent.conversation import digests_of, locate
from runtime.store.episodes import Actor, Episode, Outcome, Purpose, Role, Step, StopReason
from runtime.store.own_episodes import OwnEpisodes
from runtime.store.step_log import StepLog, Whose
from runtime.store.step_rows import episode_to_row, outcome_to_row, step_to_row, tokens_to_blob, tool_set_to_row

STEPS_AN_EPISODE = 5
TOKENS_A_STEP = (60, 20)
"""New ones of a prompt, and of a completion."""
BEGAN_AT = 1.7e9
"""Unix seconds of the first episode."""


def fill(path: Path, num_episodes: int) -> None:
    """Make a log of so many episodes, with what serving logs: own ones, a few evaluations, outcomes."""
    StepLog(path).close()
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA synchronous = OFF")
        connection.execute("PRAGMA cache_size = -200000")
        for start in range(0, num_episodes, 2000):
            connection.execute("BEGIN")
            for number in range(start, min(start + 2000, num_episodes)):
                _insert_episode(connection, number)
            connection.execute("COMMIT")


def _insert_episode(connection: sqlite3.Connection, number: int) -> None:
    purpose = Purpose.EVALUATION if number % 10 == 0 else Purpose.PRACTICE if number % 100 == 1 else Purpose.SERVE
    created_at = BEGAN_AT + number
    episode = Episode(
        f"ep_{number:024x}", Actor.POLICY, purpose, "base", None, {}, created_at, owner="ann" if number % 7 else "bob"
    )
    _insert(connection, "episodes", episode_to_row(episode))
    parent: Step | None = None
    for step in _steps(episode, number):
        row = _step_row(step, parent)
        if number == 0 and parent is None:
            _insert(connection, "tool_sets", tool_set_to_row(step))
        _insert(connection, "steps", row)
        parent = step
    if number % 2:
        outcome = Outcome(
            f"out_{number:024x}", episode.id, float(number % 3 > 0), "user", "", created_at, "ann", Role.TEACH
        )
        _insert(connection, "outcomes", outcome_to_row(outcome))


_TOOLS = ({"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}},)


def _steps(episode: Episode, number: int) -> Iterator[Step]:
    new, said = TOKENS_A_STEP
    prompt: tuple[int, ...] = ()
    for index in range(STEPS_AN_EPISODE):
        is_last = index == STEPS_AN_EPISODE - 1
        call = ToolCall(f"call_{number}_{index}", "look", {"at": "the shelf"})
        prompt += tuple(range(index, index + new))
        completion = tuple(range(100, 100 + said))
        yield Step(
            id=f"step_{number:020x}{index:04x}",
            episode_id=episode.id,
            parent_id=f"step_{number:020x}{index - 1:04x}" if index else None,
            index=index,
            new_messages=({"role": "user", "content": f"Order {number}, part {index}: " + "word " * 40},),
            tools=_TOOLS,  # type: ignore[arg-type]
            prompt_token_ids=prompt,
            completion_token_ids=completion,
            behavior_logprobs=(-0.5,) * said,
            sampling=SamplingParams(),
            adapter="base",
            action=FinalAnswer("It is done.") if is_last else ToolCalls((call,)),
            finish_reason=FinishReason.STOP,
            stop_reason=StopReason.FINAL_ANSWER if is_last else StopReason.CLIENT_TOOLS,
            tool_results=(),
            conversation_digest=digests_of(_conversation(number))[-1] if is_last else f"{number}-{index}",
            created_at=episode.created_at + index / 10,
            first_token_ms=5.0,
            latency_ms=50.0,
        )
        prompt += completion


def _conversation(number: int) -> list[Any]:
    return [{"role": "user", "content": f"Order {number}"}, {"role": "assistant", "content": "It is done."}]


def _step_row(step: Step, parent: Step | None) -> dict[str, Any]:
    prefix = 0 if parent is None else len(parent.prompt_token_ids) + len(parent.completion_token_ids)
    digest = tool_set_to_row(step)["digest"]
    prompt, completion = tokens_to_blob(step.prompt_token_ids), tokens_to_blob(step.completion_token_ids)
    return step_to_row(step, digest, prompt, completion, prefix)


def _insert(connection: sqlite3.Connection, table: str, row: dict[str, Any]) -> None:
    places = ", ".join("?" * len(row))
    connection.execute(f"INSERT INTO {table} ({', '.join(row)}) VALUES ({places})", tuple(row.values()))


# -------------------------------------------------------------------------------------------------- measuring


def measure(path: Path) -> dict[str, float]:
    """By what is asked, how long it takes."""
    size = path.stat().st_size / 2**20
    began = time.perf_counter()
    log = StepLog(path)
    figures = {"MiB": size, "open": (time.perf_counter() - began) * 1000}
    newest = log.num_episodes() - 1
    named = log.episodes(limit=1)[0]
    last = OwnEpisodes(log, ["base"], None).last_step_id()
    steps = log.steps(named.id)
    number = [0]

    def append() -> None:
        number[0] += 1
        log.append(replace(steps[0], id=f"step_new{number[0]}", parent_id=None, index=0)).result()

    asked: dict[str, Callable[[], object]] = {
        "append": append,
        "find a conversation": lambda: locate(log, _conversation(newest // 2), Whose()),
        "list": lambda: log.episodes(limit=50),
        "list, two filters": lambda: log.episodes(limit=50, purpose=Purpose.PRACTICE, actor=Actor.POLICY),
        "watch": lambda: log.live_outcomes("base", 500),
        "trigger": lambda: log.num_learnable_since(BEGAN_AT + newest - 100, 200),
        "first collection": lambda: collect(log, None, ["base"], CollectionOptions(), 0),
        "collection, nothing new": lambda: collect(log, last, ["base"], CollectionOptions(), 0),
        "replay": lambda: OwnEpisodes(log, ["base"], last).old(64, random.Random(0)),
    }
    figures |= {what: median_ms(do) for what, do in asked.items()}
    log.close()
    return figures


def median_ms(do: Callable[[], object], times: int = 5) -> float:
    took = []
    for _ in range(times):
        began = time.perf_counter()
        do()
        took.append((time.perf_counter() - began) * 1000)
    return statistics.median(took)


def table(rows: dict[int, dict[str, float]]) -> str:
    """Markdown, one row a size."""
    names = list(next(iter(rows.values())))
    lines = ["| steps | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for num_steps, figures in rows.items():
        lines.append(f"| {num_steps:,} | " + " | ".join(f"{figures[name]:.3g}" for name in names) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.large_log", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, nargs="+", default=[10_000, 200_000, 2_000_000])
    rows = {}
    for num_steps in parser.parse_args().steps:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "agent.db"
            fill(path, num_steps // STEPS_AN_EPISODE)
            rows[num_steps] = measure(path)
        print(table(rows), flush=True)


if __name__ == "__main__":
    main()
