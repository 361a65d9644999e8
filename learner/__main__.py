"""python -m learner: run a cycle against a served agent, import demonstrations, show cycles, roll back."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from pathlib import Path

from openai import AsyncOpenAI, OpenAIError

from learner.endpoint import Endpoint
from learner.learning_log import LearningLog
from runtime.types import new_id


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m learner", description=(__doc__ or "").strip())
    parser.add_argument("command", nargs="?", choices=("once", "status", "rollback", "import"), default="status")
    parser.add_argument("files", nargs="*", type=Path, help="demonstration files to import")
    parser.add_argument("--once", action="store_true", help="run one cycle; the same as the command once")
    parser.add_argument(
        "--url", default=os.environ.get("STEPAGENT_URL", "http://127.0.0.1:8000/v1"), help="the endpoint"
    )
    parser.add_argument("--api-key", default=os.environ.get("STEPAGENT_API_KEY", "none"))
    parser.add_argument("--state", type=Path, default=Path("state"), help="the server's state folder")
    parser.add_argument("--model", type=Path, default=Path("policies/novice_model"), help="the base model's folder")
    parser.add_argument("--world", default="order_desk")
    parser.add_argument("--objectives", nargs="+", default=["sft"], choices=("sft", "implicit"))
    parser.add_argument("--gate-tasks", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    options.command = "once" if options.once else options.command
    return options


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    endpoint = Endpoint(AsyncOpenAI(base_url=options.url, api_key=options.api_key))
    try:
        match options.command:
            case "once":
                return asyncio.run(_once(options, endpoint))
            case "import":
                return asyncio.run(_import(options, endpoint))
            case "rollback":
                print(json.dumps(asyncio.run(endpoint.rollback("asked by python -m learner rollback"))))
                return 0
        return _status(options)
    except OpenAIError as error:
        print(f"{options.url} did not do it: {error}", file=sys.stderr)
        return 1


async def _once(options: argparse.Namespace, endpoint: Endpoint) -> int:
    from learner.cycle import CycleOptions, CycleParts, run_cycle
    from learner.learning_log import CycleStage
    from learner.trainer import TrainingOptions
    from runtime.step_log import StepLog
    from tools.worlds import load_world

    learning_log = LearningLog(options.state / "agent.db")
    for cycle in learning_log.fail_unfinished():
        print(f"cycle {cycle} was cut off and is marked as failed")
    parts = CycleParts(
        endpoint=endpoint,
        log=StepLog(options.state / "agent.db", read_only=True),
        learning_log=learning_log,
        world=load_world(options.world),
        base=options.model,
        adapters=options.state / "adapters",
        options=CycleOptions(
            objectives=tuple(options.objectives),
            gate_tasks=options.gate_tasks,
            training=TrainingOptions(seed=options.seed),
        ),
    )
    cycle = new_id("cycle")
    stage = await run_cycle(cycle, parts)
    _show(learning_log, 1)
    return 1 if stage is CycleStage.FAILED else 0


async def _import(options: argparse.Namespace, endpoint: Endpoint) -> int:
    from learner.demonstrations import import_file

    num_refused = 0
    for path in options.files:
        report = import_file(path)
        answer = await endpoint.demonstrate([demonstration.to_wire() for demonstration in report.imported])
        for refusal in report.refused:
            print(f"{path} line {refusal.line}: {refusal.reason}")
        for refusal in answer["refused"]:
            print(f"{path} demonstration {refusal['index'] + 1}: {refusal['reason']}")
        num_refused += len(report.refused) + len(answer["refused"])
        print(f"{path}: {answer['imported']} imported, {answer['already_known']} known already")
    return 1 if num_refused else 0


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
