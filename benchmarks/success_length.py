"""How long may an own success be to be an example? What one cycle of `sft_rft` teaches, by `max_success_length`.

    python -m benchmarks.success_length --world multihop_qa [--model FOLDER] [--demonstrations 16] [--seeds 1-3]

From one `sft` cycle and the own episodes after it a second cycle is trained for each limit, and once without own
successes. Printed is how unlikely each agent finds what the expert does at tasks of the validation split, in nats an
action: a finer measure than how many tasks succeed, and one that a real model allows on a CPU (`methods` takes its
time in trials). Differences are paired by demonstration, with their 95 % interval.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import torch

from benchmarks.figures import from_to, interval
from benchmarks.lockstep import load_policy
from benchmarks.method_runs import AXES, Scene, Stage
from benchmarks.methods import base_of
from benchmarks.recipes import OPTIONS, OWN_SUCCESSES
from learner.data.training_data import TrainingData, Trajectory
from learner.objectives.build import objective_of
from learner.objectives.objectives import action_sequence
from learner.options import TrainingOptions
from learner.training.trainer import Trainer

LIMITS = (1.0, 1.5, 1000.0)
"""In lengths of the longest demonstration; the last keeps every success."""


def trained(scene: Scene, data: TrainingData, limit: float, begin: Path | None, folder: Path, seed: int) -> Trainer:
    """An agent after one cycle on the data, kept in the folder."""
    options = TrainingOptions(
        lr=OWN_SUCCESSES.lr if scene.is_small else None,
        epochs=0,
        min_gradient_steps=scene.gradient_steps,
        trajectories_per_step=OWN_SUCCESSES.trajectories_per_step,
        seed=seed,
    )
    trainer = Trainer(scene.base, begin, options, scene.device)
    trainer.train(objective_of("sft_rft", data, replace(OPTIONS, max_success_length=limit)))
    trainer.network.save_pretrained(folder)
    return trainer


def unlikeliness(trainer: Trainer, experts: Sequence[Trajectory]) -> list[float]:
    """Of each demonstration, -log p of an action in nats, the mean over its actions."""
    sequences = [
        action_sequence(state.prompt, state.expert or (), (each.episode_id, state.id))
        for each in experts
        for state in each.states
    ]
    found = iter(-tokens.sum().item() for tokens in trainer.logprobs(sequences))
    return [fmean(next(found) for _ in each.states) for each in experts]


def compare_limits(stage: Stage, experts: Sequence[Trajectory]) -> None:
    """Print a line for each limit."""
    scene, folder = stage.scene, stage.folder
    shown = TrainingData(stage.demonstrations)
    first = trained(scene, shown, 1.0, None, folder / "first", 1000 * scene.seed)
    tasks = [*stage.demonstrated, *stage.others][: scene.num_own_episodes]
    network = load_policy(scene.base, folder / "first", scene.device)
    own = stage.rollouts.own_trajectories(network, tasks, torch.Generator().manual_seed(scene.seed), "own", ())
    longest = max(len(each.states) for each in stage.demonstrations)
    lengths = sorted(len(each.states) for each in own if each.outcome == 1.0)
    print(f"seed {scene.seed}: demonstrations of up to {longest} steps, own successes of {lengths}")
    print(f"  after the first cycle: {fmean(unlikeliness(first, experts)):.3f} nats an action")
    control = unlikeliness(
        trained(scene, shown, 1.0, folder / "first", folder / "control", 1000 * scene.seed + 1), experts
    )
    print(f"  no own success: {fmean(control):.3f}", flush=True)
    for limit in LIMITS:
        data = TrainingData(stage.demonstrations, tuple(own))
        agent = trained(scene, data, limit, folder / "first", folder / f"within-{limit}", 1000 * scene.seed + 1)
        found = unlikeliness(agent, experts)
        mean, half = interval([one - other for one, other in zip(found, control, strict=True)])
        num = sum(length <= limit * longest for length in lengths)
        print(f"  within {limit:g}, {num} successes: {fmean(found):.3f}, {mean:+.3f} ± {half:.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--world", default="multihop_qa", help="which (default multihop_qa)")
    parser.add_argument("--model", type=Path, help="a real model's folder, instead of the world's small student")
    parser.add_argument("--demonstrations", type=int, default=16, help="how many (default 16)")
    parser.add_argument("--seeds", type=from_to, default="1-3", help="from-to (default 1-3)")
    parser.add_argument("--tasks", type=int, default=40, help="whose expert is asked for his actions (default 40)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    student, base = (options.model.name, options.model) if options.model else base_of(options.world)
    for seed in options.seeds:
        scene = Scene(
            options.world, student, base, seed, options.demonstrations, AXES[None],
            split="validation", num_tasks=options.tasks,
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            stage = Stage(scene, Path(folder))
            compare_limits(stage, stage.rollouts.demonstrations(stage.tried))


if __name__ == "__main__":
    main()
