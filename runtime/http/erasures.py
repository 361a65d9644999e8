"""Erase episodes, and tell what was erased, what was made of it, and what taught what.

A key may erase its own episodes, an admin key anybody's. `DELETE /v1/episodes/...` is for good; to say only that a
demonstration or an outcome was wrong, delete that: it stays logged and no longer counts.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Body, Query, Request

from runtime.http.errors import ApiError
from runtime.http.keys import asking_key
from runtime.http.pages import left_out
from runtime.http.parts import Parts
from runtime.http.schemas import ErasureRequest
from runtime.http.strict_json import OwnRoute, router_at
from runtime.privacy.erasing import Erasing
from runtime.store.damage import Damaged
from runtime.store.episodes import Role
from runtime.store.erasure import Erasure, Scope
from runtime.store.keys import Key
from runtime.store.lineage import Lineage, UnknownName

_NO_REASON = ErasureRequest(reason="")
MOST_SHOWN = 1000
"""Ids of each kind in one answer."""


def erasure_routes(parts: Parts) -> APIRouter:
    router = router_at("/v1", OwnRoute)

    @router.delete("/episodes")
    async def erase_episodes(
        request: Request,
        user: Annotated[str | None, Query(min_length=1, max_length=1000)] = None,
        key: Annotated[str | None, Query(min_length=1, max_length=64)] = None,
        reason: Annotated[str, Query(max_length=1000)] = "",
        retrain: bool = False,
        body: Annotated[ErasureRequest, Body()] = _NO_REASON,
    ) -> dict[str, Any]:
        """Erase all episodes for a user, of a key, or both: for good, with what was made of them.

        A key that is no admin key erases among its own only. The answer comes when nothing of them is in a table.
        """
        asking, erasing = asking_key(request), erasing_of(parts)
        if user is None and key is None:
            raise ApiError(400, "say whose episodes: ?user=NAME or ?key=NAME", None, "user")
        if key is not None and not asking.sees(key):
            raise ApiError(403, "only an admin key erases the episodes of another key", "role_missing", "key")
        owner = key if key is not None else asking.sees_only
        scope = Scope.USER if user is not None else Scope.KEY
        found = await asyncio.to_thread(erasing.eraser.episodes_of, user, owner)
        return await _erase(parts, asking, found, scope, body.reason or reason, body.retrain or retrain)

    @router.delete("/episodes/{episode_id}")
    async def erase_episode(
        episode_id: str,
        request: Request,
        reason: Annotated[str, Query(max_length=1000)] = "",
        retrain: bool = False,
        body: Annotated[ErasureRequest, Body()] = _NO_REASON,
    ) -> dict[str, Any]:
        """Erase one episode, or one demonstration, for good. Again: the same erasure is told."""
        asking, erasing = asking_key(request), erasing_of(parts)
        episode = parts.log.episode(episode_id)
        tombstone = erasing.eraser.tombstone(episode_id)
        if tombstone is not None and asking.sees(tombstone.owner):
            return await _shown(parts, erasing.eraser.erasure(tombstone.erasure_id))
        if episode is None or not asking.sees(episode.owner):
            raise ApiError(404, f"there is no episode {episode_id!r}", "episode_not_found")
        return await _erase(parts, asking, [episode_id], Scope.EPISODE, body.reason or reason, body.retrain or retrain)

    @router.get("/erasures")
    async def list_erasures(limit: Annotated[int, Query(ge=1, le=1000)] = 50) -> dict[str, Any]:
        """Newest first: who erased what, when and why."""
        damaged = list[Damaged]()
        found = await asyncio.to_thread(erasing_of(parts).eraser.erasures, limit, damaged)
        shown = [{"object": "erasure", **asdict(each)} for each in found]
        return {"object": "list", "data": shown} | left_out(damaged)

    @router.get("/erasures/{erasure_id}")
    async def read_erasure(erasure_id: str) -> dict[str, Any]:
        """One erasure: its tombstones, and the adapters that know something of its episodes, as they are now."""
        try:
            return await _shown(parts, erasing_of(parts).eraser.erasure(erasure_id))
        except KeyError:
            raise ApiError(404, f"there is no erasure {erasure_id!r}", "erasure_not_found") from None

    @router.get("/episodes/{episode_id}/lineage")
    async def episode_lineage(episode_id: str, request: Request) -> dict[str, Any]:
        """What was made of an episode: demonstrations, cycles that read it, adapters that know something of it."""
        episode, tombstone = parts.log.episode(episode_id), erasing_of(parts).eraser.tombstone(episode_id)
        whose = episode or tombstone
        if whose is None or not asking_key(request).sees(whose.owner):
            raise ApiError(404, f"there is no episode {episode_id!r}", "episode_not_found")
        found = await asyncio.to_thread(lineage_of(parts).of_episode, episode_id)
        return {"object": "lineage", **asdict(found)}

    @router.get("/adapters/{name}/lineage")
    async def adapter_lineage(name: str) -> dict[str, Any]:
        """What an adapter was trained on, and what its ancestors were."""
        try:
            found = await asyncio.to_thread(lineage_of(parts).of_adapter, name)
        except UnknownName as problem:
            raise ApiError(404, problem.args[0], "adapter_not_found") from None
        return {"object": "lineage", **asdict(found)}

    return router


def erasing_of(parts: Parts) -> Erasing:
    if parts.erasing is None:
        raise ApiError(409, "this server was wired without erasures", "no_erasures")
    return parts.erasing


def lineage_of(parts: Parts) -> Lineage:
    return erasing_of(parts).lineage


async def _erase(
    parts: Parts, asking: Key, episode_ids: Sequence[str], scope: Scope, reason: str, retrain: bool
) -> dict[str, Any]:
    if retrain and not asking.may(Role.ADMIN):
        raise ApiError(403, f"a retraining needs an admin key: the role of this key is {asking.role}", "role_missing")
    if retrain and parts.learning is None:
        raise ApiError(409, "this server was wired without a learner", "no_learner")
    erasing = erasing_of(parts)
    erasure = await erasing.erase(episode_ids, scope, reason, asking.name)
    if retrain:
        erasure = await erasing.retrain(erasure, asking.name)
    return await _shown(parts, erasure)


async def _shown(parts: Parts, erasure: Erasure) -> dict[str, Any]:
    erasing = erasing_of(parts)
    consequences = await erasing.consequences(erasure)
    tombstones = await asyncio.to_thread(erasing.eraser.tombstones, erasure.id)
    return {
        "object": "erasure",
        **asdict(erasure),
        "episodes": [asdict(tombstone) for tombstone in tombstones[:MOST_SHOWN]],
        "demonstrations": consequences.demonstrations[:MOST_SHOWN],
        "adapters": [asdict(adapter) for adapter in consequences.adapters],
        "reward_models": consequences.reward_models,
        "cycles": consequences.cycles,
    }
