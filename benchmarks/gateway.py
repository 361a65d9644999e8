"""What our endpoint adds to a request, beside two gateways that stand before a server of models.

    python -m benchmarks.gateway [--repeats 3] [--json FILE]          # make setup-gateway makes the peers' environments

Compared is the way of one request (60 prompt tokens, three tools, 16 tokens of answer), from the same client over
keep-alive connections, in one run, taking turns:

- **direct**: to a scripted server in vLLM's form that answers at once. It is the base: `added` is the median latency
  less that of the direct call in the same repeat.
- **ours**: our server, whose engine answers the same tokens at once. It renders the chat template, stitches the
  episode, parses the answer, and commits the step with its token ids and logprobs (SQLite, synchronous=FULL) before the
  answer's last byte. It has no server behind it, and is charged the direct call all the same.
- **LiteLLM's proxy** before the scripted server: as it comes, which logs nothing; and with a logger of ten lines, which
  commits question and answer as JSON to SQLite (synchronous=FULL) before the answer's last byte. No token ids.
- **rLLM's model gateway** before the scripted server: as it comes, which logs token ids and logprobs behind the answer
  (SQLite, synchronous=NORMAL, no WAL); and with `sync_traces`, before the answer; a stream's trace is written behind it
  in both. Its durability is below ours: one that stands where ours does cannot be configured.

Each server is one process with one worker. Medians of the repeats; in brackets their range.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.endpoint_overhead import BODY, Speed, serve, timed
from benchmarks.plain_http import PlainClient

ROOT = Path(__file__).parent.parent
NUM_REQUESTS = {1: 60, 32: 160}
"""By concurrency."""

LITELLMS = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true"}
"""Its variables: it starts without asking the network for prices, and without keys, as the others do."""
LOGGER = """
import json, sqlite3
from litellm.integrations.custom_logger import CustomLogger

class Log(CustomLogger):
    def __init__(self):
        self.db = sqlite3.connect("log.db", isolation_level=None, check_same_thread=False)
        self.db.execute("pragma journal_mode = wal")
        self.db.execute("pragma synchronous = full")
        self.db.execute("create table if not exists steps (question text, answer text)")

    def write(self, data, answer):
        question = {name: data.get(name) for name in ("model", "messages", "tools")}
        self.db.execute("insert into steps values (?, ?)", [json.dumps(question), json.dumps(answer)])

    async def async_post_call_success_hook(self, data, user_api_key_dict, response):
        self.write(data, response.model_dump())
        return response

    async def async_post_call_streaming_iterator_hook(self, user_api_key_dict, response, request_data):
        chunks = []
        async for chunk in response:
            chunks.append(chunk.model_dump())
            if chunk.choices and chunk.choices[0].finish_reason:
                self.write(request_data, chunks)
            yield chunk

log = Log()
"""


@dataclass(frozen=True, slots=True)
class Target:
    """Where a request goes."""

    name: str
    port: int
    path: str = "/v1/chat/completions"
    log: tuple[Path, str] | None = None
    """SQLite file and table of a gateway that keeps one; ours is looked at by benchmarks/durability.py."""

    @property
    def num_logged(self) -> int:
        assert self.log is not None
        with contextlib.closing(sqlite3.connect(self.log[0])) as db:
            return db.execute(f"select count(*) from {self.log[1]}").fetchone()[0]


def upstream(pipe: Connection) -> None:
    """The scripted server's process."""
    import uvloop

    from benchmarks.scripted_upstream import listen

    async def run() -> None:
        server = await listen()
        pipe.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    uvloop.run(run())


@contextmanager
def direct() -> Iterator[int]:
    """The port of the scripted server."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=upstream, args=(theirs,), daemon=True)
    process.start()
    try:
        yield ours.recv()
    finally:
        process.terminate()


@contextmanager
def our_server() -> Iterator[Target]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs, "FULL"), daemon=True)
    process.start()
    try:
        yield Target("ours", ours.recv())
    finally:
        ours.send("stop")
        process.join(10)


@contextmanager
def litellm(program: Path, server_port: int, with_log: bool) -> Iterator[Target]:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "step_logger.py").write_text(LOGGER)
        callbacks = "  callbacks: step_logger.log\n" if with_log else ""
        (Path(folder) / "config.yaml").write_text(
            "model_list:\n  - model_name: scripted\n    litellm_params:\n      model: openai/scripted\n"
            f"      api_base: http://127.0.0.1:{server_port}/v1\n      api_key: none\n"
            f"litellm_settings:\n  telemetry: false\n{callbacks}"
        )
        name = "LiteLLM's proxy, " + ("with a durable log" if with_log else "no log")
        command = [program, "--config", "config.yaml", "--host", "127.0.0.1", "--num_workers", "1", "--port"]
        with _running(command, folder) as port:
            yield Target(name, port, log=(Path(folder) / "log.db", "steps") if with_log else None)


@contextmanager
def rllm(program: Path, server_port: int, is_synchronous: bool) -> Iterator[Target]:
    with tempfile.TemporaryDirectory() as folder:
        config = {
            "workers": [{"url": f"http://127.0.0.1:{server_port}/v1", "model_name": "scripted"}],
            "db_path": f"{folder}/traces.db",
            "sync_traces": is_synchronous,
            "health_check_interval": 3600,
            "log_level": "WARNING",
        }
        (Path(folder) / "config.yaml").write_text(json.dumps(config))
        name = "rLLM's gateway, " + ("sync_traces" if is_synchronous else "as it comes")
        with _running([program, "--config", "config.yaml", "--host", "127.0.0.1", "--port"], folder) as port:
            yield Target(name, port, "/sessions/s/v1/chat/completions", (Path(folder) / "traces.db", "traces"))


@contextmanager
def _running(command: list[Any], folder: str) -> Iterator[int]:
    """A program whose last option is its port, once it answers there."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with (Path(folder) / "said").open("w") as said:
        words = [*map(str, command), str(port)]
        process = subprocess.Popen(words, cwd=folder, env={**os.environ, **LITELLMS}, stdout=said, stderr=said)
        try:
            _wait_for(port, process)
            yield port
        finally:
            process.terminate()
            process.wait(20)


def _wait_for(port: int, process: subprocess.Popen[bytes], timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1.0):
            return
        time.sleep(0.2)
    raise SystemExit(f"{process.args} did not start")


async def speed_of(target: Target, concurrency: int, stream: bool) -> Speed:
    clients = [PlainClient(target.port) for _ in range(concurrency)]
    body = {**BODY, "stream": stream}
    calls: list[Callable[[], Awaitable[object]]] = [
        lambda client=client: client.post(target.path, body) for client in clients
    ]
    await asyncio.gather(*(call() for call in calls))  # connect, and warm up
    speed = await timed(calls, NUM_REQUESTS[concurrency])
    for client in clients:
        await client.close()
    return speed


def measure(targets: list[Target], repeats: int) -> dict[tuple[str, bool, int], list[Speed]]:
    """By name, whether it streams, and concurrency: one speed a repeat."""
    speeds: dict[tuple[str, bool, int], list[Speed]] = {}
    cells = [(concurrency, stream) for concurrency in NUM_REQUESTS for stream in (False, True)]
    with tqdm(total=repeats * len(cells) * len(targets)) as bar:
        for repeat in range(repeats):
            for concurrency, stream in cells:
                for target in targets if repeat % 2 == 0 else reversed(targets):
                    speed = asyncio.run(speed_of(target, concurrency, stream))
                    speeds.setdefault((target.name, stream, concurrency), []).append(speed)
                    bar.update()
    return speeds


def rows_of(speeds: dict[tuple[str, bool, int], list[Speed]]) -> list[dict[str, Any]]:
    rows = []
    for (name, stream, concurrency), each in speeds.items():
        base = speeds["direct", stream, concurrency]
        added = [speed.latency_ms - other.latency_ms for speed, other in zip(each, base, strict=True)]
        rates = [speed.per_second for speed in each]
        rows.append(
            {
                "way": name,
                "request": "streamed" if stream else "plain",
                "concurrency": concurrency,
                "latency_ms": statistics.median(speed.latency_ms for speed in each),
                "added_ms": statistics.median(added),
                "added_ms_range": [min(added), max(added)],
                "per_second": statistics.median(rates),
                "per_second_range": [min(rates), max(rates)],
            }
        )
    return sorted(rows, key=lambda row: (row["concurrency"], row["request"]))


def report(rows: list[dict[str, Any]]) -> None:
    print("| concurrency | request | way | latency, ms | added, ms | requests/s |\n|---|---|---|---|---|---|")
    for row in rows:
        low, high = row["added_ms_range"]
        slow, fast = row["per_second_range"]
        print(
            f"| {row['concurrency']} | {row['request']} | {row['way']} | {row['latency_ms']:.2f} "
            f"| {row['added_ms']:.2f} ({low:.2f}-{high:.2f}) | {row['per_second']:.0f} ({slow:.0f}-{fast:.0f}) |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--litellm", type=Path, default=ROOT / ".venv-clients-litellm/bin/litellm")
    parser.add_argument("--rllm", type=Path, default=ROOT / ".venv-clients-rllm/bin/rllm-model-gateway")
    parser.add_argument("--json", type=Path, default=None, help="also write the rows here")
    options = parser.parse_args()
    with ExitStack() as stack:
        port = stack.enter_context(direct())
        targets = [Target("direct", port), stack.enter_context(our_server())]
        for program, start in ((options.litellm, litellm), (options.rllm, rllm)):
            if not program.is_file():
                print(f"left out, since it is not there: {program} (make setup-gateway)", file=sys.stderr)
                continue
            targets += [stack.enter_context(start(program, port, is_durable)) for is_durable in (False, True)]
        rows = rows_of(measure(targets, options.repeats))
        time.sleep(2.0)  # for what is written behind the answers
        num_asked = options.repeats * 2 * sum(concurrency + num for concurrency, num in NUM_REQUESTS.items())
        logged = {target.name: target.num_logged for target in targets if target.log is not None}
    report(rows)
    for name, num_logged in logged.items():
        print(f"{name}: {num_logged} of {num_asked} requests in its log, two seconds after the last")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
