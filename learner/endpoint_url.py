"""The address of the endpoint, as people write it and as clients want it."""

from __future__ import annotations

from urllib.parse import urlsplit


def endpoint_url(url: str) -> str:
    """With /v1 behind a server's address that has nothing behind it: what clients are served lies there."""
    return f"{url.rstrip('/')}/v1" if urlsplit(url).path in ("", "/") else url


def is_address(url: str) -> bool:
    """Whether a client can ask there at all."""
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number
        return False
