"""A server on a real port, for tests that speak to it as its users do; and engines that say what a test tells them."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from openai import AsyncOpenAI, OpenAI

from policies.adapters.base_network import read_base_network
from policies.chat.chat_protocol import ChatProtocol
from policies.types import Adapter, Engine, EngineLimits, SampledToken, SamplingParams, TokenIds
from runtime.adapters.reward_models import RewardModels
from runtime.adapters.swap import Swap
from runtime.agent.loop import RunLimits
from runtime.agent.tools import Toolbox
from runtime.http.app import create_app
from runtime.http.connections import DEFAULT_LIMITS, ConnectionLimits
from runtime.http.metrics import Metrics
from runtime.http.parts import Parts
from runtime.http.shutdown import DrainingServer, server_of
from runtime.learning.learning import Learning
from runtime.privacy.erasing import Erasing
from runtime.startup import listen, url_of
from runtime.store.adapter_registry import AdapterRegistry
from runtime.store.step_log import StepLog
from tests.scripted_engine import ScriptedEngine
from tools.worlds.order_desk import OrderDesk

ROOT = Path(__file__).parent.parent
NOVICE_FOLDER = ROOT / "policies" / "novice_model"
MODEL = "novice"

VOCAB_SIZE = json.loads((NOVICE_FOLDER / "config.json").read_text())["vocab_size"]
LIMITS = EngineLimits(
    2048, max_adapters=3, max_rank=16, vocab_size=VOCAB_SIZE, supports_grammar=True, logprob_tolerance=1e-3
)
"""Those of the novice. The scripted engine keeps to no grammar: it says what it is told to."""


class SayingEngine(ScriptedEngine):
    """Says one text after another, each ended by the end of a turn, and remembers what it was asked.

    Once it has said all it says "All done." for ever. A text that must not end by itself is given as token ids.
    """

    def __init__(
        self, protocol: ChatProtocol, *says: str | Sequence[int], limits: EngineLimits = LIMITS, pause_s: float = 0.0
    ) -> None:
        super().__init__(self._next, limits)
        self.says = deque(says)
        self.prompts: list[TokenIds] = []
        self.samplings: list[SamplingParams] = []
        self.num_said: list[int] = []
        """Of each completion asked for, how many tokens were taken before it ended or was cancelled."""
        self.pause_s = pause_s
        """Before each token."""
        self._protocol = protocol

    def _next(self, _: TokenIds, __: str) -> Sequence[int | SampledToken]:
        said = self.says.popleft() if self.says else "All done."
        return said if not isinstance(said, str) else self._protocol.encode(said + "<|im_end|>")

    async def generate(
        self, prompt_token_ids: Sequence[int], sampling: SamplingParams, adapter: Adapter | None, *, stream: bool = True
    ) -> AsyncIterator[SampledToken]:
        self.prompts.append(tuple(prompt_token_ids))
        self.samplings.append(sampling)
        self.num_said.append(0)
        number = len(self.num_said) - 1
        async with aclosing(super().generate(prompt_token_ids, sampling, adapter, stream=stream)) as tokens:
            async for token in tokens:
                await asyncio.sleep(self.pause_s)
                self.num_said[number] += 1
                yield token


def parts_of(engine: Engine, protocol: ChatProtocol, folder: Path, **changes: Any) -> Parts:
    """A server's parts, with real stores in a folder and the order desk as its world."""
    folder.mkdir(parents=True, exist_ok=True)
    registry = changes.get("registry") or AdapterRegistry(folder / "agent.db")
    log = changes.get("log") or StepLog(folder / "agent.db")
    names = [agent.name for agent in changes.get("named_agents", ())]
    network = read_base_network(NOVICE_FOLDER)
    swap = changes.get("swap") or Swap(engine, registry, network, agents=("", *names))
    parts = Parts(
        served_name=MODEL,
        engine=engine,
        protocol=protocol,
        log=log,
        registry=registry,
        swap=swap,
        toolbox=Toolbox((), OrderDesk()),
        worlds={"": "order_desk"},
        limits=RunLimits(),
        metrics=Metrics(engine),
        reward_models=RewardModels(engine, registry, network, swap.changes),
        learning=Learning.beside(folder, log, registry, swap, arguments=["--model", str(NOVICE_FOLDER)]),
    )
    parts = replace(parts, erasing=Erasing(folder, log, registry, swap, parts.learning, parts.metrics.registry))
    return replace(parts, **changes)


class Served:
    """A running server, and clients for it."""

    def __init__(self, parts: Parts, port: int, server: DrainingServer) -> None:
        self.parts = parts
        self.server = server
        self.port = port
        self.url = f"http://127.0.0.1:{port}"

    def client(self, **options: Any) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", **{"api_key": "none", "max_retries": 0, "timeout": 60, **options})

    def async_client(self, **options: Any) -> AsyncOpenAI:
        return AsyncOpenAI(base_url=f"{self.url}/v1", **{"api_key": "none", "max_retries": 0, "timeout": 60, **options})


@contextmanager
def served(parts: Parts, grace_s: float = 2.0, limits: ConnectionLimits = DEFAULT_LIMITS) -> Iterator[Served]:
    """Serve in a thread, as serve.py does in its main thread. Closes the stores, but not the engine, at the end."""
    sock = listen("127.0.0.1", 0)
    if parts.learning is not None:
        parts.learning.process.url = url_of(sock)
    server = server_of(create_app(parts), parts.cutting, grace_s=grace_s, limits=limits)
    thread = threading.Thread(target=server.run, args=([sock],), daemon=True)
    thread.start()
    try:
        wait_until(lambda: server.started)
        yield Served(parts, sock.getsockname()[1], server)
    finally:
        server.should_exit = True
        thread.join(10)
        parts.log.close()
        parts.registry.close()
        if parts.keys.store is not None:
            parts.keys.store.close()


def wait_until(is_so: Callable[[], bool], timeout_s: float = 10.0) -> None:
    """Wait until something is so. Raises AssertionError where it takes too long."""
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)
