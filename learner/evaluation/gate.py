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

from learner.evaluation.advice import advice, more_to_try
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


@dataclass(frozen=True, slots=True)
class NoContest:
    """Why a fold has no contestants: its units are not tried."""

    reason: str


@dataclass(frozen=True, slots=True)
class Untried:
    """Units that were not tried."""

    fold: int | None
    number: int
    reason: str

    def words(self, num_planned: int, kind: str) -> str:
        of_fold = "" if self.fold is None else f", those of fold {self.fold}"
        others = "; import demonstrations of other tasks" if self.number == num_planned else ""
        return f"{self.number} of {num_planned} {kind} could not be tried{of_fold}: {self.reason}{others}"


Contest = Callable[[int | None], AbstractAsyncContextManager[Contestants | NoContest]]
"""Makes the contestants of a fold ready for as long as it is entered; of None: candidate and acting adapter themselves.
A fold's are both trained without it. It is entered once a fold, and only while the answer is not known."""


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
    trials: Trials[Any],
    contest: Contest,
    level: float = ERROR_RATE,
    on_done: Callable[[], object] = lambda: None,
    perplexity: float | None = None,
) -> GateDecision:
    """Try until the answer is known; `on_done` is called after each unit.

    `level`: the error rate, from `level_for`. `perplexity`: of the candidate after training, for advice.
    """
    test, pairs, num_tried = SequentialTest(len(trials.units), level), list[Pair](), 0
    untried = list[Untried]()
    looks = test.planned_looks()
    for fold, units in ((fold, list(group)) for fold, group in groupby(trials.units, key=lambda unit: unit.fold)):
        async with contest(fold) as contestants:
            if isinstance(contestants, NoContest):
                untried.append(Untried(fold, len(units), contestants.reason))
            for block in _until_each(looks, num_tried, units):
                pairs += [] if isinstance(contestants, NoContest) else await trials.pairs(block, contestants)
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
            anchors = [] if isinstance(contestants, NoContest) else await trials.pairs(trials.anchors, contestants)
    return decide(test, pairs, anchors, trials.kind, untried, perplexity)


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


def decide(
    test: SequentialTest,
    pairs: Sequence[Pair],
    anchors: Sequence[Pair],
    kind: str,
    untried: Sequence[Untried] = (),
    perplexity: float | None = None,
) -> GateDecision:
    """What the pairs say, when the last look has been taken. The guards are asked only where a gain is shown."""
    evidence: dict[str, Any] = {
        "unit": kind, "num_planned": test.num_pairs, "level": test.level, "looks": list(test.looks),
        **summary(pairs), "anchors": summary(anchors),
        "untried": [[each.fold, each.number, each.reason] for each in untried],
    }  # fmt: skip
    not_tried = [each.words(test.num_pairs, kind) for each in untried]
    if not pairs:
        return GateDecision(Finding.UNDECIDED, "; ".join([*_why_none(test, kind, untried), *not_tried]), evidence)
    gain, low = fmean(gains(pairs)), test.lower_bound(gains(pairs))
    evidence |= {"gain_low": low, "answer": test.answer.value}
    bound = "" if low is None else f", lower bound {low:+.1%}"
    words = f"gain {gain:+.1%} on {len(pairs)} of {test.num_pairs} {kind}{bound}"
    if test.answer is Answer.SHOWN:
        return GateDecision(*_guarded(words, evidence, pairs, anchors), evidence)
    advised = [] if _is_too_small(test) else list(filter(None, [advice(evidence, perplexity)]))
    words = "; ".join([words, *_why_not_shown(test, len(pairs), kind), *not_tried, *advised])
    is_open = gain > 0 and test.answer is Answer.NOT_SHOWN
    return GateDecision(Finding.UNDECIDED if is_open else Finding.NOT_BETTER, words, evidence)


def _why_none(test: SequentialTest, kind: str, untried: Sequence[Untried]) -> list[str]:
    """Why there are no pairs, beside what was not tried."""
    if not test.num_pairs:
        return [f"there are no {kind} to try it on"]
    num_tried = test.num_pairs - sum(each.number for each in untried)
    return [f"none of {num_tried} {kind} was finished under the acting adapter"] if num_tried else []


def _is_too_small(test: SequentialTest) -> bool:
    """Whether no candidate at all could pass. Before there is more to try it on, no other advice is of use."""
    return test.num_pairs < fewest_pairs(test.level)


def _why_not_shown(test: SequentialTest, num_pairs: int, kind: str) -> list[str]:
    """Judged by what was planned: a test that was given up could have tried more."""
    fewest = fewest_pairs(test.level)
    if _is_too_small(test):
        return [f"no gain at all can be shown on fewer than {fewest}: {more_to_try(kind)} first"]
    if test.is_ended and num_pairs < fewest:
        return [f"no gain at all can be shown on fewer than {fewest}"]
    return ["stopped early, since the rest could hardly show a gain"] if test.answer is Answer.GIVEN_UP else []


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
