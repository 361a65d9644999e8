"""kill -9 under load: is any step missing from the log that a client was given?

    python -m benchmarks.durability [--kills 50] [--json FILE]

A real server (python serve.py, the novice, the embedded engine) is put under load by eight clients, half of them
streaming, and its process is killed at a random moment. Each client keeps the ids of the steps whose answers it
received whole. Then the log is opened as the next start would open it: every such step must be there, with the tokens
it was served with, and the log must verify. All kills hit one log, so that it also lives through fifty recoveries.

The servers are forked from a process that has done their imports: fifty times over, those would take most of the time.
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
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.plain_http import PlainClient
from runtime.store.step_log import StepLog

NUM_CLIENTS = 8
ORDERS = range(1000, 1200)
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["runtime.http.app", "runtime.engines.embedded.engine", "sqlite_utils", "uvloop"])


def serve_until_killed(state: Path, told: Connection) -> None:
    """The child process: `python serve.py`, but for its imports, with its standard output on a pipe."""
    os.dup2(told.fileno(), 1)
    import serve

    serve.main(["--port", "0", "--state", str(state), "--threads", "1"])


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


async def load(port: int, answered: list[str], client_number: int) -> None:
    """Ask until the server dies; note the steps of every answer that came whole."""
    client = PlainClient(port)
    is_streaming = client_number % 2 == 1
    order = random.Random(client_number)
    try:
        while True:
            question = f"Order {order.choice(ORDERS)} has come in. Please see to it."
            body = {
                "model": "novice_model",
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


async def load_and_kill(server: BaseProcess, port: int, after_s: float) -> list[str]:
    """Kill the server so many seconds after its first answer; returns the steps that were answered."""
    answered: list[str] = []
    clients = [asyncio.create_task(load(port, answered, number)) for number in range(NUM_CLIENTS)]
    while not answered:  # noqa: ASYNC110 (a list that clients append to; an event would be a second truth)
        await asyncio.sleep(0.01)
    await asyncio.sleep(after_s)
    server.kill()
    await asyncio.gather(*clients)
    server.join()
    return answered


def measure(num_kills: int) -> dict[str, Any]:
    state = Path(tempfile.mkdtemp())
    draw = random.Random(0)
    num_answered, missing, problems, recovery_s = 0, 0, 0, []
    for _ in tqdm(range(num_kills), unit="kill"):
        server, port = start_server(state)
        answered = asyncio.run(load_and_kill(server, port, draw.uniform(0.0, 1.5)))
        began = time.perf_counter()
        log = StepLog(state / "agent.db")
        recovery_s.append(time.perf_counter() - began)
        missing += sum(log.step(step_id) is None for step_id in answered)
        problems += len(log.verify())
        log.close()
        num_answered += len(answered)
    return {
        "kills": num_kills,
        "answered_steps": num_answered,
        "missing_steps": missing,
        "problems_found_by_verify": problems,
        "median_recovery_ms": statistics.median(recovery_s) * 1000,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--json", type=Path, default=None, help="also write the figures here")
    arguments = parser.parse_args()
    figures = measure(arguments.kills)
    print("| " + " | ".join(figures) + " |\n|" + "---|" * len(figures))
    print(
        "| "
        + " | ".join(f"{value:.4g}" if isinstance(value, float) else str(value) for value in figures.values())
        + " |"
    )
    print(f"answered steps missing from the log: {figures['missing_steps']} (goal: 0)")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1))
    raise SystemExit(1 if figures["missing_steps"] or figures["problems_found_by_verify"] else 0)
