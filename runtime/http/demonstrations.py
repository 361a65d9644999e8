"""/v1/demonstrations: import experts' conversations as episodes, and list them.

A demonstration that cannot be learned from is refused with its reason, and the others are imported all the same. Each
is logged by itself, so that an import that was broken off can be sent again whole: what is known adds nothing.
"""

from __future__ import annotations

import asyncio
from contextlib import closing
from dataclasses import asdict, replace
from typing import Annotated, Any

from fastapi import APIRouter, Body, Query, Request, Response

from runtime.agent.demonstrations import Demonstration, demonstrated_episode, demonstrated_steps
from runtime.agent.served_agent import ServedAgent, has_system
from runtime.http.agents import agent_named, listed_agent
from runtime.http.errors import ApiError
from runtime.http.keys import asking_key
from runtime.http.pages import episode_page, page
from runtime.http.parts import Parts
from runtime.http.schemas import DemonstrationsRequest, WithdrawalRequest
from runtime.http.strict_json import OwnRoute, router_at
from runtime.store.damage import Damaged
from runtime.store.episodes import Actor, Withdrawal, new_id
from runtime.store.keys import Key
from runtime.store.step_log import StepLogError

NO_REASON = WithdrawalRequest(reason="")


def demonstration_routes(parts: Parts) -> APIRouter:
    router = router_at("/v1/demonstrations", OwnRoute)

    @router.post("")
    async def import_demonstrations(body: DemonstrationsRequest, request: Request) -> dict[str, Any]:
        """Log experts' conversations, to be learned from. A body of the wrong form is refused whole."""
        agent = agent_named(parts, body.agent, asking_key(request))
        num_imported, refused = 0, []
        for index, entry in enumerate(body.demonstrations):
            try:
                demonstration = for_agent(agent, entry.as_demonstration())
                num_imported += await import_demonstration(parts, agent, demonstration, asking_key(request))
            except ValueError as error:
                refused.append({"index": index, "reason": str(error)})
        num_known = len(body.demonstrations) - num_imported - len(refused)
        return {"imported": num_imported, "already_known": num_known, "refused": refused}

    @router.get("")
    async def list_demonstrations(
        request: Request,
        after: str | None = None,
        limit: Annotated[int, Query(ge=1, le=1000)] = 50,
        adapter: str | None = None,
        task_prefix: str | None = None,
        agent: str | None = None,
    ) -> Response:
        """By id, last one first. `after` is the `last_id` of the page before; `adapter` is an expert's name."""
        key = asking_key(request)
        owner, wanted_agent = key.sees_only, listed_agent(parts, agent, key)

        def found() -> dict[str, Any]:
            wanted = (None, Actor.EXPERT, adapter, task_prefix, owner, wanted_agent)
            damaged = list[Damaged]()
            with closing(parts.log.each_episode(after, limit + 1, *wanted, damaged=damaged)) as episodes:
                return episode_page(episodes, limit, damaged)

        return await page(found)

    @router.delete("/{episode_id}")
    async def withdraw_demonstration(
        episode_id: str, request: Request, body: Annotated[WithdrawalRequest, Body()] = NO_REASON
    ) -> dict[str, Any]:
        """Say that a demonstration was wrong: it is neither listed nor learned from any more."""
        key, episode = asking_key(request), parts.log.episode(episode_id)
        if episode is None or episode.actor is not Actor.EXPERT or not key.sees(episode.owner):
            raise ApiError(404, f"there is no demonstration {episode_id!r}", "demonstration_not_found")
        return await withdraw(parts, episode.id, body.reason, key)

    return router


async def withdraw(parts: Parts, fact_id: str, reason: str, key: Key) -> dict[str, Any]:
    """Log that an outcome, a correction or a demonstration no longer counts. Twice adds nothing."""
    if not parts.log.withdrawals(fact_id):
        await parts.log.commit(Withdrawal(new_id("wd"), fact_id, reason, key.name))
    return {"object": "withdrawal", **asdict(parts.log.withdrawals(fact_id)[0])}


def for_agent(agent: ServedAgent, demonstration: Demonstration) -> Demonstration:
    """A client's demonstration as one of an agent: it is told what the agent is told where it brings no prompt, and is
    offered what the agent is offered where it does not say what was on offer and calls nothing else: what is learned
    without tools in its prompt is not what the agent will read."""
    opening = () if has_system(demonstration.messages) else agent.opening
    called, offered = demonstration.called_without_tools, agent.toolbox.always_offered
    is_offered = called and called <= {tool["function"]["name"] for tool in offered}
    tools = offered if is_offered else demonstration.tools
    return replace(demonstration, agent=agent.name, opening=opening, tools=tools)


async def import_demonstration(parts: Parts, agent: ServedAgent, demonstration: Demonstration, key: Key) -> bool:
    """Log one; False where it is known already. Raises ValueError where it is refused."""
    episode_id = await asyncio.to_thread(lambda: demonstration.episode_id)  # of all that was said
    if parts.log.episode(episode_id) is not None:
        return False
    task = await agent.toolbox.find_task(parts.limits.deadline_s, demonstration.task, demonstration.messages)
    episode = replace(demonstrated_episode(demonstration), task=task, owner=key.name)
    # Templates of a long conversation take a while, and answers must go on meanwhile.
    steps = await asyncio.to_thread(demonstrated_steps, demonstration, parts.protocol, parts.engine.limits)
    try:
        await parts.log.commit(episode, *steps)
    except StepLogError:
        if parts.log.episode(episode_id) is None:
            raise
        return False  # another request imported it meanwhile
    return True
