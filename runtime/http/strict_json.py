"""Request bodies as strict JSON.

Python's own reader lets NaN, infinity, halves of surrogate pairs and numbers of any length through; they would break
later, in the log, the template or the answer. Here they are refused with the place where they stand.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any, ParamSpec, TypeVar

import orjson
from fastapi import APIRouter, Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError

from policies.chat.messages import MAX_DEPTH, is_deeper
from runtime.http.errors import ERROR_RESPONSES, ApiError, as_api_error
from runtime.off_loop import free_off_loop, off_loop
from runtime.privacy.redaction import RedactionFailed, Redactor

P = ParamSpec("P")
T = TypeVar("T")

LARGE_BYTES = 32 * 1024
REDACTED = "x-stepagent-redacted"
"""The header that tells a client how many secrets of its request were replaced."""


class StrictJsonRoute(APIRoute):
    """A route whose body is read by orjson instead of json."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        answer = super().get_route_handler()
        annotation: Any = self.body_field.field_info.annotation if self.body_field else None
        model = annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None

        async def answer_strictly(request: Request) -> Response:
            strict = _StrictJsonRequest(request.scope, request.receive)
            strict.model = model
            strict.redactor = getattr(request.app.state, "redactor", None)
            try:
                response = await answer(strict)
                if strict.num_redacted:
                    response.headers[REDACTED] = str(strict.num_redacted)
                return response
            finally:
                if strict.large_value is not None:
                    free_off_loop(strict.large_value)

        return answer_strictly


class OwnRoute(StrictJsonRoute):
    """A route that no client of OpenAI's or Anthropic's asks: a query that it does not know is refused. A misspelled
    filter would choose, or erase, more than was meant."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        answer = super().get_route_handler()
        known = [field.alias for field in self.dependant.query_params]

        async def answer_to_known(request: Request) -> Response:
            unknown = next((name for name in request.query_params if name not in known), None)
            if unknown is not None:
                there_are = f"there are: {', '.join(known)}" if known else "there is none here"
                raise ApiError(400, f"there is no query parameter {unknown!r}; {there_are}", None, f"query.{unknown}")
            return await answer(request)

        return answer_to_known


def router_at(
    prefix: str,
    route_class: type[APIRoute] = StrictJsonRoute,
    errors: dict[int | str, dict[str, Any]] = ERROR_RESPONSES,
) -> APIRouter:
    """For the routes below a path. Their errors are told here and not by the app: it takes the routes as they are, for
    FastAPI's `include_router` makes each of them anew, half of a server's start."""
    return APIRouter(prefix=prefix, route_class=route_class, responses=errors)


async def made_of_body(request: Request, is_slow: bool, make: Callable[P, T], *values: P.args, **more: P.kwargs) -> T:
    """What is made of a body that was read: in a thread where that is slow or the body large, and let go there, too."""
    large_value = getattr(request, "large_value", None)
    made = await off_loop(is_slow or large_value is not None, make, *values, **more)
    if large_value is not None:
        request.large_value = (large_value, made)  # pyright: ignore[reportAttributeAccessIssue]
    return made


class _StrictJsonRequest(Request):
    model: type[BaseModel] | None = None
    """Of the body."""
    large_value: Any = None
    """What a large body was read to, and what was made of that."""
    redactor: Redactor | None = None
    num_redacted: int = 0
    """Placeholders that stand in the body for something."""

    async def json(self) -> Any:
        """The body's value; of a large one already its model, which FastAPI takes as it is: a hundred thousand messages
        are not checked on the event loop. Raises orjson.JSONDecodeError, which FastAPI takes for the json module's own.
        """
        self._require_plain()
        body = await self.body()
        is_large = len(body) > LARGE_BYTES
        is_slow = self.redactor is not None and self.redactor.is_slow
        value = await off_loop(is_large or is_slow, self._read, body)
        self.large_value = value if is_large else None
        return value

    def _require_plain(self) -> None:
        encodings = [each.strip().lower() for each in self.headers.get("content-encoding", "").split(",")]
        if packed := ", ".join(each for each in encodings if each not in ("", "identity")):
            told = f"the body comes as {packed}, which is not read here: send it as it is, without content-encoding"
            raise ApiError(415, told, "content_encoding")

    def _read(self, body: bytes) -> Any:
        value = orjson.loads(body)
        # A body with few brackets cannot be deep; walking every body through would cost a fifth of a small request.
        if body.count(b"{") + body.count(b"[") > MAX_DEPTH and is_deeper(value):
            raise ApiError(400, f"the body is nested more than {MAX_DEPTH} deep; flatten it")
        if self.redactor is not None:
            value, self.num_redacted = self._redacted(self.redactor, value)
        if self.model is None or len(body) <= LARGE_BYTES:
            return value
        try:
            return self.model.model_validate(value)
        except ValidationError as error:
            raise as_api_error(error) from None

    def _redacted(self, redactor: Redactor, value: Any) -> tuple[Any, int]:
        try:
            return redactor.body(value)
        except RedactionFailed as problem:
            raise as_api_error(problem) from None
