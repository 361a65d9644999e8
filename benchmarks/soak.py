"""A server under an even load for half an hour: does anything grow that should not?

    python -m benchmarks.soak [--minutes 30] [--clients 4] [--json FILE]

A real server (python serve.py, the novice, the embedded engine) in a process of its own, and clients that ask, wait for
the answer, think for a moment, report how it went, and now and then read lists and make a backup. One row a minute:
latency, the server's memory, open files and threads, and the size of its log. Memory has to be read from the third
minute on: until then caches fill (64 MiB of token ids are kept by design).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import httpx

from runtime.store.backup import make_backup, verify_backup
from runtime.store.soundness import problems_of

ROOT = Path(__file__).parent.parent
THINKS_S = 0.2
"""A client's pause after an answer, on average."""
SETTLED_AFTER = 2
"""Minutes in which caches fill."""


@dataclass(slots=True)
class Minute:
    """What was seen in one minute."""

    minute: int
    requests: int = 0
    failed: int = 0
    p50_ms: float = 0.0
    p95_ms: float = 0.0
    rss_mib: float = 0.0
    files: int = 0
    threads: int = 0
    log_mib: float = 0.0


@dataclass(slots=True)
class Tally:
    """What the clients have seen since it was emptied."""

    latencies_s: list[float] = field(default_factory=list)
    failed: int = 0


@contextmanager
def server_on(state: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    process = subprocess.Popen(
        [sys.executable, "serve.py", "--port", "0", "--state", str(state), "--learn-every", "0", "--threads", "1"],
        cwd=ROOT, text=True, stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        url = next(line for line in process.stdout if line.startswith("listening")).split()[1]
        next(line for line in process.stdout if line.startswith("try"))
        yield process, url
    finally:
        process.terminate()
        process.wait()


async def use(client: httpx.AsyncClient, draw: random.Random, tally: Tally) -> None:
    """One conversation's turn, as a user has it."""
    question = f"Order {draw.randrange(1000, 1200)} has come in. Please see to it."
    body: dict[str, Any] = {"model": "novice_model", "messages": [{"role": "user", "content": question}]}
    body |= {"max_completion_tokens": 64, "stream": draw.random() < 0.5}
    began = time.perf_counter()
    answer = await client.post("chat/completions", json=body)
    tally.latencies_s.append(time.perf_counter() - began)
    tally.failed += answer.status_code != 200
    if draw.random() < 0.3:
        said = await client.post(f"episodes/{answer.headers['x-episode-id']}/outcome", json={"value": 1.0})
        tally.failed += said.status_code != 201
    if draw.random() < 0.05:
        tally.failed += (await client.get("episodes", params={"limit": 50})).status_code != 200


async def keep_using(url: str, number: int, tally: Tally, until: float) -> None:
    draw = random.Random(number)
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        while time.monotonic() < until:
            try:
                await use(client, draw, tally)
            except httpx.HTTPError:
                tally.failed += 1
            await asyncio.sleep(draw.expovariate(1 / THINKS_S))


def seen(minute: int, tally: Tally, pid: int, state: Path) -> Minute:
    latencies = tally.latencies_s or [0.0, 0.0]
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
    return Minute(
        minute,
        requests=len(tally.latencies_s),
        failed=tally.failed,
        p50_ms=1000 * median(latencies),
        p95_ms=1000 * quantiles(latencies, n=20)[-1],
        rss_mib=int(status["VmRSS"].split()[0]) / 1024,
        files=len(os.listdir(f"/proc/{pid}/fd")),
        threads=int(status["Threads"]),
        log_mib=sum(path.stat().st_size for path in state.glob("agent.db*")) / 2**20,
    )


async def soak(url: str, pid: int, state: Path, minutes: int, num_clients: int) -> list[Minute]:
    tally, found = Tally(), list[Minute]()
    until = time.monotonic() + 60 * minutes
    clients = [asyncio.create_task(keep_using(url, number, tally, until)) for number in range(num_clients)]
    for minute in range(1, minutes + 1):
        if minute % 5 == 0:
            backup = state.parent / f"{minute}.tar"
            tally.failed += bool(await asyncio.to_thread(make_backup, state, backup))
            tally.failed += bool(await asyncio.to_thread(verify_backup, backup))
            backup.unlink()
        await asyncio.sleep(max(0.0, until - 60 * (minutes - minute) - time.monotonic()))
        found.append(seen(minute, tally, pid, state))
        tally.latencies_s, tally.failed = [], 0
        print(_row(found[-1]), flush=True)
    await asyncio.gather(*clients)
    return found


def _row(minute: Minute) -> str:
    cells = (f"{value:.1f}" if isinstance(value, float) else str(value) for value in asdict(minute).values())
    return "| " + " | ".join(cells) + " |"


def growth_a_minute(found: list[Minute], name: str) -> float:
    """The slope of a straight line through the settled minutes, by least squares; 0 for fewer than two of them."""
    points = [(each.minute, getattr(each, name)) for each in found if each.minute > SETTLED_AFTER]
    if len(points) < 2:
        return 0.0
    mean_x, mean_y = (sum(values) / len(points) for values in zip(*points, strict=True))
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / spread


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--minutes", type=int, default=30)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--json", type=Path, default=None, help="also write the figures here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        columns = [each.name for each in fields(Minute)]
        print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns), flush=True)
        with server_on(Path(folder) / "state") as (process, url):
            found = asyncio.run(soak(url, process.pid, Path(folder) / "state", arguments.minutes, arguments.clients))
        problems = list(problems_of(Path(folder) / "state"))
    growth = {name: growth_a_minute(found, name) for name in ("rss_mib", "files", "threads", "p95_ms")}
    print("growth a minute: " + ", ".join(f"{name} {value:+.3f}" for name, value in growth.items()))
    num_failed = sum(each.failed for each in found)
    print(f"failed: {num_failed} of {sum(each.requests for each in found)}; verify: {problems or 'sound'}")
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(each) for each in found], indent=1))
    raise SystemExit(1 if num_failed or problems else 0)
