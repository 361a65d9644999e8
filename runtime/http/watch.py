"""/v1/learner/watch: what live evidence says of the adapter that acts; pause the watch over it, and let it go on."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from statistics import fmean
from typing import Annotated, Any

from fastapi import APIRouter, Body, Request

from runtime.adapters.live_guard import Evidence
from runtime.http.agents import agent_named
from runtime.http.cycles import learning_of
from runtime.http.keys import asking_key
from runtime.http.pages import left_out
from runtime.http.parts import Parts
from runtime.http.schemas import AgentChange
from runtime.http.strict_json import OwnRoute, router_at
from runtime.store.damage import Damaged

_OWN_AGENT = AgentChange()


def watch_routes(parts: Parts) -> APIRouter:
    router = router_at("/v1/learner/watch", OwnRoute)
    registry = parts.registry

    def shown(agent: str) -> dict[str, Any]:
        told = {"object": "learner.watch", "agent": agent, **asdict(registry.watch(agent))}
        try:
            evidence = learning_of(parts).watch.evidence(agent)
        except Damaged as damaged:  # what acts cannot be read: nothing is watched then
            return told | {"evidence": []} | left_out([damaged])
        return told | {"evidence": [_shown(each) for each in evidence]}

    async def change(is_paused: bool, body: AgentChange, request: Request) -> dict[str, Any]:
        agent, key = agent_named(parts, body.agent).name, asking_key(request).name
        await asyncio.to_thread(registry.record_watch, is_paused, body.reason, key, agent)
        return await asyncio.to_thread(shown, agent)

    @router.get("")
    async def read_watch(agent: str | None = None) -> dict[str, Any]:
        """The evidence that would change what acts for an agent, and whether the watch is paused."""
        return await asyncio.to_thread(shown, agent_named(parts, agent).name)

    @router.post("/pause")
    async def pause_watch(request: Request, body: Annotated[AgentChange, Body()] = _OWN_AGENT) -> dict[str, Any]:
        """Let live evidence change nothing until the watch is resumed, also after a restart."""
        return await change(True, body, request)

    @router.post("/resume")
    async def resume_watch(request: Request, body: Annotated[AgentChange, Body()] = _OWN_AGENT) -> dict[str, Any]:
        """Let live evidence roll back, refuse and promote again."""
        return await change(False, body, request)

    return router


def _shown(evidence: Evidence) -> dict[str, Any]:
    return {
        "measure": evidence.measure,
        "adapter": evidence.adapter,
        "against": evidence.against,
        "mean": fmean(evidence.values) if evidence.values else None,
        "mean_against": fmean(evidence.others) if evidence.others else None,
        "num_values": len(evidence.values),
        "num_values_against": len(evidence.others),
        "num_values_by_key": dict(evidence.by_key),
        "is_worse": evidence.is_worse,
    }
