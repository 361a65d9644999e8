"""/v1/models, /health and /metrics: what is served, and how it fares."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, PlainTextResponse

from policies.types import adapter_name
from runtime.http.admission import chosen_agent
from runtime.http.agents import model_names
from runtime.http.parts import Parts


def server_routes(parts: Parts) -> APIRouter:
    router = APIRouter()
    started = int(time.time())

    def models() -> list[dict[str, Any]]:
        owner = {"object": "model", "created": started, "owned_by": "stepagent"}
        limit = parts.engine.limits.max_context_tokens  # EngineError while the first engine is starting
        return [{"id": name, **owner, "max_model_len": limit} for name in model_names(parts)]

    @router.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        """The agents (whichever adapter is acting for each), and each loaded adapter by its own name."""
        return {"object": "list", "data": models()}

    @router.get("/v1/models/{model}")
    async def read_model(model: str) -> dict[str, Any]:
        for entry in models():
            if entry["id"] == model:
                return entry
        chosen_agent(parts, model)  # says what there is
        raise AssertionError(f"{model} is chosen, but not listed")

    @router.get("/health", responses={503: {"description": "The engine cannot answer; the body is as with 200."}})
    async def health() -> JSONResponse:
        """200 while the engine can answer, 503 while it cannot: `status` is `starting` where that will pass."""
        engine = parts.engine.health()
        body = {
            "status": "ok" if engine.is_alive else "starting" if engine.is_starting else "down",
            "engine": asdict(engine),
            "acting": adapter_name(parts.registry.acting()),
            "log": parts.log.counts(),
        }
        if parts.named_agents:
            body["agents"] = {agent.model: adapter_name(parts.registry.acting(agent.name)) for agent in parts.agents}
        return JSONResponse(body, 200 if engine.is_alive else 503)

    @router.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> PlainTextResponse:
        """Prometheus text."""
        return PlainTextResponse(parts.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return router
