"""Keeps web pages away from a server that asks for no key.

Whoever opens a page lets its scripts send requests to this machine. A server without keys would do what they ask, so
it answers only requests that no strange page can send: to a name of this machine (a page whose own name was pointed
here, DNS rebinding, sends its own), and, where something is changed, from no other origin and not as a form.

A server that asks for keys needs none of this: pages do not know the key.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from urllib.parse import urlsplit

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from runtime.config import is_loopback
from runtime.http.errors import ApiError
from runtime.store.keys import KeyRing

_READING = frozenset({"GET", "OPTIONS"})
_ANSWER_HEADERS = (
    "x-episode-id", "x-step-id", "x-adapter", "x-stepagent-warning", "x-stepagent-redacted", "retry-after",
)  # fmt: skip


class LocalPagesOnly:
    """Middleware: refuses what a strange page could have sent, as long as no key is asked for."""

    def __init__(self, app: ASGIApp, ring: KeyRing, cors_origins: Collection[str]) -> None:
        self._app = app
        self._ring = ring
        self._cors_origins = frozenset(cors_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not self._ring.asks and (problem := self._problem(scope)):
            return await problem.response(scope["path"])(scope, receive, send)
        await self._app(scope, receive, send)

    def _problem(self, scope: Scope) -> ApiError | None:
        headers = _Headers(scope)
        if strange := [host for host in headers.all(b"host") if not _is_here(host)]:
            return _refusal(
                f"this server asks for no key and answers to names of its own machine only, not {strange[0]!r}"
            )
        if scope["method"] in _READING:
            return None
        origins = headers.all(b"origin")
        if self._cors_origins.issuperset(origins) and origins:
            return _form_problem(headers)
        is_foreign = headers.first(b"sec-fetch-site") not in ("", "same-origin", "none")
        if is_foreign or any(urlsplit(origin).netloc != headers.first(b"host") for origin in origins):
            return _refusal("this server asks for no key and takes no changes from other web pages: start it with "
                            f"--cors-origin {origins[0] if origins else 'ORIGIN'} to trust this one")  # fmt: skip
        return _form_problem(headers)


def with_cors(app: ASGIApp, cors_origins: Sequence[str]) -> ASGIApp:
    """Lets pages of these origins read the answers, and ask beforehand whether they may send a request."""
    return CORSMiddleware(
        app, allow_origins=cors_origins, allow_methods=["*"], allow_headers=["*"], expose_headers=_ANSWER_HEADERS
    )


class _Headers:
    """A request's headers as text, also where one is sent twice."""

    def __init__(self, scope: Scope) -> None:
        self._pairs: list[tuple[bytes, bytes]] = scope["headers"]

    def all(self, name: bytes) -> list[str]:
        return [value.decode("latin-1").strip() for key, value in self._pairs if key == name]

    def first(self, name: bytes) -> str:
        return next(iter(self.all(name)), "")


def _is_here(host: str) -> bool:
    """Whether a Host header names this machine itself, on whatever port."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return False
    return is_loopback(name.rstrip("."))


def _form_problem(headers: _Headers) -> ApiError | None:
    """A page can send forms and plain text without asking; JSON it cannot."""
    content_type = headers.first(b"content-type").partition(";")[0].strip().lower()
    has_body = headers.first(b"content-length") not in ("", "0") or headers.first(b"transfer-encoding") != ""
    if content_type == "application/json" or content_type.endswith("+json") or not (content_type or has_body):
        return None
    said = f"not as {content_type}" if content_type else "and say so"
    return ApiError(400, f"send the body as JSON, {said}: content-type: application/json", "not_json")


def _refusal(message: str) -> ApiError:
    return ApiError(403, f"{message}; or give it a key (STEPAGENT_API_KEY)", "strange_page")
