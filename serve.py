"""python serve.py: wires the parts of the server and runs it. Heavy imports come after parsing, so --help is quick."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from typing import TYPE_CHECKING

from runtime.config import Settings, parse_settings

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path
    from types import FrameType

    from policies.chat.chat_protocol import ChatProtocol
    from policies.types import Engine
    from runtime.adapters.approval import PromotionTerms
    from runtime.adapters.swap import Swap
    from runtime.agent.served_agent import ServedAgent
    from runtime.agent.tools import Toolbox
    from runtime.agents import AgentsFile, AgentTable
    from runtime.engines.gpu_share import GpuShare
    from runtime.http.parts import Parts
    from runtime.privacy.erasing import Erasing
    from runtime.privacy.redaction import Redactor
    from runtime.privacy.retention import Retention
    from runtime.store.step_log import StepLog
    from tools.shelf import ToolShelf
    from tools.worlds.world import World


def main(arguments: list[str]) -> None:
    settings = parse_settings(arguments)
    require_learner_options(settings)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    print(f"loading {settings.model} ...", flush=True)
    run(settings)


def run(settings: Settings) -> None:
    """Serve until interrupted. Raises SystemExit with a sentence where the server cannot start."""
    import uvloop

    from tools.ending import ending_in_time

    on_signals(leave_at_once)
    with ending_in_time():
        try:
            uvloop.run(_serve(settings))
        except KeyboardInterrupt:
            print("stopped.")


def on_signals(handler: Callable[[int, FrameType | None], object]) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)


def leave_at_once(number: int, frame: FrameType | None) -> None:
    """Before there is anything to close. Raised in the midst of an import, an exception may be lost and leave the
    import lock held: a server came neither up nor to an end."""
    os.write(sys.stdout.fileno(), b"stopped.\n")
    os._exit(0)


async def _serve(settings: Settings) -> None:
    from runtime.startup import listen, url_of, welcome

    sock = listen(settings.host, settings.port)  # before the slow imports: a port in use is told at once
    import sqlite3

    from policies.types import EngineError
    from runtime.engines.supervised import SupervisedEngine
    from runtime.http.app import create_app
    from runtime.http.shutdown import server_of
    from runtime.store.damage import StepLogError, unusable

    parts = build_parts(settings)
    # uvicorn ends its connections first and then raises the signal again: as an exception it also closes the log.
    on_signals(signal.default_int_handler)
    assert parts.learning is not None
    parts.learning.process.url = url_of(sock)
    server = server_of(create_app(parts), parts.cutting, log_level=settings.log_level, grace_s=settings.shutdown_grace)

    beside: list[asyncio.Task[None]] = []

    async def start() -> None:
        telling = asyncio.create_task(tell_progress(parts.engine))
        try:
            await start_engine(parts)
        except BaseException:
            server.should_exit = True
            raise
        finally:
            telling.cancel()
        if parts.state is not None:
            parts.state.say(f"process {os.getpid()}, {url_of(sock)}")
        print(welcome(parts, settings, sock), flush=True)
        for agent, files in demonstrations_of(settings).items():
            importing = import_demonstrations(files, agent, url_of(sock), parts.keys.learner_secret)
            beside.append(asyncio.create_task(importing))

    starting = asyncio.create_task(start())
    try:
        if not isinstance(parts.engine, SupervisedEngine):
            await starting  # at once; the other takes a while, in which the server says so to whoever asks
        await server.serve(sockets=[sock])
        if starting.done():
            starting.result()
    except (EngineError, ValueError, StepLogError) as error:
        raise SystemExit(f"cannot start: {error}") from error
    except sqlite3.Error as error:
        raise SystemExit(f"cannot start: {unusable(error, settings.state / 'agent.db')}") from error
    finally:
        for task in (starting, *beside):
            task.cancel()
        await asyncio.gather(*beside, return_exceptions=True)
        await parts.engine.close()
        parts.log.close()
        parts.registry.close()
        if parts.shelf is not None:
            parts.shelf.close()
        if parts.keys.store is not None:
            parts.keys.store.close()
        if parts.state is not None:
            parts.state.close()


def demonstrations_of(settings: Settings) -> dict[str, Sequence[Path]]:
    """By agent, the files to import once the server is up."""
    of_agents = {name: agent.demonstrations for name, agent in settings.agents_file.agents.items()}
    return {name: files for name, files in {"": settings.demonstrations, **of_agents}.items() if files}


async def import_demonstrations(files: Sequence[Path], agent: str, url: str, secret: str) -> None:
    """Have the learner import them; it says what it refuses. Serving goes on meanwhile."""
    whose = ["--agent", agent] if agent else []
    command = [sys.executable, "-m", "learner", "import", *map(str, files), "--url", f"{url}/v1", *whose]
    importing = await asyncio.create_subprocess_exec(*command, env={**os.environ, "STEPAGENT_API_KEY": secret})
    try:
        await importing.wait()
    finally:
        if importing.returncode is None:
            importing.terminate()


async def tell_progress(engine: Engine, every_s: float = 10.0) -> None:
    """Say what a slow start is waiting for, until the task is cancelled."""
    while True:
        await asyncio.sleep(every_s)
        print(engine.health().problem, flush=True)


def build_parts(settings: Settings) -> Parts:
    """Everything a running server consists of. Raises SystemExit with a sentence for what cannot be built."""
    import sqlite3

    from policies.adapters.base_network import BaseNetworkError, model_folder, read_base_network
    from policies.chat.chat_protocol import ChatProtocol
    from runtime.adapters.approval import Approval
    from runtime.adapters.reward_models import RewardModels
    from runtime.adapters.swap import Swap
    from runtime.agent.budget import RunLimits
    from runtime.agent.scorers import Choosing, ChoosingAsked, ChosenBy
    from runtime.agent.served_agent import ServedAgent
    from runtime.agent.tool_sources import tool_sources
    from runtime.agents import AgentsFileProblem
    from runtime.http.best_of import ChoosingLimits
    from runtime.http.load import Load, today
    from runtime.http.metrics import Metrics
    from runtime.http.parts import Parts
    from runtime.http.shutdown import Cutting
    from runtime.learning.learning import Learning
    from runtime.privacy.erasing import Erasing
    from runtime.store.adapter_registry import AdapterRegistry
    from runtime.store.damage import StepLogError, unusable
    from runtime.store.keys import KeyRing, KeyStore
    from runtime.store.learning_log import migrate_learning_log
    from runtime.store.state_folder import StateFolder
    from runtime.store.step_log import LOCK_TIMEOUT_S, StepLog
    from runtime.store.vocabulary import require_vocabulary
    from tools.shelf import ToolShelf
    from tools.worlds.world import WorldFailed, max_steps_of

    served_name = settings.served_name or os.path.basename(os.path.normpath(settings.model))
    try:
        agents_file = settings.agents_file
    except AgentsFileProblem as problem:
        raise SystemExit(str(problem)) from None
    folder_of_agents = settings.agents.parent if settings.agents else None
    shelf = ToolShelf(tool_sources(agents_file.tools, folder_of_agents), settings.search_corpus)
    try:
        if served_name in agents_file.agents:
            raise ValueError(
                f"the agent {served_name!r} has the name of the model itself: choose another, or --served-name"
            )
        slots = num_slots(settings, agents_file)
        worlds = {"": settings.world_name, **{name: agent.world for name, agent in agents_file.agents.items()}}
        loaded = load_worlds(worlds, settings.agents)
        toolbox = toolbox_of(shelf, settings.tools, loaded[""], settings.run_tools)
        example = toolbox.example_request()
        named_agents = tuple(
            ServedAgent(
                name,
                name,
                toolbox_of(shelf, agent.tools, loaded[name], agent.run_tools),
                agent.system_prompt,
                agent.sampling.said,
                ChoosingAsked(agent.best_of, None if agent.best_of_by is None else ChosenBy(agent.best_of_by)),
            )
            for name, agent in agents_file.agents.items()
        )
        folder_of_state = StateFolder(settings.state)
        log = StepLog(settings.state / "agent.db", lock_timeout_s=min(LOCK_TIMEOUT_S, settings.deadline))
        registry = AdapterRegistry(settings.state / "agent.db")
        for name in worlds:
            registry.acting(name)  # raises where it can no longer be read: another adapter would be served
        migrate_learning_log(settings.state)
        keys = KeyRing(KeyStore(settings.state / "agent.db"), key_of(settings))
        folder = model_folder(settings.model)
        network = read_base_network(folder)
        protocol = ChatProtocol.load(folder, settings.response_template)
        require_vocabulary(settings.state / "agent.db", protocol.vocabulary_fingerprint, settings.model)
        if settings.tools and not protocol.takes_tools:
            raise ValueError(f"the chat template of {settings.model} has no words for tools: leave --tools out")
        for agent in named_agents:
            require_possible(agent, protocol, settings.model)
        redactor = redactor_of(settings)
        engine = load_engine(settings, folder, protocol, slots)
    except (sqlite3.Error, UnicodeDecodeError) as error:
        shelf.close()
        raise SystemExit(f"cannot start: {unusable(error, settings.state / 'agent.db')}") from error
    except WorldFailed as error:
        shelf.close()
        raise SystemExit(f"cannot start: the world {settings.world_name} opens no task: {error}") from error
    except (ValueError, OSError, StepLogError, BaseNetworkError) as error:
        shelf.close()
        raise SystemExit(f"cannot start: {error}") from error
    swap = Swap(engine, registry, network, agents=("", *agents_file.agents))
    metrics, cutting = Metrics(engine), Cutting()
    learning = Learning.beside(
        settings.state,
        log,
        registry,
        swap,
        arguments=learner_arguments(settings, folder),
        environment=learner_environment(settings, folder, keys.learner_secret),
        every_episodes=settings.learn_every,
        arguments_of={name: ["--world", agent.world] for name, agent in agents_file.agents.items()},
        every_episodes_of={
            name: settings.learn_every if agent.learn_every is None else agent.learn_every
            for name, agent in agents_file.agents.items()
        },
    )
    erasing = Erasing(settings.state, log, registry, swap, learning, metrics.registry)
    return Parts(
        served_name=served_name,
        named_agents=named_agents,
        worlds=worlds,
        engine=engine,
        protocol=protocol,
        log=log,
        registry=registry,
        swap=swap,
        toolbox=toolbox,
        example=example,
        shelf=shelf,
        limits=RunLimits(
            max_steps=settings.max_steps or max(map(max_steps_of, loaded.values())),
            max_completion_tokens=settings.max_run_tokens,
            deadline_s=settings.deadline,
            tool_timeout_s=settings.tool_timeout,
        ),
        metrics=metrics,
        cutting=cutting,
        choosing=ChoosingLimits(Choosing(settings.best_of, ChosenBy(settings.best_of_by)), settings.best_of_most),
        reward_models=RewardModels(engine, registry, network, swap.changes),
        approval=Approval(
            swap,
            registry,
            promotion_terms(settings),
            {name: promotion_terms(settings, agent) for name, agent in agents_file.agents.items()},
        ),
        load=Load(settings.max_batch_size, settings.max_waiting, cutting, metrics.registry, used=log.usage_of(today())),
        keys=keys,
        state=folder_of_state,
        cors_origins=tuple(settings.cors_origins),
        learning=learning,
        redactor=redactor,
        erasing=erasing,
        retention=retention_of(settings, log, erasing, swap),
    )


def load_worlds(worlds: Mapping[str, str], agents_file: Path | None) -> dict[str, World | None]:
    """By agent, the world whose tasks it does. Raises ValueError, with the agent's place in its file, for one that
    cannot be loaded."""
    from runtime.agents import place_in, printable
    from tools.worlds import WORLDS, load_world

    loaded: dict[str, World | None] = {"": None}  # by name: a user's file may be large, and is read once
    for agent, world in worlds.items():
        if world in loaded:
            continue
        if ":" in world and world.partition(":")[0] in WORLDS:  # a file of the user's
            print(f"loading the world {printable(world)} ...", flush=True)
        try:
            loaded[world] = load_world(world)
        except ValueError as error:
            if not agent or agents_file is None:
                raise
            place = place_in(agents_file, ("agents", agent, "world"))
            raise ValueError(f"{place}: {printable(str(error))}") from error
    return {agent: loaded[world] for agent, world in worlds.items()}


def toolbox_of(shelf: ToolShelf, tools: Sequence[str], world: World | None, run_tools: str) -> Toolbox:
    """The tools that the server runs for one agent. Raises ValueError for those that cannot be loaded."""
    from runtime.agent.tools import Toolbox

    offered = shelf.offer(tools)
    return Toolbox(offered.tools, world, run_tools == "always", offered.bounds)


def require_possible(agent: ServedAgent, protocol: ChatProtocol, model: str) -> None:
    """Raises ValueError for an agent that this model's chat template cannot be."""
    from policies.chat.chat_protocol import ChatProtocolError

    if agent.toolbox.has_tools and not protocol.takes_tools:
        raise ValueError(
            f"agent {agent.name!r}: the chat template of {model} has no words for tools: leave `tools` out"
        )
    try:
        protocol.render([*agent.opening, {"role": "user", "content": "Hello."}], ())
    except ChatProtocolError as error:
        raise ValueError(
            f"agent {agent.name!r}: the chat template of {model} takes no system prompt: {error}"
        ) from error


def promotion_terms(settings: Settings, agent: AgentTable | None = None) -> PromotionTerms:
    """What a candidate of an agent may do; None: of the server's own."""
    from runtime.adapters.approval import PromotionMode, PromotionTerms

    mode = (agent and agent.promote) or settings.promote
    return PromotionTerms(
        PromotionMode.DRY_RUN if settings.learn == "dry-run" else PromotionMode(mode),
        (agent and agent.canary_share) or settings.canary_share,
        ((agent and agent.approval_days) or settings.approval_days) * 86400,
    )


SPARE_SLOTS = 3
"""Of the engine, beside the acting adapters: a candidate or its twin, what it is tried against, and one that drains."""


def num_slots(settings: Settings, agents_file: AgentsFile) -> int:
    """Adapters that the engine must hold at a time. Raises ValueError where it may not hold so many."""
    modes = [settings.promote, *(agent.promote or settings.promote for agent in agents_file.agents.values())]
    num_canaries = modes.count("canary")
    needed = len(modes) + SPARE_SLOTS + max(0, num_canaries - 1)
    if settings.max_adapters is not None and settings.max_adapters < needed:
        raise ValueError(
            f"{len(modes)} agents, the server's own included, need {needed} adapters in the engine at a time: one that "
            f"acts for each, {SPARE_SLOTS} while one of them learns, and one more for each further agent that promotes "
            f"by canary; --max-adapters is {settings.max_adapters}: raise it, or serve fewer agents"
        )
    return settings.max_adapters or needed


def retention_of(settings: Settings, log: StepLog, erasing: Erasing, swap: Swap) -> Retention:
    """What erases what was kept long enough."""
    from policies.command_line import split_commas
    from runtime.privacy.retention import Limits, Retention

    def limits_of(days: float | None, gigabytes: float | None) -> Limits:
        return Limits(days, None if gigabytes is None else int(gigabytes * 1e9))

    limits = limits_of(settings.keep_days, settings.keep_gb)
    of_agents = {
        name: limits_of(agent.keep_days or settings.keep_days, agent.keep_gb)
        for name, agent in settings.agents_file.agents.items()
        if agent.keep_days or agent.keep_gb
    }
    anchors = split_commas(str(settings.learner_arg.get("anchors", "")))
    return Retention(settings.state, log, erasing, limits, swap.is_in_progress, anchors, of_agents)


def redactor_of(settings: Settings) -> Redactor | None:
    """What replaces secrets; None: nothing does. Raises ValueError for a function that cannot be imported."""
    from runtime.privacy.redaction import Redactor, load_hook
    from runtime.privacy.secret_shapes import SHAPES

    hooks = [load_hook(path) for path in settings.redact]
    shapes = SHAPES if settings.redact_secrets == "on" else ()
    return Redactor(shapes, hooks) if hooks or shapes else None


def require_learner_options(settings: Settings) -> None:
    """Ends the process with a sentence for what the learner would not take: else every cycle would end at once."""
    from learner.commands.once import OnceOptions
    from policies.command_line import parse, refuse

    named = {name: name.removeprefix("no-").replace("-", "_") for name in settings.learner_arg}
    if given := [name for name in named if named[name] in SET_BY_THE_SERVER]:
        refuse(f"learner_arg {name}: the server itself tells the learner, leave it out" for name in given)
    if unknown := [name for name in named if named[name] not in OnceOptions.model_fields]:
        refuse(f"learner_arg {name}: no such option; python -m learner once --help lists them" for name in unknown)
    parse(OnceOptions, passed_on(settings), "serve.py --learner-arg")


SET_BY_THE_SERVER = {"url", "state", "agent", "cycle", "server_pid"}
"""Options of a learner that runs beside a server."""


def learner_arguments(settings: Settings, folder: Path) -> list[str]:
    """What a learner that runs beside this server has to know of it."""
    template = ["--response-template", str(settings.response_template)] if settings.response_template else []
    return ["--model", str(folder), "--world", settings.world_name, *template, *passed_on(settings)]


def passed_on(settings: Settings) -> list[str]:
    return [part for name, value in settings.learner_arg.items() for part in option(name, value)]


def option(name: str, value: object) -> list[str]:
    """One option as a command line spells it: a switch has no value."""
    if str(value).lower() in ("true", "false"):
        return [f"--{name}" if str(value).lower() == "true" else f"--no-{name}"]
    return [f"--{name}", str(value)]


def learner_environment(settings: Settings, folder: Path, secret: str) -> dict[str, str]:
    """Its key, as a variable of the environment since others can read the arguments of a process; beside vLLM also the
    GPU it is left."""
    share = gpu_share(settings, folder).learner_environment if settings.engine == "vllm" else {}
    return {"STEPAGENT_API_KEY": secret, **share}


def key_of(settings: Settings) -> str | None:
    """The key that the server is started with, from the environment, the TOML file, or a file of its own."""
    if settings.api_key_file is not None:
        return settings.api_key_file.read_text("utf-8").strip()
    return settings.api_key.get_secret_value() if settings.api_key else None


def load_engine(settings: Settings, folder: Path, protocol: ChatProtocol, max_adapters: int) -> Engine:
    if settings.engine == "vllm":
        return supervised_vllm(settings, folder, max_adapters)
    from runtime.engines.embedded.engine import EmbeddedEngine

    return EmbeddedEngine(
        folder,
        tokenizer=protocol.tokenizer,
        max_batch_size=settings.max_batch_size,
        max_context_tokens=settings.max_context,
        kv_memory_bytes=settings.kv_memory,
        precision=settings.precision,
        num_threads=settings.threads,
        max_adapters=max_adapters,
    )


def supervised_vllm(settings: Settings, folder: Path, max_adapters: int) -> Engine:
    from functools import partial

    from runtime.engines.supervised import SupervisedEngine
    from runtime.engines.vllm.engine import VllmEngine

    share = gpu_share(settings, folder)
    if share.told:
        print(share.told, flush=True)
    start = partial(
        VllmEngine.start,
        folder,
        max_batch_size=settings.max_batch_size,
        max_context_tokens=settings.max_context,
        max_adapters=max_adapters,
        kv_memory_bytes=settings.kv_memory,
        num_threads=settings.threads,
        gpu_memory_fraction=share.engine_fraction,
        engine_args={name: spelled(value) for name, value in settings.engine_arg.items()},
    )
    return SupervisedEngine(start)


def spelled(value: object) -> str:
    """A value of a TOML table as a command line spells it."""
    if isinstance(value, dict):
        return json.dumps(value)
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def gpu_share(settings: Settings, folder: Path) -> GpuShare:
    """Which GPU, or which part of it, is vLLM's, and which the learner's."""
    from runtime.engines.gpu_share import (
        fraction_of_user,
        num_gpus_of_engine,
        share_gpus,
        visible_gpus,
        weight_bytes_of,
    )

    num_for_engine, users_fraction = num_gpus_of_engine(settings.engine_arg), fraction_of_user(settings.engine_arg)
    return share_gpus(visible_gpus(), weight_bytes_of(folder), num_for_engine, users_fraction)


async def start_engine(parts: Parts) -> None:
    """Bring up the engine with the acting adapter. Raises EngineError or ValueError where it cannot
    start, and sqlite3's errors."""
    from runtime.engines.supervised import SupervisedEngine

    if isinstance(parts.engine, SupervisedEngine):
        await parts.engine.start(parts.swap.restore)
    else:
        await parts.swap.restore()


if __name__ == "__main__":
    main(sys.argv[1:])
