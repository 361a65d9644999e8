"""kill -9 under load, in mid-cycle, mid-backup and mid-erasure: is any answered step missing, or anything half?

    python -m benchmarks.durability [--kills 200] [--json FILE]

A real server (python serve.py, the novice, the embedded engine) is put under load by eight clients, half of them
streaming, and its process is killed at a random moment; by turns also while a learner's cycle runs beside it, while the
state is backed up, when the backup is killed too, and while everything is erased that the clients of the three kills
before had said. Each client keeps the ids of the steps whose answers it received whole. Then the log is opened as the
next start would open it: every such step must be there, and the state folder must verify (at every tenth kill, and at
the last). A backup that has its name must be whole. An erasure that was cut off must have been finished by the servers
that followed: at the end nothing of it may be in a table, nor its words in any file. All kills hit one state folder, so
that it also lives through as many recoveries.

The servers are forked from a process that has done their imports: for each kill, those would take most of the time.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import random
import re
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import httpx
from tqdm import tqdm

from benchmarks.plain_http import PlainClient
from runtime.store.backup import make_backup, verify_backup
from runtime.store.erasure import Eraser
from runtime.store.learning_log import LearningReader
from runtime.store.soundness import problems_of
from runtime.store.step_log import StepLog

NUM_CLIENTS = 8
ORDERS = range(1000, 1200)
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["runtime.http.app", "runtime.engines.embedded.engine", "sqlite_utils", "uvloop"])


def serve_until_killed(state: Path, told: Connection) -> None:
    """The child process: `python serve.py`, but for its imports, with its standard output on a pipe."""
    os.dup2(told.fileno(), 1)
    import serve

    serve.main(["--port", "0", "--state", str(state), "--threads", "1", "--learn-every", "0"])


def back_up(state: Path, file: Path) -> None:
    """The child process of a backup."""
    make_backup(state, file)


def start_server(state: Path) -> tuple[BaseProcess, int]:
    """A server on a free port; returns once it listens."""
    ours, theirs = PROCESSES.Pipe(duplex=False)
    server = PROCESSES.Process(target=serve_until_killed, args=(state, theirs), daemon=True)
    server.start()
    theirs.close()
    welcome = ""
    with os.fdopen(os.dup(ours.fileno())) as lines:
        for line in lines:
            welcome += line
            if line.startswith("try"):  # the last one; to close the pipe before would break it
                break
    if found := re.search(r"http://127\.0\.0\.1:(\d+)", welcome):
        return server, int(found[1])
    server.join()
    raise SystemExit(f"the server ended with exit code {server.exitcode} before it listened")


async def load(port: int, answered: list[str], client_number: int, user: str) -> None:
    """Ask until the server dies, in the name of this user; note the steps of every answer that came whole."""
    client = PlainClient(port)
    is_streaming = client_number % 2 == 1
    order = random.Random(client_number)
    try:
        while True:
            question = f"Order {order.choice(ORDERS)} has come in. Please see to it. {user}"
            body = {
                "model": "novice_model",
                "user": user,
                "messages": [{"role": "user", "content": question}],
                "stream": is_streaming,
            }
            answer = await client.post("/v1/chat/completions", {**body, "max_completion_tokens": 64})
            answered.extend(_steps_of(answer, is_streaming))
    except (OSError, asyncio.IncompleteReadError):
        await client.close()


def _steps_of(answer: bytes, is_streaming: bool) -> list[str]:
    if not is_streaming:
        return [step["id"] for step in json.loads(answer)["stepagent"]["choices"][0]]
    events = [line.removeprefix(b"data: ") for line in answer.split(b"\n\n") if line]
    assert events[-1] == b"[DONE]", "a stream that came whole ends with [DONE]"
    chunks = [json.loads(event) for event in events[:-1]]
    return [chunk["stepagent"]["step"]["id"] for chunk in chunks if "stepagent" in chunk]


Beside = Callable[[int], Awaitable[BaseProcess | None]]


async def load_and_kill(server: BaseProcess, port: int, user: str, after_s: float, beside: Beside) -> list[str]:
    """Kill the server, and what runs beside it, so many seconds after its first answer; returns the answered steps."""
    answered: list[str] = []
    clients = [asyncio.create_task(load(port, answered, number, user)) for number in range(NUM_CLIENTS)]
    while not answered:  # noqa: ASYNC110 (a list that clients append to; an event would be a second truth)
        await asyncio.sleep(0.01)
    process = await beside(port)
    await asyncio.sleep(after_s)
    server.kill()
    if process is not None:
        process.kill()
        process.join()
    await asyncio.gather(*clients)
    server.join()
    return answered


async def nothing(_: int) -> None:
    """Beside the load."""


def a_cycle(state: Path) -> Beside:
    async def begin(port: int) -> None:
        """It dies with its server. Returns when it has logged that it works."""
        async with httpx.AsyncClient(timeout=30) as client:
            answer = await client.post(f"http://127.0.0.1:{port}/v1/learner/cycles", json={})
            cycle = answer.raise_for_status().json()["id"]
        log = LearningReader(state)
        while log.status(cycle) is None:  # noqa: ASYNC110 (another process writes it)
            await asyncio.sleep(0.05)

    return begin


def a_backup(state: Path, file: Path) -> Beside:
    async def begin(_: int) -> BaseProcess:
        process = PROCESSES.Process(target=back_up, args=(state, file), daemon=True)
        process.start()
        return process

    return begin


def an_erasure(user: str) -> Beside:
    """Of everything that this user has said."""

    async def begin(port: int) -> None:
        client = httpx.AsyncClient(timeout=60)
        erasing = asyncio.create_task(client.delete(f"http://127.0.0.1:{port}/v1/episodes", params={"user": user}))
        erasing.add_done_callback(lambda task: task.exception())  # the answer, or that the server was killed

    return begin


LONGEST_S = {"load": 1.5, "cycle": 8.0, "backup": 1.0, "erasure": 2.0}
"""From the first answer, or the begin of what runs beside, to the kill: drawn below this."""
FINISHED_WITHIN_S = 120.0
"""Of a last start, in which it makes good what was cut off."""


@dataclass(slots=True)
class Found:
    """What was found after the kills of one kind."""

    kills: int = 0
    answered_steps: int = 0
    missing_steps: int = 0
    half_backups: int = 0
    whole_backups: int = 0
    cut_erasures: int = 0
    """That had begun, and were not finished when the server was killed."""
    whole_erasures: int = 0


def measure(num_kills: int) -> dict[str, Any]:
    folder = Path(tempfile.mkdtemp())
    state, draw = folder / "state", random.Random(0)
    found = {kind: Found() for kind in LONGEST_S}
    problems: list[str] = []
    recovery_s: list[float] = []
    for number in tqdm(range(num_kills), unit="kill"):
        turn, kind = number // len(LONGEST_S), list(LONGEST_S)[number % len(LONGEST_S)]
        backup = folder / f"{number}.tar"
        user = STAYS if kind == "erasure" else user_of(turn)
        beside = {
            "load": nothing,
            "cycle": a_cycle(state),
            "backup": a_backup(state, backup),
            "erasure": an_erasure(user_of(turn)),
        }[kind]
        server, port = start_server(state)
        answered = asyncio.run(load_and_kill(server, port, user, draw.uniform(0.0, LONGEST_S[kind]), beside))
        _look(state, answered, found[kind], recovery_s)
        if backup.exists():
            wrong = verify_backup(backup)
            problems += [f"backup {number}: {problem}" for problem in wrong]
            found[kind].whole_backups += not wrong
            found[kind].half_backups += bool(wrong)
            backup.unlink()
        if number % 10 == 9 or number == num_kills - 1:
            problems += problems_of(state)
    problems += what_is_left(state, [user_of(turn) for turn in range(num_kills // len(LONGEST_S))])
    cycles = Counter(str(status.stage) for status in LearningReader(state).cycles(limit=num_kills))
    return {
        "by_kind": {kind: asdict(each) for kind, each in found.items()},
        "cycles_by_last_stage": dict(cycles),
        "problems": problems,
        "median_recovery_ms": statistics.median(recovery_s) * 1000,
        "log_mib": (state / "agent.db").stat().st_size / 2**20,
    }


STAYS = "somebody who stays"


def user_of(turn: int) -> str:
    """Who is erased at the end of this turn through the kinds of kills: a name that is no part of another's."""
    return f"somebody-{turn:04}-who-goes"


def _look(state: Path, answered: list[str], found: Found, recovery_s: list[float]) -> None:
    began = time.perf_counter()
    log = StepLog(state / "agent.db")
    recovery_s.append(time.perf_counter() - began)
    found.kills += 1
    found.answered_steps += len(answered)
    found.missing_steps += sum(log.step(step_id) is None for step_id in answered)
    eraser = Eraser(state, log)
    found.cut_erasures += len(eraser.unfinished())
    found.whole_erasures = len(eraser.erasures(10_000)) - len(eraser.unfinished())
    log.close()


def what_is_left(state: Path, users: Sequence[str]) -> list[str]:
    """Start once more, wait until what was cut off is finished, erase what had not even begun; then say what can still
    be found of these users."""
    server, port = start_server(state)
    log = StepLog(state / "agent.db")
    eraser, until = Eraser(state, log), time.monotonic() + FINISHED_WITHIN_S
    while eraser.unfinished() and time.monotonic() < until:
        time.sleep(0.2)
    problems = [f"{erasure} is not finished" for erasure in eraser.unfinished()]
    for user in users:
        httpx.delete(f"http://127.0.0.1:{port}/v1/episodes", params={"user": user}, timeout=60).raise_for_status()
    erased = "SELECT id FROM erased_episodes"
    for table, column in (("episodes", "id"), ("steps", "episode_id"), ("outcomes", "episode_id")):
        number = log.query(f"SELECT count(*) AS number FROM {table} WHERE {column} IN ({erased})")[0]["number"]
        problems += [f"{number} rows of {table} are left of what was erased"] if number else []
    log.close()
    server.kill()
    server.join()
    for path in sorted(path for path in state.rglob("*") if path.is_file()):
        words = path.read_bytes()
        problems += [f"{path.name} still names {user}" for user in users if user.encode() in words]
    return problems


def _row(cells: Iterable[object]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--json", type=Path, default=None, help="also write the figures here")
    arguments = parser.parse_args()
    figures = measure(arguments.kills)
    columns = list(figures["by_kind"]["load"])
    print(_row(["killed in", *columns]) + "\n|" + "---|" * (len(columns) + 1))
    for kind, values in figures["by_kind"].items():
        print(_row([kind, *values.values()]))
    print(f"cycles by their last stage: {figures['cycles_by_last_stage']}")
    print(f"log {figures['log_mib']:.1f} MiB; median recovery {figures['median_recovery_ms']:.2f} ms")
    print("\n".join(figures["problems"]) or "nothing was found by verify")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1))
    bad = [each["missing_steps"] + each["half_backups"] for each in figures["by_kind"].values()]
    raise SystemExit(1 if any(bad) or figures["problems"] else 0)
