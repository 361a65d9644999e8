"""One learning cycle: collect -> inspect -> reward -> train -> gate -> promote. All of it through the endpoint.

Whatever goes wrong ends in the cycle's row, as a reason; serving goes on without us. Several objectives may be trained
in one cycle: those that cannot be are left out with their reason, and the gate chooses among the rest.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from openai import APIStatusError, OpenAIError

from learner.client import Endpoint
from learner.data.collect import Collected, CollectionOptions, collect
from learner.data.comparison import DropReason
from learner.data.experts import Expert, ModelExpert
from learner.data.inspection import Inspection, Inspector, inspect
from learner.data.rewards import agreement_rewards, discriminator_rewards, implicit_rewards
from learner.data.training_data import TrainingData
from learner.evaluation.gate import GateDecision, decide
from learner.evaluation.trials import Trials
from learner.objectives.build import NothingToLearn, ObjectiveOptions, objective_of
from learner.objectives.objectives import Objective
from learner.report import CycleNotes
from learner.training.diagnostics import WatchedActions, diagnostics, policy_action_sums
from learner.training.discriminator import Discriminator, DiscriminatorOptions, train_discriminator
from learner.training.trainer import Trainer, TrainingFailed, TrainingOptions
from policies.chat_protocol import ChatProtocol
from policies.types import BASE_ADAPTER, TokenIds
from runtime.store.learning_log import CycleStage, LearningLog, StepReward
from runtime.store.step_log import StepLog
from tools.worlds.world import World

NUM_PROBE_PROMPTS = 8
"""States whose prompts the probe is chosen from."""


@dataclass(frozen=True, slots=True)
class CycleOptions:
    """What a cycle does."""

    objectives: tuple[str, ...] = ("sft", "rft")
    """Of `learner.objectives.build.OBJECTIVES`: each that can be trains a candidate, and the gate chooses. With few
    demonstrations own successes teach more, with many the experts do, as measured (benchmarks/methods.py)."""
    num_samples: int = 2
    """Actions of the acting policy at each state of a demonstration."""
    gate_tasks: int = 100
    """Validation tasks of the world on which candidates and the acting adapter are compared."""
    canary_share: float = 0.0
    """Of the new episodes that a candidate which passed the gate serves at first; 0: it acts at once."""
    collection: CollectionOptions = field(default_factory=CollectionOptions)
    objective: ObjectiveOptions = field(default_factory=ObjectiveOptions)
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
    notes = CycleNotes(cycle, parts.learning_log)
    try:
        stage, message = await _run(notes, parts)
    except NothingToLearn as reason:
        stage, message = CycleStage.NOTHING_TO_LEARN, str(reason)
    except TrainingFailed as error:
        stage, message = CycleStage.FAILED, str(error)
    except Exception as error:  # whatever broke belongs into the cycle's row; serving goes on without us
        stage, message = CycleStage.FAILED, f"{type(error).__name__}: {error}"
    parts.learning_log.note(cycle, stage, message, report=notes.report)
    return stage


async def _run(notes: CycleNotes, parts: CycleParts) -> tuple[CycleStage, str]:
    parents = await parts.endpoint.parents()
    if parts.options.canary_share and (canary := await parts.endpoint.canary()):
        raise NothingToLearn(f"{canary} is a canary still: it is promoted or refused by how it does, or by you")
    collected = _collect(notes, parts, parents)
    inspector = _inspector(parts, parents[0])
    inspection = await _inspect(notes, inspector, collected)
    objectives = _reward(notes, parts, inspection.training_data)
    try:
        with _candidate_folders(parts.state) as folders:
            candidates = _train(notes, parts, parents[0], inspection.training_data, objectives, folders)
            judged = await _gate(notes, parts, inspector, collected, candidates)
        return await _promote(notes, parts, parents[0], judged)
    finally:  # whatever happened: what is neither promoted nor refused would keep its slot in the engine
        with suppress(OpenAIError):
            await parts.endpoint.refuse_left_over([notes.cycle])


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


def _collect(notes: CycleNotes, parts: CycleParts, parents: Sequence[str]) -> Collected:
    with notes.stage(CycleStage.COLLECT):
        seed = parts.options.training.seed
        since = parts.learning_log.last_step_seen()
        collected = collect(parts.log, since, parents, parts.options.collection, seed)
        notes.report.update(acting=parents[0], collected=collected.counts, last_step_id=collected.last_step_id)
    if not collected.demonstrations and not collected.policy_episodes:
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


async def _inspect(notes: CycleNotes, inspector: Inspector, collected: Collected) -> Inspection:
    num_states = sum(len(each.path) for each in (*collected.demonstrations, *collected.policy_episodes))
    with notes.counted(CycleStage.INSPECT, "", num_states) as count:
        inspection = await inspect(collected.demonstrations, collected.policy_episodes, inspector, count)
        notes.report["inspection"] = inspection.report()
        notes.measure("training_data", inspection.measures())
        problems = [expert.problems for expert in inspector.experts if isinstance(expert, ModelExpert)]
        notes.report["expert_problems"] = dict(sum(problems, Counter[str]()))
    compared = inspection.at_expert_states + inspection.at_policy_states
    if compared and all(state.drop_reason is DropReason.MASTERED for state in compared):
        raise NothingToLearn(f"the policy does what the experts do at all {len(compared)} states where they answered")
    return inspection


Lessons = dict[str, Objective | NothingToLearn]
"""By its name, each objective that was asked for, or why there is none."""


def _reward(notes: CycleNotes, parts: CycleParts, training_data: TrainingData) -> Lessons:
    """Agreement and discriminator rewards, and the objectives; the implicit rewards come with a trained policy.

    The discriminator, which is a network of its own, is gone when this ends.
    """
    with notes.stage(CycleStage.REWARD):
        parts.learning_log.add_rewards(agreement_rewards(notes.cycle, training_data))
        discriminator = _discriminator(notes, parts, training_data)
        return {
            kind: _lesson(kind, parts.options.objective, training_data, discriminator)
            for kind in parts.options.objectives
        }


def _discriminator(notes: CycleNotes, parts: CycleParts, training_data: TrainingData) -> Discriminator | Exception:
    """With its rewards in the log; or why there is none."""
    options = parts.options
    try:
        discriminator = train_discriminator(
            training_data,
            parts.base,
            options.objective,
            DiscriminatorOptions(training=options.training),
            options.device,
        )
    except (NothingToLearn, TrainingFailed) as reason:
        notes.report["discriminator"] = {"none": str(reason)}
        return reason
    watched = WatchedActions.of(training_data)
    logits = discriminator.rewards(watched.sequences()[len(watched.experts) :])
    actions = [action for _, action in watched.policy_actions]
    parts.learning_log.add_rewards(discriminator_rewards(notes.cycle, actions, logits))
    accuracy = {} if discriminator.accuracy is None else {"accuracy": discriminator.accuracy}
    notes.measure("discriminator", {"num_pairs": float(discriminator.num_pairs), **accuracy})
    return discriminator


def _lesson(
    kind: str, options: ObjectiveOptions, training_data: TrainingData, discriminator: Discriminator | Exception
) -> Objective | NothingToLearn:
    try:
        if not isinstance(discriminator, Exception):
            return objective_of(kind, training_data, options, discriminator)
        if kind == "inverse":
            return NothingToLearn(f"there is no discriminator: {discriminator}")
        return objective_of(kind, training_data, options)
    except NothingToLearn as reason:
        return reason


def _train(
    notes: CycleNotes, parts: CycleParts, acting: str, training_data: TrainingData, objectives: Lessons, folders: Path
) -> list[Candidate]:
    """A candidate for each objective that can be trained. Raises why where none can."""
    candidates, problems = [], list[NothingToLearn | TrainingFailed]()
    for kind, objective in objectives.items():
        with notes.stage(CycleStage.TRAIN, kind):
            try:
                if isinstance(objective, NothingToLearn):
                    raise objective
                candidates.append(_train_one(notes, parts, acting, training_data, kind, objective, folders / kind))
            except (NothingToLearn, TrainingFailed) as problem:
                problems.append(problem)
                notes.report.setdefault("not_trained", {})[kind] = str(problem)
    if not candidates:
        raise next((problem for problem in problems if isinstance(problem, TrainingFailed)), problems[0])
    return candidates


def _train_one(
    notes: CycleNotes,
    parts: CycleParts,
    acting: str,
    training_data: TrainingData,
    kind: str,
    objective: Objective,
    folder: Path,
) -> Candidate:
    begin = None if acting == BASE_ADAPTER else parts.state / "adapters" / acting
    trainer = Trainer(parts.base, begin, parts.options.training, parts.options.device)
    watched = WatchedActions.of(training_data)
    rows = watched.sequences()
    before = trainer.logprobs(rows)
    training = trainer.train(objective, lambda done, total: notes.progress(CycleStage.TRAIN, kind, done, total))
    after = trainer.logprobs(rows)
    notes.measure(kind, {**training.diagnostics, **diagnostics(watched, before, after)})
    trainer.save(folder, _probe_prompts(training_data), _card(notes, kind, acting, training_data))
    own = [action for _, action in watched.policy_actions]
    beta = parts.options.objective.beta
    rewards = implicit_rewards(
        notes.cycle, own, policy_action_sums(watched, after), policy_action_sums(watched, before), beta
    )
    return Candidate(kind, folder, rewards)


async def _gate(
    notes: CycleNotes,
    parts: CycleParts,
    inspector: Inspector,
    collected: Collected,
    candidates: Sequence[Candidate],
) -> list[Judged]:
    """Judge the candidates one after the other. Raises why where the runtime takes none of them in.

    At most two are in the engine at a time, the best one so far and the next: slots are few.
    """
    options, judged, best = parts.options, list[Judged](), None
    trials = Trials.of_cycle(notes.cycle, collected, inspector, options.gate_tasks)
    with notes.counted(CycleStage.GATE, inspector.acting, trials.num) as count:
        baseline = await trials.results(inspector.acting, count)
    problems = list[APIStatusError]()
    for candidate in candidates:
        with notes.counted(CycleStage.GATE, candidate.objective, trials.num) as count:
            reason = f"{candidate.objective}, {notes.cycle}"
            try:
                name = await parts.endpoint.register(candidate.folder.absolute(), inspector.acting, reason)
            except APIStatusError as problem:
                problems.append(problem)
                notes.report.setdefault("not_taken_in", {})[candidate.objective] = problem.message
                continue
            decision = decide(await trials.results(name, count), baseline, trials.unit, len(candidates))
            parts.learning_log.add_decision(
                notes.cycle, name, inspector.acting, decision.promote, decision.reason, decision.evidence
            )
        judged.append(Judged(candidate, name, decision))
        best = await _keep_the_better(parts.endpoint, best, judged[-1])
    if not judged:
        raise problems[0]
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


async def _promote(
    notes: CycleNotes, parts: CycleParts, acting: str, judged: Sequence[Judged]
) -> tuple[CycleStage, str]:
    """Hand the best of those that are better to the runtime; the implicit rewards are those of the best in any case."""
    best = max(judged, key=lambda each: (each.decision.promote, each.gain))
    parts.learning_log.add_rewards(best.candidate.rewards)
    if not best.decision.promote:
        return CycleStage.REFUSED, "; ".join(f"{each.name}: {each.decision.reason}" for each in judged)
    reason, share = best.decision.reason, parts.options.canary_share
    with notes.stage(CycleStage.PROMOTE, best.name):
        try:
            if share:
                record = await parts.endpoint.start_canary(best.name, share, reason, acting)
            else:
                record = await parts.endpoint.promote(best.name, reason, acting)
        except APIStatusError as problem:  # somebody else has changed what acts meanwhile
            return CycleStage.REFUSED, f"{best.name} was better ({reason}), but is not let act: {problem.message}"
    if record["proposal"]:
        notes.report["proposed"] = best.name
        return CycleStage.PROPOSED, f"{best.name} waits for somebody's yes (python -m learner approve): {reason}"
    if record["state"] == "refused":
        return CycleStage.REFUSED, f"{best.name}: a dry run promotes nothing: {reason}"
    notes.report["promoted"] = best.name
    return CycleStage.PROMOTED, f"{best.name}{', as a canary' if record['state'] == 'canary' else ''}: {reason}"


def _probe_prompts(training_data: TrainingData) -> list[TokenIds]:
    """Prompts of states that the policy has to change at, where there are any: there a probe tells most."""
    states = [state for trajectory in training_data.trajectories for state in trajectory.states]
    states.sort(key=lambda state: not state.is_informative)
    return [state.prompt for state in states[:NUM_PROBE_PROMPTS]]


def _card(notes: CycleNotes, kind: str, acting: str, training_data: TrainingData) -> str:
    return (
        f"# {kind}, {notes.cycle}\n\nA LoRA trained by StepAgent from {acting}, on {len(training_data.demonstrations)} "
        f"demonstrations and {len(training_data.policy_episodes)} own episodes. `probe.json` holds what it says after "
        "fixed prompts.\n"
    )
