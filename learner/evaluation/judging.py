"""Judges the candidates of a cycle: the runtime takes each one in, and the gate holds it against the acting adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from openai import APIStatusError

from learner.client import Endpoint
from learner.data.collaborators import Collaborators
from learner.evaluation import gate
from learner.evaluation.fold_contest import FoldContest, TrainWithout
from learner.evaluation.gate import GateDecision
from learner.evaluation.trials import CycleTrials
from learner.evaluation.twins import as_evidence
from learner.report import CycleRecord
from learner.training.candidates import Candidate
from runtime.store.learning_log import CycleStage


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the gate decided on a candidate that the runtime has verified."""

    candidate: Candidate
    name: str
    """The adapter's."""
    decision: GateDecision

    @property
    def gain(self) -> float:
        return self.decision.evidence.get("gain", float("-inf"))

    def to_json(self) -> dict[str, object]:
        return {
            **self.decision.evidence,
            "objective": self.candidate.objective,
            "promote": self.decision.promote,
            "reason": self.decision.reason,
        }


async def judge(
    record: CycleRecord,
    who: Collaborators,
    trials: CycleTrials,
    candidates: Sequence[Candidate],
    acting: str,
    train_without: TrainWithout,
) -> list[Verdict]:
    """Judge the candidates one after the other. Raises why where the runtime takes none of them in.

    At most two are in the engine at a time, the best one so far and the next: slots are few. By folds the first one
    that passes is taken: each further one would cost a training a fold.
    """
    verdicts, best, problem = list[Verdict](), None, None
    level = gate.level_for(len(candidates), num_earlier(who, trials, acting))
    for candidate in candidates:
        with record.counted(CycleStage.GATE, candidate.objective, len(trials.units)) as count:
            try:
                reason = f"{candidate.objective}, {record.cycle}"
                name = await who.endpoint.register(candidate.folder.absolute(), acting, reason, record.cycle)
            except APIStatusError as error:
                problem = problem or error
                record.add(not_registered={candidate.objective: error.message})
                continue
            contests = FoldContest(record, who, candidate, name, acting, train_without)
            perplexity = record.report.diagnostics.get(candidate.objective, {}).get("perplexity")
            decision = await gate.judge(trials, contests.contest, level, count, perplexity)
            decision.evidence.update(as_evidence(contests.twins))
        verdict = Verdict(candidate, name, decision)
        _log(record, who, verdict, acting)
        verdicts.append(verdict)
        best = await _keep_the_better(who.endpoint, best, verdict)
        if best is not None and trials.folds:
            break
    if problem is not None and not verdicts:
        raise problem
    return verdicts


def num_earlier(who: Collaborators, trials: CycleTrials, acting: str) -> int:
    """How many candidates were held against the acting adapter before, on about as much evidence."""
    return gate.num_earlier(who.learning_log.evidence_against(acting, who.agent), len(trials.units))


def best_of(verdicts: Sequence[Verdict]) -> Verdict:
    """One that is to be promoted, if there is any, and of these the one that gains most."""
    return max(verdicts, key=lambda verdict: (verdict.decision.promote, verdict.gain))


def _log(record: CycleRecord, who: Collaborators, verdict: Verdict, acting: str) -> None:
    decision = verdict.decision
    who.learning_log.add_decision(
        record.cycle, verdict.name, acting, decision.promote, decision.reason, decision.evidence
    )
    record.add(gate={verdict.name: verdict.to_json()})


async def _keep_the_better(endpoint: Endpoint, best: Verdict | None, newest: Verdict) -> Verdict | None:
    """The one of the two that is to be promoted, if one is; the other is refused."""
    if not newest.decision.promote:
        await endpoint.refuse(newest.name, newest.decision.reason)
        return best
    if best is None:
        return newest
    better, other = (newest, best) if newest.gain > best.gain else (best, newest)
    await endpoint.refuse(other.name, f"{better.name} gains more: {better.decision.reason}")
    return better
