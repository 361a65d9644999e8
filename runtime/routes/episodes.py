"""/v1/episodes: list and read what was logged, and say how an episode ended."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Query

from policies.types import Message
from runtime.answers import step_summary
from runtime.parts import Parts
from runtime.routes.bodies import StrictJsonRoute
from runtime.routes.errors import ApiError
from runtime.types import Actor, Episode, Outcome, Purpose, Step, new_id
from runtime.wire import OutcomeRequest


def episode_routes(parts: Parts) -> APIRouter:
    router = APIRouter(prefix="/v1/episodes", route_class=StrictJsonRoute)
    log = parts.log

    @router.get("")
    async def list_episodes(
        after: str | None = None,
        limit: Annotated[int, Query(ge=1, le=1000)] = 50,
        purpose: Purpose | None = None,
        actor: Actor | None = None,
        adapter: str | None = None,
        task_prefix: str | None = None,
    ) -> dict[str, Any]:
        """Newest first. `after` is the `last_id` of the page before."""
        found = log.episodes(after, limit + 1, purpose, actor, adapter, task_prefix)
        return episode_page(found, limit)

    @router.get("/{episode_id}")
    async def read_episode(episode_id: str, with_tokens: bool = False) -> dict[str, Any]:
        """One episode with its steps and outcomes; `with_tokens` adds token ids and logprobs."""
        episode = _known(parts, episode_id)
        steps = [_step(step, with_tokens) for step in log.steps(episode.id)]
        return {**_episode(episode), "steps": steps, "outcomes": [asdict(o) for o in log.outcomes(episode.id)]}

    @router.post("/{episode_id}/outcome", status_code=201)
    async def report_outcome(episode_id: str, body: OutcomeRequest) -> dict[str, Any]:
        """Say how an episode ended. May be said again; the newest counts."""
        episode = _known(parts, episode_id)
        outcome = Outcome(new_id("out"), episode.id, body.value, body.source, body.note)
        await log.commit(outcome)
        return asdict(outcome)

    return router


def episode_page(found: list[Episode], limit: int) -> dict[str, Any]:
    """One page of a list; `found` holds one episode more than the limit where there are more pages."""
    page = found[:limit]
    return {
        "object": "list",
        "data": [_episode(episode) for episode in page],
        "has_more": len(found) > limit,
        "last_id": page[-1].id if page else None,
    }


def _known(parts: Parts, episode_id: str) -> Episode:
    episode = parts.log.episode(episode_id)
    if episode is None:
        raise ApiError(404, f"there is no episode {episode_id!r}; GET /v1/episodes lists them", "episode_not_found")
    return episode


def _episode(episode: Episode) -> dict[str, Any]:
    return {"object": "episode", **asdict(episode)}


def _step(step: Step, with_tokens: bool) -> dict[str, Any]:
    new_messages: list[Message] = list(step.new_messages)
    shown = {
        **step_summary(step),
        "parent_id": step.parent_id,
        "new_messages": new_messages,
        "finish_reason": step.finish_reason,
        "num_prompt_tokens": len(step.prompt_token_ids),
        "num_completion_tokens": len(step.completion_token_ids),
        "created_at": step.created_at,
        "first_token_ms": step.first_token_ms,
        "latency_ms": step.latency_ms,
    }
    if with_tokens:
        shown |= {
            "prompt_token_ids": step.prompt_token_ids,
            "completion_token_ids": step.completion_token_ids,
            "behavior_logprobs": step.behavior_logprobs,
            "sampling": asdict(step.sampling),
            "tools": step.tools,
        }
    return shown
