"""What one `sft` makes of a real model in each world: single steps and whole tasks, before and after.

    python -m benchmarks.real_in_worlds --model FOLDER [--worlds babyai,alfworld] [--out state/real-in-worlds.json]

Of each world some of the expert's training tasks are learned, with the world's own instructions and the tools that
experts call. On held-out tasks two things are counted. Steps: at how many of the expert's states the greedy action is
the expert's, token by token, which one packed pass tells and no sampling; a call in other words or another order counts
as wrong. Tasks: how many the greedy policy brings to outcome 1 in the world itself. In `agentdojo_attacks` that is not
to do what was planted, so that a policy which can do nothing is right; what it did of the users' tasks is told beside.

Each world is measured in a process of its own; finished ones are rows of a file and not measured again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.rollouts import Attempt, Rollouts, num_solved
from benchmarks.transcripts import expert_conversations, first_steps, interval, states_of, tools_of
from learner.data.training_data import State, TrainingData, Trajectory
from learner.objectives.build import objective_of
from learner.options import ObjectiveOptions, TrainingOptions
from learner.packing.prefix_tree import Pack, ScoredSequence, Span, pack_sequences
from learner.packing.scoring import hidden_states, to_batch
from learner.packing.tree_attention import TREE_ATTENTION
from learner.training.trainer import Trainer
from policies.chat.chat_protocol import ChatProtocol, message_action
from policies.novice.build import wilson_interval
from tools.worlds import WORLDS, load_world
from tools.worlds.world import Task

MAX_STEPS = 20
"""Of a whole task: greedy policies go round in circles."""
TOKEN_BUDGET = 4096
"""Of a pack that is read; a longer sequence goes alone."""


@dataclass(frozen=True, slots=True)
class Row:
    """One world, one `sft`."""

    world: str
    model: str
    num_demonstrations: int
    num_gradient_steps: int
    trajectories_per_step: int
    num_states: int
    """Of the held-out transcripts together."""
    longest_prompt: int
    """Tokens."""
    before: list[float]
    """Of each held-out transcript: the share of its states at which the greedy action is the expert's."""
    after: list[float]
    outcomes_before: list[float]
    """Of each held-out task that was tried."""
    outcomes_after: list[float]
    num_solved: tuple[int, int] | None
    """In `agentdojo_attacks`: at how many of them the user's task was done, before and after."""
    training_s: float


def measure(name: str, options: argparse.Namespace) -> Row:
    world, protocol = load_world(name), ChatProtocol.load(options.model)
    learned, held_out = (
        [first_steps(each, options.steps) for each in expert_conversations(world, split, number)]
        for split, number in (("train", options.demonstrations), ("heldout", options.held_out))
    )
    tools = tools_of(world, [*learned, *held_out])
    shown, expected = ([in_tokens(protocol, each, tools) for each in side] for side in (learned, held_out))
    rollouts = Rollouts(world, protocol, tools)
    rollouts.max_steps = min(rollouts.max_steps, MAX_STEPS)
    tasks = [world.task("heldout", index) for index in range(options.tasks)]
    trainer = Trainer(options.model, None, training_options(options))
    before, tried_before = agreements(trainer.network, expected), tried(rollouts, trainer.network, tasks)
    objective = objective_of("sft", TrainingData(tuple(shown)), ObjectiveOptions(), None)
    began = time.monotonic()
    with tqdm(desc=f"{name}, gradient steps", unit="step") as bar:
        report = trainer.train(objective, lambda done, total: bar.update())
    training_s = time.monotonic() - began
    after, tried_after = agreements(trainer.network, expected), tried(rollouts, trainer.network, tasks)
    states = [state for each in expected for state in each.states]
    return Row(
        world=name,
        model=options.model.name,
        num_demonstrations=len(shown),
        num_gradient_steps=report.num_gradient_steps,
        trajectories_per_step=options.trajectories_per_step,
        num_states=len(states),
        longest_prompt=max(len(state.prompt) for state in states),
        before=before,
        after=after,
        outcomes_before=[attempt.outcome for attempt in tried_before],
        outcomes_after=[attempt.outcome for attempt in tried_after],
        num_solved=(num_solved(tried_before), num_solved(tried_after)) if name == "agentdojo_attacks" else None,
        training_s=training_s,
    )


def training_options(options: argparse.Namespace) -> TrainingOptions:
    return TrainingOptions(
        lr=options.lr,
        epochs=1,
        min_gradient_steps=options.gradient_steps,
        trajectories_per_step=options.trajectories_per_step,
    )


def tried(rollouts: Rollouts, network: Any, tasks: Sequence[Task]) -> list[Attempt]:
    """Every task once, greedily. The trainer's network, which has learned on packs, is asked as it is: merging its
    adapter in 16 bits would round what it learned."""
    if not tasks:
        return []
    network.set_attn_implementation("sdpa")
    try:
        return rollouts.attempts(network, tasks, [0.0] * len(tasks), torch.Generator())
    finally:
        network.set_attn_implementation(TREE_ATTENTION)


def in_tokens(protocol: ChatProtocol, conversation: list[dict[str, Any]], tools: Sequence[Any]) -> Trajectory:
    """An expert's conversation, as the model would have to write it."""
    name, states = json.dumps(conversation), list[State]()
    for number, (before, message) in enumerate(states_of(conversation)):
        prompt, expert = protocol.completion_of(before, message_action(message), tools)
        states.append(State(f"{name}/{number}", prompt, expert, ()))
    return Trajectory(name, tuple(states), outcome=1.0, is_demonstration=True)


def agreements(network: Any, trajectories: Sequence[Trajectory]) -> list[float]:
    """Of each: the share of its states at which the greedy action is the expert's."""
    states = [(place, state) for place, each in enumerate(trajectories) for state in each.states]
    sequences = [expert_sequence(state, number) for number, (_, state) in enumerate(states)]
    budget = max(TOKEN_BUDGET, *(len(sequence.token_ids) for sequence in sequences))
    is_right = [False] * len(states)
    for pack in tqdm(pack_sequences(sequences, budget), desc="held-out states", unit="pack"):
        for sequence, agrees in greedily_right(network, pack):
            is_right[sequence] = agrees
    return [
        fmean(right for (at, _), right in zip(states, is_right, strict=True) if at == place)
        for place in range(len(trajectories))
    ]


def expert_sequence(state: State, number: int) -> ScoredSequence:
    assert state.expert is not None
    span = Span(len(state.prompt), len(state.prompt) + len(state.expert))
    return ScoredSequence(state.prompt + state.expert, (span,), owner=number)


@torch.no_grad()
def greedily_right(network: Any, pack: Pack) -> list[tuple[int, bool]]:
    """Of each sequence of the pack whether every scored token is the likeliest there."""
    batch = to_batch(pack, network.device)
    logits = network.get_output_embeddings()(hidden_states(network, batch)[batch.pair_positions])
    is_likeliest = (logits.argmax(-1) == batch.pair_targets)[batch.pair_of_token]
    return [
        (sequence, bool(is_likeliest[batch.sequence_of_token == at].all()))
        for at, sequence in enumerate(batch.sequences)
    ]


# -------------------------------------------------------------------------------------------------- report


def table(rows: Sequence[Row]) -> str:
    lines = [
        "| world | learned | longest prompt | states | steps before | after one `sft` | gain | "
        "tasks before | after one `sft` | training, s |",
        "|" + "---|" * 10,
    ]
    for row in rows:
        gain = interval([after - before for before, after in zip(row.before, row.after, strict=True)])
        steps = [f"{fmean(side):.1%}" for side in (row.before, row.after)]
        told = f"{100 * gain[0]:+.1f} ({100 * gain[1]:+.1f} to {100 * gain[2]:+.1f})"
        states = f"{row.num_states} in {len(row.before)}"
        tasks = [success(side) for side in (row.outcomes_before, row.outcomes_after)]
        cells = [row.world, row.num_demonstrations, row.longest_prompt, states, *steps, told, *tasks]
        lines.append(f"| {' | '.join(map(str, cells))} | {row.training_s:.0f} |")
    lines += [
        f"\n{row.world}: of the users' tasks {row.num_solved[0]} were done before, {row.num_solved[1]} after."
        for row in rows
        if row.num_solved
    ]
    return "\n".join(lines)


def success(outcomes: Sequence[float]) -> str:
    """Of whole tasks, with the 95 % interval."""
    if not outcomes:
        return "not tried"
    num_right = sum(outcome == 1.0 for outcome in outcomes)
    low, high = wilson_interval(num_right, len(outcomes))
    return f"{num_right} of {len(outcomes)} ({low:.0%} to {high:.0%})"


# -------------------------------------------------------------------------------------------------- main


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="a network's folder (python -m policies.fetch)")
    parser.add_argument("--worlds", default="", help="names by commas; default: all that need no file of yours")
    parser.add_argument("--demonstrations", type=int, default=32, help="that are learned")
    parser.add_argument("--held-out", type=int, default=16, help="transcripts of held-out tasks that are read")
    parser.add_argument("--steps", type=int, default=8, help="of each transcript, at most")
    parser.add_argument("--tasks", type=int, default=16, help="held-out tasks that are tried as a whole")
    parser.add_argument("--gradient-steps", type=int, default=48)
    parser.add_argument("--trajectories-per-step", type=int, default=2)
    parser.add_argument("--lr", type=float, default=None, help="peak learning rate; default: by the network's width")
    parser.add_argument("--out", type=Path, default=Path("state/real-in-worlds.json"))
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    names = options.worlds.split(",") if options.worlds else [n for n, each in WORLDS.items() if not each.takes_file]
    if options.one:
        add(options.out, measure(names[0], options))
        return
    for name in names:
        if name not in {row.world for row in read(options.out)}:
            command = [sys.executable, "-m", "benchmarks.real_in_worlds", *sys.argv[1:], "--one", "--worlds", name]
            subprocess.run(command, check=False)
    print(table(read(options.out)))


def read(path: Path) -> list[Row]:
    return [Row(**row) for row in json.loads(path.read_text())] if path.exists() else []


def add(path: Path, row: Row) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([asdict(each) for each in (*read(path), row)], indent=1))


if __name__ == "__main__":
    main()
