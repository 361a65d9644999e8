"""What a server and a cycle ask of the log all the time costs as much in a long one as in a short one."""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from benchmarks.large_log import fill
from runtime.store import step_log
from runtime.store.episodes import Actor, Purpose
from runtime.store.own_episodes import OwnEpisodes
from runtime.store.step_log import StepLog

SHORT, LONG = 400, 4000
"""Episodes; the queries' own bounds lie below."""


class Meter:
    """Counts what SQLite does: operations of its virtual machine, in hundreds."""

    def __init__(self) -> None:
        self.num = 0

    def tick(self) -> int:
        self.num += 1
        return 0


@contextmanager
def opened(path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[StepLog, Meter]]:
    meter, plain = Meter(), step_log._open_to_read

    def metered(file: Path) -> sqlite3.Connection:
        connection = plain(file)
        connection.set_progress_handler(meter.tick, 100)
        return connection

    monkeypatch.setattr(step_log, "_open_to_read", metered)
    monkeypatch.setattr(step_log, "LIVE_EPISODES", 200)
    log = StepLog(path, read_only=True)
    yield log, meter
    log.close()


def last_step(log: StepLog) -> str | None:
    return OwnEpisodes(log, ["base"], None).last_step_id()


ASKED: dict[str, Callable[[StepLog], Any]] = {
    "list": lambda log: log.episodes(limit=50),
    "list with a rare value": lambda log: log.episodes(limit=50, purpose=Purpose.PRACTICE),
    "list with two filters": lambda log: log.episodes(limit=50, purpose=Purpose.SERVE, actor=Actor.POLICY),
    "list with an owner": lambda log: log.episodes(limit=50, owner="ann", adapter="base"),
    "watch": lambda log: log.live_outcomes("base", 100),
    "trigger": lambda log: log.num_learnable_since(0.0, 200),
    "trigger after a cycle": lambda log: log.num_learnable_since(log.episodes(limit=100)[-1].created_at, 200),
    "trigger after a clock was set back": lambda log: log.num_learnable_after(log.num_episodes() - 300, 200),
    "first collection": lambda log: OwnEpisodes(log, ["base"], None).fresh(100),
    "collection with nothing new": lambda log: OwnEpisodes(log, ["base"], last_step(log)).fresh(100),
    "no replay in a first collection": lambda log: not OwnEpisodes(log, ["base"], None).old(20, random.Random(0)),
    "replay": lambda log: OwnEpisodes(log, ["base"], last_step(log)).old(20, random.Random(0)),
    "too old": lambda log: OwnEpisodes(log, ["base"], None).num_too_old(),
    "counts": lambda log: log.counts(),
}


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("logs")
    for num in (SHORT, LONG):
        fill(folder / f"{num}.db", num)
    return folder / f"{SHORT}.db", folder / f"{LONG}.db"


@pytest.mark.parametrize("what", ASKED)
def test_the_cost_does_not_grow_with_the_log(
    logs: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    costs = []
    for path in logs:
        with opened(path, monkeypatch) as (log, meter):
            assert ASKED[what](log) or what in ("collection with nothing new", "too old")
            costs.append(meter.num)
    assert costs[1] < 2 * costs[0] + 20, f"{costs} hundred operations at {SHORT} and {LONG} episodes"


def test_a_filled_log_is_sound(logs: tuple[Path, Path]) -> None:
    log = StepLog(logs[0], read_only=True)
    assert log.verify() == []
    log.close()
