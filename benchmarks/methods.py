"""Which objective makes the best agent: each trains the same novice on the same demonstrations, equally long.

    python -m benchmarks.methods [--methods 'sft;implicit'] [--demonstrations 8,24] [--seeds 5]
    python -m benchmarks.methods --tune sft

A run is one method, seed and number of demonstrations: three cycles at the order desk, each from the adapter of the
one before (no gate: a worse adapter goes on too), its success measured after each. All methods have the same
demonstrations and gradient steps. What else each takes, the table says: samples of the policy at the demonstrations'
states, own episodes and their outcomes, experts' answers at own states; `inverse` trains its discriminator besides.
Seconds are CPU seconds of one thread, measuring left out.

Settings are tuned on validation tasks with seeds of their own, nine for each objective (`--tune`), and reported on
held-out tasks. Finished runs are kept in a file and not run again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path
from random import Random
from statistics import fmean, stdev
from typing import Any

import torch
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from benchmarks.desk_rollouts import WORLD, Desk, load_policy
from learner.data.training_data import TrainingData, Trajectory
from learner.objectives.build import NothingToLearn, objective_of
from learner.options import ObjectiveOptions, TrainingOptions
from learner.training.discriminator import DiscriminatorOptions, discriminate
from learner.training.trainer import Trainer
from policies.adapters.base_network import read_base_network
from policies.chat.chat_protocol import ChatProtocol
from policies.novice.build import NOVICE_PATH
from tools.worlds.world import Task

NUM_CYCLES = 3
GRADIENT_STEPS = 24
"""Of a cycle, for every method."""
NUM_SAMPLES = 4
"""Of the policy at each state of a demonstration, where a method looks at them."""
NUM_OWN_EPISODES = 48
"""Of a cycle, where a method learns from them: one at each demonstrated task, the others at tasks never seen before."""
DISCRIMINATOR_LR = 2e-3
TUNING_SEEDS = (101, 102, 103)
TUNING_DEMONSTRATIONS = 8
TUNING_CYCLES = 2

# ---------------------------------------------------------------------------------------------- methods


OBJECTIVE_OPTIONS = ObjectiveOptions(
    beta=0.3,
    anchor_weight=1.0,
    kl_weight=0.02,
    clip_low=0.2,
    clip_high=0.28,
    own_states=False,
    informative_only=False,
    max_versions_old=2,
)
"""What tuning starts from; written out, so that the runs do not change with the learner's defaults."""


class Answers(StrEnum):
    """At which own episodes an expert answers, in every state; as many a cycle as there are demonstrations."""

    NONE = "none"
    DEMONSTRATED = "demonstrated"  # at demonstrated tasks
    FRESH = "fresh"  # at tasks without a demonstration
    FAILED = "failed"  # at tasks without a demonstration, where the policy failed


@dataclass(frozen=True, slots=True)
class Method:
    """An objective, its settings, and what it is given."""

    objective: str
    """`none`: the novice stays as it is."""
    lr: float = 2e-3
    trajectories_per_step: int = 8
    objectives: ObjectiveOptions = OBJECTIVE_OPTIONS
    answers: Answers = Answers.NONE

    @property
    def objective_options(self) -> ObjectiveOptions:
        """Answers at own states are there to be learned from."""
        return replace(self.objectives, own_states=self.answers is not Answers.NONE)

    @property
    def takes_samples(self) -> bool:
        return self.objective in ("implicit", "inverse") or self.objectives.informative_only

    @property
    def takes_own_episodes(self) -> bool:
        return self.objective in ("inverse", "eto", "rft", "ppo") or self.answers is not Answers.NONE


SFT = Method("sft", lr=4e-3, trajectories_per_step=2)
IMPLICIT = Method("implicit", lr=4e-3)
INVERSE = Method("inverse", lr=8e-3)
PPO = Method(
    "ppo", lr=4e-3, objectives=replace(OBJECTIVE_OPTIONS, anchor_weight=0.0, kl_weight=0.0, max_versions_old=0)
)
METHODS: dict[str, Method] = {
    "sft": SFT,
    "implicit": IMPLICIT,
    "inverse": INVERSE,
    "eto": Method("eto", lr=1e-3, objectives=replace(OBJECTIVE_OPTIONS, beta=0.03)),
    "rft": Method("rft", lr=4e-3),
    "ppo": PPO,
    # What might beat sft:
    "sft, informative": replace(SFT, objectives=replace(OBJECTIVE_OPTIONS, informative_only=True)),
    "sft, own states": replace(SFT, answers=Answers.DEMONSTRATED),
    "sft, fresh states": replace(SFT, answers=Answers.FRESH),
    "sft, failed states": replace(SFT, answers=Answers.FAILED),
    "implicit, failed states": replace(IMPLICIT, answers=Answers.FAILED),
    "inverse, failed states": replace(INVERSE, answers=Answers.FAILED),
    "ppo, anchored": replace(PPO, objectives=replace(OBJECTIVE_OPTIONS, anchor_weight=3.0, kl_weight=0.0)),
    "ppo, anchored, on-policy": replace(PPO, objectives=replace(PPO.objectives, anchor_weight=3.0)),
    "ppo, anchored, failed states": replace(
        PPO, objectives=replace(PPO.objectives, anchor_weight=3.0), answers=Answers.FAILED
    ),
}
"""By name, with the settings that tuning chose; a variant has those of its objective."""
NOVICE = Method("none")


def _batch(method: Method, size: int) -> Method:
    return replace(method, trajectories_per_step=size)


def _lessons(method: Method, changes: dict[str, float]) -> Method:
    return replace(method, objectives=replace(method.objectives, **changes))


def _grid(
    objective: str, vary: Callable[[Method, Any], Method], choices: Sequence[Any], top_lr: float = 8e-3
) -> list[Method]:
    lrs = top_lr / 4, top_lr / 2, top_lr
    return [vary(replace(Method(objective), lr=lr), choice) for lr in lrs for choice in choices]


GRIDS: dict[str, list[Method]] = {
    "sft": _grid("sft", _batch, (2, 4, 8)),
    "implicit": _grid(
        "implicit",
        _lessons,
        ({"beta": 0.3, "anchor_weight": 1.0}, {"beta": 1.0, "anchor_weight": 1.0}, {"beta": 0.3, "anchor_weight": 0.2}),
    ),
    "inverse": _grid("inverse", _lessons, ({"anchor_weight": 0.0}, {"anchor_weight": 0.3}, {"anchor_weight": 1.0})),
    "eto": _grid("eto", _lessons, ({"beta": 0.03}, {"beta": 0.1}, {"beta": 0.3}), top_lr=2e-3),
    "rft": _grid("rft", _batch, (4, 8, 16)),
    "ppo": _grid(
        "ppo",
        _lessons,
        (
            {"anchor_weight": 0.0, "kl_weight": 0.0},
            {"anchor_weight": 0.0, "kl_weight": 0.02},
            {"anchor_weight": 0.0, "kl_weight": 0.0, "max_versions_old": 0},
        ),
    ),
    "ppo+anchor": _grid(
        "ppo",
        _lessons,
        (
            {"anchor_weight": 0.3, "kl_weight": 0.0},
            {"anchor_weight": 1.0, "kl_weight": 0.0},
            {"anchor_weight": 3.0, "kl_weight": 0.0},
        ),
    ),
}
"""The nine settings that tuning tries for each objective."""

# ------------------------------------------------------------------------------------------------- runs


@dataclass(frozen=True, slots=True)
class Scene:
    """Where a method is tried."""

    seed: int
    num_demonstrations: int
    split: str
    num_tasks: int
    num_cycles: int


@dataclass(frozen=True, slots=True)
class CycleResult:
    """The agent after a cycle."""

    greedy: float
    """Success rate; NaN where it was not measured."""
    sampled: float
    """Success rate at temperature 1; NaN where it was not measured."""
    cpu_seconds: float
    """Of this cycle: the policy's samples and own episodes, and training."""
    num_answers: int
    """States that an expert has acted or answered at, all cycles so far, each counted once."""
    note: str
    """Why nothing was learned; empty where something was."""
    diagnostics: dict[str, float]


class Run:
    """One method from the novice on."""

    def __init__(self, desk: Desk, method: Method, scene: Scene, folder: Path) -> None:
        self._desk, self._method, self._scene, self._folder = desk, method, scene, folder
        order = Random(f"demonstrations/{scene.seed}").sample(range(WORLD.splits["train"]), WORLD.splits["train"])
        tasks = [WORLD.task("train", index) for index in order]
        self._demonstrated, self._others = tasks[: scene.num_demonstrations], tasks[100:]
        self._adapter: Path | None = None
        self._own: list[list[Trajectory]] = []
        """Own episodes, cycle by cycle."""

    def cycle(self, number: int) -> CycleResult:
        """Learn once, and measure."""
        began = time.process_time()
        network = load_policy(NOVICE_PATH, self._adapter)
        training_data = self._material(network, number)
        note, diagnostics = "", dict[str, float]()
        try:
            diagnostics = self._train(training_data, number)
        except NothingToLearn as reason:
            note = str(reason)
        seconds = time.process_time() - began
        greedy = sampled = float("nan")
        if self._scene.split == "heldout" or number + 1 == self._scene.num_cycles:
            greedy, sampled = measured(self._desk, load_policy(NOVICE_PATH, self._adapter), self._scene, number)
        answers = {
            (s.prompt, s.expert) for each in training_data.trajectories for s in each.states if s.expert is not None
        }
        return CycleResult(greedy, sampled, seconds, len(answers), note, diagnostics)

    def _material(self, network: Any, number: int) -> TrainingData:
        method, draw = self._method, _generator(self._scene.seed, number, 1)
        demonstrations = self._desk.demonstrations(self._demonstrated)
        if method.takes_samples:
            demonstrations = self._desk.inspected(network, self._demonstrated, NUM_SAMPLES, draw)
        if method.takes_own_episodes:
            self._own.append(self._own_episodes(network, number, draw))
        return TrainingData(tuple(demonstrations), self._own_with_ages())

    def _own_episodes(self, network: Any, number: int, draw: torch.Generator) -> list[Trajectory]:
        num_demonstrated = len(self._demonstrated)
        num_others = NUM_OWN_EPISODES - num_demonstrated
        tasks: list[Task] = self._demonstrated + self._others[number * num_others : (number + 1) * num_others]
        own = self._desk.own_trajectories(network, tasks, draw, f"own/{number}")
        answered = self._answered(own)
        return [each if each in answered else _without_expert(each) for each in own]

    def _answered(self, own: Sequence[Trajectory]) -> list[Trajectory]:
        num_answered = len(self._demonstrated)
        demonstrated, others = own[:num_answered], own[num_answered:]
        match self._method.answers:
            case Answers.NONE:
                return []
            case Answers.DEMONSTRATED:
                return list(demonstrated)
            case Answers.FRESH:
                return list(others[:num_answered])
            case Answers.FAILED:
                return [each for each in others if each.outcome == 0.0][:num_answered]

    def _own_with_ages(self) -> tuple[Trajectory, ...]:
        newest = len(self._own) - 1
        return tuple(_aged(each, newest - cycle) for cycle, own in enumerate(self._own) for each in own)

    def _train(self, training_data: TrainingData, number: int) -> dict[str, float]:
        method = self._method
        if method.objective == "none":
            return {}
        training = TrainingOptions(
            lr=method.lr,
            epochs=0,  # as many gradient steps as follow, however many trajectories there are
            min_gradient_steps=GRADIENT_STEPS,
            trajectories_per_step=method.trajectories_per_step,
            seed=1000 * self._scene.seed + number,
        )
        discriminator, diagnostics = None, dict[str, float]()
        if method.objective == "inverse":
            options = DiscriminatorOptions(training=replace(training, lr=DISCRIMINATOR_LR))
            discriminator = discriminate(training_data, NOVICE_PATH, method.objective_options, options)
            if discriminator.accuracy is not None:
                diagnostics["discriminator_held_out_accuracy"] = discriminator.accuracy
        objective = objective_of(method.objective, training_data, method.objective_options, discriminator)
        trainer = Trainer(NOVICE_PATH, self._adapter, training, device="cpu")
        report = trainer.train(objective)
        assert report.num_gradient_steps == GRADIENT_STEPS
        self._adapter = self._folder / f"cycle-{number}"
        trainer.network.save_pretrained(self._adapter)
        return diagnostics | report.diagnostics


def _without_expert(trajectory: Trajectory) -> Trajectory:
    """Nobody has answered; so nobody knows either whether the action agrees."""
    states = (
        replace(
            state, expert=None, policy_actions=tuple(replace(action, agrees=None) for action in state.policy_actions)
        )
        for state in trajectory.states
    )
    return replace(trajectory, states=tuple(states))


def _aged(trajectory: Trajectory, num_versions: int) -> Trajectory:
    states = (
        replace(
            state,
            policy_actions=tuple(replace(action, num_versions_old=num_versions) for action in state.policy_actions),
        )
        for state in trajectory.states
    )
    return replace(trajectory, states=tuple(states))


def measured(desk: Desk, network: Any, scene: Scene, number: int) -> tuple[float, float]:
    """Success greedy and at temperature 1."""
    tasks = [WORLD.task(scene.split, index) for index in range(scene.num_tasks)]
    temperatures = [0.0] * len(tasks) + [1.0] * len(tasks)
    attempts = desk.attempts(network, tasks + tasks, temperatures, _generator(scene.seed, number, 2))
    outcomes = [attempt.outcome for attempt in attempts]
    return fmean(outcomes[: len(tasks)]), fmean(outcomes[len(tasks) :])


def _generator(seed: int, cycle: int, purpose: int) -> torch.Generator:
    return torch.Generator().manual_seed(1_000_000 * seed + 1000 * cycle + purpose)


def run(desk: Desk, method: Method, scene: Scene) -> list[CycleResult]:
    """All cycles of a method in a scene."""
    with tempfile.TemporaryDirectory() as folder:
        one = Run(desk, method, scene, Path(folder))
        return [one.cycle(number) for number in range(scene.num_cycles)]


class FinishedRuns:
    """A file of finished runs, one JSON object a line: what was run once is not run again."""

    def __init__(self, path: Path, desk: Desk) -> None:
        self._path, self._desk = path, desk
        self._novice = read_base_network(NOVICE_PATH).fingerprint
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text("utf-8").splitlines() if path.exists() else []
        self._found = {json.dumps(row["key"], sort_keys=True): row["cycles"] for row in map(json.loads, lines)}

    def results(self, method: Method, scene: Scene) -> list[CycleResult]:
        """The run's results, from the file or from running it now."""
        settings = {"novice": self._novice, "gradient_steps": GRADIENT_STEPS, "samples": NUM_SAMPLES}
        key = {"method": asdict(method), "scene": asdict(scene), **settings}
        text = json.dumps(key, sort_keys=True)
        if text not in self._found:
            self._found[text] = [asdict(result) for result in run(self._desk, method, scene)]
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, "cycles": self._found[text]}) + "\n")
        return [CycleResult(**cycle) for cycle in self._found[text]]


# ------------------------------------------------------------------------------------------------ table

STUDENT_T = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}
"""Two-sided 95 %, by the number of seeds."""


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean over seeds, and half the width of its 95 % interval (Student's t)."""
    half = STUDENT_T[len(values)] * stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return fmean(values), half


@dataclass(frozen=True, slots=True)
class Found:
    """One method's runs at one number of demonstrations, in the order of the seeds."""

    runs: Sequence[Sequence[CycleResult]]

    def over_seeds(self, value: Callable[[CycleResult], float], cycle: int = -1) -> list[float]:
        """The value after a cycle, of each seed."""
        return [value(run[cycle]) for run in self.runs]

    @property
    def cpu_seconds(self) -> float:
        """Of all cycles, mean over seeds."""
        return fmean(sum(result.cpu_seconds for result in run) for run in self.runs)

    @property
    def notes(self) -> list[str]:
        """Why cycles taught nothing."""
        return [result.note for run in self.runs for result in run if result.note]


def _greedy(result: CycleResult) -> float:
    return 100 * result.greedy


def _sampled(result: CycleResult) -> float:
    return 100 * result.sampled


def cycle_table(found: dict[str, Found], novice: Found) -> list[list[str]]:
    """Success after each cycle of one number of demonstrations; a row for each method."""
    start = fmean(novice.over_seeds(_sampled))
    rows = [
        ["method", "greedy after 1, 2, 3", "T=1 after 1, 2, 3", "T=1 less sft's", "answers", "CPU s", "points/CPU s"],
        ["novice", _rate(novice.over_seeds(_greedy)), _rate(novice.over_seeds(_sampled)), "", "0", "0", ""],
    ]
    for name, one in found.items():
        gain = (fmean(one.over_seeds(_sampled)) - start) / one.cpu_seconds
        rows.append(
            [
                name,
                _curve(one, _greedy),
                _curve(one, _sampled),
                _difference(one, found["sft"]) if "sft" in found and name != "sft" else "",
                f"{fmean(run[-1].num_answers for run in one.runs):.0f}",
                f"{one.cpu_seconds:.1f}",
                f"{gain:.1f}",
            ]
        )
    return rows


def demonstration_table(found: dict[int, dict[str, Found]], value: Callable[[CycleResult], float]) -> list[list[str]]:
    """Success after the last cycle; a row for each method, a column for each number of demonstrations."""
    rows = [["method", *map(str, found)]]
    for name in next(iter(found.values())):
        rows.append([name, *(_rate(found[number][name].over_seeds(value)) for number in found)])
    return rows


def _curve(found: Found, value: Callable[[CycleResult], float]) -> str:
    """Means after each cycle, and the last one's interval."""
    before = [f"{fmean(found.over_seeds(value, cycle)):.1f}" for cycle in range(len(found.runs[0]) - 1)]
    return ", ".join([*before, _rate(found.over_seeds(value))])


def _rate(values: Sequence[float]) -> str:
    mean, half = interval(values)
    return f"{mean:.1f} ± {half:.1f}"


def _difference(found: Found, other: Found) -> str:
    """At temperature 1 after the last cycle, paired by seed."""
    pairs = zip(found.over_seeds(_sampled), other.over_seeds(_sampled), strict=True)
    mean, half = interval([one - two for one, two in pairs])
    return f"{mean:+.1f} ± {half:.1f}"


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """The rows as a table of RESULTS.md; the first is its heading. Reads well in a terminal too."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def report(
    runs: FinishedRuns, names: Sequence[str], numbers: Sequence[int], split: str, seeds: Sequence[int], num_tasks: int
) -> None:
    """Run what has not been run, and print the tables."""
    with tqdm(total=len(seeds) * (1 + len(names) * len(numbers)), unit="run") as bar:

        def gather(method: Method, number: int, num_cycles: int) -> Found:
            found = []
            for seed in seeds:
                found.append(runs.results(method, Scene(seed, number, split, num_tasks, num_cycles)))
                bar.update()
            return Found(found)

        novice = gather(NOVICE, 0, 1)
        found = {number: {name: gather(METHODS[name], number, NUM_CYCLES) for name in names} for number in numbers}
    print(f"\nSuccess in % on {num_tasks} {split} tasks, mean over {len(seeds)} seeds ± half its 95 % interval (t).")
    for number, by_name in found.items():
        print(f"\n{number} demonstrations:\n\n{markdown(cycle_table(by_name, novice))}")
        for name, one in by_name.items():
            if one.notes:
                print(f"{name}: nothing to learn in {len(one.notes)} cycles, first: {one.notes[0]}")
    if len(numbers) > 1:
        for kind, value in (("T=1", _sampled), ("greedy", _greedy)):
            print(f"\n{kind}, by the number of demonstrations:\n\n{markdown(demonstration_table(found, value))}")


def tune(runs: FinishedRuns, objective: str, num_tasks: int) -> None:
    """Try the objective's settings on validation tasks; the best is printed last."""
    scenes = [Scene(seed, TUNING_DEMONSTRATIONS, "validation", num_tasks, TUNING_CYCLES) for seed in TUNING_SEEDS]
    found = []
    for method in tqdm(GRIDS[objective], desc=objective):
        last = [runs.results(method, scene)[-1] for scene in scenes]
        greedy, sampled = fmean(r.greedy for r in last), fmean(r.sampled for r in last)
        seconds = fmean(r.cpu_seconds for r in last)
        found.append(((greedy + sampled) / 2, greedy, sampled, seconds, _told_apart(method), last[0].diagnostics))
    for score, greedy, sampled, seconds, settings, diagnostics in sorted(found, key=lambda each: each[0]):
        watched = " ".join(f"{name}={value:.2f}" for name, value in diagnostics.items())
        print(f"{score:.3f}  greedy {greedy:.3f}  T=1 {sampled:.3f}  {seconds:4.1f} s  {settings}  {watched}")


def _told_apart(method: Method) -> str:
    """The settings that differ from an objective's defaults."""
    plain, given = asdict(Method(method.objective)), asdict(method)
    objectives = {k: v for k, v in given.pop("objective_options").items() if v != plain["objective_options"][k]}
    return json.dumps({k: v for k, v in given.items() if v != plain[k]} | objectives)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--methods", default=";".join(METHODS), help="which, with semicolons (default: all)")
    parser.add_argument("--demonstrations", default="24", help="how many, with commas (default 24)")
    parser.add_argument("--seeds", type=int, default=5, help="how many (default 5)")
    parser.add_argument("--validation", action="store_true", help="on validation tasks and the seeds of tuning instead")
    parser.add_argument("--tasks", type=int, default=200, help="tasks, each tried greedy and at T=1 (default 200)")
    parser.add_argument("--tune", metavar="METHOD", help="try settings of this method on validation tasks instead")
    parser.add_argument("--runs", type=Path, default=Path("state/methods.jsonl"), help="the file of finished runs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    runs = FinishedRuns(options.runs, Desk(ChatProtocol.load(NOVICE_PATH)))
    if options.tune:
        tune(runs, options.tune, options.tasks)
    else:
        names, numbers = options.methods.split(";"), [int(number) for number in options.demonstrations.split(",")]
        split, first = ("validation", TUNING_SEEDS[0]) if options.validation else ("heldout", 1)
        report(runs, names, numbers, split, range(first, first + options.seeds), options.tasks)


if __name__ == "__main__":
    main()
