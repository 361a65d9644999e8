"""Decides whether a candidate may act: the same trials under both adapters, until it is known or the trials are done.

A candidate passes where the lower bound of its gain is above zero, malformed actions did not rise, and it got no worse
at what must not be forgotten. Comparing two bare rates was refused: on a hundred tasks two equal policies easily differ
by five points.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from enum import StrEnum
from itertools import groupby
from statistics import fmean
from typing import Any, Protocol, TypeVar

from learner.evaluation.evidence import Pair, gains, summary
from learner.evaluation.outlook import ERROR_RATE
from learner.evaluation.sequential import Answer, SequentialTest
from learner.evaluation.sign_flips import chance, fewest_pairs

GUARD_RATE = 0.05
"""How often, at most, a guard refuses a candidate though nothing got worse."""
AS_MUCH_EVIDENCE = 0.8
"""An earlier attempt counts where it had so large a share of the trials that there are now."""


class Finding(StrEnum):
    """What the gate says of a candidate."""

    BETTER = "better"  # it may act
    NOT_BETTER = "not_better"  # no gain was seen
    UNDECIDED = "undecided"  # a gain was seen that chance may have made: more evidence, a canary or a person may tell
    MALFORMED = "malformed"  # it gains, but more of its actions cannot be read
    FORGETS = "forgets"  # it gains, but is worse at what went well before


@dataclass(frozen=True, slots=True)
class GateDecision:
    """What the gate says, why, and on what evidence."""

    finding: Finding
    reason: str
    evidence: dict[str, Any]

    @property
    def promote(self) -> bool:
        return self.finding is Finding.BETTER


@dataclass(frozen=True, slots=True)
class Contestants:
    """The names of the two adapters, as the server loads them, that try a unit."""

    candidate: str
    acting: str


TASKS = "tasks"
"""What a unit is where the world's tasks are tried."""
SUCCEEDS_AT_NONE = (
    "the acting adapter succeeds at none, so whole tasks say little: --learner-arg gate-tasks=0 lets demonstrations "
    "decide, step by step"
)

Contest = Callable[[int | None], AbstractAsyncContextManager[Contestants | None]]
"""Makes the contestants of a fold ready for as long as it is entered; of None: candidate and acting adapter themselves.
A fold's are both trained without it. It is entered once a fold, and only while the answer is not known. It gives None
for a fold that has no contestants: its units are not tried."""


class Tried(Protocol):
    """Something to be tried."""

    @property
    def fold(self) -> int | None: ...


UnitT = TypeVar("UnitT", bound=Tried)


class Trials(Protocol[UnitT]):
    """What candidates and the acting adapter are tried on; `learner.evaluation.trials.CycleTrials` in a cycle."""

    @property
    def units(self) -> Sequence[UnitT]:
        """Those of one fold follow each other."""
        ...

    @property
    def anchors(self) -> Sequence[UnitT]:
        """What must not be forgotten."""
        ...

    @property
    def kind(self) -> str:
        """What a unit is, as a plural."""
        ...

    async def pairs(self, units: Sequence[UnitT], contestants: Contestants) -> list[Pair]:
        """Try units under both; those that the acting adapter could not finish are left out."""
        ...


async def judge(
    trials: Trials[Any], contest: Contest, level: float = ERROR_RATE, on_done: Callable[[], object] = lambda: None
) -> GateDecision:
    """Try until the answer is known; `on_done` is called after each unit.

    `level`: the error rate, from `level_for`.
    """
    test, pairs, num_tried = SequentialTest(len(trials.units), level), list[Pair](), 0
    looks = test.planned_looks()
    for fold, units in groupby(trials.units, key=lambda unit: unit.fold):
        async with contest(fold) as contestants:
            for block in _until_each(looks, num_tried, units):
                pairs += await trials.pairs(block, contestants) if contestants else []
                num_tried += len(block)
                for _ in block:
                    on_done()
                if num_tried in looks and test.look(gains(pairs), num_tried == test.num_pairs) is not Answer.OPEN:
                    break
        if test.answer is not Answer.OPEN:
            break
    anchors = list[Pair]()
    if test.answer is Answer.SHOWN and trials.anchors:
        async with contest(None) as contestants:
            anchors = await trials.pairs(trials.anchors, contestants) if contestants else []
    return decide(test, pairs, anchors, trials.kind)


def _until_each(looks: Sequence[int], num_tried: int, units: Iterable[UnitT]) -> Iterable[list[UnitT]]:
    """Blocks of units that end where it is looked."""
    block = list[UnitT]()
    for unit in units:
        block.append(unit)
        num_tried += 1
        if num_tried in looks:
            yield block
            block = []
    if block:
        yield block


def decide(test: SequentialTest, pairs: Sequence[Pair], anchors: Sequence[Pair], kind: str) -> GateDecision:
    """What the pairs say, when the last look has been taken. The guards are asked only where a gain is shown."""
    evidence: dict[str, Any] = {
        "unit": kind, "num_planned": test.num_pairs, "level": test.level, "looks": list(test.looks),
        **summary(pairs), "anchors": summary(anchors),
    }  # fmt: skip
    if not pairs:
        none = f"none of {test.num_pairs} {kind} was finished under the acting adapter"
        words = none if test.num_pairs else f"there are no {kind} to try it on"
        return GateDecision(Finding.UNDECIDED, words, evidence)
    gain, low = fmean(gains(pairs)), test.lower_bound(gains(pairs))
    evidence |= {"gain_low": low, "answer": test.answer.value}
    words = f"gain {gain:+.1%} on {len(pairs)} of {test.num_pairs} {kind}, lower bound {low:+.1%}"
    if test.answer is Answer.SHOWN:
        return GateDecision(*_guarded(words, evidence, pairs, anchors), evidence)
    if len(pairs) < fewest_pairs(test.level):
        words += f"; no gain at all can be shown on fewer than {fewest_pairs(test.level)}"
    if kind == TASKS and not evidence["acting_score"]:
        words += f"; {SUCCEEDS_AT_NONE}"
    is_open = gain > 0 and test.answer is Answer.NOT_SHOWN
    return GateDecision(Finding.UNDECIDED if is_open else Finding.NOT_BETTER, words, evidence)


def _guarded(
    words: str, evidence: dict[str, Any], pairs: Sequence[Pair], anchors: Sequence[Pair]
) -> tuple[Finding, str]:
    """What is found of a candidate that gains: whether the gain has a price, beyond the noise."""
    if chance([pair.malformed_rise for pair in pairs]) <= GUARD_RATE:
        rise = f"malformed actions rose from {evidence['acting_malformed']} to {evidence['candidate_malformed']}"
        return Finding.MALFORMED, f"{rise} ({words})"
    if anchors and chance([-gain for gain in gains(anchors)]) <= GUARD_RATE:
        scores = evidence["anchors"]
        fell = f"from {scores['acting_score']:.1%} to {scores['candidate_score']:.1%} on {len(anchors)} anchors"
        return Finding.FORGETS, f"it got worse at what went well before: {fell} ({words})"
    return Finding.BETTER, words


def level_for(num_candidates: int, num_earlier: int) -> float:
    """The error rate of one candidate's test (Bonferroni).

    Candidates that were refused before on the same evidence count as if they were of this cycle: else a cycle that is
    repeated until it passes would pass by chance.
    """
    return ERROR_RATE / (num_candidates + num_earlier)


def num_earlier(evidence_against: Sequence[Mapping[str, Any]], num_planned: int) -> int:
    """How many candidates were held against the adapter that acts on about as much evidence as there is now.

    `evidence_against`: of all decisions against it.
    """
    planned = [evidence.get("num_planned", 0) for evidence in evidence_against]
    return sum(AS_MUCH_EVIDENCE * num_planned <= number for number in planned)
