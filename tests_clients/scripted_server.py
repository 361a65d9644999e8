"""A server whose engine says what a test tells it to: run with the project's own Python, apart from the clients.

POST /script takes {"says": [...]}: what is said next, one text a step. GET /steps lists what was logged since then.
What it serves are the real routes, chat protocol, log and stitching; only the network's part is scripted.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import uvicorn

from policies.chat.chat_protocol import ChatProtocol
from runtime.agent.tools import Toolbox
from runtime.http.app import create_app
from runtime.startup import listen
from runtime.store.episodes import Step
from runtime.store.step_log import StepLog
from tests.serving import LIMITS, NOVICE_FOLDER, SayingEngine, parts_of


def main() -> None:
    protocol = ChatProtocol.load(NOVICE_FOLDER)
    # Long enough for stock prompts of agent frameworks: the scripted engine has no attention to pay for it.
    engine = SayingEngine(protocol, limits=replace(LIMITS, max_context_tokens=200_000))
    with tempfile.TemporaryDirectory() as folder:
        parts = replace(parts_of(engine, protocol, Path(folder), toolbox=Toolbox()), learning=None)
        app = create_app(parts)
        begun: list[str | None] = [None]

        @app.post("/script")
        async def script(body: dict[str, Any]) -> dict[str, int]:
            engine.says.clear()
            engine.says.extend(body["says"])
            begun[0] = _last(parts.log)
            return {"says": len(engine.says)}

        @app.get("/steps")
        async def steps() -> list[dict[str, Any]]:
            return [_shown(parts.log, step) for step in parts.log.steps_since(begun[0], 1000)]

        sock = listen("127.0.0.1", 0)
        print(sock.getsockname()[1], flush=True)
        server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
        asyncio.run(server.serve(sockets=[sock]))


def _last(log: StepLog) -> str | None:
    last = None
    while page := log.steps_since(last, 1000):
        last = page[-1].id
    return last


def _shown(log: StepLog, step: Step) -> dict[str, Any]:
    parent = log.step(step.parent_id) if step.parent_id else None
    served = () if parent is None else parent.prompt_token_ids + parent.completion_token_ids
    return {
        "id": step.id,
        "episode_id": step.episode_id,
        "parent_id": step.parent_id,
        "index": step.index,
        "change": step.prompt_change,
        "is_token_exact": parent is not None and step.prompt_token_ids[: len(served)] == served,
        "tools": [tool["function"]["name"] for tool in step.tools],
        "action": type(step.action).__name__,
    }


if __name__ == "__main__":
    sys.exit(main())
