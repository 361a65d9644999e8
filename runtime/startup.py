"""The socket the server listens on, and what it says when it is ready."""

from __future__ import annotations

import json
import shlex
import socket
from typing import TYPE_CHECKING

from policies.types import adapter_name
from runtime.config import Settings

if TYPE_CHECKING:
    from runtime.http.parts import Parts


def listen(host: str, port: int) -> socket.socket:
    """A bound socket; port 0 takes a free one. Raises SystemExit with a sentence where the address is not to be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # The protocol is named: asyncio turns Nagle's algorithm off (40 ms an answer) only where it is told so.
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
        sock.listen(2048)  # from now on, so that who connects right after the welcome waits instead of being refused
    except OSError as error:
        sock.close()
        raise SystemExit(f"cannot listen on {host}:{port}: {error.strerror or error}; try another --port") from error
    return sock


def url_of(sock: socket.socket) -> str:
    """Where a bound socket can be reached from this machine."""
    host, port = sock.getsockname()[:2]
    here = "127.0.0.1" if host == "0.0.0.0" else "::1" if host == "::" else host
    return f"http://{f'[{here}]' if ':' in here else here}:{port}"


def welcome(parts: Parts, settings: Settings, sock: socket.socket) -> str:
    """Where it listens, what it serves, where the log is, and a request to try."""
    url = url_of(sock)
    lines = [
        f"listening   {url}/v1",
        f"serving     {parts.served_name} ({settings.model}), {settings.engine} engine, adapter " + _acting(parts),
        *(f"agent       {agent.model}, adapter {_acting(parts, agent.name)}" for agent in parts.named_agents),
        f"step log    {settings.state / 'agent.db'}",
        "learner     "
        + (f"a cycle every {settings.learn_every} new episodes; " if settings.learn_every else "")
        + f"curl{_key(parts)} -X POST {url}/v1/learner/cycles starts one now",
        "try         " + _example(parts, url),
    ]
    return "\n".join(lines)


def _acting(parts: Parts, agent: str = "") -> str:
    return adapter_name(parts.registry.acting(agent))


def _example(parts: Parts, url: str) -> str:
    body = {"model": parts.served_name, "messages": [{"role": "user", "content": parts.example}]}
    said = shlex.quote(json.dumps(body))
    return f"curl{_key(parts)} {url}/v1/chat/completions -H 'content-type: application/json' -d {said}"


def _key(parts: Parts) -> str:
    """curl's option for the API key, which the shell fills in."""
    return ' -H "authorization: Bearer $STEPAGENT_API_KEY"' if parts.keys.asks else ""
