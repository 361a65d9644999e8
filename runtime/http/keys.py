"""Who may ask what: which key a request comes with, and which role its route needs.

A route that is not in the table below needs an admin key: a new one is safe until somebody decides (a test lists those
that nobody decided on). What is not served at all is told to every key: an admin's would be of no more use there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.routing import Match, compile_path
from starlette.types import ASGIApp, Receive, Scope, Send

from runtime.http.agents import agent_named
from runtime.http.errors import ApiError
from runtime.http.parts import Parts
from runtime.http.schemas import KeyRequest
from runtime.http.strict_json import OwnRoute, router_at
from runtime.store.adapter_registry import UNNAMED
from runtime.store.episodes import Role
from runtime.store.keys import ANYBODY, Key, KeyProblem, KeyRing, KeyStore, Quota

NO_KEY: Sequence[tuple[str, str]] = (("GET", "/health"), ("GET", "/"))
"""What is answered to everybody."""

NEEDS: Sequence[tuple[Role, str, str]] = (
    (Role.USE, "POST", "/v1/chat/completions"),
    (Role.USE, "POST", "/v1/responses"),
    (Role.USE, "POST", "/v1/responses/input_tokens"),
    (Role.USE, "GET", "/v1/responses/{response_id}"),
    (Role.USE, "DELETE", "/v1/responses/{response_id}"),
    (Role.USE, "POST", "/v1/responses/{response_id}/cancel"),
    (Role.USE, "GET", "/v1/responses/{response_id}/input_items"),
    (Role.USE, "POST", "/v1/messages"),
    (Role.USE, "POST", "/v1/messages/count_tokens"),
    (Role.USE, "GET", "/v1/models"),
    (Role.USE, "GET", "/v1/models/{model}"),
    (Role.USE, "GET", "/v1/episodes"),
    (Role.USE, "GET", "/v1/episodes/{episode_id}"),
    (Role.USE, "DELETE", "/v1/episodes"),
    (Role.USE, "DELETE", "/v1/episodes/{episode_id}"),
    (Role.USE, "GET", "/v1/episodes/{episode_id}/lineage"),
    (Role.ADMIN, "GET", "/v1/erasures"),
    (Role.ADMIN, "GET", "/v1/erasures/{erasure_id}"),
    (Role.ADMIN, "GET", "/v1/adapters/{name}/lineage"),
    (Role.FEEDBACK, "POST", "/v1/episodes/{episode_id}/outcome"),
    (Role.FEEDBACK, "DELETE", "/v1/episodes/{episode_id}/outcomes/{outcome_id}"),
    (Role.FEEDBACK, "POST", "/v1/episodes/{episode_id}/corrections"),
    (Role.FEEDBACK, "DELETE", "/v1/episodes/{episode_id}/corrections/{correction_id}"),
    (Role.TEACH, "POST", "/v1/episodes/{episode_id}/promote"),
    (Role.TEACH, "POST", "/v1/demonstrations"),
    (Role.TEACH, "GET", "/v1/demonstrations"),
    (Role.TEACH, "DELETE", "/v1/demonstrations/{episode_id}"),
    (Role.USE, "GET", "/v1/export"),
    (Role.ADMIN, "GET", "/v1/adapters"),
    (Role.ADMIN, "POST", "/v1/adapters"),
    (Role.ADMIN, "POST", "/v1/adapters/rollback"),
    (Role.ADMIN, "POST", "/v1/adapters/{name}/promote"),
    (Role.ADMIN, "POST", "/v1/adapters/{name}/canary"),
    (Role.ADMIN, "POST", "/v1/adapters/{name}/refuse"),
    (Role.ADMIN, "POST", "/v1/adapters/{name}/reward"),
    (Role.ADMIN, "POST", "/v1/adapters/{name}/unload"),
    (Role.ADMIN, "GET", "/v1/learner/cycles"),
    (Role.ADMIN, "POST", "/v1/learner/cycles"),
    (Role.ADMIN, "GET", "/v1/learner/cycles/{cycle}"),
    (Role.ADMIN, "GET", "/v1/learner/watch"),
    (Role.ADMIN, "POST", "/v1/learner/watch/pause"),
    (Role.ADMIN, "POST", "/v1/learner/watch/resume"),
    (Role.ADMIN, "GET", "/v1/keys"),
    (Role.ADMIN, "POST", "/v1/keys"),
    (Role.ADMIN, "POST", "/v1/keys/{name}/rotate"),
    (Role.ADMIN, "POST", "/v1/keys/{name}/revoke"),
    (Role.ADMIN, "GET", "/metrics"),
    (Role.USE, "GET", "/openapi.json"),
    (Role.USE, "GET", "/docs"),
    (Role.USE, "GET", "/docs/oauth2-redirect"),
    (Role.USE, "GET", "/redoc"),
)
"""The least role that each route needs."""

_PATTERNS = [(role, method, compile_path(path)[0]) for role, method, path in NEEDS]
_PLAIN = {(method, path): role for role, method, path in NEEDS}

_HOW = "send it as `Authorization: Bearer KEY`, or in the header x-api-key"
_SCOPE_KEY = "stepagent.key"


def needed_role(method: str, path: str) -> Role | None:
    """The least role for a request; None: no key at all."""
    if (method, path) in NO_KEY:
        return None
    if role := _PLAIN.get((method, path)):
        return role
    return next((role for role, verb, pattern in _PATTERNS if verb == method and pattern.match(path)), Role.ADMIN)


def _is_served(scope: Scope) -> bool:
    return any(route.matches(scope)[0] is Match.FULL for route in scope["app"].routes)


def asking_key(request: Request) -> Key:
    """The key that a request came with."""
    return request.scope.get(_SCOPE_KEY, ANYBODY)


class KeyCheck:
    """Middleware: refuses requests without a key that may ask for what they ask for."""

    def __init__(self, app: ASGIApp, ring: KeyRing) -> None:
        self._app = app
        self._ring = ring

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        needed = needed_role(scope["method"], scope["path"])
        if needed is Role.ADMIN and not _is_served(scope):
            needed = Role.USE
        secret = _secret_of(scope)
        key = self._ring.key_of(secret)
        if needed is not None and (problem := _problem(key, secret, needed, scope)):
            return await problem.response(scope["path"])(scope, receive, send)
        scope[_SCOPE_KEY] = key or ANYBODY
        await self._app(scope, receive, send)


def _secret_of(scope: Scope) -> str | None:
    """The key that a request names. None: it names none."""
    headers = dict(scope["headers"])
    scheme, _, given = headers.get(b"authorization", b"").strip().partition(b" ")
    if scheme.lower() == b"bearer" and given.strip():
        return given.strip().decode("utf-8", "surrogateescape")
    return headers.get(b"x-api-key", b"").strip().decode("utf-8", "surrogateescape") or None


def _problem(key: Key | None, secret: str | None, needed: Role, scope: Scope) -> ApiError | None:
    if key is None:
        said = "this key is not known here, or was revoked" if secret else "this server needs an API key"
        headers = {"WWW-Authenticate": "Bearer"}
        return ApiError(401, f"{said}: ask its operator for one and {_HOW}", "invalid_api_key", headers=headers)
    if key.may(needed):
        return None
    asked = f"{scope['method']} {scope['path']}"
    return ApiError(
        403,
        f"{asked} needs a key with the role {needed}, and {key.name!r} has the role {key.role}: "
        "ask the server's operator for another",
        "role_missing",
    )


# ------------------------------------------------------------------------------------------------- routes


def key_routes(parts: Parts) -> APIRouter:
    router = router_at("/v1/keys", OwnRoute)
    one_by_one = asyncio.Lock()  # else two admins who revoke each other at once both find another left

    @router.get("")
    async def list_keys() -> dict[str, Any]:
        """Every key that was ever made, oldest first, without its secret."""
        return {"object": "list", "data": [shown_key(key) for key in _store(parts).all_keys()]}

    @router.post("", status_code=201)
    async def make_key(body: KeyRequest, request: Request) -> dict[str, Any]:
        """Make a key. Its secret is in this answer and nowhere else."""
        store, quota = _store(parts), Quota(body.requests_per_day, body.steps_per_day, body.tokens_per_day)
        agents = [_agent_of_key(parts, agent) for agent in body.agents or ()]
        async with one_by_one:
            if body.role is not Role.ADMIN and not parts.keys.admins():
                raise _locked_out(
                    "from the first key on nobody is answered without one, and none is an admin's", "role"
                )
            secret = await _change(store.make, body.name, body.role, quota, asking_key(request).name, agents)
        return _named(store, body.name) | {"secret": secret}

    @router.post("/{name}/rotate")
    async def rotate_key(name: str, request: Request) -> dict[str, Any]:
        """Give a key another secret; the old one is refused from now on."""
        store = _store(parts)
        secret = await _change(store.rotate, name, asking_key(request).name)
        return _named(store, name) | {"secret": secret}

    @router.post("/{name}/revoke")
    async def revoke_key(name: str, request: Request) -> dict[str, Any]:
        """Refuse a key from now on, for ever."""
        store = _store(parts)
        async with one_by_one:
            if parts.keys.admins() == {name}:
                raise _locked_out(f"{name!r} is the last admin key", "name")
            await _change(store.revoke, name, asking_key(request).name)
        return _named(store, name)

    return router


def _locked_out(why: str, param: str) -> ApiError:
    told = f"{why}: make a key with the role admin first, or use `python -m runtime.keys` beside the server"
    return ApiError(409, told, "no_admin_key", param)


def _agent_of_key(parts: Parts, name: str) -> str:
    """Raises ApiError (404) for one that is not served."""
    return UNNAMED if name == UNNAMED else agent_named(parts, name).name or UNNAMED


def shown_key(key: Key) -> dict[str, Any]:
    """A key as clients see it."""
    return {
        "object": "key",
        "name": key.name,
        "role": key.role,
        "agents": key.agents or None,
        "is_revoked": key.is_revoked,
        "requests_per_day": key.quota.requests,
        "steps_per_day": key.quota.steps,
        "tokens_per_day": key.quota.tokens,
        "created_at": key.created_at,
        "changed_at": key.changed_at,
    }


def _store(parts: Parts) -> KeyStore:
    if parts.keys.store is None:
        raise ApiError(409, "this server was wired without a store of keys", "no_keys")
    return parts.keys.store


async def _change(change: Any, *values: object) -> Any:
    try:
        return await asyncio.to_thread(change, *values)
    except KeyProblem as problem:
        raise ApiError(409, str(problem), "key_conflict", "name") from problem


def _named(store: KeyStore, name: str) -> dict[str, Any]:
    return next(shown_key(key) for key in store.all_keys() if key.name == name)
