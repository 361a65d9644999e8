"""From a log to a better adapter: `python examples/from_log_to_adapter.py DEMONSTRATIONS.jsonl [URL]`.

Imports an expert's conversations, asks for one learner cycle, and waits for what the gate says. Serving goes on.
"""

import json
import sys
import time
from pathlib import Path

import httpx

ENDINGS = ("promoted", "proposed", "refused", "no_lesson", "failed")
"""Stages of a cycle that has ended; `proposed` waits for somebody's yes (python -m learner approve)."""


def main(demonstrations: Path, base_url: str) -> dict:
    with httpx.Client(base_url=base_url, timeout=60) as server:
        records = [json.loads(line) for line in demonstrations.read_text().splitlines()]
        imported = server.post("/demonstrations", json={"demonstrations": records}).raise_for_status().json()
        print(f"{imported['imported']} imported, {imported['already_known']} known, {len(imported['refused'])} refused")
        cycle = server.post("/learner/cycles", json={}).raise_for_status().json()
        while cycle["stage"] not in ENDINGS:
            time.sleep(1)
            cycle = server.get(f"/learner/cycles/{cycle['id']}").raise_for_status().json()
        print(f"{cycle['stage']}: {cycle['message']}")
        return cycle


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "http://127.0.0.1:8000/v1")
