"""/v1/adapters: what was registered and what became of it; register, promote, refuse, unload, roll back."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Body

from policies.types import BASE_ADAPTER, Adapter
from runtime.http.errors import ApiError
from runtime.http.parts import Parts
from runtime.http.schemas import AdapterChange, AdapterPromotion, AdapterRefusal, AdapterRegistration, CanaryRequest
from runtime.http.strict_json import StrictJsonRoute
from runtime.store.adapter_registry import AdapterRegistry

_NO_REASON = AdapterChange()
_PROMOTION = AdapterPromotion()


def adapter_routes(parts: Parts) -> APIRouter:
    router = APIRouter(prefix="/v1/adapters", route_class=StrictJsonRoute)
    registry, swap = parts.registry, parts.swap

    @router.get("")
    async def list_adapters() -> dict[str, Any]:
        """Every version that was ever registered, oldest first, with its history."""
        return {"object": "list", "data": [_record(registry, adapter) for adapter in registry.adapters()]}

    @router.post("", status_code=201)
    async def register_adapter(body: AdapterRegistration) -> dict[str, Any]:
        """Copy in a PEFT folder of the server's machine, validate, load and verify it; it can be promoted then.

        The very same files again are the adapter that they already are. 409 with the reason where it is refused.
        """
        adapter = await _register(registry, body)
        await swap.bring_up(adapter.name)
        return _record(registry, adapter)

    @router.post("/rollback")
    async def roll_back(body: Annotated[AdapterChange, Body()] = _NO_REASON) -> dict[str, Any]:
        """Let act again what acted before; `base` is the base network. 409 where nothing is behind."""
        acting = await swap.rollback(body.reason)
        return {"acting": acting.name if acting else BASE_ADAPTER}

    @router.post("/{name}/promote")
    async def promote_adapter(name: str, body: Annotated[AdapterPromotion, Body()] = _PROMOTION) -> dict[str, Any]:
        """Let it act for new episodes; episodes that are running keep the adapter they began with."""
        await swap.promote(name, body.reason, body.expected_acting)
        return _record(registry, registry.adapter(name))

    @router.post("/{name}/canary")
    async def start_canary(name: str, body: CanaryRequest) -> dict[str, Any]:
        """Let it serve a share of the new episodes; it is promoted or refused by how they go. 409 beside another."""
        await swap.start_canary(name, body.share, body.reason, body.expected_acting)
        return _record(registry, registry.adapter(name))

    @router.post("/{name}/unload")
    async def unload_adapter(name: str, body: Annotated[AdapterChange, Body()] = _NO_REASON) -> dict[str, Any]:
        """Free its slot in the engine; registering its files again brings it up again. 409 where it serves."""
        await swap.unload(name, body.reason)
        return _record(registry, registry.adapter(name))

    @router.post("/{name}/refuse")
    async def refuse_adapter(name: str, body: AdapterRefusal) -> dict[str, Any]:
        """Turn a candidate down for ever."""
        await swap.refuse(name, body.reason)
        return _record(registry, registry.adapter(name))

    return router


async def _register(registry: AdapterRegistry, body: AdapterRegistration) -> Adapter:
    try:
        return await asyncio.to_thread(registry.register, Path(body.path), body.parent, body.reason, body.cycle)
    except OSError as error:  # no permission, too long a name, a full disk
        raise ApiError(
            409, f"the adapter could not be copied in: {error.strerror}", "adapter_refused", "path"
        ) from error


def _record(registry: AdapterRegistry, adapter: Adapter) -> dict[str, Any]:
    """An adapter as clients see it."""
    events = registry.events(adapter.name)
    return {
        "object": "adapter",
        "name": adapter.name,
        "version": adapter.version,
        "state": events[-1].state,
        "parent": adapter.parent,
        "digest": adapter.digest,
        "rank": adapter.rank,
        "cycle": registry.cycle_of(adapter.name),
        "is_acting": registry.acting() == adapter,
        "events": [asdict(event) for event in events],
    }
