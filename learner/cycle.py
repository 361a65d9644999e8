"""One learning cycle: collect -> inspect -> reward -> train -> gate -> promote."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from learner.comparison import report_on
from learner.endpoint import Endpoint
from learner.gate import decide
from learner.held_out import is_held_out
from learner.inspection import InspectedState, inspect
from learner.learning_log import CycleStage, LearningLog, RewardSource, StepReward
from learner.objectives import Likelihood, Objective, Pair, StepPreference, action_row
from learner.trainer import Trainer, TrainingFailed, TrainingOptions
from policies.types import BASE_ADAPTER
from runtime.step_log import StepLog
from runtime.types import Actor, Step
from tools.worlds.practice import Attempt
from tools.worlds.world import World


@dataclass(frozen=True, slots=True)
class CycleOptions:
    """What a cycle does."""

    objectives: tuple[str, ...] = ("sft",)
    """`sft`, `implicit`: each trains a candidate, and the gate chooses."""
    num_samples: int = 2
    """Actions of the acting policy at each state of a demonstration."""
    held_out_share: float = 0.2
    """Of the demonstrations; never trained on."""
    gate_tasks: int = 100
    """Validation tasks of the world on which candidate and acting adapter are compared."""
    gate_temperature: float = 1.0
    beta: float = 0.3
    """Of the implicit reward."""
    anchor_weight: float = 1.0
    training: TrainingOptions = field(default_factory=TrainingOptions)


@dataclass(frozen=True, slots=True)
class CycleParts:
    """What a cycle works with; wired in learner/__main__.py."""

    endpoint: Endpoint
    log: StepLog
    learning_log: LearningLog
    world: World
    base: Path
    adapters: Path
    """Where the runtime keeps its adapters' folders."""
    options: CycleOptions


class NothingToLearn(Exception):
    """The cycle ends without a candidate, and why."""


async def run_cycle(cycle: str, parts: CycleParts) -> CycleStage:
    """Run a cycle to its end, which is noted in the learning log with a report. No error of a cycle is raised."""
    report: dict[str, Any] = {}
    try:
        stage, message = await _run(_Notes(cycle, parts.learning_log, report), parts)
    except NothingToLearn as reason:
        stage, message = CycleStage.NO_LESSON, str(reason)
    except TrainingFailed as error:
        stage, message = CycleStage.FAILED, str(error)
    except Exception as error:  # whatever broke belongs into the cycle's row; serving goes on without us
        stage, message = CycleStage.FAILED, f"{type(error).__name__}: {error}"
    parts.learning_log.note(cycle, stage, message, report=report)
    return stage


@dataclass(frozen=True, slots=True)
class _Notes:
    """Where the cycle's progress is written."""

    cycle: str
    log: LearningLog
    report: dict[str, Any]

    def stage(self, stage: CycleStage, message: str = "", done: int = 0, total: int = 0) -> None:
        self.log.note(self.cycle, stage, message, done, total, self.report)


async def _run(notes: _Notes, parts: CycleParts) -> tuple[CycleStage, str]:
    began = time.monotonic()
    notes.stage(CycleStage.COLLECT)
    trajectories = collect(parts)
    acting = await parts.endpoint.acting()
    notes.report.update(acting=acting, demonstrations=len(trajectories))
    notes.stage(CycleStage.INSPECT, total=len(trajectories))
    states = await inspect(trajectories, parts.endpoint, parts.log, acting, parts.options.num_samples)
    notes.report["comparison"] = report_on(state.compared for state in states).to_json()
    notes.stage(CycleStage.REWARD)
    parts.learning_log.add_rewards(agreement_rewards(notes.cycle, states))
    if all(state.compared.drop_reason is not None for state in states):
        raise NothingToLearn("the acting policy does what the experts do at every state of the demonstrations")
    candidates = await _train(notes, parts, acting, states)
    notes.report["cycle_seconds_without_gate"] = time.monotonic() - began
    stage, message = await _choose(notes, parts, acting, candidates)
    notes.report["cycle_seconds"] = time.monotonic() - began
    return stage, message


def collect(parts: CycleParts) -> list[list[Step]]:
    """The experts' trajectories that may be trained on. Raises NothingToLearn where there are none."""
    episodes = parts.log.episodes(limit=1_000_000, actor=Actor.EXPERT)
    share = parts.options.held_out_share
    kept = [episode for episode in episodes if not is_held_out(episode.id, share)]
    if not kept:
        raise NothingToLearn(f"there are {len(episodes)} demonstrations, none to train on: import some first")
    return [parts.log.steps(episode.id) for episode in kept]


def agreement_rewards(cycle: str, states: Sequence[InspectedState]) -> list[StepReward]:
    """1 for an own action that means what the expert's does, else 0: the first reward of StepAgent (2411.03817)."""
    return [
        StepReward(step.id, cycle, RewardSource.EXPERT_AGREEMENT, float(comparison.agrees))
        for state in states
        for step, comparison in zip(state.samples, state.compared.comparisons, strict=True)
    ]


def objective_of(name: str, states: Sequence[InspectedState], options: CycleOptions) -> Objective:
    """An objective on the inspected states. Raises ValueError for an unknown name."""
    experts = [action_row(s.expert.prompt_token_ids, s.expert.completion_token_ids, _owner(s)) for s in states]
    if name == "sft":
        return Likelihood("sft", tuple(experts))
    if name == "implicit":
        return _implicit(experts, states, options)
    raise ValueError(f"no objective is called {name!r}; there are: sft, implicit")


def _implicit(experts: list[Any], states: Sequence[InspectedState], options: CycleOptions) -> StepPreference:
    rows, pairs = list(experts), []
    for chosen, state in enumerate(states):
        compared = zip(state.samples, state.compared.comparisons, strict=True)
        rejected = [sample for sample, comparison in compared if not comparison.agrees]
        for sample in rejected:
            pairs.append(Pair((chosen,), (len(rows),), 1.0 / len(rejected)))
            rows.append(action_row(sample.prompt_token_ids, sample.completion_token_ids, _owner(state)))
    anchored = frozenset(range(len(experts)))
    return StepPreference(tuple(rows), tuple(pairs), anchored, options.beta, options.anchor_weight)


def _owner(state: InspectedState) -> tuple[object, ...]:
    return (state.expert.episode_id, state.expert.id)


async def _train(notes: _Notes, parts: CycleParts, acting: str, states: Sequence[InspectedState]) -> list[str]:
    """Train a candidate for each objective and hand it to the runtime; returns their names, not yet judged."""
    names = []
    prompts = [state.expert.prompt_token_ids for state in states if state.compared.drop_reason is None][:8]
    begin = None if acting == BASE_ADAPTER else parts.adapters / acting
    for kind in parts.options.objectives:
        trainer = Trainer(parts.base, begin, parts.options.training)
        training = trainer.train(
            objective_of(kind, states, parts.options),
            lambda done, total, kind=kind: notes.stage(CycleStage.TRAIN, kind, done, total),
        )
        notes.report.setdefault("health", {}).update({f"{kind}_{k}": v for k, v in training.health.items()})
        folder = Path(tempfile.mkdtemp(prefix="candidate-"))
        try:
            trainer.save(folder, prompts, f"# {kind}, cycle {notes.cycle}\n\nTrained from {acting} by StepAgent.\n")
            names.append(await parts.endpoint.register(folder, acting, f"{kind}, cycle {notes.cycle}"))
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    return names


async def _choose(notes: _Notes, parts: CycleParts, acting: str, candidates: Sequence[str]) -> tuple[CycleStage, str]:
    """Hold every candidate against the acting adapter; promote the best of those that are better, refuse the others."""
    notes.stage(CycleStage.GATE, acting)
    baseline = await _attempts(parts, acting)
    decisions = {}
    for name in candidates:
        notes.stage(CycleStage.GATE, name)
        decisions[name] = decide(await _attempts(parts, name), baseline)
        decision = decisions[name]
        parts.learning_log.add_decision(notes.cycle, name, acting, decision.promote, decision.reason, decision.evidence)
    better = [name for name, decision in decisions.items() if decision.promote]
    best = max(better, key=lambda name: decisions[name].evidence["gain"], default=None)
    for name in decisions.keys() - {best}:
        await parts.endpoint.refuse(name, decisions[name].reason)
    notes.report["gate"] = {
        name: decision.evidence | {"reason": decision.reason} for name, decision in decisions.items()
    }
    if best is None:
        return CycleStage.REFUSED, "; ".join(f"{name}: {decision.reason}" for name, decision in decisions.items())
    notes.stage(CycleStage.PROMOTE, best)
    await parts.endpoint.promote(best, decisions[best].reason)
    notes.report["promoted"] = best
    return CycleStage.PROMOTED, f"{best}: {decisions[best].reason}"


async def _attempts(parts: CycleParts, adapter: str) -> list[Attempt]:
    options = parts.options
    num_tasks = min(options.gate_tasks, parts.world.splits["validation"])
    return await parts.endpoint.evaluate(parts.world, "validation", num_tasks, adapter, options.gate_temperature)
