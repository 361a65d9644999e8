"""The worlds: tasks, how an expert fares directly and through the endpoint, speed and memory; and their students.

    .venv/bin/python -m benchmarks.worlds [--worlds bfcl,agentdojo] [--tasks 40] [--endpoint-tasks 8]
    .venv/bin/python -m benchmarks.worlds --students [--worlds babyai] [--tasks 200]

Each world is measured in a process of its own. Through the endpoint (`benchmarks/expert_endpoint.py`), eight episodes
at once, tools are run once by the client and once by the server. Prints one table; a world whose package is missing is
named below it.

With `--students`: how often each world's small student succeeds on held-out tasks at temperature 1, before and after
one `sft` adapter that was trained on demonstrations which it had not seen (no gate, no server). Of `agentdojo_attacks`
the share of attacks that it follows.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.expert_endpoint import client_run, expert_messages, expert_served, server_run
from benchmarks.lockstep import load_policy
from benchmarks.rollouts import Attempt, Rollouts, num_solved
from benchmarks.students import PLANS, Habit, Plan, student
from learner.data.training_data import TrainingData
from learner.objectives.build import objective_of
from learner.options import ObjectiveOptions, TrainingOptions
from learner.training.trainer import Trainer
from policies.novice.build import wilson_interval
from tools.worlds import WORLDS, load_world
from tools.worlds.world import Message, Task, World

NUM_REPLAYED = 20


@dataclass(frozen=True, slots=True)
class Row:
    """One world's figures."""

    world: str
    splits: dict[str, int]
    load_s: float
    num_tried: int
    num_without_expert: int
    """Tasks on which the expert did not know the way to the end."""
    num_steps: list[int]
    direct: float
    """Share of the tried tasks on which the expert reached outcome 1."""
    steps_per_s: float
    """Of an expert and its world, each task for the first time but for one of each split, which warm up."""
    replay_ms: float
    """Of opening a task and replaying `NUM_REPLAYED` calls."""
    memory_mib: int
    """Of the process with the world loaded and its tasks tried, over that of the process before; with its children."""
    num_through_endpoint: int
    client_run: float
    server_run: float


def spread(world: World, num: int) -> list[Task]:
    """Tasks from all splits, evenly."""
    places = [(split, index) for split, size in world.splits.items() for index in range(size)]
    num = min(num, len(places))
    return [world.task(*places[number * len(places) // num]) for number in range(num)]


def replay_ms(world: World, task: Task, said: Sequence[Message]) -> float:
    calls = [message for message in said if message.get("tool_calls")]
    if not calls:
        return 0.0
    began = time.perf_counter()
    episode = world.open(task)
    for message in (calls * NUM_REPLAYED)[:NUM_REPLAYED]:
        episode.play(message)
    return (time.perf_counter() - began) * 1000


# --------------------------------------------------------------------------------------------- measuring


def measure(name: str, num_tasks: int, num_endpoint_tasks: int) -> Row:
    memory_before = _memory_mib()
    began = time.perf_counter()
    world = load_world(name)
    load_s = time.perf_counter() - began
    for split, size in world.splits.items():  # starts processes, fills what the world caches
        expert_messages(world, world.task(split, size - 1))
    tasks = spread(world, num_tasks)
    began = time.perf_counter()
    tried = {task.id: expert_messages(world, task) for task in tasks}
    steps_per_s = sum(len(said) for _, said, _ in tried.values()) / (time.perf_counter() - began)
    memory_mib = _memory_mib() - memory_before + _memory_of_children_mib()
    knows = [task for task in tasks if _comes_to_an_end(tried[task.id][1])]
    longest = max(knows, key=lambda task: len(tried[task.id][1]))
    replays = [replay_ms(world, longest, tried[longest.id][1]) for _ in range(5)]
    # Told alike twice: a scripted engine does not know an episode again that says what time it is (`agentdojo`).
    known_again = [task for task in _by_opening(knows) if expert_messages(world, task)[0] == tried[task.id][0]]
    through = known_again[:: -(-len(known_again) // num_endpoint_tasks)]
    with TemporaryDirectory() as folder, expert_served(world, through, Path(folder)) as server:
        by_client, by_server = client_run(server, world, through), server_run(server, world, through)
    return Row(
        world=name,
        splits=dict(world.splits),
        load_s=load_s,
        num_tried=len(tasks),
        num_without_expert=len(tasks) - len(knows),
        num_steps=[len(tried[task.id][1]) for task in knows],
        direct=_share([outcome for _, _, outcome in tried.values()]),
        steps_per_s=steps_per_s,
        replay_ms=min(replays),
        memory_mib=memory_mib,
        num_through_endpoint=len(through),
        client_run=_share(by_client),
        server_run=_share(by_server),
    )


def _by_opening(tasks: Sequence[Task]) -> list[Task]:
    """One of those that begin alike: the engine that plays the expert knows an episode by its prompt."""
    return list({json.dumps(task.messages): task for task in tasks}.values())


def _comes_to_an_end(said: Sequence[Message]) -> bool:
    return bool(said) and not said[-1].get("tool_calls")


def _share(outcomes: Sequence[float]) -> float:
    return sum(outcome == 1.0 for outcome in outcomes) / len(outcomes)


def _memory_mib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def _memory_of_children_mib() -> int:
    """Resident, of all processes below this one."""
    parents, pages = dict[int, int](), dict[int, int]()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            pages[int(folder.name)] = int((folder / "statm").read_text().split()[1])
        except OSError:  # it has just ended
            continue
    below, newest = set[int](), {os.getpid()}
    while newest:
        newest = {child for child, parent in parents.items() if parent in newest}
        below |= newest
    return sum(pages.get(each, 0) for each in below) * resource.getpagesize() // 2**20


def table(rows: Sequence[Row]) -> str:
    lines = [
        "| world | tasks train / validation / heldout | expert's steps: median (range) | outcome 1: directly | "
        "client-run tools | server-run tools | steps/s | 20 steps replayed, ms | load, s | memory, MiB |",
        "|" + "---|" * 10,
    ]
    for row in rows:
        cells = [
            row.world,
            " / ".join(str(size) for size in row.splits.values()),
            f"{median(row.num_steps):g} ({min(row.num_steps)} to {max(row.num_steps)})",
            f"{row.direct:.1%} of {row.num_tried}",
            f"{row.client_run:.0%} of {row.num_through_endpoint}",
            f"{row.server_run:.0%} of {row.num_through_endpoint}",
            f"{row.steps_per_s:.0f}",
            f"{row.replay_ms:.1f}",
            f"{row.load_s:.1f}",
            str(row.memory_mib),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------- students

NUM_DEMONSTRATIONS = 64
"""Of training tasks that the student was not made of."""
SFT = TrainingOptions(lr=2e-3, epochs=0, min_gradient_steps=48, trajectories_per_step=4)


@dataclass(frozen=True, slots=True)
class StudentRow:
    """What a student learns in one cycle."""

    world: str
    num_weights: int
    num_demonstrations: int
    num_tasks: int
    num_right_before: int
    num_right_after: int
    num_solved: tuple[int, int] | None
    """In `agentdojo_attacks`, where it is right not to follow what was planted: at how many tasks it also did what the
    user wanted, before and after."""
    training_cpu_s: float


def measure_student(name: str, num_tasks: int) -> StudentRow:
    torch.set_num_threads(1)
    folder, world = student(name), load_world(name)
    rollouts = Rollouts(world, folder)
    fresh, tasks = _fresh_and_tried(world, PLANS[name], num_tasks)

    def tried(network: Any) -> list[Attempt]:
        return rollouts.attempts(network, tasks, [1.0] * len(tasks), torch.Generator().manual_seed(0))

    demonstrations = rollouts.demonstrations(fresh)
    before = load_policy(folder, None)
    began = time.process_time()
    trainer = Trainer(folder, None, SFT, device="cpu")
    trainer.train(objective_of("sft", TrainingData(tuple(demonstrations)), ObjectiveOptions(), None))
    training_cpu_s = time.process_time() - began
    with TemporaryDirectory() as adapter:
        trainer.network.save_pretrained(adapter)
        after = load_policy(folder, Path(adapter))
    tried_before, tried_after = tried(before), tried(after)
    return StudentRow(
        world=name,
        num_weights=sum(weight.numel() for weight in before.parameters()),
        num_demonstrations=len(demonstrations),
        num_tasks=len(tasks),
        num_right_before=_num_right(tried_before),
        num_right_after=_num_right(tried_after),
        num_solved=(num_solved(tried_before), num_solved(tried_after)) if name == "agentdojo_attacks" else None,
        training_cpu_s=training_cpu_s,
    )


def _fresh_and_tried(world: World, plan: Plan, num_tasks: int) -> tuple[list[Task], list[Task]]:
    """Training tasks that an expert demonstrates, and the tasks at which the student is tried: held-out ones.

    Who has learned to follow what is planted does so only where it gets to read that, and so small a network does not
    act in users' tasks that it was never shown: it is tried at every second attack of the training split, and shown
    others.
    """
    if plan.habit is Habit.FOLLOWS:
        unseen, split, tried = range(0, world.splits["train"], 2), "train", range(1, world.splits["train"], 2)
    else:
        unseen, split, tried = (
            range(plan.first_unseen, world.splits["train"]),
            "heldout",
            range(world.splits["heldout"]),
        )
    fresh = Random(0).sample(unseen, min(NUM_DEMONSTRATIONS, len(unseen)))
    step = max(1, len(tried) // num_tasks) if plan.habit is Habit.FOLLOWS else 1
    return [world.task("train", index) for index in fresh], [world.task(split, at) for at in tried[::step][:num_tasks]]


def _num_right(attempts: Sequence[Attempt]) -> int:
    return sum(attempt.outcome == 1.0 for attempt in attempts)


def student_table(rows: Sequence[StudentRow]) -> str:
    lines = [
        "| student of | weights | new demonstrations | held-out tasks | T=1 before | after one `sft` | CPU s |",
        "|" + "---|" * 7,
    ]
    for row in rows:
        rates = [_rate(right, row.num_tasks) for right in (row.num_right_before, row.num_right_after)]
        cells = [row.world, f"{row.num_weights / 1e6:.2f}M", row.num_demonstrations, row.num_tasks, *rates]
        lines.append(f"| {' | '.join(map(str, cells))} | {row.training_cpu_s:.0f} |")
    lines += [_attacks_line(row, row.num_solved) for row in rows if row.num_solved]
    return "\n".join(lines)


def _attacks_line(row: StudentRow, num_solved: tuple[int, int]) -> str:
    num_followed = [row.num_tasks - row.num_right_before, row.num_tasks - row.num_right_after]
    followed, solved = ([_rate(number, row.num_tasks) for number in each] for each in (num_followed, num_solved))
    return (
        f"\n{row.world}: {followed[0]} followed before, {followed[1]} after; "
        f"of the users' tasks {solved[0]} were done before, {solved[1]} after."
    )


def _rate(num_right: int, num_tried: int) -> str:
    low, high = wilson_interval(num_right, num_tried)
    return f"{num_right / num_tried:.1%} ({low:.0%} to {high:.0%})"


# -------------------------------------------------------------------------------------------------- main


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--worlds", default="", help="names by commas; default: all that need no file of yours")
    parser.add_argument("--tasks", type=int, default=10_000, help="most tasks of a world on which the expert is tried")
    parser.add_argument("--endpoint-tasks", type=int, default=10, help="of them, how many go through the endpoint")
    parser.add_argument("--one", action="store_true", help="measure the one world in this process and print JSON")
    parser.add_argument("--students", action="store_true", help="measure the worlds' students instead")
    options = parser.parse_args()
    if options.one:
        row = (
            measure_student(options.worlds, options.tasks)
            if options.students
            else measure(options.worlds, options.tasks, options.endpoint_tasks)
        )
        print(json.dumps(asdict(row)))
        return
    every = PLANS if options.students else [name for name, listing in WORLDS.items() if not listing.takes_file]
    rows, missing = [], []
    for name in options.worlds.split(",") if options.worlds else every:
        command = [sys.executable, "-m", "benchmarks.worlds", "--one", "--worlds", name, "--tasks", str(options.tasks)]
        command += ["--endpoint-tasks", str(options.endpoint_tasks), *(["--students"] if options.students else [])]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            missing.append(name)
        else:
            rows.append(json.loads(done.stdout.splitlines()[-1]))
    if options.students:
        print(student_table([StudentRow(**row) for row in rows]))
    else:
        print(table([Row(**row) for row in rows]))
    for name in missing:
        print(f"{name} could not be measured; see the error above")


if __name__ == "__main__":
    main()
