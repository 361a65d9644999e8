"""What each stage of a learner cycle takes with a real model: seconds, and CPU seconds of server and learner.

Serves the model, imports short transcripts of one tool (`--transcripts`, of `--steps` steps each), and sees one cycle
through.
CPU seconds are given because wall time says little on a machine that others use too.

Run: python -m benchmarks.cycle_stages --model FOLDER [--transcripts 10] [--steps 2] [--learner-arg epochs=1]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

from benchmarks.demo import server
from runtime.store.learning_log import ENDINGS

TICKS = os.sysconf("SC_CLK_TCK")
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CITIES = ("Oslo", "Cairo", "Lima", "Paris", "Quito", "Delhi", "Accra", "Seoul", "Perth", "Turin", "Davos", "Izmir")


def transcript(city: str, num_steps: int = 2) -> dict[str, Any]:
    """One step is a call, the second an answer."""
    call = {"id": "c", "type": "function", "function": {"name": "get_weather", "arguments": json.dumps({"city": city})}}
    messages = [
        {"role": "user", "content": f"Do I need an umbrella in {city}?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "Rain."},
        {"role": "assistant", "content": f"Yes: it rains in {city}."},
    ]
    return {"tools": [WEATHER], "messages": messages[: 2 * num_steps]}


def cpu_seconds(pid: int | None) -> float:
    """Of a process so far; 0 where it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / TICKS


def pid_of(name: str) -> int | None:
    """The newest process below ours whose command line has this word."""
    found = subprocess.run(["pgrep", "-nf", name], capture_output=True, text=True, check=False).stdout.split()
    return int(found[0]) if found else None


def see_through(url: str, state: Path) -> dict[str, Any]:
    """Start a cycle; its record at the end, with CPU seconds by stage."""
    serving, learning, spent = (
        pid_of(f"serve.py.*{state}"),
        None,
        defaultdict[str, list[float]](lambda: [0.0, 0.0, 0.0]),
    )
    began = now = time.monotonic()
    before = [cpu_seconds(serving), 0.0]
    cycle = httpx.post(f"{url}/v1/learner/cycles", json={}, timeout=60).raise_for_status().json()
    while cycle["stage"] not in ENDINGS:
        time.sleep(0.5)
        learning = learning or pid_of(f"learner once.*{state}")
        stage, last, now = cycle["stage"], now, time.monotonic()
        used = [cpu_seconds(serving), cpu_seconds(learning) or before[1]]
        for place, delta in enumerate((now - last, used[0] - before[0], used[1] - before[1])):
            spent[stage][place] += delta
        before = used
        cycle = httpx.get(f"{url}/v1/learner/cycles/{cycle['id']}", timeout=60).raise_for_status().json()
    return {**cycle, "stages": dict(spent), "wall": time.monotonic() - began}


def table(cycle: dict[str, Any]) -> str:
    lines = [f"{'stage':<12}{'seconds':>9}{'server CPU s':>14}{'learner CPU s':>15}", "-" * 50]
    together = [sum(column) for column in zip(*cycle["stages"].values(), strict=True)]
    for stage, (wall, serving, learning) in [*cycle["stages"].items(), ("together", together)]:
        lines.append(f"{stage:<12}{wall:>9.1f}{serving:>14.1f}{learning:>15.1f}")
    return "\n".join([*lines, f"ended as {cycle['stage']}: {cycle['message']}", f"{cycle['report'].get('seconds')}"])


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cycle_stages", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--transcripts", type=int, default=10)
    parser.add_argument("--steps", type=int, choices=(1, 2), default=2, help="of each transcript")
    parser.add_argument("--learner-arg", action="append", default=[], help="passed on: min-gradient-steps=2")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    passed_on = [part for given in options.learner_arg for part in ("--learner-arg", given)]
    with tempfile.TemporaryDirectory() as folder:
        state, path = Path(folder) / "state", Path(folder) / "transcripts.jsonl"
        cities = [
            f"{CITIES[number % len(CITIES)]}{number // len(CITIES) or ''}" for number in range(options.transcripts)
        ]
        path.write_text("".join(json.dumps(transcript(city, options.steps)) + "\n" for city in cities))
        served = ["--model", str(options.model), "--max-context", "2048", *passed_on]
        with server(state, served, Path(folder) / "server.log") as url:
            subprocess.run([sys.executable, "-m", "learner", "import", str(path), "--url", f"{url}/v1"], check=True)
            cycle = see_through(url, state)
    if options.json:
        options.json.write_text(json.dumps(cycle, indent=2))
    print(table(cycle))


if __name__ == "__main__":
    main(sys.argv[1:])
