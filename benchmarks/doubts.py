"""Noisy demonstrations found: mistakes are put into an expert's demonstrations, and who finds them is counted.

    python -m benchmarks.doubts [--world order_desk] [--demonstrations 16] [--noise 0.1,0.25] [--seeds 3]

A mistake is a call that is legal and wrong: that of the expert at another task, at the same number of steps. The world
lives it, and the expert goes on from where it led; a demonstration may so be mended or lost. Found is what

- `cross-fit` networks do not expect (`learner/training/cross_fit.py`): three, each trained without a third;
- `peers` contradict, where every task was demonstrated three times, by experts who err independently;
- `world` contradicts: the order desk's own expert, asked at every step. It made them, and finds what it did not choose.

Precision: of the listed steps, those that are mistakes. Recall: of the mistakes, those that are listed.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean

import torch
from transformers.utils import logging as transformers_logging

from benchmarks.best_of import markdown, student_of
from benchmarks.rollouts import Rollouts
from learner.data.comparison import compare
from learner.data.training_data import State, Trajectory
from learner.options import TrainingOptions
from learner.training.cross_fit import surprises
from policies.chat.chat_protocol import action_message, message_action
from policies.types import ToolCalls
from tools.worlds import load_world
from tools.worlds.world import Task

NUM_PEERS = 3


@dataclass(frozen=True, slots=True)
class Noisy:
    """A demonstration, and which of its steps are mistakes."""

    trajectory: Trajectory
    mistakes: frozenset[str]
    contradicted: frozenset[str]
    """Steps that the world's expert would not have taken."""


def noisy(rollouts: Rollouts, task: Task, other: Task, noise: float, name: str, draw: random.Random) -> Noisy:
    """A demonstration of the task; each step is with this probability what the other task's expert does there."""
    world, protocol = rollouts.world, rollouts.protocol
    episode, distraction = world.open(task), world.open(other)
    prompt, states = protocol.render(task.messages), list[State]()
    messages = list(task.messages)
    mistakes, contradicted = set[str](), set[str]()
    for number in range(rollouts.max_steps):
        right = episode.expert_action()
        if right is None:
            break
        wrong = distraction.expert_action()
        if wrong is not None:
            distraction.play(wrong)
        said, state_id = right, f"{name}/{number}"
        is_call = wrong is not None and isinstance(message_action(wrong), ToolCalls)
        if is_call and isinstance(message_action(right), ToolCalls) and draw.random() < noise:
            assert wrong is not None
            if not compare(message_action(wrong), message_action(right), episode.same_effect).agrees:
                said = wrong
                mistakes.add(state_id)
        if not compare(message_action(said), message_action(right), episode.same_effect).agrees:
            contradicted.add(state_id)
        _, written = protocol.completion_of(messages, message_action(said))
        states.append(State(state_id, prompt, written, ()))
        told = episode.play(action_message(message_action(said)))
        known, messages = (
            [*messages, action_message(message_action(said))],
            [*messages, action_message(message_action(said)), *told],
        )
        if not told:
            break
        prompt = protocol.extend(prompt + written, known, told)
    outcome = episode.outcome()
    return Noisy(Trajectory(name, tuple(states), task.id, outcome, True), frozenset(mistakes), frozenset(contradicted))


def demonstrated(rollouts: Rollouts, num_tasks: int, times: int, noise: float, seed: int) -> list[Noisy]:
    draw, world = random.Random(seed), rollouts.world
    tasks = [world.task("train", 1000 * seed % 5000 + number) for number in range(num_tasks + 1)]
    return [
        noisy(rollouts, task, other, noise, f"{task.id}/{time}", draw)
        for task, other in pairwise(tasks)
        for time in range(times)
    ]


def by_networks(demonstrations: Sequence[Noisy], base: Path, seed: int) -> set[str]:
    groups = {each.trajectory.episode_id: str(each.trajectory.task) for each in demonstrations}
    training = TrainingOptions(seed=seed)
    found = surprises([each.trajectory for each in demonstrations], groups, base, training, device="cpu")
    return {each.step_id for each in found if each.is_doubted}


def by_peers(demonstrations: Sequence[Noisy]) -> set[str]:
    """As `learner.data.doubts` does it: at one state, what fewer than half of the others agree with."""
    at_state: dict[tuple[int, ...], list[State]] = {}
    for each in demonstrations:
        for state in each.trajectory.states:
            at_state.setdefault(state.prompt, []).append(state)
    found = set[str]()
    for group in at_state.values():
        for state in group:
            against = sum(other.expert != state.expert for other in group)
            if 2 * against > len(group) - 1:
                found.add(state.id)
    return found


def judged(found: set[str], demonstrations: Sequence[Noisy]) -> tuple[int, int, int]:
    """(mistakes that are listed, listed steps, mistakes)"""
    mistakes = {step for each in demonstrations for step in each.mistakes}
    return len(found & mistakes), len(found), len(mistakes)


def row(name: str, noise: float, counts: Sequence[tuple[int, int, int]]) -> list[str]:
    hits, listed, mistakes = (sum(each) for each in zip(*counts, strict=True))
    precision = f"{hits / listed:.2f}" if listed else "-"
    return [name, f"{noise:g}", str(mistakes), str(listed), precision, f"{hits / mistakes:.2f}" if mistakes else "-"]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--world", default="order_desk")
    parser.add_argument("--demonstrations", type=int, default=16, help="tasks (default 16)")
    parser.add_argument("--noise", default="0.1,0.25", help="probability of a mistake at a step (default 0.1,0.25)")
    parser.add_argument("--seeds", type=int, default=3, help="how many (default 3)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    name, base = student_of(options.world)
    rollouts = Rollouts(load_world(options.world), base)
    rows = [["found by", "noise", "mistakes", "listed", "precision", "recall"]]
    for noise in map(float, options.noise.split(",")):
        counts: dict[str, list[tuple[int, int, int]]] = {"cross-fit": [], f"peers ({NUM_PEERS})": [], "world": []}
        lost = []
        for seed in range(1, options.seeds + 1):
            once = demonstrated(rollouts, options.demonstrations, 1, noise, seed)
            often = demonstrated(rollouts, options.demonstrations, NUM_PEERS, noise, seed)
            lost.append(fmean(each.trajectory.outcome != 1.0 for each in once))
            counts["cross-fit"].append(judged(by_networks(once, base, seed), once))
            counts[f"peers ({NUM_PEERS})"].append(judged(by_peers(often), often))
            counts["world"].append(judged({step for each in once for step in each.contradicted}, once))
        rows += [row(by, noise, found) for by, found in counts.items()]
        print(f"noise {noise:g}: {fmean(lost):.0%} of the demonstrations are lost by their mistakes")
    print(f"\n{options.world}, {name}, {options.demonstrations} demonstrated tasks, {options.seeds} seeds\n")
    print(markdown(rows))


if __name__ == "__main__":
    main()
