"""/v1/learner/cycles: start a learning cycle, and see how each one goes or went."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Body, Query

from runtime.http.agents import agent_named, listed_agent
from runtime.http.errors import ApiError
from runtime.http.pages import left_out
from runtime.http.parts import Parts
from runtime.http.schemas import CycleRequest
from runtime.http.strict_json import OwnRoute, router_at
from runtime.learning.learning import Learning
from runtime.store.damage import Damaged

_AS_STARTED = CycleRequest.model_validate({})


def learner_routes(parts: Parts) -> APIRouter:
    router = router_at("/v1/learner/cycles", OwnRoute)

    @router.post("", status_code=202)
    async def start_cycle(body: Annotated[CycleRequest, Body()] = _AS_STARTED) -> dict[str, Any]:
        """Start a cycle beside the serving, and answer at once. 409 while another one runs."""
        learning, agent = learning_of(parts), agent_named(parts, body.agent).name
        cycle = await learning.process.start(body.as_options(), agent)
        shown = {"object": "learner.cycle", "id": cycle, "agent": agent, "stage": "starting"}
        return {**shown, "message": "", "report": {}}

    @router.get("")
    async def list_cycles(limit: Annotated[int, Query(ge=1, le=1000)] = 50, agent: str | None = None) -> dict[str, Any]:
        """Newest first, of all agents or of one."""
        damaged = list[Damaged]()
        newest, wanted = learning_of(parts).cycles.newest, listed_agent(parts, agent)
        cycles = await asyncio.to_thread(newest, limit, damaged, wanted)
        return {"object": "list", "data": cycles} | left_out(damaged)

    @router.get("/{cycle}")
    async def read_cycle(cycle: str) -> dict[str, Any]:
        """One cycle: where it is, its report, the gate's decisions and a summary of its step rewards."""
        found = await asyncio.to_thread(learning_of(parts).cycles.cycle, cycle)
        if found is None:
            raise ApiError(404, f"there is no cycle {cycle!r}; GET /v1/learner/cycles lists them", "cycle_not_found")
        return found

    return router


def learning_of(parts: Parts) -> Learning:
    if parts.learning is None:
        raise ApiError(409, "this server was wired without a learner", "no_learner")
    return parts.learning
