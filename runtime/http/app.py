"""create_app: the HTTP side of the server, from its parts."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import orjson
from fastapi import FastAPI, Request, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from runtime import __version__
from runtime.http.adapters import adapter_routes
from runtime.http.chat import chat_routes
from runtime.http.cycles import learner_routes
from runtime.http.demonstrations import demonstration_routes
from runtime.http.episodes import episode_routes
from runtime.http.erasures import erasure_routes
from runtime.http.errors import ApiError, install_error_handlers
from runtime.http.export import export_routes
from runtime.http.keys import KeyCheck, key_routes
from runtime.http.messages import message_routes
from runtime.http.metrics import Metrics
from runtime.http.parts import Parts
from runtime.http.responses import response_routes
from runtime.http.server import server_routes
from runtime.http.watch import watch_routes
from runtime.http.web_pages import LocalPagesOnly, with_cors

MAX_BODY_BYTES = 4 * 1024 * 1024


def create_app(parts: Parts) -> FastAPI:
    """The whole HTTP interface. The parts outlive the app: whoever made them closes them."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        # What was loaded until now stays for good: without this, each collection walks through a million objects of it.
        gc.collect()
        gc.freeze()
        beside = [asyncio.create_task(parts.swap.keep_draining())]
        if parts.approval is not None:
            beside.append(asyncio.create_task(parts.approval.keep_expiring()))
        if parts.erasing is not None:
            beside.append(asyncio.create_task(parts.erasing.keep_finishing()))
        if parts.retention is not None:
            beside.append(asyncio.create_task(parts.retention.keep_sweeping()))
        if parts.learning is not None:
            beside.append(asyncio.create_task(parts.learning.keep_watching()))
        yield
        for task in beside:
            task.cancel()
        if parts.learning is not None:
            await parts.learning.process.close()

    if parts.learning is not None:
        parts.metrics.show_cycles(parts.learning.log)
    app = FastAPI(title="StepAgent", version=__version__, lifespan=lifespan)
    app.state.redactor = parts.redactor
    install_error_handlers(app)
    of_agent = (chat_routes, response_routes, message_routes, episode_routes, demonstration_routes, export_routes)
    for routes in (*of_agent, erasure_routes, adapter_routes, learner_routes, watch_routes, key_routes, server_routes):
        app.router.routes.extend(routes(parts).routes)
    _describe_off_loop(app)
    app.add_middleware(_BodyLimit)
    app.add_middleware(_RequestCount, metrics=parts.metrics)
    app.add_middleware(KeyCheck, ring=parts.keys)
    app.add_middleware(LocalPagesOnly, ring=parts.keys, cors_origins=parts.cors_origins)
    if parts.cors_origins:
        app.add_middleware(with_cors, cors_origins=parts.cors_origins)
    app.add_middleware(_HeadAsGet)
    return app


def _describe_off_loop(app: FastAPI) -> None:
    """/openapi.json takes a second to make, which FastAPI would do on the event loop."""

    async def described(_: Request) -> Response:
        return Response(await asyncio.to_thread(lambda: orjson.dumps(app.openapi())), media_type="application/json")

    app.router.routes = [route for route in app.router.routes if getattr(route, "path", None) != app.openapi_url]
    app.add_route(str(app.openapi_url), described, ["GET"], include_in_schema=False)


class _HeadAsGet:
    """Answers HEAD as GET, without the body, as the protocol does by itself: monitors ask for /health so."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_head = scope["type"] == "http" and scope["method"] == "HEAD"
        await self._app({**scope, "method": "GET"} if is_head else scope, receive, send)


class _BodyLimit:
    """Refuses bodies beyond the limit, announced or not, before they are read whole."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        if announced.isdigit() and int(announced) > MAX_BODY_BYTES:
            return await _too_large().response(scope["path"])(scope, receive, send)
        num_bytes = 0

        async def receive_some() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > MAX_BODY_BYTES:
                raise _too_large()
            return message

        await self._app(scope, receive_some, send)


def _too_large() -> ApiError:
    return ApiError(413, f"the body is larger than {MAX_BODY_BYTES} bytes; send less", "body_too_large")


class _RequestCount:
    """Counts answers by route and status."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)

        async def send_counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = getattr(scope.get("route"), "path", "other")
                self._metrics.requests.labels(route, message["status"]).inc()
            await send(message)

        await self._app(scope, receive, send_counted)
