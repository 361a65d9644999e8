"""What choosing among several draws gains, and what it costs: Best-of-N at each step, by every scorer.

    python -m benchmarks.best_of [--world order_desk] [--demonstrations 4,8] [--seeds 3] [--tasks 100]

A cell is a world, a number of demonstrations and a seed. Its student is the base after one cycle of `sft`, as a cycle
trains by default. Two discriminators tell experts' actions from the policy's: the one that the same cycle leaves beside
the adapter (the wrong actions are the base's, at the demonstrations' states), and the one that the next cycle makes
(the student's, at the demonstrations' states and at its own in NUM_OWN_EPISODES tasks, where the expert answers).

Then held-out tasks are tried at temperature 1 with one draw a step, and with the best of N by each scorer, by the
engine and the scorers that serve. All arms draw with the same seeds, and the first draw of each is the one that T=1
takes. `oracle` takes a draw that the world's expert agrees with, where there is one: what no scorer can pass by much.

AUC: at the states of the arm `mean_logprob`, of all pairs of a draw that the expert agrees with and one that he does
not, at one state, the share that a scorer ranks rightly; ties count half. Beside it, of a discriminator's logit alone,
the AUC on held-out steps: at the expert's states of the held-out tasks, his action against the student's wrong draws,
which is what it is trained to tell apart. Cells that were run are read from the file.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from benchmarks.figures import counts, interval, spread
from benchmarks.lockstep import MAX_ACTION_TOKENS, load_policy
from benchmarks.methods import Row, Rows
from benchmarks.rollouts import Attempt, Rollouts
from benchmarks.students import first_unseen, student
from learner.data.comparison import compare
from learner.data.training_data import TrainingData
from learner.objectives.build import NothingToLearn, objective_of
from learner.objectives.states import answered_states
from learner.options import ObjectiveOptions, TrainingOptions
from learner.training.discriminator import Discriminator, DiscriminatorOptions, discriminate
from learner.training.trainer import Trainer
from policies.adapters.reward import expert_likelihood
from policies.chat.chat_protocol import message_action
from policies.novice.build import NOVICE_PATH
from policies.types import Adapter, Completion, Draw, FinishReason, SamplingParams, TokenIds
from runtime.agent.scorers import Majority, MeanLogprob, best
from runtime.engines.embedded.engine import EmbeddedEngine
from tools.worlds import load_world
from tools.worlds.world import Task

NUM_DRAWS = 4
NUM_SAMPLES = 2
"""Of the policy at each state of a demonstration, as a cycle takes by default."""
NUM_OWN_EPISODES = 24
MOST_AT_ONCE = 32


# ------------------------------------------------------------------------------------------------ students


@dataclass(frozen=True, slots=True)
class Cell:
    """One student, and the tasks that it is tried on."""

    world: str
    num_demonstrations: int
    seed: int
    num_tasks: int
    split: str = "heldout"
    is_tried: bool = True
    """Whether tasks are tried too, beside the AUC on held-out steps."""


@dataclass(frozen=True, slots=True)
class Made:
    """What training left in a folder."""

    student: Path
    rewards: dict[str, Path]
    """By the scorer's name; a discriminator that could not be trained is not in it."""
    accuracy: dict[str, float]
    """Of each, on the pairs that its cycle held out."""
    held_out_steps: dict[str, tuple[float, int]]
    """Of each, its AUC on held-out steps, and of how many pairs."""
    problems: dict[str, str]


def train(cell: Cell, base: Path, rollouts: Rollouts, folder: Path) -> Made:
    """The student and its discriminators."""
    world, unseen = rollouts.world, first_unseen(cell.world)
    num_free = rollouts.world.splits["train"] - unseen - cell.num_demonstrations - NUM_OWN_EPISODES
    first = unseen + (cell.seed * 997) % max(1, num_free)
    tasks = [world.task("train", first + number) for number in range(cell.num_demonstrations + NUM_OWN_EPISODES)]
    demonstrated, others = tasks[: cell.num_demonstrations], tasks[cell.num_demonstrations :]
    draw = torch.Generator().manual_seed(cell.seed)
    training, objectives = TrainingOptions(seed=cell.seed), ObjectiveOptions()
    of_base = TrainingData(tuple(rollouts.inspected(load_policy(base, None), demonstrated, NUM_SAMPLES, draw)))
    prompts = [state.prompt for each in of_base.demonstrations for state in each.states][:8]
    trainer = Trainer(base, None, training, device="cpu")
    trainer.train(objective_of("sft", of_base, objectives))
    trainer.save(folder / "student", prompts, "# student\n")
    student = load_policy(base, folder / "student")
    of_student = TrainingData(
        tuple(rollouts.inspected(student, demonstrated, NUM_SAMPLES, draw)),
        tuple(rollouts.own_trajectories(student, others, draw, "own", range(len(others)))),
    )
    held_out = [world.task(cell.split, index) for index in range(cell.num_tasks)]
    of_held_out = TrainingData(tuple(rollouts.inspected(student, held_out, NUM_DRAWS, draw)))
    informative = [each for each in answered_states(of_held_out, objectives) if each.state.is_informative]
    made = Made(folder / "student", {}, {}, {}, {})
    for name, data in (("discriminator", of_base), ("discriminator, next cycle", of_student)):
        try:
            found = discriminate(data, base, objectives, DiscriminatorOptions(training=training), "cpu")
        except NothingToLearn as reason:
            made.problems[name] = str(reason)
            continue
        _keep(found, name, folder, prompts, made)
        made.held_out_steps[name] = found.accuracy_at(informative) if informative else (float("nan"), 0)
    return made


def _keep(found: Discriminator, name: str, folder: Path, prompts: Sequence[TokenIds], made: Made) -> None:
    made.rewards[name] = folder / f"reward-{len(made.rewards)}"
    found.save(made.rewards[name], prompts, "# reward\n")
    if found.accuracy is not None:
        made.accuracy[name] = found.accuracy


# ------------------------------------------------------------------------------------------------- choosing


@dataclass(frozen=True, slots=True)
class ByReward:
    """As the server's scorer of this kind, of a reward model that is loaded already; or by its logit alone, which the
    server does not do."""

    engine: EmbeddedEngine
    reward: Adapter
    name: str
    is_alone: bool = False

    async def scores(self, prompt: TokenIds, draws: Sequence[Draw]) -> list[float]:
        different = list(dict.fromkeys(draw.token_ids for draw in draws))
        asked = [(tokens, adapter) for tokens in different for adapter in (self.reward, None)]
        told = await asyncio.gather(*(self.engine.score(prompt, *each) for each in asked))
        scored = {tokens: sides for tokens, *sides in zip(different, told[::2], told[1::2], strict=True)}
        return [self._score(draw, *scored[draw.token_ids]) for draw in draws]

    def _score(self, draw: Draw, by_reward: tuple[float, ...], by_base: tuple[float, ...]) -> float:
        if self.is_alone:
            return sum(by_reward) - sum(by_base)
        return expert_likelihood(draw.logprobs, by_reward, by_base)


@dataclass(frozen=True, slots=True)
class SeenState:
    """The draws at one state: who agrees with the expert, and what each scorer said."""

    agrees: list[bool]
    scores: dict[str, list[float]]


class BestOfRollouts(Rollouts):
    """Episodes on the engine that serves, with a choice at each step."""

    def with_engine(self, engine: EmbeddedEngine, student: Adapter, seed: int) -> BestOfRollouts:
        self._engine, self._student, self._seed = engine, student, seed
        self._places = asyncio.Semaphore(MOST_AT_ONCE)
        return self

    async def outcomes(
        self, tasks: Sequence[Task], num_draws: int, choose: Any, temperature: float = 1.0
    ) -> list[float]:
        """Of each task, where `choose(attempt, prompt, draws)` says which draw is taken at every step."""
        return list(await asyncio.gather(*(self._outcome(task, num_draws, choose, temperature) for task in tasks)))

    async def _outcome(self, task: Task, num_draws: int, choose: Any, temperature: float) -> float:
        async with self._places:
            attempt = self._open(task)
            for number in range(self.max_steps):
                completions = await asyncio.gather(
                    *(self._complete(attempt, task, number, place, temperature) for place in range(num_draws))
                )
                draws = [self._as_draw(each) for each in completions]
                chosen = 0 if num_draws == 1 else await choose(attempt, attempt.prompt, draws)
                self._play(attempt, completions[chosen])
                room = self._engine.limits.max_context_tokens - MAX_ACTION_TOKENS
                if attempt.is_over or attempt.episode.is_done or len(attempt.prompt) > room:
                    break
            return attempt.outcome

    async def _complete(self, attempt: Attempt, task: Task, number: int, place: int, temperature: float) -> Completion:
        seed = zlib.crc32(f"{self._seed} {task.id} {number} {place}".encode())
        sampling = SamplingParams(
            MAX_ACTION_TOKENS, temperature, seed=seed, stop_token_ids=self.protocol.stop_token_ids
        )
        stream = self._engine.generate(attempt.prompt, sampling, self._student, stream=False)
        tokens = [token async for token in stream]
        reason = tokens[-1].finish_reason or FinishReason.LENGTH
        return Completion(tuple(t.token_id for t in tokens), tuple(t.logprob for t in tokens), reason)

    def _as_draw(self, completion: Completion) -> Draw:
        action = self.protocol.parse(completion.token_ids, completion.finish_reason)
        is_cut = completion.finish_reason is FinishReason.LENGTH
        return Draw(completion.token_ids, completion.logprobs, action, is_cut)

    def agrees(self, attempt: Attempt, draws: Sequence[Draw]) -> list[bool] | None:
        """Whether the expert would do what each draw does; None where he does not answer."""
        expert = attempt.episode.expert_action()
        if expert is None:
            return None
        action = message_action(expert)
        return [compare(draw.action, action, attempt.episode.same_effect).agrees for draw in draws]


def by_scorer(scorer: Any) -> Any:
    async def choose(attempt: Attempt, prompt: TokenIds, draws: Sequence[Draw]) -> int:
        return best(draws, await scorer.scores(prompt, draws))

    return choose


def watching(rollouts: BestOfRollouts, scorers: Sequence[Any], seen: list[SeenState]) -> Any:
    """Chooses by the first scorer, and keeps what all of them say."""

    async def choose(attempt: Attempt, prompt: TokenIds, draws: Sequence[Draw]) -> int:
        scores = {scorer.name: await scorer.scores(prompt, draws) for scorer in scorers}
        agrees = rollouts.agrees(attempt, draws)
        if agrees is not None:
            seen.append(SeenState(agrees, scores))
        return best(draws, scores[scorers[0].name])

    return choose


def by_expert(rollouts: BestOfRollouts) -> Any:
    async def choose(attempt: Attempt, prompt: TokenIds, draws: Sequence[Draw]) -> int:
        agrees = rollouts.agrees(attempt, draws)
        return agrees.index(True) if agrees and True in agrees else 0

    return choose


def auc(seen: Sequence[SeenState], scorer: str) -> tuple[float, int]:
    """Of the pairs at one state, the share ranked rightly, and how many there are."""
    told = [
        1.0 if good > bad else 0.5 if good == bad else 0.0
        for state in seen
        for good, is_good in zip(state.scores[scorer], state.agrees, strict=True)
        for bad, is_bad in zip(state.scores[scorer], state.agrees, strict=True)
        if is_good and not is_bad
    ]
    return (fmean(told) if told else float("nan")), len(told)


# ---------------------------------------------------------------------------------------------------- a cell


async def measure(cell: Cell, base: Path, rollouts: BestOfRollouts, made: Made) -> dict[str, Any]:
    """Success and CPU seconds of each arm, and each scorer's AUC."""
    engine = EmbeddedEngine(base, num_threads=1, device="cpu", max_batch_size=MOST_AT_ONCE)
    student = Adapter("student", 1, made.student, 16, None, "")
    await engine.load_adapter(student)
    scorers: list[Any] = [MeanLogprob(), Majority()]
    for number, (name, path) in enumerate(made.rewards.items()):
        reward = Adapter(f"reward-{number}", 2 + number, path, 16, "student", "", is_reward=True)
        await engine.load_adapter(reward)
        scorers.append(ByReward(engine, reward, name))
        scorers.append(ByReward(engine, reward, f"{name}, its logit alone", is_alone=True))
    tried = rollouts.with_engine(engine, student, cell.seed)
    tasks = [rollouts.world.task(cell.split, index) for index in range(cell.num_tasks)]
    arms: dict[str, dict[str, float]] = {}

    async def arm(name: str, num_draws: int, choose: Any, temperature: float = 1.0) -> None:
        began = time.process_time()
        outcomes = await tried.outcomes(tasks, num_draws, choose, temperature)
        arms[name] = {
            "success": fmean(outcome == 1.0 for outcome in outcomes),
            "cpu_seconds": time.process_time() - began,
        }

    seen: list[SeenState] = []
    await arm("T=1", 1, None)
    await arm("greedy", 1, None, 0.0)
    for scorer in scorers:
        await arm(scorer.name, NUM_DRAWS, by_scorer(scorer))
    await arm("oracle", NUM_DRAWS, by_expert(tried))
    await tried.outcomes(tasks, NUM_DRAWS, watching(tried, scorers, seen))
    await engine.close()
    aucs = {scorer.name: dict(zip(("auc", "num_pairs"), auc(seen, scorer.name), strict=True)) for scorer in scorers}
    return {"arms": arms, "aucs": aucs}


def run(cell: Cell, base: Path) -> dict[str, Any]:
    rollouts = BestOfRollouts(load_world(cell.world), base)
    with tempfile.TemporaryDirectory() as folder:
        made = train(cell, base, rollouts, Path(folder))
        trials = asyncio.run(measure(cell, base, rollouts, made)) if cell.is_tried else {}
        return {**trials, "accuracy": made.accuracy, "held_out_steps": made.held_out_steps, "problems": made.problems}


class FinishedCells:
    """A file of finished cells, one JSON object a line."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text("utf-8").splitlines(keepends=True) if path.exists() else []
        if lines and not lines[-1].endswith("\n"):  # a process that was killed while it wrote: the cell is run again
            path.write_text("".join(lines[:-1]), "utf-8")
            lines.pop()
        self._found = {json.dumps(row["cell"], sort_keys=True): row["result"] for row in map(json.loads, lines)}

    def result(self, cell: Cell, base: Path) -> dict[str, Any]:
        """From the file, or from running it now."""
        key = json.dumps(asdict(cell), sort_keys=True)
        if key not in self._found:
            self._found[key] = run(cell, base)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"cell": asdict(cell), "result": self._found[key]}) + "\n")
        return self._found[key]


# ---------------------------------------------------------------------------------------------------- report


def table(results: Sequence[dict[str, Any]]) -> list[list[str]]:
    """A row for each arm: success, its gain over T=1 paired by seed, AUC (mean over seeds), and CPU seconds a task
    against T=1's."""
    rows = [["choice", "success %", "points over T=1", "AUC (pairs)", "CPU, times T=1"]]
    for name in dict.fromkeys(name for result in results for name in result["arms"]):
        having = [result for result in results if name in result["arms"]]
        rate = [100 * result["arms"][name]["success"] for result in having]
        gain = [100 * (r["arms"][name]["success"] - r["arms"]["T=1"]["success"]) for r in having]
        cost = [r["arms"][name]["cpu_seconds"] / r["arms"]["T=1"]["cpu_seconds"] for r in having]
        told = [r["aucs"][name] for r in having if name in r["aucs"] and r["aucs"][name]["num_pairs"]]
        rows.append(
            [
                name if len(having) == len(results) else f"{name} ({len(having)} of {len(results)} seeds)",
                "{:.1f} ± {:.1f}".format(*interval(rate)),
                "" if name == "T=1" else "{:+.1f} ± {:.1f}".format(*interval(gain)),
                f"{fmean(t['auc'] for t in told):.2f} ({sum(t['num_pairs'] for t in told)})" if told else "",
                f"{fmean(cost):.1f}",
            ]
        )
    return rows


def held_out_steps(results: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Of each discriminator, its AUC on held-out steps: median, least and most of the seeds, and how many pairs."""
    told: dict[str, list[tuple[float, int]]] = {}
    for result in results:
        for name, (share, number) in result["held_out_steps"].items():
            if number:
                told.setdefault(name, []).append((share, number))
    return {
        name: f"{spread([share for share, _ in seeds], 2)}, {sum(number for _, number in seeds)} pairs"
        for name, seeds in told.items()
    }


def markdown(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


AXIS = "best-of-4"


def rows_of(cell: Cell, result: dict[str, Any], student: str) -> list[Row]:
    """A cell as rows of the table of methods: success in %, CPU seconds of trying the tasks (not of training)."""
    arms = result["arms"]
    return [
        Row(
            "sft" if name == "T=1" else f"sft, best of {NUM_DRAWS} by {name}",
            cell.world,
            student,
            cell.seed,
            cell.num_demonstrations,
            AXIS,
            success_t1=round(100 * arm["success"], 1),
            success_greedy=round(100 * arms["greedy"]["success"], 1) if name == "T=1" else None,
            cpu_seconds=round(arm["cpu_seconds"], 1),
            is_default=False,
            tasks=cell.num_tasks,
        )
        for name, arm in arms.items()
        if name != "greedy"
    ]


def student_of(world: str) -> tuple[str, Path]:
    """Name and folder of the small network that is trained for a world."""
    if world == "order_desk":
        return "novice", NOVICE_PATH
    return "student", student(world)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--world", default="order_desk")
    parser.add_argument("--demonstrations", type=counts, default="4,8", help="how many, with commas (default 4,8)")
    parser.add_argument("--seeds", type=int, default=3, help="how many (default 3)")
    parser.add_argument("--tasks", type=int, default=100, help="held-out tasks (default 100)")
    parser.add_argument("--no-trials", action="store_true", help="tell the AUC on held-out steps alone")
    parser.add_argument("--cells", type=Path, default=Path("state/best_of.jsonl"), help="the file of finished cells")
    parser.add_argument("--rows", type=Path, help="put rows into this file (benchmarks/results/methods.json)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    name, base = student_of(options.world)
    cells, rows = FinishedCells(options.cells), list[Row]()
    for number in options.demonstrations:
        results = []
        for seed in range(1, options.seeds + 1):
            cell = Cell(options.world, number, seed, options.tasks, is_tried=not options.no_trials)
            results.append(cells.result(cell, base))
            rows += rows_of(cell, results[-1], name) if cell.is_tried else []
        print(f"\n{options.world}, {name}, {number} demonstrations, {options.seeds} seeds, {options.tasks} tasks\n")
        if not options.no_trials:
            print(markdown(table(results)))
        for result in results:
            for of, problem in result["problems"].items():
                print(f"{of}: {problem}")
        print("AUC on held-out steps:", held_out_steps(results))
        print("accuracy on the pairs that the cycle held out:", [result["accuracy"] for result in results], flush=True)
    if options.rows:
        Rows(options.rows).add(*rows, instead_of=lambda row: row.cell)  # an arm may have another name than before


if __name__ == "__main__":
    main()
