"""One learning cycle: collect -> inspect -> reward -> train -> gate -> promote. All of it through the endpoint.

Whatever goes wrong ends in the cycle's row, as a reason; serving goes on without us. Several objectives may be trained
in one cycle: those that cannot be are left out with their reason, and the gate chooses among the rest.
"""

from __future__ import annotations

import random
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

from learner.collection import Collected, CollectionOptions, LoggedEpisode, collect
from learner.comparison import ComparedState, DropReason, Verdict
from learner.discriminator import Discriminator, DiscriminatorOptions, train_discriminator
from learner.endpoint import Endpoint
from learner.experts import Expert, ModelExpert
from learner.gate import GateDecision, Trial, decide
from learner.health import WatchedActions, health, own_sums
from learner.inspection import Inspection, Inspector, inspect, inspect_demonstrations
from learner.learning_log import CycleStage, LearningLog, StepReward
from learner.lessons import LessonOptions, NothingToLearn, objective_of
from learner.material import Material
from learner.rewards import agreement_rewards, discriminator_rewards, implicit_rewards
from learner.trainer import Trainer, TrainingFailed, TrainingOptions
from policies.chat_protocol import ChatProtocol
from policies.types import BASE_ADAPTER, TokenIds
from runtime.step_log import StepLog
from tools.worlds.world import World

NUM_PROBE_PROMPTS = 8
"""States whose prompts the probe is chosen from."""


@dataclass(frozen=True, slots=True)
class CycleOptions:
    """What a cycle does."""

    objectives: tuple[str, ...] = ("sft",)
    """Of `learner.lessons.OBJECTIVES`: each trains a candidate, and the gate chooses."""
    num_samples: int = 2
    """Actions of the acting policy at each state of a demonstration."""
    gate_tasks: int = 100
    """Validation tasks of the world on which candidates and the acting adapter are compared."""
    gate_temperature: float = 1.0
    canary_share: float = 0.0
    """Of the new episodes that a candidate which passed the gate serves at first; 0: it acts at once."""
    collection: CollectionOptions = field(default_factory=CollectionOptions)
    lesson: LessonOptions = field(default_factory=LessonOptions)
    training: TrainingOptions = field(default_factory=TrainingOptions)
    device: str = "auto"


@dataclass(frozen=True, slots=True)
class CycleParts:
    """What a cycle works with; wired in learner/__main__.py."""

    endpoint: Endpoint
    log: StepLog
    learning_log: LearningLog
    protocol: ChatProtocol
    world: World | None
    experts: Sequence[Expert]
    base: Path
    """The base model's folder."""
    state: Path
    """The server's state folder; the runtime keeps its adapters there."""
    options: CycleOptions


@dataclass(frozen=True, slots=True)
class Candidate:
    """A trained adapter in a folder of the learner's. Nobody has judged it yet."""

    objective: str
    folder: Path
    rewards: list[StepReward]
    """Implicit rewards, by what it has become."""


@dataclass(frozen=True, slots=True)
class Judged:
    """A candidate that the runtime has verified and the gate has judged."""

    candidate: Candidate
    name: str
    decision: GateDecision

    @property
    def gain(self) -> float:
        return self.decision.evidence.get("gain", float("-inf"))


async def run_cycle(cycle: str, parts: CycleParts) -> CycleStage:
    """Run a cycle to its end, which is noted in the learning log with a report. No error of a cycle is raised."""
    notes = _Notes(cycle, parts.learning_log)
    try:
        stage, message = await _run(notes, parts)
    except NothingToLearn as reason:
        stage, message = CycleStage.NO_LESSON, str(reason)
    except TrainingFailed as error:
        stage, message = CycleStage.FAILED, str(error)
    except Exception as error:  # whatever broke belongs into the cycle's row; serving goes on without us
        stage, message = CycleStage.FAILED, f"{type(error).__name__}: {error}"
    parts.learning_log.note(cycle, stage, message, report=notes.report)
    return stage


async def _run(notes: _Notes, parts: CycleParts) -> tuple[CycleStage, str]:
    lineage = await parts.endpoint.lineage()
    collected = _collect(notes, parts, lineage)
    inspector = _inspector(parts, lineage[0])
    inspection = await _inspect(notes, inspector, collected)
    discriminator = _reward(notes, parts, inspection.material)
    with _candidate_folders(parts.state) as folders:
        candidates = _train(notes, parts, lineage[0], inspection.material, discriminator, folders)
        judged = await _gate(notes, parts, inspector, collected.held_out, candidates)
    return await _promote(notes, parts, judged)


@contextmanager
def _candidate_folders(state: Path) -> Iterator[Path]:
    """A folder for candidates until the runtime has taken them in; what a killed cycle left there goes."""
    folders = state / "candidates"
    shutil.rmtree(folders, ignore_errors=True)
    folders.mkdir()
    try:
        yield folders
    finally:
        shutil.rmtree(folders, ignore_errors=True)


# ------------------------------------------------------------------------------------------------- stages


def _collect(notes: _Notes, parts: CycleParts, lineage: Sequence[str]) -> Collected:
    with notes.stage(CycleStage.COLLECT):
        seed = parts.options.training.seed
        since = parts.learning_log.last_step_seen()
        collected = collect(parts.log, since, lineage, parts.options.collection, seed)
        notes.report.update(acting=lineage[0], collected=collected.counts, last_step_id=collected.last_step_id)
    if not collected.demonstrations and not collected.own:
        held = f", {len(collected.held_out)} held out" if collected.held_out else ""
        raise NothingToLearn(
            f"there are no demonstrations to train on{held}, and no own episodes: import some first "
            "(python -m learner import FILE)"
        )
    return collected


def _inspector(parts: CycleParts, acting: str) -> Inspector:
    return Inspector(
        parts.endpoint, parts.log, parts.protocol, parts.world, parts.experts, acting, parts.options.num_samples
    )


async def _inspect(notes: _Notes, inspector: Inspector, collected: Collected) -> Inspection:
    with notes.stage(CycleStage.INSPECT, total=len(collected.demonstrations) + len(collected.own)):
        inspection = await inspect(collected.demonstrations, collected.own, inspector)
        notes.report["inspection"] = inspection.report()
        problems = [expert.problems for expert in inspector.experts if isinstance(expert, ModelExpert)]
        notes.report["expert_problems"] = dict(sum(problems, Counter[str]()))
    compared = inspection.demonstrated + inspection.own
    if compared and all(state.drop_reason is DropReason.MASTERED for state in compared):
        raise NothingToLearn(f"the policy does what the experts do at all {len(compared)} states where they answered")
    return inspection


def _reward(notes: _Notes, parts: CycleParts, material: Material) -> Discriminator | None:
    """Agreement and discriminator rewards; the implicit ones come with a trained policy."""
    with notes.stage(CycleStage.REWARD):
        parts.learning_log.add_rewards(agreement_rewards(notes.cycle, material))
        try:
            options = DiscriminatorOptions(training=parts.options.training)
            discriminator = train_discriminator(material, parts.base, parts.options.lesson, options)
        except NothingToLearn as reason:
            notes.report["discriminator"] = {"none": str(reason)}
            return None
        watched = WatchedActions.of(material)
        logits = discriminator.rewards(watched.rows()[len(watched.experts) :])
        actions = [action for _, action in watched.own]
        parts.learning_log.add_rewards(discriminator_rewards(notes.cycle, actions, logits))
        measured = {"num_pairs": float(discriminator.num_pairs)}
        notes.measure(
            "discriminator", measured | ({"accuracy": a} if (a := discriminator.accuracy) is not None else {})
        )
    return discriminator


def _train(
    notes: _Notes,
    parts: CycleParts,
    acting: str,
    material: Material,
    discriminator: Discriminator | None,
    folders: Path,
) -> list[Candidate]:
    """A candidate for each objective that can be trained. Raises why where none can."""
    candidates, problems = [], list[NothingToLearn | TrainingFailed]()
    for kind in parts.options.objectives:
        with notes.stage(CycleStage.TRAIN, kind):
            try:
                candidates.append(_train_one(notes, parts, acting, material, discriminator, kind, folders / kind))
            except (NothingToLearn, TrainingFailed) as problem:
                problems.append(problem)
                notes.report.setdefault("not_trained", {})[kind] = str(problem)
    if not candidates:
        raise next((problem for problem in problems if isinstance(problem, TrainingFailed)), problems[0])
    return candidates


def _train_one(
    notes: _Notes,
    parts: CycleParts,
    acting: str,
    material: Material,
    discriminator: Discriminator | None,
    kind: str,
    folder: Path,
) -> Candidate:
    if kind == "inverse" and discriminator is None:
        raise NothingToLearn(f"there is no discriminator: {notes.report['discriminator']['none']}")
    objective = objective_of(kind, material, parts.options.lesson, discriminator)
    begin = None if acting == BASE_ADAPTER else parts.state / "adapters" / acting
    trainer = Trainer(parts.base, begin, parts.options.training, parts.options.device)
    watched = WatchedActions.of(material)
    rows = watched.rows()
    before = trainer.logprobs(rows)
    training = trainer.train(objective, lambda done, total: notes.progress(CycleStage.TRAIN, kind, done, total))
    after = trainer.logprobs(rows)
    notes.measure(kind, {**training.health, **health(watched, before, after)})
    trainer.save(folder, _probe_prompts(material), _card(notes, kind, acting, material))
    own = [action for _, action in watched.own]
    beta = parts.options.lesson.beta
    rewards = implicit_rewards(notes.cycle, own, own_sums(watched, after), own_sums(watched, before), beta)
    return Candidate(kind, folder, rewards)


async def _gate(
    notes: _Notes,
    parts: CycleParts,
    inspector: Inspector,
    held_out: Sequence[LoggedEpisode],
    candidates: Sequence[Candidate],
) -> list[Judged]:
    """Judge the candidates one after the other, on tasks of the world, or on held-out demonstrations without one.

    At most two are in the engine at a time, the best one so far and the next: slots are few.
    """
    trials = _Trials(parts, inspector, held_out, seed=notes.cycle)
    with notes.stage(CycleStage.GATE, inspector.acting):
        baseline = await trials.of(inspector.acting)
    judged, best = list[Judged](), None
    for candidate in candidates:
        with notes.stage(CycleStage.GATE, candidate.objective):
            reason = f"{candidate.objective}, {notes.cycle}"
            name = await parts.endpoint.register(candidate.folder.absolute(), inspector.acting, reason)
            decision = decide(await trials.of(name), baseline, trials.unit, len(candidates))
            parts.learning_log.add_decision(
                notes.cycle, name, inspector.acting, decision.promote, decision.reason, decision.evidence
            )
        judged.append(Judged(candidate, name, decision))
        best = await _keep_the_better(parts.endpoint, best, judged[-1])
    notes.report["gate"] = {
        each.name: {
            **each.decision.evidence,
            "objective": each.candidate.objective,
            "promote": each.decision.promote,
            "reason": each.decision.reason,
        }
        for each in judged
    }
    return judged


async def _keep_the_better(endpoint: Endpoint, best: Judged | None, newest: Judged) -> Judged | None:
    """The one of the two that is to be promoted, if one is; the other is refused."""
    if not newest.decision.promote:
        await endpoint.refuse(newest.name, newest.decision.reason)
        return best
    if best is None:
        return newest
    better, other = (newest, best) if newest.gain > best.gain else (best, newest)
    await endpoint.refuse(other.name, f"{better.name} gains more: {better.decision.reason}")
    return better


async def _promote(notes: _Notes, parts: CycleParts, judged: Sequence[Judged]) -> tuple[CycleStage, str]:
    """Hand the best of those that are better to the runtime; the implicit rewards are those of the best in any case."""
    best = max(judged, key=lambda each: (each.decision.promote, each.gain))
    parts.learning_log.add_rewards(best.candidate.rewards)
    if not best.decision.promote:
        return CycleStage.REFUSED, "; ".join(f"{each.name}: {each.decision.reason}" for each in judged)
    reason, share = best.decision.reason, parts.options.canary_share
    with notes.stage(CycleStage.PROMOTE, best.name):
        if share:
            await parts.endpoint.start_canary(best.name, share, reason)
        else:
            await parts.endpoint.promote(best.name, reason)
    notes.report["promoted"] = best.name
    return CycleStage.PROMOTED, f"{best.name}{f', canary of {share:.0%}' if share else ''}: {reason}"


# -------------------------------------------------------------------------------------------------- trials


@dataclass(frozen=True, slots=True)
class _Trials:
    """The trials of a cycle's gate: the same for every adapter."""

    parts: CycleParts
    inspector: Inspector
    held_out: Sequence[LoggedEpisode]
    seed: str
    """Draws the tasks: always the same ones would in time be learned by selection."""

    @property
    def unit(self) -> str:
        return "tasks" if self.parts.world else "held-out demonstrations"

    async def of(self, adapter: str) -> list[Trial | None]:
        return await (
            self._demonstrations(adapter) if self.parts.world is None else self._tasks(self.parts.world, adapter)
        )

    async def _tasks(self, world: World, adapter: str) -> list[Trial | None]:
        options, size = self.parts.options, world.splits["validation"]
        places = random.Random(self.seed).sample(range(size), min(options.gate_tasks, size))
        tasks = [world.task("validation", place) for place in places]
        attempts = await self.parts.endpoint.evaluate(world, tasks, adapter, options.gate_temperature)
        return [None if attempt.error else Trial(attempt.outcome, attempt.num_malformed) for attempt in attempts]

    async def _demonstrations(self, adapter: str) -> list[Trial | None]:
        """A demonstration's score is the share of the sampled actions that agree with its expert's."""
        _, compared = await inspect_demonstrations(self.held_out, replace(self.inspector, acting=adapter))
        states = iter(compared)
        return [_agreement(list(islice(states, len(demonstration.path)))) for demonstration in self.held_out]


def _agreement(states: Sequence[ComparedState]) -> Trial | None:
    comparisons = [comparison for state in states for comparison in state.comparisons]
    if not comparisons:
        return None
    num_malformed = sum(comparison.verdict is Verdict.MALFORMED for comparison in comparisons)
    return Trial(fmean(comparison.agrees for comparison in comparisons), num_malformed)


# --------------------------------------------------------------------------------------------------- notes


class _Notes:
    """Where a cycle is, in the learning log, and what is known of it so far."""

    PROGRESS_EVERY_S = 1.0

    def __init__(self, cycle: str, log: LearningLog) -> None:
        self.cycle = cycle
        self.report: dict[str, Any] = {"seconds": {}, "health": {}}
        self._log = log
        self._noted_at = 0.0

    @contextmanager
    def stage(self, stage: CycleStage, message: str = "", total: int = 0) -> Iterator[None]:
        """Note that a stage is reached, and how long it took."""
        self._log.note(self.cycle, stage, message, 0, total, self.report)
        began = time.monotonic()
        try:
            yield
        finally:
            seconds = self.report["seconds"]
            seconds[stage] = round(seconds.get(stage, 0.0) + time.monotonic() - began, 3)

    def progress(self, stage: CycleStage, message: str, done: int, total: int) -> None:
        """Note how far a stage is, at most once a second: rows are for ever."""
        if done == total or time.monotonic() - self._noted_at > self.PROGRESS_EVERY_S:
            self._noted_at = time.monotonic()
            self._log.note(self.cycle, stage, message, done, total, self.report)

    def measure(self, of: str, values: dict[str, float]) -> None:
        self.report["health"][of] = {name: round(value, 6) for name, value in values.items()}


def _probe_prompts(material: Material) -> list[TokenIds]:
    """Prompts of states that the policy has to change at, where there are any: there a probe tells most."""
    states = [state for trajectory in material.trajectories for state in trajectory.states]
    states.sort(key=lambda state: not state.is_informative)
    return [state.prompt for state in states[:NUM_PROBE_PROMPTS]]


def _card(notes: _Notes, kind: str, acting: str, material: Material) -> str:
    return (
        f"# {kind}, {notes.cycle}\n\nA LoRA trained by StepAgent from {acting}, on {len(material.demonstrations)} "
        f"demonstrations and {len(material.own)} own episodes. `probe.json` holds what it says after fixed prompts.\n"
    )
