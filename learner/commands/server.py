"""What every command of the learner needs to know: where the server is, its key, and its state folder."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from pydantic import Field, field_validator
from pydantic_settings import SettingsConfigDict

from learner.api_key import api_key
from learner.endpoint_url import endpoint_url, is_address
from learner.terminal import plain
from policies.command_line import Options

if TYPE_CHECKING:
    from learner.client import Endpoint
    from runtime.store.step_log import StepLog

T = TypeVar("T")


class ServerOptions(Options):
    """Where the server is."""

    model_config = SettingsConfigDict(env_prefix="STEPAGENT_LEARNER_")

    url: str = Field(
        default_factory=lambda: os.environ.get("STEPAGENT_URL", "http://127.0.0.1:8000/v1"), validate_default=True
    )
    """The endpoint; default: STEPAGENT_URL, or the server's own default. /v1 may be left out."""
    api_key_file: Path | None = None
    """File that holds the server's API key; default: STEPAGENT_API_KEY."""
    state: Path = Path("state")
    """The server's state folder."""
    agent: str = ""
    """The agent that it is about, by its name in agents.toml; default: the server's own, or all in a list."""

    @field_validator("url")
    @classmethod
    def _of_the_endpoint(cls, url: str) -> str:
        if not is_address(url):
            raise ValueError(f"{url!r} is no address of a server, such as http://127.0.0.1:8000")
        return endpoint_url(url)

    def endpoint(self, timeout_s: float = 600.0) -> Endpoint:
        from openai import AsyncOpenAI

        from learner.client import Endpoint

        return Endpoint(
            AsyncOpenAI(base_url=self.url, api_key=api_key(self.api_key_file), timeout=timeout_s), agent=self.agent
        )


def ask(options: ServerOptions, request: Callable[[Endpoint], Awaitable[T]]) -> T | None:
    """What the server answers to a request; None where it does not, which is said."""
    from openai import OpenAIError

    async def answer() -> T:
        return await request(options.endpoint())

    try:
        return asyncio.run(answer())
    except OpenAIError as error:
        print(plain(f"{options.url} did not do it: {error}"), file=sys.stderr)
        return None


def has_state(options: ServerOptions) -> bool:
    """Whether a server has ever run on the state folder; says so where not."""
    database = options.state / "agent.db"
    if not database.exists():
        print(f"there is no {database}: start the server first, or name its --state", file=sys.stderr)
    return database.exists()


def step_log_of(options: ServerOptions) -> StepLog | None:
    """The step log of the state folder, to read; None, and a sentence, where there is none or it cannot be opened."""
    from runtime.store.step_log import StepLog, StepLogError

    if not has_state(options):
        return None
    try:
        return StepLog(options.state / "agent.db", read_only=True)
    except StepLogError as error:
        print(error, file=sys.stderr)
        return None


def unknown_agent(log: StepLog, agent: str) -> str:
    """What is wrong with an agent's name, in a sentence; empty where none is named, or the log has episodes of it."""
    if not agent or log.query("SELECT 1 FROM episodes WHERE agent = ? LIMIT 1", agent):
        return ""
    known = [row["agent"] for row in log.query("SELECT DISTINCT agent FROM episodes WHERE agent <> '' ORDER BY agent")]
    return f"no episode of an agent {agent!r} is logged; there are some of: {', '.join(known) or 'the server alone'}"
