"""The gate: only what is surely better passes, and it tries no more than it needs."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from benchmarks.gate import Crowd, any_of, looking, rate
from learner.evaluation.evidence import UNFINISHED, Pair, Trial, merged, paired
from learner.evaluation.gate import Contestants, Finding, GateDecision, NoContest, judge, level_for, num_earlier
from learner.evaluation.outlook import ERROR_RATE


@dataclass(frozen=True)
class ScriptedUnit:
    candidate: Trial | None
    acting: Trial | None
    fold: int | None = None


@dataclass
class ScriptedTrials:
    units: Sequence[ScriptedUnit]
    anchors: Sequence[ScriptedUnit] = ()
    kind: str = "tasks"
    num_tried: int = 0
    tried_under: list[Contestants] = field(default_factory=list)

    async def pairs(self, units: Sequence[ScriptedUnit], contestants: Contestants) -> list[Pair]:
        self.num_tried += len(units)
        self.tried_under.append(contestants)
        return [pair for unit in units if (pair := paired("unit", unit.candidate, unit.acting, unit.fold))]


@asynccontextmanager
async def themselves(fold: int | None) -> AsyncIterator[Contestants]:
    yield Contestants(f"candidate {fold}", f"acting {fold}")


def scores(candidate: Sequence[float], acting: Sequence[float], num_malformed: int = 0) -> list[ScriptedUnit]:
    return [ScriptedUnit(Trial(new, num_malformed), Trial(old, 0)) for new, old in zip(candidate, acting, strict=True)]


async def judged(
    units: Sequence[ScriptedUnit], anchors: Sequence[ScriptedUnit] = (), kind: str = "tasks", **options: Any
) -> GateDecision:
    return await judge(ScriptedTrials(units, anchors, kind), themselves, **options)


# ------------------------------------------------------------------------------------------------ its error rates


@pytest.mark.parametrize("number", [10, 24])
def test_no_better_candidates_pass_in_less_than_five_percent(number: int) -> None:
    """Of 2,000, with states that cluster in demonstrations and adapters that agree where it is easy."""
    found = rate(Crowd(gain=0.0), number, looking, 2000, ERROR_RATE)
    assert found.num_promoted / found.num_repeats < 0.045


def test_from_ten_demonstrations_on_a_gain_of_thirty_points_passes_in_four_of_five_cases() -> None:
    for number in (10, 12, 16):
        found = rate(Crowd(gain=0.3), number, looking, 200, ERROR_RATE)
        assert found.num_promoted / found.num_repeats >= 0.85


def test_the_luck_of_training_a_fold_makes_no_more_than_five_percent_pass() -> None:
    found = rate(Crowd(gain=0.0, fold_luck=0.45), 10, looking, 2000, ERROR_RATE)
    assert found.num_promoted / found.num_repeats < 0.06


def test_noise_is_rarely_taken_for_a_gain_however_many_candidates_are_tried() -> None:
    found = any_of(Crowd(gain=0.0), 16, 500, num_candidates=3, num_cycles=1)
    assert found.num_promoted / found.num_repeats < 0.05


def test_a_cycle_that_is_repeated_on_the_same_evidence_is_held_to_more() -> None:
    assert num_earlier([{"num_planned": 10}, {"num_planned": 10}, {"num_planned": 7}, {}], 10) == 2
    assert num_earlier([{"num_planned": 10}], 16) == 0
    assert level_for(2, 2) == ERROR_RATE / 4


# -------------------------------------------------------------------------------------------------- its verdicts


async def test_a_clear_gain_passes_with_its_evidence() -> None:
    decision = await judged(scores([1.0] * 16, [1.0] * 8 + [0.0] * 8))
    assert (decision.finding, decision.promote) == (Finding.BETTER, True)
    assert decision.evidence["gain"] == 0.5
    assert 0 < decision.evidence["gain_low"] < 0.5
    assert (decision.evidence["num_trials"], len(decision.evidence["pairs"])) == (16, 16)
    assert "gain +50.0% on 16 of 16 tasks, lower bound +" in decision.reason


async def test_equal_and_worse_candidates_are_refused() -> None:
    same = [1.0, 0.0] * 50
    assert (await judged(scores(same, same))).finding is Finding.NOT_BETTER
    assert (await judged(scores([0.0] * 100, same))).finding is Finding.NOT_BETTER


async def test_a_small_gain_on_few_tasks_is_left_to_more_evidence_or_a_person() -> None:
    assert (await judged(scores([1.0] * 6 + [0.0] * 4, [1.0] * 5 + [0.0] * 5))).finding is Finding.UNDECIDED
    decision = await judged(scores([1.0] * 4, [0.0] * 4))
    assert decision.finding is Finding.UNDECIDED
    assert "no gain at all can be shown on fewer than 6" in decision.reason


@pytest.mark.parametrize(("acting", "is_said"), [(0.0, True), (1.0, False)])
async def test_of_an_agent_that_succeeds_at_nothing_it_is_said_what_else_could_decide(
    acting: float, is_said: bool
) -> None:
    units = scores([1.0] * 2 + [acting] * 22, [0.0] * 2 + [acting] * 22)
    decision = await judged(units)
    assert (not decision.promote, "gate-tasks=0" in decision.reason) == (True, is_said)
    of_demonstrations = await judge(ScriptedTrials(units, kind="held-out demonstrations"), themselves)
    assert "gate-tasks=0" not in of_demonstrations.reason


async def test_few_pairs_of_a_test_that_was_given_up_are_not_told_to_be_too_few() -> None:
    """Of 13 planned, six were tried: "no gain at all can be shown on fewer than 7"."""
    given_up = (await judged(scores([0.0] * 13, [0.0] * 13), kind="demonstrations", level=ERROR_RATE / 4)).reason
    assert "gain +0.0% on 8 of 13 demonstrations; stopped early, since the rest could hardly show a gain" in given_up
    assert "fewer than" not in given_up
    assert "lower bound" not in given_up
    too_few = (await judged(scores([0.0] * 4, [0.0] * 4), level=ERROR_RATE / 4)).reason
    assert "no gain at all can be shown on fewer than 8" in too_few
    unfinished = [*scores([1.0] * 5, [0.0] * 5), *[ScriptedUnit(None, None)] * 8]
    assert "no gain at all can be shown on fewer than 6" in (await judged(unfinished)).reason


@pytest.mark.parametrize(
    ("perplexity", "remedy"),
    [
        (73.2, "perplexity after training is 73.2, so train longer, with a larger --learner-arg min-gradient-steps=N"),
        (None, ": train longer, with a larger --learner-arg min-gradient-steps=N or another lr=X"),
        (1.3, "it has learned its demonstrations (perplexity 1.3) and they do not carry over: import more, of other"),
        (
            1.3,
            "import more, of other tasks; where that does not help, the model may be too weak for them, or what it is",
        ),
    ],
)
async def test_where_neither_acts_as_the_experts_do_it_is_said_what_to_do(
    perplexity: float | None, remedy: str
) -> None:
    """A refusal said "gain +0.0%" and nothing else, though 68 actions could not be read."""
    units = [ScriptedUnit(Trial(0.0, 5), Trial(0.0, 1))] * 12
    decision = await judged(units, kind="demonstrations", perplexity=perplexity)
    tried = decision.evidence["num_trials"]
    unread = f"{5 * tried} of the candidate's actions cannot be read (the acting adapter's: {tried})"
    assert f"neither acts once as the experts do, and {unread}: " in decision.reason
    assert remedy in decision.reason


async def test_of_an_ordinary_refusal_nothing_is_advised() -> None:
    for new, old in ((0.5, 0.5), (0.4, 0.5), (0.0, 0.5)):
        reason = (await judged(scores([new] * 12, [old] * 12), kind="demonstrations", perplexity=73.0)).reason
        assert "perplexity" not in reason
    unread = await judged(scores([0.5] * 12, [0.5] * 12, num_malformed=1), kind="demonstrations", perplexity=73.0)
    assert "cannot be read (the acting adapter's: 0): perplexity after training is 73, so train" in unread.reason


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("demonstrations", "import demonstrations of other tasks first"),
        ("held-out demonstrations", "import demonstrations of other tasks first"),
        ("tasks", "try more tasks (--learner-arg gate-tasks=N; 0 lets demonstrations decide) first"),
    ],
)
async def test_with_fewer_units_than_can_decide_more_of_them_come_first(kind: str, more: str) -> None:
    """Of four demonstrations at which nothing could be shown, it was said to train longer."""
    units = [ScriptedUnit(Trial(0.0, 5), Trial(0.0, 1))] * 4
    reason = (await judged(units, kind=kind, perplexity=73.2)).reason
    assert reason.endswith(f" of 4 {kind}; no gain at all can be shown on fewer than 6: {more}")


async def test_folds_that_were_not_tried_are_named_with_the_reason() -> None:
    """Twelve copies of one transcript are of one fold: "none of 12 was finished under the acting adapter"."""

    @asynccontextmanager
    async def contest(fold: int | None) -> AsyncIterator[Contestants | NoContest]:
        yield NoContest("no expert has acted") if fold == 2 else Contestants("candidate", "acting")

    def in_fold(fold: int, number: int, is_finished: bool = True) -> list[ScriptedUnit]:
        return [ScriptedUnit(Trial(0.6, 0), Trial(0.5, 0) if is_finished else None, fold)] * number

    async def reason(*units: ScriptedUnit) -> str:
        decision = await judge(ScriptedTrials(units, kind="demonstrations"), contest)
        assert decision.evidence["untried"] == [[2, sum(unit.fold == 2 for unit in units), "no expert has acted"]]
        return decision.reason

    assert await reason(*in_fold(2, 12)) == (
        "12 of 12 demonstrations could not be tried, those of fold 2: no expert has acted; "
        "import demonstrations of other tasks"
    )
    some = await reason(*in_fold(0, 4), *in_fold(2, 8))
    assert some.startswith("gain +10.0% on 4 of 12 demonstrations; no gain at all can be shown on fewer than 6; ")
    assert some.endswith("8 of 12 demonstrations could not be tried, those of fold 2: no expert has acted")
    assert await reason(*in_fold(0, 4, False), *in_fold(2, 8)) == (
        "none of 4 demonstrations was finished under the acting adapter; "
        "8 of 12 demonstrations could not be tried, those of fold 2: no expert has acted"
    )


async def test_no_trials_decide_nothing() -> None:
    assert not (await judged([])).promote
    decision = await judged([ScriptedUnit(Trial(1.0, 0), None)] * 10)
    assert not decision.promote
    assert "none of 10 tasks was finished under the acting adapter" in decision.reason


async def test_more_malformed_actions_are_refused_whatever_the_gain() -> None:
    decision = await judged(scores([1.0] * 50, [0.0] * 50, num_malformed=1))
    assert decision.finding is Finding.MALFORMED
    assert "malformed actions rose from 0 to" in decision.reason


async def test_a_single_malformed_action_is_no_rise() -> None:
    """A candidate that gained 47 points was once refused for one action that could not be read."""
    units = [ScriptedUnit(Trial(1.0, 1), Trial(0.0, 0)), *scores([1.0] * 49, [0.0] * 49)]
    assert (await judged(units)).promote


async def test_a_trial_that_only_the_candidate_could_not_finish_has_failed() -> None:
    """A candidate that won 40 tasks and broke off 60 was once promoted: the 60 were left out."""
    units = [*scores([1.0] * 8, [1.0, 0.0] * 4), *[ScriptedUnit(None, Trial(0.5, 0))] * 12]
    decision = await judged(units)
    assert not decision.promote
    assert decision.evidence["candidate_unfinished"] > 0
    assert paired("unit", None, Trial(1.0, 0)) == Pair("unit", UNFINISHED, Trial(1.0, 0))


def test_the_demonstrations_of_a_task_make_one_pair_by_their_mean() -> None:
    parts = [Pair("a", Trial(1.0, 1), Trial(0.5, 0), 2), Pair("a", UNFINISHED, Trial(0.0, 3), 2)]
    assert merged("a", parts) == Pair("a", Trial(0.5, 1), Trial(0.25, 3), 2)
    assert merged("a", parts[1:]) is parts[1]
    assert merged("a", []) is None
    broken_off = merged("a", [parts[1], parts[1]])
    assert broken_off is not None
    assert broken_off.candidate is UNFINISHED


async def test_a_candidate_that_forgets_what_went_well_is_refused_whatever_it_gains() -> None:
    gained = scores([1.0] * 16, [0.0] * 16)
    forgetting = await judged(gained, anchors=scores([0.0] * 5 + [1.0] * 3, [1.0] * 8))
    assert forgetting.finding is Finding.FORGETS
    assert "from 100.0% to 37.5% on 8 anchors" in forgetting.reason
    assert (await judged(gained, anchors=scores([0.0] + [1.0] * 7, [1.0] * 8))).promote  # within the noise
    assert (await judged(gained, anchors=scores([0.2] * 8, [0.2] * 8))).promote


# ----------------------------------------------------------------------------------------------- what it tries


async def test_it_stops_as_soon_as_the_answer_is_known() -> None:
    better, worse = ScriptedTrials(scores([1.0] * 100, [0.0] * 100)), ScriptedTrials(scores([0.0] * 100, [1.0] * 100))
    counted = Counter[str]()
    assert (await judge(better, themselves, on_done=lambda: counted.update(["unit"]))).promote
    assert not (await judge(worse, themselves)).promote
    assert better.num_tried == counted["unit"] < 30
    assert worse.num_tried < 30


async def test_anchors_are_tried_only_where_a_gain_is_shown() -> None:
    worse = ScriptedTrials(scores([0.0] * 20, [1.0] * 20), scores([1.0], [1.0]))
    await judge(worse, themselves)
    assert worse.num_tried < 20


async def test_each_fold_is_tried_by_its_own_adapters_and_none_is_made_that_is_not_needed() -> None:
    """A fold costs a training."""
    entered = list[int | None]()

    @asynccontextmanager
    async def contest(fold: int | None) -> AsyncIterator[Contestants]:
        entered.append(fold)
        async with themselves(fold) as contestants:
            yield contestants

    def in_folds(score: float) -> list[ScriptedUnit]:
        return [ScriptedUnit(Trial(score, 0), Trial(0.5, 0), number // 10) for number in range(50)]

    trials = ScriptedTrials([*scores([1.0] * 2, [0.5] * 2), *in_folds(1.0)], anchors=scores([1.0], [1.0]))
    decision = await judge(trials, contest)
    assert decision.promote
    assert entered == [None, 0, 1, 2, None]  # 24 of 52 were enough; the anchors are the candidate's own
    assert {pair[1] for pair in decision.evidence["pairs"]} == {None, 0, 1, 2}
    assert Contestants("candidate 1", "acting 1") in trials.tried_under
    entered.clear()
    assert not (await judge(ScriptedTrials(in_folds(0.0)), contest)).promote
    assert entered == [0]
