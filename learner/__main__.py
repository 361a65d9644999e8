"""python -m learner: run a cycle against a served agent, import demonstrations, show cycles, roll back."""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import fcntl
import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from openai import APIStatusError, AsyncOpenAI, OpenAIError
from tqdm import tqdm

from learner.api_key import add_key_options, api_key
from learner.client import Endpoint
from runtime.store.episodes import new_id
from runtime.store.learning_log import LearningLog

if TYPE_CHECKING:
    from learner.cycle import CycleParts
    from learner.data.experts import Expert
    from learner.importing.demonstrations import ImportedDemonstration

BATCH = 64
"""Demonstrations of one import request."""
NICENESS = 10
"""Of a learner beside a server: on shared cores it gets what serving leaves."""


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m learner", description=(__doc__ or "").strip())
    parser.add_argument("command", nargs="?", choices=("once", "status", "rollback", "import"), default="status")
    parser.add_argument("files", nargs="*", type=Path, help="demonstration files to import")
    parser.add_argument("--once", action="store_true", help="run one cycle; the same as the command once")
    parser.add_argument(
        "--url", default=os.environ.get("STEPAGENT_URL", "http://127.0.0.1:8000/v1"), help="the endpoint"
    )
    add_key_options(parser)
    parser.add_argument("--state", type=Path, default=Path("state"), help="the server's state folder")
    cycle = parser.add_argument_group("a cycle")
    cycle.add_argument("--cycle", default="", help="the cycle's name; default: a new one")
    cycle.add_argument("--model", type=Path, default=Path("policies/novice_model"), help="the base model's folder")
    cycle.add_argument("--response-template", type=Path, default=None, help="as the server was started with")
    cycle.add_argument("--world", default="order_desk", help="the world that judges and knows the way; empty for none")
    cycle.add_argument("--objectives", default="", help="sft, implicit, inverse, eto, rft, ppo: one or more, by commas")
    cycle.add_argument("--samples", type=int, default=2, help="actions sampled at each state of a demonstration")
    cycle.add_argument("--gate-tasks", type=int, default=100, help="the world's tasks that the gate tries")
    cycle.add_argument("--canary-share", type=float, default=0.0, help="of new episodes, before it acts for all")
    cycle.add_argument("--expert-url", default="", help="a stronger model's OpenAI-compatible endpoint")
    cycle.add_argument("--expert-model", default="", help="its name there; its key is STEPAGENT_EXPERT_API_KEY")
    cycle.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    cycle.add_argument("--threads", type=int, default=1, help="of its arithmetic on a CPU")
    cycle.add_argument("--seed", type=int, default=0)
    cycle.add_argument("--server-pid", type=int, default=None, help=argparse.SUPPRESS)  # the server that started us
    for name, kind, text in (*_TRAINING, *_OBJECTIVE):
        cycle.add_argument(f"--{name}", type=kind, default=None, help=text)
    options = parser.parse_args(arguments)
    options.command = "once" if options.once else options.command
    if bool(options.expert_url) != bool(options.expert_model):
        parser.error("--expert-url and --expert-model go together")
    if options.command == "import" and not options.files:
        parser.error("name the demonstration files to import")
    return options


def _yes_or_no(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"true or false, not {text!r}")
    return text.lower() == "true"


_TRAINING = (
    ("lr", float, "peak learning rate; default: by the network's width"),
    ("epochs", int, "passes over the training_data"),
    ("rank", int, "of a fresh adapter"),
    ("token-budget", int, "most tokens of one packed forward pass: what bounds the memory"),
)
"""Options of the trainer; what is not given keeps the default of `learner.training.trainer.TrainingOptions`."""

_OBJECTIVE = (
    ("beta", float, "of implicit and eto: smaller lets the policy go further"),
    ("anchor-weight", float, "of experts' likelihood, in implicit, inverse and ppo"),
    ("kl-weight", float, "of the distance from the reference, in inverse and ppo"),
    ("informative-only", _yes_or_no, "true: sft and implicit learn only where the agent disagrees with the expert"),
)
"""Options of what is learned; what is not given keeps the default of `learner.objectives.build.LessonOptions`."""


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    if options.server_pid is not None:
        _live_beside(options.server_pid)  # before the slow imports: they too give way to the server, and end with it
    endpoint = Endpoint(AsyncOpenAI(base_url=options.url, api_key=api_key(options)))
    try:
        match options.command:
            case "once":
                return _once(options, endpoint)
            case "import":
                return asyncio.run(_import(options, endpoint))
            case "rollback":
                print(json.dumps(asyncio.run(endpoint.rollback("asked by python -m learner rollback"))))
                return 0
        return _status(options)
    except OpenAIError as error:
        print(f"{options.url} did not do it: {error}", file=sys.stderr)
        return 1


# --------------------------------------------------------------------------------------------------- a cycle


def _once(options: argparse.Namespace, endpoint: Endpoint) -> int:
    """Run one cycle. Exit code 0 however it was decided, 1 where it failed, 3 beside another cycle."""
    os.environ.setdefault("OMP_NUM_THREADS", str(options.threads))  # before torch is imported
    from learner.cycle import run_cycle
    from runtime.store.learning_log import CycleStage

    if not (options.state / "agent.db").exists():
        print(f"there is no {options.state / 'agent.db'}: start the server first, or name its --state", file=sys.stderr)
        return 1
    with _only_learner(options.state) as is_alone:
        if not is_alone:
            print(f"another cycle runs on {options.state}: wait for its end", file=sys.stderr)
            return 3
        parts = _cycle_parts(options, endpoint)
        cut_off = parts.learning_log.fail_unfinished()
        for cycle in cut_off:
            print(f"cycle {cycle} was cut off and is marked as failed")

        async def clear_up_and_run() -> CycleStage:
            if cut_off:
                await endpoint.refuse_left_over(cut_off)
            return await run_cycle(options.cycle or new_id("cycle"), parts)

        stage = asyncio.run(clear_up_and_run())
        _show(parts.learning_log, 1)
    return 1 if stage is CycleStage.FAILED else 0


def _live_beside(server: int) -> None:
    """Give way to the server, and end with it, however it ends (Linux)."""
    os.nice(NICENESS)
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
    if os.getppid() != server:  # it ended before we asked to be told
        raise SystemExit(f"the server (process {server}) has ended")


@contextmanager
def _only_learner(state: Path) -> Iterator[bool]:
    """Whether no other learner works on this state folder, as long as this goes on. Its death frees the place."""
    with (state / "learner.lock").open("w") as lock:
        yield _locks(lock)


def _locks(lock: TextIO) -> bool:
    """Waits a second for it: the server holds it for a moment when it looks whether a learner is alive."""
    give_up_at = time.monotonic() + 1.0
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > give_up_at:
                return False
            time.sleep(0.02)


def _cycle_parts(options: argparse.Namespace, endpoint: Endpoint) -> CycleParts:
    from learner.cycle import CycleOptions, CycleParts
    from learner.objectives.build import OBJECTIVES, ObjectiveOptions
    from learner.training.trainer import TrainingOptions
    from policies.chat_protocol import ChatProtocol
    from runtime.store.step_log import StepLog
    from tools.worlds import load_world

    log, world = (
        StepLog(options.state / "agent.db", read_only=True),
        load_world(options.world) if options.world else None,
    )
    training = TrainingOptions(seed=options.seed, **_given(options, _TRAINING))
    objectives = tuple(name for name in options.objectives.split(",") if name) or CycleOptions().objectives
    if unknown := set(objectives) - OBJECTIVES.keys():
        raise SystemExit(f"no objective is called {min(unknown)!r}; there are: {', '.join(OBJECTIVES)}")
    return CycleParts(
        endpoint=endpoint,
        log=log,
        learning_log=LearningLog(options.state / "agent.db"),
        protocol=ChatProtocol.load(options.model, options.response_template),
        world=world,
        experts=_experts(options, log, world),
        base=options.model,
        state=options.state,
        options=CycleOptions(
            objectives=objectives,
            num_samples=options.samples,
            gate_tasks=options.gate_tasks,
            canary_share=options.canary_share,
            training=training,
            objective=ObjectiveOptions(**_given(options, _OBJECTIVE)),
            device=options.device,
        ),
    )


def _given(options: argparse.Namespace, names: Sequence[tuple[str, Any, str]]) -> dict[str, Any]:
    """Those of these options that were given, as keyword arguments."""
    values = {name.replace("-", "_"): getattr(options, name.replace("-", "_")) for name, *_ in names}
    return {name: value for name, value in values.items() if value is not None}


def _experts(options: argparse.Namespace, log: object, world: object) -> list[Expert]:
    """Whoever may know what to do at the policy's own states; the first who does is believed."""
    from learner.data.experts import Corrections, ModelExpert, WorldExpert

    experts: list[Expert] = [Corrections(log)]  # type: ignore[arg-type]
    if world is not None:
        experts.append(WorldExpert(world))  # type: ignore[arg-type]
    if options.expert_url:
        key = os.environ.get("STEPAGENT_EXPERT_API_KEY", "none")
        experts.append(ModelExpert(AsyncOpenAI(base_url=options.expert_url, api_key=key), options.expert_model))
    return experts


# -------------------------------------------------------------------------------------------- demonstrations


async def _import(options: argparse.Namespace, endpoint: Endpoint) -> int:
    """Send what can be read, in batches, and say by its line what cannot. Exit code 1 where anything was refused."""
    from learner.importing.demonstrations import ImportedDemonstration, read_demonstrations

    num_refused = 0
    for path in options.files:
        sums: Counter[str] = Counter()
        batch: list[ImportedDemonstration] = []
        for read in tqdm(read_demonstrations(path), desc=str(path), unit=" records"):
            if isinstance(read, ImportedDemonstration):
                batch.append(read)
            else:
                _refused(path, read.line, read.reason, sums)
            if len(batch) == BATCH:
                await _send(path, batch, endpoint, sums)
                batch = []
        await _send(path, batch, endpoint, sums)
        print(f"{path}: {sums['imported']} imported, {sums['known']} known already, {sums['refused']} refused")
        num_refused += sums["refused"]
    return 1 if num_refused else 0


async def _send(path: Path, batch: Sequence[ImportedDemonstration], endpoint: Endpoint, sums: Counter[str]) -> None:
    """Send a batch, in halves where the server finds it too large."""
    if not batch:
        return
    try:
        answer = await endpoint.demonstrate([demonstration.to_wire() for demonstration in batch])
    except APIStatusError as error:
        if error.status_code != 413:
            raise
        if len(batch) == 1:
            return _refused(path, batch[0].provenance.line, "it is too large for the server", sums)
        await _send(path, batch[: len(batch) // 2], endpoint, sums)
        return await _send(path, batch[len(batch) // 2 :], endpoint, sums)
    sums.update(imported=answer["imported"], known=answer["already_known"])
    for refusal in answer["refused"]:
        _refused(path, batch[refusal["index"]].provenance.line, refusal["reason"], sums)


def _refused(path: Path, line: int, reason: str, sums: Counter[str]) -> None:
    tqdm.write(f"{path}{f' line {line}' if line else ''}: {reason}")  # line 0: the file as a whole
    sums["refused"] += 1


# ---------------------------------------------------------------------------------------------------- status


def _status(options: argparse.Namespace) -> int:
    database = options.state / "agent.db"
    if not database.exists():
        print(f"there is no {database}: start the server first, or name its --state", file=sys.stderr)
        return 1
    _show(LearningLog(database), 20)
    return 0


def _show(learning_log: LearningLog, limit: int) -> None:
    cycles = learning_log.cycles(limit)
    print(f"{len(cycles)} cycles" + (", newest first" if len(cycles) > 1 else ""))
    for status in cycles:
        seconds = status.created_at - status.started_at
        print(f"{status.cycle}  {status.stage}  {seconds:.0f} s  {status.message}")


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
