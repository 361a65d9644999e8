"""Errors in OpenAI's form: what was wrong and what to change. One place that turns exceptions into them."""

from __future__ import annotations

import logging
import re
import sqlite3
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from policies.adapters.files import AdapterRefused
from policies.chat.chat_protocol import ChatProtocolError
from policies.types import EngineError, GrammarFailed
from runtime.adapters.swap import SwapError
from runtime.agent.step import ContextFull
from runtime.http.admission import AgentRefused, ErasedEpisode, ForeignEpisode, UnknownModel
from runtime.http.fields import FieldRefused
from runtime.http.load import Refused
from runtime.http.shutdown import ServerStopping
from runtime.http.sse import ClientGone
from runtime.learning.process import LearnerBusy
from runtime.privacy.redaction import RedactionFailed
from runtime.store.adapter_registry import RegistryError, UnknownAdapter
from runtime.store.damage import Damaged, StepLogError
from tools.worlds.world import WorldFailed

logger = logging.getLogger(__name__)


class ErrorDetail(BaseModel):
    """What was wrong, in OpenAI's form."""

    message: str
    type: Literal["invalid_request_error", "server_error"]
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every answer that is an error."""

    error: ErrorDetail


ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "The request cannot be answered; the message says what to change."},
    "5XX": {"model": ErrorBody, "description": "The server could not answer; the same request may succeed later."},
}
"""For the OpenAPI document; FastAPI's own 422 is never sent."""


class AnthropicErrorDetail(BaseModel):
    """What was wrong, in Anthropic's form."""

    type: str
    message: str


class AnthropicErrorBody(BaseModel):
    """The body of every answer under /v1/messages that is an error."""

    type: Literal["error"]
    error: AnthropicErrorDetail


ANTHROPIC_ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    kind: {**told, "model": AnthropicErrorBody} for kind, told in ERROR_RESPONSES.items()
}


MESSAGES = "/v1/messages"
"""Where Anthropic's clients ask."""


class ApiError(HTTPException):
    """An answer that is an error: HTTP status, message, and OpenAI's machine-readable code and parameter.

    An HTTPException, because FastAPI lets nothing else through that is raised while it reads a body.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, headers)
        self.code = code
        self.param = param

    @property
    def error(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status_code < 500 else "server_error"
        return {"message": self.detail, "type": kind, "param": self.param, "code": self.code}

    @property
    def body(self) -> dict[str, Any]:
        return {"error": self.error}

    def response(self, path: str) -> JSONResponse:
        """In the form that clients of this path read: Anthropic's under /v1/messages, else OpenAI's."""
        is_anthropic = path == MESSAGES or path.startswith(f"{MESSAGES}/")
        return JSONResponse(anthropic_error(self) if is_anthropic else self.body, self.status_code, self.headers)


def as_api_error(error: Exception) -> ApiError:
    """What a client is told of an exception."""
    match error:
        case ApiError():
            return error
        case RequestValidationError() | ValidationError():
            return _validation_error(error)
        case UnknownModel():
            return ApiError(404, str(error), "model_not_found", "model")
        case AgentRefused():
            return ApiError(403, str(error), "agent_refused", "model")
        case ErasedEpisode():
            return ApiError(410, str(error), "episode_erased", "metadata.episode_id")
        case ForeignEpisode():
            return ApiError(409, str(error), "episode_taken", "metadata.episode_id")
        case ContextFull():
            return ApiError(400, str(error), "context_length_exceeded", "messages")
        case ChatProtocolError():
            return ApiError(400, str(error), None, "messages")
        case GrammarFailed():
            problem = f"the schema of the answer, or of a tool's arguments, cannot be held to; make it simpler: {error}"
            return ApiError(400, problem, "grammar_failed", "response_format")
        case EngineError():
            return ApiError(503, f"the engine could not answer: {error}", "engine_error")
        case WorldFailed():
            logger.warning("the world could not open a task: %s", error, exc_info=error.__cause__)
            return ApiError(503, f"the world could not open the task: {error}", "world_error")
        case LearnerBusy():
            return ApiError(409, str(error), "learner_busy")
        case SwapError():
            return ApiError(409, str(error), "adapter_not_served")
        case AdapterRefused():
            return ApiError(409, f"the adapter is refused: {error}", "adapter_refused")
        case UnknownAdapter():
            return ApiError(404, f"{error}; GET /v1/adapters lists them", "adapter_not_found")
        case RegistryError():
            return ApiError(409, str(error), "adapter_conflict")
        case ClientGone() | ClientDisconnect():
            return ApiError(499, str(error) or "the client has hung up", "client_gone")
        case Refused():
            return ApiError(429, str(error), error.code, headers={"Retry-After": str(error.retry_after_s)})
        case RedactionFailed():
            return ApiError(500, f"nothing was done with this text: {error}", "redaction_failed")
        case ServerStopping():
            return ApiError(503, str(error), "server_stopping", headers={"Retry-After": "5"})
        case sqlite3.Error():
            problem = f"the server's database, agent.db, could not be used: {error}"
            return ApiError(503, f"{problem}; is the disk full, or does another program hold a lock?", "database_error")
        case Damaged():
            return ApiError(503, f"what was asked for cannot be read: {error}", "damaged")
        case StepLogError():
            return ApiError(503, f"the answer could not be logged, so it was not given: {error}", "log_error")
        case HTTPException(status_code=404):
            return ApiError(404, "nothing is served at this path; GET /openapi.json tells what is")
        case HTTPException(status_code=405):
            problem = "this path is served, but not with this method; GET /openapi.json tells with which"
            return ApiError(405, problem, headers=error.headers)
        case HTTPException():
            return ApiError(error.status_code, error.detail, headers=error.headers)
        case FieldRefused(param=param):
            return ApiError(400, str(error), None, param)
        case ValueError():
            return ApiError(400, str(error))
    logger.error("unexpected error", exc_info=error)
    return ApiError(500, f"unexpected {type(error).__name__}; the server's log has the details")


_OF_UNIONS = re.compile(
    r"constrained-\w+|str|int|float|bool|dict|items|blocks|(literal|list|dict|function-\w+)\[.*|[A-Z]\w*"
)
"""What stands between the names of fields where a field may have one of several types."""


def _path(problem: Mapping[str, Any]) -> str:
    parts = [str(part) for part in problem["loc"] if part != "body"]
    return ".".join(part for part in parts if not _OF_UNIONS.fullmatch(part))


def _told_problem(problems: Sequence[Any]) -> Any:
    """Of the problems with the first field, that of the type which was meant: it lies deepest."""
    first = _path(problems[0])
    return max((each for each in problems if _path(each).startswith(first)), key=lambda each: _path(each).count("."))


def _validation_error(error: RequestValidationError | ValidationError) -> ApiError:
    problem = _told_problem(error.errors())
    where = _path(problem)
    if problem["type"] == "json_invalid":
        return ApiError(400, f"the body is not valid JSON: {problem.get('ctx', {})['error']} at character {where}")
    if problem["loc"] == ("body",) and problem["type"] in ("missing", "model_attributes_type"):
        return ApiError(400, "the body must be a JSON object, sent with content-type: application/json")
    if isinstance(cause := problem.get("ctx", {}).get("error"), FieldRefused):
        return as_api_error(cause)
    message = str(problem["msg"]).removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        message = "there is no such field; GET /docs tells which there are"
    return ApiError(400, f"{where}: {message}" if where else message, None, where or None)


_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
}


def anthropic_error(error: ApiError) -> dict[str, Any]:
    """The body of an error in Anthropic's form."""
    kind = _ANTHROPIC_TYPES.get(error.status_code, "invalid_request_error" if error.status_code < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": error.detail}}


def install_error_handlers(app: FastAPI) -> None:
    async def answer(request: Request, error: Exception) -> JSONResponse:
        return as_api_error(error).response(request.url.path)

    refused = (ApiError, RequestValidationError, HTTPException, ValueError, ContextFull)
    of_adapters = (SwapError, AdapterRefused, RegistryError, LearnerBusy)
    failed = (
        EngineError,
        RedactionFailed,
        WorldFailed,
        StepLogError,
        sqlite3.Error,
        ClientGone,
        ClientDisconnect,
        ServerStopping,
        Refused,
        Exception,
    )
    for kind in (*refused, *of_adapters, *failed):
        app.add_exception_handler(kind, answer)
