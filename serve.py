"""python serve.py: wires the parts of the server and runs it. Heavy imports come after parsing, so --help is quick."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.config import Settings, parse_settings

if TYPE_CHECKING:
    from policies.chat_protocol import ChatProtocol
    from policies.types import Engine
    from runtime.parts import Parts


def main(arguments: list[str]) -> None:
    settings = parse_settings(arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    print(f"loading {settings.model} ...", flush=True)
    run(settings)


def run(settings: Settings) -> None:
    """Serve until interrupted. Raises SystemExit with a sentence where the server cannot start."""
    import uvloop

    # uvicorn ends its connections first and then raises the signal again: as an exception it also closes the log.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        uvloop.run(_serve(settings))
    except KeyboardInterrupt:
        print("stopped.")


async def _serve(settings: Settings) -> None:
    from runtime.listening import listen, welcome

    sock = listen(settings.host, settings.port)  # before the slow imports: a port in use is told at once
    import uvicorn

    from runtime.app import create_app

    parts = build_parts(settings)
    try:
        await start_engine(parts)
        config = uvicorn.Config(create_app(parts), log_level=settings.log_level, timeout_graceful_shutdown=5)
        print(welcome(parts, settings, sock), flush=True)
        await uvicorn.Server(config).serve(sockets=[sock])
    finally:
        await parts.engine.close()
        parts.log.close()
        parts.registry.close()


def build_parts(settings: Settings) -> Parts:
    """Everything a running server consists of. Raises SystemExit with a sentence for what cannot be built."""
    import sqlite3

    from policies.base_network import BaseNetworkError, read_base_network
    from policies.chat_protocol import ChatProtocol
    from policies.registry import AdapterRegistry
    from runtime.agent import RunLimits
    from runtime.metrics import Metrics
    from runtime.parts import Parts
    from runtime.server_tools import Toolbox
    from runtime.step_log import StepLog, StepLogError
    from runtime.swap import Swap
    from tools import load_tools
    from tools.worlds import load_world

    try:
        toolbox = Toolbox(
            load_tools(settings.tools, settings.search_corpus), load_world(settings.world) if settings.world else None
        )
        settings.state.mkdir(parents=True, exist_ok=True)
        log = StepLog(settings.state / "agent.db")
        registry = AdapterRegistry(settings.state / "agent.db")
        network = read_base_network(Path(settings.model))
        protocol = ChatProtocol.load(settings.model)
        engine = load_engine(settings, protocol)
    except (ValueError, OSError, StepLogError, BaseNetworkError, sqlite3.Error) as error:
        raise SystemExit(f"cannot start: {error}") from error
    return Parts(
        served_name=settings.served_name or os.path.basename(os.path.normpath(settings.model)),
        engine=engine,
        protocol=protocol,
        log=log,
        registry=registry,
        swap=Swap(engine, registry, network),
        toolbox=toolbox,
        limits=RunLimits(
            max_steps=settings.max_steps,
            max_completion_tokens=settings.max_run_tokens,
            deadline_s=settings.deadline,
            tool_timeout_s=settings.tool_timeout,
        ),
        metrics=Metrics(engine),
        api_key=settings.api_key.get_secret_value() if settings.api_key else None,
    )


def load_engine(settings: Settings, protocol: ChatProtocol) -> Engine:
    if settings.engine == "vllm":
        return supervised_vllm(settings)
    from runtime.engines.embedded import EmbeddedEngine

    return EmbeddedEngine(
        settings.model,
        tokenizer=protocol.tokenizer,
        max_batch_size=settings.max_batch_size,
        max_context_tokens=settings.max_context,
        num_threads=settings.threads,
    )


def supervised_vllm(settings: Settings) -> Engine:
    from functools import partial

    from runtime.engines.supervised import SupervisedEngine
    from runtime.engines.vllm import VllmEngine

    start = partial(
        VllmEngine.start,
        settings.model,
        max_batch_size=settings.max_batch_size,
        max_context_tokens=settings.max_context,
        num_threads=settings.threads,
        engine_args={name: str(value) for name, value in settings.engine_arg.items()},
    )
    return SupervisedEngine(start)


async def start_engine(parts: Parts) -> None:
    """Bring up the engine with the acting adapter. Raises SystemExit with a sentence where it cannot start."""
    from policies.types import EngineError
    from runtime.engines.supervised import SupervisedEngine

    if not isinstance(parts.engine, SupervisedEngine):
        await parts.swap.restore()
        return
    try:
        await parts.engine.start(parts.swap.restore)
    except (EngineError, ValueError) as error:
        raise SystemExit(f"cannot start: {error}") from error


if __name__ == "__main__":
    main(sys.argv[1:])
