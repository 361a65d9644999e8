"""What one `sft` makes of a real model in each world: how much of what experts do it does, before and after.

    python -m benchmarks.real_in_worlds --model FOLDER [--worlds bfcl,alfworld] [--out state/real-in-worlds.json]

Of each world some of the expert's training tasks are learned, the first steps of each, with the world's own
instructions and the tools that experts call; and on held-out tasks it is counted at how many of the expert's states the
greedy action is the expert's, token by token: all tokens are told by one packed pass, nothing is sampled. So a call in
other words or another order counts as wrong, and whole tasks are not tried; `benchmarks.demo_real` does both, and takes
an hour for it. Each world is measured in a process of its own; finished ones are rows of a file and not measured again.
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

from benchmarks.transcripts import expert_conversations, first_steps, interval, states_of, tools_of
from learner.data.training_data import State, TrainingData, Trajectory
from learner.objectives.build import objective_of
from learner.options import ObjectiveOptions, TrainingOptions
from learner.packing.prefix_tree import Pack, ScoredSequence, Span, pack_sequences
from learner.packing.scoring import hidden_states, to_batch
from learner.training.trainer import Trainer
from policies.chat.chat_protocol import ChatProtocol, message_action
from tools.worlds import WORLDS, load_world

SFT = TrainingOptions(epochs=2, trajectories_per_step=4, min_gradient_steps=16)
TOKEN_BUDGET = 4096
"""Of a pack that is read; a longer sequence goes alone."""


@dataclass(frozen=True, slots=True)
class Row:
    """One world, one `sft`."""

    world: str
    model: str
    num_demonstrations: int
    num_gradient_steps: int
    num_states: int
    """Of the held-out transcripts together."""
    longest_prompt: int
    """Tokens."""
    before: list[float]
    """Of each held-out transcript: the share of its states at which the greedy action is the expert's."""
    after: list[float]
    training_s: float


def measure(name: str, options: argparse.Namespace) -> Row:
    world, protocol = load_world(name), ChatProtocol.load(options.model)
    learned, held_out = (
        [first_steps(each, options.steps) for each in expert_conversations(world, split, number)]
        for split, number in (("train", options.demonstrations), ("heldout", options.held_out))
    )
    tools = tools_of(world, [*learned, *held_out])
    shown, tried = ([in_tokens(protocol, each, tools) for each in side] for side in (learned, held_out))
    trainer = Trainer(options.model, None, SFT)
    before = agreements(trainer.network, tried)  # a fresh adapter changes nothing
    objective = objective_of("sft", TrainingData(tuple(shown)), ObjectiveOptions(), None)
    began = time.monotonic()
    with tqdm(desc=f"{name}, gradient steps", unit="step") as bar:
        report = trainer.train(objective, lambda done, total: bar.update())
    training_s = time.monotonic() - began
    states = [state for each in tried for state in each.states]
    return Row(
        world=name,
        model=options.model.name,
        num_demonstrations=len(shown),
        num_gradient_steps=report.num_gradient_steps,
        num_states=len(states),
        longest_prompt=max(len(state.prompt) for state in states),
        before=before,
        after=agreements(trainer.network, tried),
        training_s=training_s,
    )


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
        "| world | demonstrations | longest prompt | held-out states | before | after one `sft` | gain | training, s |",
        "|" + "---|" * 8,
    ]
    for row in rows:
        gain = interval([after - before for before, after in zip(row.before, row.after, strict=True)])
        rates = [f"{fmean(side):.1%}" for side in (row.before, row.after)]
        told = f"{100 * gain[0]:+.1f} ({100 * gain[1]:+.1f} to {100 * gain[2]:+.1f})"
        states = f"{row.num_states} in {len(row.before)}"
        cells = [row.world, row.num_demonstrations, row.longest_prompt, states, *rates, told, f"{row.training_s:.0f}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


# -------------------------------------------------------------------------------------------------- main


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="a network's folder (python -m policies.fetch)")
    parser.add_argument("--worlds", default="", help="names by commas; default: all that need no file of yours")
    parser.add_argument("--demonstrations", type=int, default=32, help="that are learned")
    parser.add_argument("--held-out", type=int, default=16, help="transcripts of held-out tasks that are read")
    parser.add_argument("--steps", type=int, default=3, help="of each transcript, at most")
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
