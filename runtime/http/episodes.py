"""/v1/episodes: list and read what was logged, and say how an episode ended."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Body, Query, Request, Response

from policies.chat.chat_protocol import action_message, message_action
from policies.types import Message
from runtime.agent.demonstrations import correction_in_tokens, promoted_episode
from runtime.http.agents import agent_named, listed_agent
from runtime.http.chat_answer import step_summary
from runtime.http.demonstrations import NO_REASON, import_demonstration, withdraw
from runtime.http.errors import ApiError
from runtime.http.keys import asking_key
from runtime.http.pages import episode_page, left_out, page, shown_episode, that_fit
from runtime.http.parts import Parts
from runtime.http.schemas import CorrectionRequest, OutcomeRequest, PromotionRequest, WithdrawalRequest
from runtime.http.strict_json import OwnRoute, router_at
from runtime.store.damage import Damaged
from runtime.store.episodes import Actor, Correction, Episode, Outcome, Purpose, Role, Step, new_id
from runtime.store.keys import Key
from runtime.store.learning_log import RewardSource, StepReward
from runtime.store.step_log import StepLog

_BY_A_USER = PromotionRequest()
WORLD = "world"
"""As whose word an outcome is logged that no person and no client has judged."""


def episode_routes(parts: Parts) -> APIRouter:
    router = router_at("/v1/episodes", OwnRoute)
    log = parts.log

    @router.get("")
    async def list_episodes(
        request: Request,
        after: str | None = None,
        limit: Annotated[int, Query(ge=1, le=1000)] = 50,
        purpose: Purpose | None = None,
        actor: Actor | None = None,
        adapter: str | None = None,
        task_prefix: str | None = None,
        agent: str | None = None,
    ) -> Response:
        """Newest first, the key's own; an admin key lists all. `after` is the `last_id` of the page before.

        Rows of the log that are damaged are left out and named under `damaged`, here and in the other lists.
        """
        key = asking_key(request)
        wanted = (purpose, actor, adapter, task_prefix, key.sees_only, listed_agent(parts, agent, key))

        def found() -> dict[str, Any]:
            damaged = list[Damaged]()
            with closing(log.each_episode(after, limit + 1, *wanted, damaged=damaged)) as episodes:
                return episode_page(episodes, limit, damaged)

        return await page(found)

    @router.get("/{episode_id}")
    async def read_episode(
        episode_id: str,
        request: Request,
        with_tokens: bool = False,
        after_step: str | None = None,
        limit: Annotated[int, Query(ge=1, le=1000)] = 1000,
    ) -> Response:
        """One episode with its outcomes and its steps by time; `with_tokens` adds token ids and logprobs.

        `rewards` of a step is what the newest cycles gave it, by source; empty where none has read it yet.

        Of a long one a page of steps: `after_step` is the `last_step_id` of the page before.
        """
        episode = _known(parts, asking_key(request), episode_id)

        def read() -> dict[str, Any]:
            damaged = list[Damaged]()
            rewards = parts.learning.log.newest_rewards_of(episode.id) if parts.learning else {}
            steps = (
                _step(step, with_tokens) | _chosen_among(log, step) | {"rewards": _rewards(rewards.get(step.id, {}))}
                for step in log.steps_after(episode.id, after_step, limit + 1, damaged)
            )
            fitting, has_more = that_fit(steps, limit)
            return {
                **shown_episode(episode),
                "steps": fitting,
                "has_more": has_more,
                "last_step_id": fitting[-1]["id"] if fitting else None,
                "outcomes": [asdict(outcome) for outcome in log.outcomes(episode.id)],
                **left_out(damaged),
            }

        return await page(read)

    @router.post("/{episode_id}/outcome", status_code=201)
    async def report_outcome(episode_id: str, body: OutcomeRequest, request: Request) -> dict[str, Any]:
        """Say how an episode ended: exactly 1 is a success. May be said again: of those who are trusted most, what was
        said last counts."""
        key = asking_key(request)
        episode = _known(parts, key, episode_id)
        if body.source == WORLD and not key.may(Role.ADMIN):
            message = (
                f"only the server, its learner and admin keys speak for the world: the role of this key is {key.role}"
            )
            raise ApiError(403, f"{message}; leave `source` out", "source_not_yours", "source")
        outcome = Outcome(new_id("out"), episode.id, body.value, body.source, body.note, key=key.name, role=key.role)
        await log.commit(outcome)
        parts.swap.finish(episode.id)
        return asdict(outcome)

    @router.delete("/{episode_id}/outcomes/{outcome_id}")
    async def withdraw_outcome(
        episode_id: str, outcome_id: str, request: Request, body: Annotated[WithdrawalRequest, Body()] = NO_REASON
    ) -> dict[str, Any]:
        """Take back what one's key has said of an episode's end (an admin key: what anybody has)."""
        key, outcome = asking_key(request), log.outcome(outcome_id)
        if outcome is None or outcome.episode_id != episode_id or not key.sees(outcome.key):
            raise ApiError(404, f"episode {episode_id!r} has no outcome {outcome_id!r} of yours", "outcome_not_found")
        return await withdraw(parts, outcome.id, body.reason, key)

    @router.post("/{episode_id}/promote", status_code=201)
    async def promote_episode(
        episode_id: str, request: Request, body: Annotated[PromotionRequest, Body()] = _BY_A_USER
    ) -> dict[str, Any]:
        """Make a demonstration of an episode: whoever asks vouches for every step of it. Twice adds nothing.

        It ends with the first step that was corrected, as it was corrected. `warnings` say what else speaks against it.
        """
        key = asking_key(request)
        episode = _known(parts, key, episode_id)
        steps = await asyncio.to_thread(log.steps, episode.id)
        if not steps:
            raise ApiError(409, f"episode {episode.id!r} has no steps yet", "episode_empty")
        path = await asyncio.to_thread(log.path_to, steps[-1].id)
        corrections = {step.id: found[-1].action for step in path if (found := log.corrections(step.id))}
        demonstration = promoted_episode(episode, path, corrections, body.expert)
        is_new = await import_demonstration(parts, agent_named(parts, episode.agent), demonstration, key)
        warnings = _against(log, episode.id)
        return {"object": "demonstration", "id": demonstration.episode_id, "is_new": is_new, "warnings": warnings}

    @router.post("/{episode_id}/corrections", status_code=201)
    async def correct_step(episode_id: str, body: CorrectionRequest, request: Request) -> dict[str, Any]:
        """Say what should have been done at a step. May be said again; the newest counts."""
        key = asking_key(request)
        episode = _known(parts, key, episode_id)
        path = await asyncio.to_thread(log.path_to, body.step_id)
        if not path or path[-1].episode_id != episode.id:
            raise ApiError(404, f"episode {episode.id!r} has no step {body.step_id!r}", "step_not_found", "step_id")
        action = message_action(body.message.as_message())
        token_ids = await asyncio.to_thread(correction_in_tokens, parts.protocol, path, action, parts.engine.limits)
        correction = Correction(new_id("corr"), body.step_id, action, token_ids, body.source, key=key.name)
        await log.commit(correction)
        return {"object": "correction", "id": correction.id, "step_id": body.step_id, "source": body.source}

    @router.delete("/{episode_id}/corrections/{correction_id}")
    async def withdraw_correction(
        episode_id: str, correction_id: str, request: Request, body: Annotated[WithdrawalRequest, Body()] = NO_REASON
    ) -> dict[str, Any]:
        """Take back one's key's correction (an admin key: anybody's)."""
        key, correction = asking_key(request), log.correction(correction_id)
        step = log.step(correction.step_id) if correction else None
        if correction is None or step is None or step.episode_id != episode_id or not key.sees(correction.key):
            message = f"episode {episode_id!r} has no correction {correction_id!r} of yours"
            raise ApiError(404, message, "correction_not_found")
        return await withdraw(parts, correction.id, body.reason, key)

    return router


def _known(parts: Parts, key: Key, episode_id: str) -> Episode:
    """The episode, if the key may see it: to others it does not exist."""
    episode = parts.log.episode(episode_id)
    if parts.erasing is not None and (erased := parts.erasing.eraser.tombstone(episode_id)) and key.sees(erased.owner):
        raise ApiError(410, f"episode {episode_id!r} was erased ({erased.erasure_id})", "episode_erased")
    if episode is None or not key.sees(episode.owner):
        raise ApiError(404, f"there is no episode {episode_id!r}; GET /v1/episodes lists them", "episode_not_found")
    return episode


def _against(log: StepLog, episode_id: str) -> list[str]:
    """What whoever promotes an episode may not have meant."""
    outcomes = log.outcomes(episode_id)
    if not outcomes or outcomes[-1].value == 1.0:
        return []
    return [f"the episode is said to have ended with outcome {outcomes[-1].value:g}; it is learned all the same"]


def _rewards(newest: Mapping[RewardSource, StepReward]) -> dict[str, Any]:
    return {source.value: {"value": reward.value, "cycle": reward.cycle} for source, reward in newest.items()}


def _chosen_among(log: StepLog, step: Step) -> dict[str, Any]:
    """The draws that a step was chosen among, where it was."""
    if step.sampling.best_of == 1:
        return {}
    return {
        "candidates": [
            {
                "action": action_message(each.action),
                "score": each.score,
                "scorer": each.scorer,
                "is_chosen": each.is_chosen,
                "num_completion_tokens": len(each.completion_token_ids),
            }
            for each in log.candidates(step.id)
        ]
    }


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
