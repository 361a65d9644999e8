"""GET /v1/export: logged episodes in other people's formats, one JSON object a line, as they are read from the log."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import StreamingResponse

from runtime.http.agents import listed_agent
from runtime.http.keys import asking_key
from runtime.http.parts import Parts
from runtime.http.strict_json import OwnRoute, router_at
from runtime.store.episodes import Actor, Purpose
from runtime.store.export import ExportFilter, export


def export_routes(parts: Parts) -> APIRouter:
    router = router_at("/v1/export", OwnRoute)

    @router.get("", response_class=StreamingResponse)
    def export_episodes(
        request: Request,
        format: Literal["atif", "openai", "trl", "hf"],
        purpose: Purpose | None = None,
        actor: Actor | None = None,
        adapter: str | None = None,
        task_prefix: str | None = None,
        since: datetime | None = None,
        min_outcome: Annotated[float | None, Query(allow_inf_nan=False)] = None,
        agent: str | None = None,
    ) -> StreamingResponse:
        """Newest episode first, the key's own; an admin key gets all.

        `since` is a moment, of UTC where it names no zone; `min_outcome` leaves out episodes without an outcome.
        """
        key = asking_key(request)
        wanted = ExportFilter(
            purpose,
            actor,
            adapter,
            task_prefix,
            None if since is None else (since if since.tzinfo else since.replace(tzinfo=UTC)).timestamp(),
            min_outcome,
            key.sees_only,
            listed_agent(parts, agent, key),
        )
        learning_log = None if parts.learning is None else parts.learning.log
        # A plain iterator is read in a thread: the log is, while answers go on.
        return StreamingResponse(
            _lines(export(parts.log, learning_log, wanted, format)), media_type="application/x-ndjson"
        )

    return router


def _lines(rows: Iterator[dict[str, object]]) -> Iterator[bytes]:
    return (json.dumps(row, ensure_ascii=True).encode() + b"\n" for row in rows)
