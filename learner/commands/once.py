"""python -m learner once: runs one cycle against a served agent, here or beside its server."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import sqlite3
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, ValidationError, create_model, field_validator, model_validator
from pydantic_settings import CliSuppress, NoDecode

from learner.api_key import key_in
from learner.commands.server import ServerOptions, ask, has_state
from learner.endpoint_url import is_address
from learner.options import CollectionOptions, CycleOptions, ObjectiveOptions, TrainingOptions
from policies.command_line import split_commas
from runtime.store.learner_lock import only_learner

if TYPE_CHECKING:
    from learner.data.collaborators import Collaborators
    from learner.data.experts import Expert
    from learner.data.judge import Judge
    from runtime.store.step_log import StepLog
    from tools.worlds.world import World

NICENESS = 10
"""Of a learner beside a server: on shared cores it gets what serving leaves."""
PATIENCE_S = 3600.0
"""It waits for an answer: the server lets users go before."""

GROUPS: dict[str, Any] = {"collection": CollectionOptions, "objective": ObjectiveOptions, "training": TrainingOptions}
"""The groups of a cycle's options: on the command line they stand side by side."""


def _side_by_side() -> dict[str, Any]:
    fields = {name: field for group in (*GROUPS.values(), CycleOptions) for name, field in _fields(group).items()}
    return {name: (_on_command_line(field.annotation), field) for name, field in fields.items() if name not in GROUPS}


def _fields(group: Any) -> dict[str, Any]:
    return group.__pydantic_fields__


def _on_command_line(annotation: Any) -> Any:
    return Annotated[annotation, NoDecode] if annotation == tuple[str, ...] else annotation


_CycleFields: Any = create_model("_CycleFields", __base__=ServerOptions, **_side_by_side())


class OnceOptions(_CycleFields):
    """Run one learner cycle: collect, inspect, reward, train, judge, promote."""

    cycle: str = ""
    """The cycle's name; default: a new one."""
    model: Path = Path("policies/novice_model")
    """The base model's folder."""
    response_template: Path | None = None
    """As the server was started with."""
    world: str | None = None
    """The world that judges and knows the way, empty for none; default: the agent's own, which the server tells."""
    expert_url: str = ""
    """A stronger model's OpenAI-compatible endpoint; its key is STEPAGENT_EXPERT_API_KEY."""
    expert_model: str = ""
    """The stronger model's name there."""
    judge_url: str = ""
    """A judge model's OpenAI-compatible endpoint: it ranks own episodes of one task that nobody has judged; its key is
    STEPAGENT_JUDGE_API_KEY."""
    judge_model: str = ""
    """The judge model's name there."""
    threads: int = Field(1, ge=1)
    """Threads of the learner's arithmetic on a CPU, beside the spare cores. OMP_NUM_THREADS bounds both."""
    server_pid: CliSuppress[int | None] = None
    """The server that started us: we give way to it, and end with it."""

    @field_validator("*", mode="before")
    @classmethod
    def _split_commas(cls, given: Any, info: Any) -> Any:
        annotation = cls.model_fields[info.field_name].annotation
        return split_commas(given) if annotation == tuple[str, ...] else given

    @model_validator(mode="after")
    def _expert_is_whole(self) -> OnceOptions:
        if bool(self.expert_url) != bool(self.expert_model):
            raise ValueError("--expert-url and --expert-model go together")
        if bool(self.judge_url) != bool(self.judge_model):
            raise ValueError("--judge-url and --judge-model go together")
        for name, url in (("--expert-url", self.expert_url), ("--judge-url", self.judge_url)):
            if url and not is_address(url):
                raise ValueError(f"{name} {url!r} is no address of an endpoint, such as http://127.0.0.1:8001/v1")
        return self

    @model_validator(mode="after")
    def _groups_are_whole(self) -> OnceOptions:
        """What a group says of its fields together."""
        try:
            self.cycle_options()
        except ValidationError as error:
            raise ValueError(error.errors()[0]["msg"].removeprefix("Value error, ")) from None
        return self

    def cycle_options(self) -> CycleOptions:
        groups = {name: group(**self._values_of(group)) for name, group in GROUPS.items()}
        return CycleOptions(**self._values_of(CycleOptions), **groups)

    def _values_of(self, group: Any) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _fields(group) if name not in GROUPS}


def run(options: OnceOptions) -> int:
    """Exit code 0 however the cycle was decided, 1 where it failed or the server does not answer, 3 beside another
    cycle."""
    if options.server_pid is not None:
        _live_beside(options.server_pid)  # before the slow imports: they too give way to the server, and end with it
    _limit_threads(options)  # before torch is imported
    from learner.commands.status import StatusOptions
    from learner.commands.status import run as show_status
    from runtime.store.learning_log import CycleStage

    if not has_state(options):
        return 1
    with only_learner(options.state) as is_alone:
        if not is_alone:
            print(f"another cycle runs on {options.state}: wait for its end", file=sys.stderr)
            return 3
        if options.world is None:
            options.world = ask(options, lambda server: server.world())
        if options.world is None:
            return 1
        try:
            stage = asyncio.run(_clear_up_and_run(options))
        except sqlite3.OperationalError as error:  # a cycle's ending is told in the database, else nowhere but here
            told = f"the cycle cannot be logged in {options.state / 'agent.db'}: {error}"
            print(f"{told}; make room, or end who keeps it locked, and start one again", file=sys.stderr)
            return 1
        show_status(StatusOptions(state=options.state, limit=1))
    return 1 if stage is CycleStage.FAILED else 0


def _limit_threads(options: OnceOptions) -> None:
    options.spare_cores = options.spare_cores and "OMP_NUM_THREADS" not in os.environ  # type: ignore[attr-defined]
    os.environ.setdefault("OMP_NUM_THREADS", str(options.threads))
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # a thread that spins takes a core from the server


async def _clear_up_and_run(options: OnceOptions) -> str:
    from learner.cycle import refuse_left_over, run_cycle
    from runtime.store.episodes import new_id

    who = collaborators(options)
    cut_off = who.learning_log.fail_unfinished()
    for cycle in cut_off:
        print(f"cycle {cycle} was cut off and is marked as failed")
    if cut_off:
        await refuse_left_over(cut_off, who)
    return await run_cycle(options.cycle or new_id("cycle"), who, options.cycle_options())


def collaborators(options: OnceOptions) -> Collaborators:
    """Who a cycle works with, as the options say."""
    from learner.data.collaborators import Collaborators
    from policies.chat.chat_protocol import ChatProtocol
    from runtime.store.learning_log import LearningLog
    from runtime.store.step_log import StepLog
    from tools.worlds import load_world

    log = StepLog(options.state / "agent.db", read_only=True)
    world = load_world(options.world) if options.world else None
    return Collaborators(
        endpoint=options.endpoint(PATIENCE_S),
        log=log,
        learning_log=LearningLog(options.state),
        protocol=ChatProtocol.load(options.model, options.response_template),
        world=world,
        experts=_experts(options, log, world),
        base=options.model,
        state=options.state,
        agent=options.agent,
        judge=_judge(options),
    )


def _experts(options: OnceOptions, log: StepLog, world: World | None) -> list[Expert]:
    """Whoever may know what to do at the policy's own states; the first who does is believed."""
    from openai import AsyncOpenAI

    from learner.data.experts import Corrections, ModelExpert, WorldExpert
    from learner.data.other_model import NUM_RETRIES

    experts: list[Expert] = [Corrections(log)]
    if world is not None:
        experts.append(WorldExpert(world))
    if options.expert_url:
        key = key_in("STEPAGENT_EXPERT_API_KEY")
        client = AsyncOpenAI(base_url=options.expert_url, api_key=key, max_retries=NUM_RETRIES)
        experts.append(ModelExpert(client, options.expert_model))
    return experts


def _judge(options: OnceOptions) -> Judge | None:
    from openai import AsyncOpenAI

    from learner.data.judge import Judge
    from learner.data.other_model import NUM_RETRIES

    if not options.judge_url:
        return None
    key = key_in("STEPAGENT_JUDGE_API_KEY")
    client = AsyncOpenAI(base_url=options.judge_url, api_key=key, max_retries=NUM_RETRIES)
    return Judge(client, options.judge_model)


def _live_beside(server: int) -> None:
    """Give way to the server, and end with it, however it ends (Linux)."""
    os.nice(NICENESS)
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
    if os.getppid() != server:  # it ended before we asked to be told
        raise SystemExit(f"the server (process {server}) has ended")
