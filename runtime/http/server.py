"""/v1/models, /health and /metrics: what is served, and how it fares."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any, TypeVar

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, PlainTextResponse

from policies.types import adapter_name
from runtime.http.admission import chosen_agent
from runtime.http.agents import model_names
from runtime.http.keys import asking_key
from runtime.http.parts import Parts
from runtime.http.strict_json import router_at
from runtime.store.damage import StepLogError
from runtime.store.keys import Key

T = TypeVar("T")


def server_routes(parts: Parts) -> APIRouter:
    router = router_at("")
    started = int(time.time())
    parts.metrics.show_storage(parts.log.storage, lambda: num_damaged_rows(parts))

    def models(key: Key) -> list[dict[str, Any]]:
        limit = parts.engine.limits.max_context_tokens  # EngineError while the first engine is starting
        return [_model(name, started, limit) for name in model_names(parts, key)]

    @router.get("/v1/models")
    async def list_models(request: Request) -> dict[str, Any]:
        """The agents that the key is for (whichever adapter is acting for each), and their loaded adapters by name."""
        found = models(asking_key(request))
        first, last = (found[0]["id"], found[-1]["id"]) if found else (None, None)
        return {"object": "list", "data": found, "has_more": False, "first_id": first, "last_id": last}

    @router.get("/v1/models/{model}")
    async def read_model(model: str, request: Request) -> dict[str, Any]:
        key = asking_key(request)
        for entry in models(key):
            if entry["id"] == model:
                return entry
        chosen_agent(parts, model, key)  # says what there is
        raise AssertionError(f"{model} is chosen, but not listed")

    @router.get("/health", responses={503: {"description": "Nothing can be answered; the body is as with 200."}})
    async def health() -> JSONResponse:
        """200 while the server can answer. 503 while it cannot, since the engine cannot (`status` is `starting` where
        that will pass, else `down`) or since nothing can be logged: then `storage` says why."""
        engine = parts.engine.health()
        stored = await asyncio.to_thread(_stored, parts)
        can_answer = engine.is_alive and stored["storage"]["is_writable"]
        status = "ok" if can_answer else "starting" if engine.is_starting else "down"
        return JSONResponse({"status": status, "engine": asdict(engine), **stored}, 200 if can_answer else 503)

    @router.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> PlainTextResponse:
        """Prometheus text."""
        return PlainTextResponse(
            await asyncio.to_thread(parts.metrics.text), media_type="text/plain; version=0.0.4; charset=utf-8"
        )

    return router


def _model(name: str, started: int, max_context_tokens: int) -> dict[str, Any]:
    """In OpenAI's form and in Anthropic's at once: they give no field two meanings."""
    return {
        "id": name,
        "object": "model",
        "created": started,
        "owned_by": "stepagent",
        "max_model_len": max_context_tokens,
        "type": "model",
        "display_name": name,
        "created_at": datetime.fromtimestamp(started, UTC).isoformat(),
        "max_input_tokens": max_context_tokens,
        "lifecycle": "active",
    }


def _stored(parts: Parts) -> dict[str, Any]:
    """What the disk knows of the server, and whether it can be written to."""
    acting, no_acting = _read(lambda: {agent.model: parts.registry.acting(agent.name) for agent in parts.agents})
    names = {model: adapter_name(adapter) for model, adapter in (acting or {}).items()}
    agents = {"agents": names} if len(names) > 1 else {}
    counts, no_counts = _read(parts.log.counts)
    storage = parts.log.storage()
    problem = "; ".join(filter(None, (storage.problem, no_acting, no_counts)))
    return {
        "acting": names.get(parts.served_name),
        **agents,
        "log": counts or {},
        "storage": {
            **asdict(storage),
            "is_writable": storage.is_writable and not no_acting,
            "problem": problem,
            "num_damaged_rows": num_damaged_rows(parts),
        },
    }


def _read(read: Callable[[], T]) -> tuple[T | None, str]:
    """What is read, or why it cannot be."""
    try:
        return read(), ""
    except (StepLogError, sqlite3.Error) as error:
        return None, str(error)


def num_damaged_rows(parts: Parts) -> int:
    """How many were stepped over since the start."""
    notes = [parts.log.damage, parts.registry.damage]
    notes += [parts.learning.log.damage] if parts.learning else []
    notes += [parts.keys.store.damage] if parts.keys.store else []
    return sum(map(len, notes))
