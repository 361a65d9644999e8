"""/v1/demonstrations: import experts' conversations as episodes, and list them.

A demonstration that cannot be learned from is refused with its reason, and the others are imported all the same. Each
is logged by itself, so that an import that was broken off can be sent again whole: what is known adds nothing.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Annotated, Any

from fastapi import APIRouter, Query

from runtime.agent.demonstrations import Demonstration, demonstrated_episode, demonstrated_steps
from runtime.http.pages import episode_page
from runtime.http.parts import Parts
from runtime.http.schemas import DemonstrationsRequest
from runtime.http.strict_json import StrictJsonRoute
from runtime.store.episodes import Actor
from runtime.store.step_log import StepLogError


def demonstration_routes(parts: Parts) -> APIRouter:
    router = APIRouter(prefix="/v1/demonstrations", route_class=StrictJsonRoute)

    @router.post("")
    async def import_demonstrations(body: DemonstrationsRequest) -> dict[str, Any]:
        """Log experts' conversations, to be learned from. A body of the wrong form is refused whole."""
        num_imported, refused = 0, []
        for index, entry in enumerate(body.demonstrations):
            try:
                num_imported += await import_demonstration(parts, entry.as_demonstration())
            except ValueError as error:
                refused.append({"index": index, "reason": str(error)})
        num_known = len(body.demonstrations) - num_imported - len(refused)
        return {"imported": num_imported, "already_known": num_known, "refused": refused}

    @router.get("")
    async def list_demonstrations(
        after: str | None = None,
        limit: Annotated[int, Query(ge=1, le=1000)] = 50,
        adapter: str | None = None,
        task_prefix: str | None = None,
    ) -> dict[str, Any]:
        """By id, last one first. `after` is the `last_id` of the page before; `adapter` is an expert's name."""
        found = parts.log.episodes(after, limit + 1, None, Actor.EXPERT, adapter, task_prefix)
        return episode_page(found, limit)

    return router


async def import_demonstration(parts: Parts, demonstration: Demonstration) -> bool:
    """Log one; False where it is known already. Raises ValueError where it is refused."""
    if parts.log.episode(demonstration.episode_id) is not None:
        return False
    task = parts.toolbox.task_of(demonstration.task, demonstration.messages)
    episode = replace(demonstrated_episode(demonstration), task=task)
    # Templates of a long conversation take a while, and answers must go on meanwhile.
    max_context_tokens = parts.engine.limits.max_context_tokens
    steps = await asyncio.to_thread(demonstrated_steps, demonstration, parts.protocol, max_context_tokens)
    try:
        await parts.log.commit(episode, *steps)
    except StepLogError:
        if parts.log.episode(demonstration.episode_id) is None:
            raise
        return False  # another request imported it meanwhile
    return True
