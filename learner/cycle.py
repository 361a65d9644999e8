"""One learning cycle: collect, inspect, reward, train, judge, promote. All of it through the served endpoint.

Whatever goes wrong ends in the cycle's row, as a reason; serving goes on without us. Several objectives may be trained
in one cycle: those that cannot be are left out with their reason, and the gate chooses among the rest.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from openai import APIStatusError, OpenAIError

from learner.data.collaborators import Collaborators
from learner.data.collect import Collected, collect
from learner.data.comparison import DropReason
from learner.data.doubts import doubts_of
from learner.data.experts import Corrections, ModelExpert, WorldExpert
from learner.data.inspection import Inspection, inspect
from learner.data.judge import judge_rewards, with_judged_outcomes
from learner.data.lessons import LessonErased, note_reading, require_unerased
from learner.data.rewards import agreement_rewards
from learner.data.training_data import TrainingData
from learner.evaluation.fold_contest import TrainWithout
from learner.evaluation.folds import left_out
from learner.evaluation.judging import Verdict, best_of, judge, num_earlier
from learner.evaluation.trials import CycleTrials
from learner.evaluation.twins import needed_later
from learner.objectives.build import TAKES_OUTCOMES, NothingToLearn
from learner.objectives.successes import success_counts
from learner.options import CycleOptions
from learner.report import CycleRecord
from learner.training.candidates import (
    Candidate,
    CandidateOptions,
    save_reward,
    train_candidates,
    train_quietly,
)
from learner.training.discriminator import Discriminator, DiscriminatorOptions, discriminate
from learner.training.freed_memory import hand_back_freed_memory
from learner.training.trainer import TrainingFailed
from policies.adapters.files import AdapterRefused, adapter_rank, weights_digest
from policies.types import BASE_ADAPTER
from runtime.store.learning_log import CycleStage

MOST_DOUBTS = 50
"""In a report."""


@dataclass(frozen=True, slots=True)
class Ending:
    """How a cycle ended, and why."""

    stage: CycleStage
    message: str


async def run_cycle(cycle: str, who: Collaborators, options: CycleOptions) -> CycleStage:
    """Run a cycle to its end, which is noted in the learning log with a report. No error of a cycle is raised."""
    record = CycleRecord(cycle, who.learning_log, who.agent)
    try:
        ending = await _run(record, who, options)
    except NothingToLearn as reason:
        ending = Ending(CycleStage.NOTHING_TO_LEARN, str(reason))
    except (TrainingFailed, LessonErased) as error:
        ending = Ending(CycleStage.FAILED, str(error))
    except Exception as error:  # whatever broke belongs into the cycle's row; serving goes on without us
        ending = Ending(CycleStage.FAILED, f"{type(error).__name__}: {error}")
    record.end(ending.stage, ending.message)
    return ending.stage


async def _run(record: CycleRecord, who: Collaborators, options: CycleOptions) -> Ending:
    parents = await _acting_and_parents(who, options)
    collected = _collect(record, who, options, parents)
    note_reading(record, who, collected)
    await _doubt(record, who, collected)
    trials = _look_ahead(record, who, options, collected, parents[0])
    inspection = await _inspect(record, who, options, collected, parents[0])
    training_data = await _ask_judge(record, who, collected, inspection.training_data)
    record.measure("own_episodes", success_counts(training_data, options.objective))
    _require_something_new(options, inspection, training_data)
    discriminator = _reward(record, who, options, collected, training_data)
    try:
        with _candidate_folders(who.state) as folders:
            await _renew_reward(record, who, parents[0], discriminator, training_data, folders)
            candidates = _train(record, who, options, parents[0], training_data, discriminator, folders)
            train_without = _fold_training(record, who, options, collected, training_data)
            verdicts = await judge(record, who, trials, candidates, parents[0], train_without)
        require_unerased(who.log, [each.episode.id for each in collected.read])
        return await _promote(record, who, options, verdicts, parents[0])
    finally:  # whatever happened: what is neither promoted nor refused would keep its slot in the engine
        with suppress(OpenAIError):
            await refuse_left_over([record.cycle], who)


async def refuse_left_over(cycles: Sequence[str], who: Collaborators) -> None:
    """Refuse what these cycles have registered, but for what was promoted and what later gates need."""
    await who.endpoint.refuse_left_over(cycles, spared=needed_later(cycles, who.learning_log))


# ------------------------------------------------------------------------------------------------- stages


async def _acting_and_parents(who: Collaborators, options: CycleOptions) -> list[str]:
    if options.canary_share and (canary := await who.endpoint.canary()):
        raise NothingToLearn(f"{canary} is a canary still: it is promoted or refused by how it does, or by you")
    parents = await who.endpoint.parents()
    if parents[0] != BASE_ADAPTER:
        _require_sound(parents[0], who, await who.endpoint.digest(parents[0]))
    return parents


def _require_sound(acting: str, who: Collaborators, digest: str) -> None:
    """Raises TrainingFailed where the files of the acting adapter, which are trained further, are not what acts: the
    engine goes on with what it has read."""
    folder = who.adapter_folder(acting)
    try:
        adapter_rank(folder)
        problem = "" if weights_digest(folder) == digest else "its weights are not those that were registered"
    except AdapterRefused as error:
        problem = str(error)
    if problem:
        whose = f" --agent {who.agent}" if who.agent else ""
        raise TrainingFailed(
            f"{acting} acts and cannot be trained further from its files in {folder}: {problem}; copy them back from a "
            f"backup, or go back to what acted before (python -m learner rollback{whose})"
        )


def _collect(record: CycleRecord, who: Collaborators, options: CycleOptions, parents: Sequence[str]) -> Collected:
    with record.stage(CycleStage.COLLECT):
        since = who.learning_log.last_step_seen(who.agent)
        seed = options.training.seed
        collected = collect(who.log, since, parents, options.collection, seed, who.world, who.agent)
        record.add(acting=parents[0], collected=collected.counts)
        record.has_read_to(collected.last_step_id)
    if not collected.demonstrations and not collected.policy_episodes:
        held = f", {len(collected.held_out)} held out" if collected.held_out else ""
        whose = f" --agent {who.agent}" if who.agent else ""
        raise NothingToLearn(
            f"there are no demonstrations to train on{held}, and no own episodes: import some first "
            f"(python -m learner import FILE{whose})"
        )
    return collected


async def _doubt(record: CycleRecord, who: Collaborators, collected: Collected) -> None:
    """What is to be doubted of the demonstrations, for the report: nothing is left out for it. Asked is only who
    answers at once; `python -m learner doubts` asks the world's expert, too."""
    found = await doubts_of([*collected.demonstrations, *collected.held_out], [Corrections(who.log)], who.world)
    record.add(doubts=[doubt.to_json() for doubt in found[:MOST_DOUBTS]])
    record.measure("demonstrations", {"num_doubted_steps": float(len(found))})


def _look_ahead(
    record: CycleRecord, who: Collaborators, options: CycleOptions, collected: Collected, acting: str
) -> CycleTrials:
    """The gate's trials, and in the report what they could show: said before anything is trained."""
    trials = CycleTrials.of_cycle(acting, collected, who, options.gate_tasks)
    num_candidates = len(options.objectives) + num_earlier(who, trials, acting)
    record.add(outlook=trials.outlook(num_candidates).to_json())
    return trials


async def _inspect(
    record: CycleRecord, who: Collaborators, options: CycleOptions, collected: Collected, acting: str
) -> Inspection:
    num_states = sum(len(each.path) for each in (*collected.demonstrations, *collected.policy_episodes))
    with record.counted(CycleStage.INSPECT, "", num_states) as count:
        inspection = await inspect(who, collected, acting, options.num_samples, count)
        problems = [expert.problems for expert in who.experts if isinstance(expert, ModelExpert | WorldExpert)]
        record.add(inspection=inspection.report(), expert_problems=dict(sum(problems, Counter[str]())))
        record.measure("training_data", inspection.measures())
        who.learning_log.add_rewards(agreement_rewards(record.cycle, inspection.training_data))
    return inspection


async def _ask_judge(
    record: CycleRecord, who: Collaborators, collected: Collected, training_data: TrainingData
) -> TrainingData:
    """The training data with a judge's scores as outcomes where nobody has said one; as it is without a judge."""
    if who.judge is None:
        return training_data
    unjudged = [each for each in collected.policy_episodes if each.outcome is None]
    with record.stage(CycleStage.REWARD, f"{who.judge.model} judges"):
        scores = await who.judge.scores(unjudged)
        who.learning_log.add_rewards(judge_rewards(record.cycle, unjudged, scores))
        mean = sum(scores.values()) / len(scores) if scores else None
        told = {"episodes": len(unjudged), "scored": len(scores), "mean": mean, "problems": dict(who.judge.problems)}
        record.add(judge=told)
    return with_judged_outcomes(training_data, scores)


def _require_something_new(options: CycleOptions, inspection: Inspection, training_data: TrainingData) -> None:
    """Raises NothingToLearn where the policy has all that experts showed by heart, and no outcome of own episodes,
    whoever said it, teaches more."""
    judged = any(each.outcome is not None for each in training_data.policy_episodes)
    if judged and not TAKES_OUTCOMES.isdisjoint(options.objectives):
        return
    compared = inspection.at_expert_states + inspection.at_policy_states
    if compared and all(state.drop_reason is DropReason.MASTERED for state in compared):
        raise NothingToLearn(f"the policy does what the experts do at all {len(compared)} states where they answered")


def _reward(
    record: CycleRecord, who: Collaborators, options: CycleOptions, collected: Collected, training_data: TrainingData
) -> Discriminator | None:
    """Discriminator rewards; those of agreement are there since the inspection, the implicit ones come with a trained
    policy."""
    with record.stage(CycleStage.REWARD):
        if not options.discriminator and "inverse" not in options.objectives:
            record.add(no_discriminator="it was not asked for")
            return None
        settings = DiscriminatorOptions(training=options.training)
        try:
            discriminator = discriminate(
                training_data, who.base, options.objective, settings, options.device, collected.groups_of
            )
            rewards = discriminator.rewards_of(record.cycle, training_data)
        except (NothingToLearn, TrainingFailed) as reason:
            record.add(no_discriminator=str(reason))
            return None
        who.learning_log.add_rewards(rewards)
        record.measure("discriminator", discriminator.measures())
        return discriminator


async def _renew_reward(
    record: CycleRecord,
    who: Collaborators,
    acting: str,
    discriminator: Discriminator | None,
    training_data: TrainingData,
    folders: Path,
) -> None:
    """Hand the discriminator to the acting adapter, whose actions it was trained against: whatever becomes of the
    candidates, it tells those apart better than the one that was trained against the actions of the adapter before."""
    if discriminator is None or acting == BASE_ADAPTER:
        return
    try:
        save_reward(discriminator, training_data, folders / "reward", record.cycle, who.protocol)
        require_unerased(who.log, [trajectory.episode_id for trajectory in training_data.trajectories])
        await who.endpoint.add_reward(acting, (folders / "reward").absolute(), record.cycle)
    except (TrainingFailed, OpenAIError) as problem:
        record.add(no_reward_model=str(problem))


def _train(
    record: CycleRecord,
    who: Collaborators,
    options: CycleOptions,
    acting: str,
    training_data: TrainingData,
    discriminator: Discriminator | None,
    folders: Path,
) -> list[Candidate]:
    """A candidate for each objective that can be trained. Raises why where none can."""
    return train_candidates(record, who, _settings(options), acting, training_data, discriminator, folders)


def _fold_training(
    record: CycleRecord,
    who: Collaborators,
    options: CycleOptions,
    collected: Collected,
    training_data: TrainingData,
) -> TrainWithout:
    """How the gate gets an adapter that has not seen a fold."""

    def train_without(fold: int, objective: str, begin: str, folder: Path) -> set[str]:
        others = training_data.without(left_out(fold, collected.groups_of))
        train_quietly(record, who, _settings(options), begin, others, objective, folder)
        hand_back_freed_memory()
        return {demonstration.episode_id for demonstration in others.demonstrations}

    return train_without


def _settings(options: CycleOptions) -> CandidateOptions:
    return CandidateOptions(
        options.objectives, options.objective, options.training, options.device, options.implicit_rewards
    )


async def _promote(
    record: CycleRecord, who: Collaborators, options: CycleOptions, verdicts: Sequence[Verdict], acting: str
) -> Ending:
    """Hand the best of those that are better to the runtime; the implicit rewards are those of the best in any case."""
    best, share = best_of(verdicts), options.canary_share
    who.learning_log.add_rewards(best.candidate.rewards)
    if not best.decision.promote:
        return Ending(CycleStage.REFUSED, "; ".join(f"{each.name}: {each.decision.reason}" for each in verdicts))
    reason = best.decision.reason
    with record.stage(CycleStage.PROMOTE, best.name):
        try:
            if share:
                adapter = await who.endpoint.start_canary(best.name, share, reason, acting)
            else:
                adapter = await who.endpoint.promote(best.name, reason, acting)
        except APIStatusError as problem:  # somebody else has changed what acts meanwhile
            message = f"{best.name} was better ({reason}), but is not let act: {problem.message}"
            return Ending(CycleStage.REFUSED, message)
    if adapter["proposal"]:
        record.add(proposed=best.name)
        message = f"{best.name} waits for somebody's yes (python -m learner approve): {reason}"
        return Ending(CycleStage.PROPOSED, message)
    if adapter["state"] == "refused":
        return Ending(CycleStage.REFUSED, f"{best.name}: a dry run promotes nothing: {reason}")
    record.add(promoted=best.name)
    how = f", canary of {share:.0%}" if share else ", as a canary" if adapter["state"] == "canary" else ""
    return Ending(CycleStage.PROMOTED, f"{best.name}{how}: {reason}")


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
