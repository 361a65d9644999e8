"""/v1/adapters: what was registered and what became of it; register, promote, refuse, unload, roll back."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Body, Request

from policies.types import Adapter, adapter_name
from runtime.adapters.approval import Approval, PromotionMode
from runtime.http.agents import agent_named
from runtime.http.errors import ApiError
from runtime.http.keys import asking_key
from runtime.http.pages import left_out
from runtime.http.parts import Parts
from runtime.http.schemas import (
    AdapterChange,
    AdapterPromotion,
    AdapterRefusal,
    AdapterRegistration,
    AgentChange,
    CanaryRequest,
    RewardRegistration,
)
from runtime.http.strict_json import OwnRoute, router_at
from runtime.store.adapter_registry import AdapterRegistry
from runtime.store.damage import Damaged
from runtime.store.keys import LEARNER

_NO_REASON, _OWN_AGENT = AdapterChange(), AgentChange()
_PROMOTION = AdapterPromotion()


def adapter_routes(parts: Parts) -> APIRouter:
    router = router_at("/v1/adapters", OwnRoute)
    registry, swap = parts.registry, parts.swap
    approval = parts.approval or Approval(swap, registry)

    def record(adapter: Adapter) -> dict[str, Any]:
        return _record(registry, adapter) | _waiting(parts, approval, adapter.name)

    @router.get("")
    async def list_adapters(agent: str | None = None) -> dict[str, Any]:
        """Every version that was ever registered (for an agent), oldest first, with its history; of one agent also the
        name of its world, empty for none, which its learner has to know."""
        wanted = None if agent is None else agent_named(parts, agent).name

        def listed() -> dict[str, Any]:
            damaged = list[Damaged]()
            asked = [each for each in registry.adapters(damaged) if wanted in (None, each.agent)]
            adapters = registry.damage.sound(asked, record, damaged)
            world = {} if wanted is None else {"world": parts.worlds.get(wanted, "")}
            return {"object": "list", "data": list(adapters)} | world | left_out(damaged)

        return await asyncio.to_thread(listed)

    @router.post("", status_code=201)
    async def register_adapter(body: AdapterRegistration, request: Request) -> dict[str, Any]:
        """Copy in a PEFT folder of the server's machine, validate, load and verify it; it can be promoted then.

        The very same files again are the adapter that they already are. 409 with the reason where it is refused.
        """
        agent = agent_named(parts, body.agent)
        adapter = await _register(registry, body, asking_key(request).name, agent.name)
        await swap.bring_up(adapter.name)
        return record(adapter)

    @router.post("/rollback")
    async def roll_back(request: Request, body: Annotated[AgentChange, Body()] = _OWN_AGENT) -> dict[str, Any]:
        """Let act again what acted for an agent before; `base` is the base network. 409 where nothing is behind."""
        agent = agent_named(parts, body.agent)
        acting = await swap.rollback(body.reason, key=asking_key(request).name, agent=agent.name)
        return {"acting": adapter_name(acting)}

    @router.post("/{name}/promote")
    async def promote_adapter(
        name: str, request: Request, body: Annotated[AdapterPromotion, Body()] = _PROMOTION
    ) -> dict[str, Any]:
        """Let it act for its agent's new episodes; episodes that are running keep the adapter they began with.

        For a candidate that waits: the yes it waits for. 409 where another adapter acts than it was held against.
        """
        key = asking_key(request).name
        if body.is_proposal or key == LEARNER:
            await _require_unerased(parts, name)
            await approval.propose(name, body.reason, body.expected_acting, key)
        else:
            await approval.promote(name, body.reason, body.expected_acting, key)
        return record(registry.adapter(name))

    @router.post("/{name}/canary")
    async def start_canary(name: str, body: CanaryRequest, request: Request) -> dict[str, Any]:
        """Let it serve a share of its agent's new episodes; it is promoted or refused by how they go. 409 beside
        another."""
        key, asks_first = asking_key(request).name, (PromotionMode.ASK, PromotionMode.DRY_RUN)
        if body.is_proposal or key == LEARNER:
            await _require_unerased(parts, name)
        if (body.is_proposal or key == LEARNER) and approval.terms_of(name).mode in asks_first:
            await approval.propose(name, body.reason, body.expected_acting, key)
        else:
            await swap.start_canary(name, body.share, body.reason, body.expected_acting, key)
        return record(registry.adapter(name))

    @router.post("/{name}/reward", status_code=201)
    async def add_reward(name: str, body: RewardRegistration, request: Request) -> dict[str, Any]:
        """Copy in a reward model beside an adapter: its newest from now on. It is judged when a step is first to be
        chosen by it."""
        try:
            reward = await asyncio.to_thread(
                registry.add_reward, name, Path(body.path), body.cycle, asking_key(request).name
            )
        except OSError as error:
            raise _not_copied(error) from error
        return {"object": "reward_model", "name": reward.name, "adapter": name, "digest": reward.digest}

    @router.post("/{name}/unload")
    async def unload_adapter(name: str, body: Annotated[AdapterChange, Body()] = _NO_REASON) -> dict[str, Any]:
        """Free its slot in the engine; registering its files again brings it up again. 409 where it serves."""
        await swap.unload(name, body.reason)
        return record(registry.adapter(name))

    @router.post("/{name}/refuse")
    async def refuse_adapter(name: str, body: AdapterRefusal, request: Request) -> dict[str, Any]:
        """Turn a candidate down for ever."""
        await approval.refuse(name, body.reason, asking_key(request).name)
        return record(registry.adapter(name))

    return router


async def _register(registry: AdapterRegistry, body: AdapterRegistration, key: str, agent: str) -> Adapter:
    said = (body.parent, body.reason, body.cycle, key, agent)
    try:
        return await asyncio.to_thread(registry.register, Path(body.path), *said)
    except OSError as error:
        raise _not_copied(error) from error


def _not_copied(error: OSError) -> ApiError:
    """No permission, too long a name, a full disk."""
    return ApiError(409, f"the folder could not be copied in: {error.strerror}", "adapter_refused", "path")


async def _require_unerased(parts: Parts, name: str) -> None:
    """Raises ApiError where the learner would let act what has learned from an episode that was erased meanwhile."""
    if parts.erasing is None:
        return
    if erased := await asyncio.to_thread(parts.erasing.lineage.erased_lessons_of, name):
        message = f"{name} has learned from {len(erased)} episodes that were erased since, {erased[0]} among them"
        raise ApiError(409, f"{message}: start another cycle", "learned_from_erased")


def _waiting(parts: Parts, approval: Approval, name: str) -> dict[str, Any]:
    """Of a candidate that waits for somebody's yes: since when, until when, and on what evidence."""
    proposal = parts.registry.proposal(name)
    if proposal is None:
        return {"proposal": None}
    decisions = parts.learning.log.decisions_on(name) if parts.learning else []
    return {"proposal": asdict(proposal) | {"expires_at": approval.expires_at(proposal), "decisions": decisions}}


def _record(registry: AdapterRegistry, adapter: Adapter) -> dict[str, Any]:
    """An adapter as clients see it."""
    state, events = registry.state(adapter.name), registry.events(adapter.name)
    return {
        "object": "adapter",
        "name": adapter.name,
        "agent": adapter.agent,
        "version": adapter.version,
        "state": state,
        "parent": adapter.parent,
        "digest": adapter.digest,
        "rank": adapter.rank,
        "cycle": registry.cycle_of(adapter.name),
        "is_acting": _is_acting(registry, adapter),
        "events": [asdict(event) for event in events],
    }


def _is_acting(registry: AdapterRegistry, adapter: Adapter) -> bool:
    """False where the pointer is damaged: then nothing acts."""
    try:
        return registry.acting(adapter.agent) == adapter
    except Damaged as damaged:
        registry.damage.note(damaged)
        return False
