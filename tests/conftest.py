"""What many tests share: the novice, loaded once, and servers on real ports."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# No server here speaks TLS, but each of thousands of clients would read all root certificates: 20 to 45 ms of CPU.
os.environ["SSL_CERT_DIR"] = str(Path(__file__).parent)
os.environ.pop("SSL_CERT_FILE", None)

import pytest

from policies.chat.chat_protocol import ChatProtocol
from runtime.engines.embedded.engine import EmbeddedEngine
from runtime.http.connections import DEFAULT_LIMITS, ConnectionLimits
from tests.serving import NOVICE_FOLDER, SayingEngine, Served, parts_of, served

SLOW_MODULES = frozenset(
    """
    test_adapter_faults test_adapter_routes test_agents test_backup test_bad_input test_batch test_best_of
    test_build_objectives test_checkpoints test_client_forms test_connections test_damage test_deploy
    test_discriminator test_doubts test_embedded_engine test_embedded_memory test_embedded_precision test_erasure
    test_erasure_cycles test_examples test_faulty_worlds test_fuzz test_gpu_check test_imported_tools test_judge
    test_keys test_large_log test_learner_command test_load test_mcp test_methods_benchmark test_no_stall
    test_novice test_objective_gradients test_order_desk test_own_worlds test_promises test_reading
    test_released_states test_responses test_retention test_sequential test_serve test_slow_world test_stitching
    test_swap_embedded test_swap_histories test_trainer test_trials test_web_pages test_worlds
    """.split()
)
"""They train, start processes or dozens of servers, load tiny networks or try thousands of examples: `make quick`
leaves them out."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.stem in SLOW_MODULES:
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: item.path.stem not in SLOW_MODULES)


@pytest.fixture(scope="session")
def protocol() -> ChatProtocol:
    """The novice's chat protocol."""
    return ChatProtocol.load(NOVICE_FOLDER)


def novice_engine_of(protocol: ChatProtocol) -> EmbeddedEngine:
    return EmbeddedEngine(NOVICE_FOLDER, tokenizer=protocol.tokenizer, device="cpu", num_threads=1)


@pytest.fixture(scope="session")
def novice_engine(protocol: ChatProtocol) -> Iterator[EmbeddedEngine]:
    """The embedded engine with the novice; about five seconds to load."""
    engine = novice_engine_of(protocol)
    yield engine
    asyncio.run(engine.close())


@pytest.fixture
def engine(protocol: ChatProtocol) -> Iterator[EmbeddedEngine]:
    """The same, but a test's own: it is swapped."""
    engine = novice_engine_of(protocol)
    yield engine
    asyncio.run(engine.close())


@pytest.fixture(scope="session")
def novice_server(
    novice_engine: EmbeddedEngine, protocol: ChatProtocol, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    """One server with the novice for all tests: each looks at its own episodes."""
    with served(parts_of(novice_engine, protocol, tmp_path_factory.mktemp("novice"))) as server:
        yield server


ServeScripted = Callable[..., Served]


@pytest.fixture
def serve_scripted(protocol: ChatProtocol, tmp_path: Path) -> Iterator[ServeScripted]:
    """Starts a server whose engine says what it is given: `serve_scripted("Hello.", limits=RunLimits(...))`."""
    with ExitStack() as stack:

        def serve(
            *says: str,
            engine: SayingEngine | None = None,
            limits_of_connections: ConnectionLimits = DEFAULT_LIMITS,
            grace_s: float = 2.0,
            **changes: Any,
        ) -> Served:
            parts = parts_of(engine or SayingEngine(protocol, *says), protocol, tmp_path, **changes)
            return stack.enter_context(served(parts, grace_s, limits_of_connections))

        yield serve
