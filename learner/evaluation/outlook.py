"""What the evidence at hand could show, said before anything is trained, and how many more demonstrations would help.

The sizes are those of a t test at the same error rate (the sign-flip test has nearly its power) under a stated guess of
how much demonstrations differ; once a gate has judged, what it saw takes the guess's place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import ceil, sqrt
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

from learner.evaluation.evidence import TASKS
from learner.evaluation.folds import needs_folds
from learner.evaluation.sign_flips import fewest_pairs

if TYPE_CHECKING:
    from learner.data.collect import LoggedEpisode

ERROR_RATE = 0.03
"""Of the gate's test. Of the candidates that are no better, 5 % at most are to pass: what training makes of a fold by
luck, which no test of its trials can see, adds to this (benchmarks/gate.py)."""
POWER = 0.8
"""How often a gain that `can be shown` is shown."""
BETWEEN = 0.15
"""Guess: the standard deviation of the gain between demonstrations, apart from chance within them."""
WITHIN = 0.3
"""Guess: the variance of one state's paired difference. Its most is 1: every state differs, half of them each way."""
USUAL_SPREAD = sqrt(BETWEEN**2 + WITHIN / 5)
"""With five states in a demonstration."""
TARGETS = (0.30, 0.20, 0.10)
"""Gains that it is worth collecting for."""
MOST_MORE = 1000


@dataclass(frozen=True, slots=True)
class Outlook:
    """What a gate on this evidence could conclude."""

    num_pairs: int
    can_show: float | None
    """The least gain that is shown in four of five cases; None: no gain can be."""
    num_more: int
    """So many more demonstrations, or tasks of the world, ..."""
    would_show: float
    """... would show this gain."""
    sentence: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def evidence_outlook(
    num_judging: int,
    num_states: int,
    kind: str = "demonstrations",
    *,
    num_demonstrations: int | None = None,
    num_candidates: int = 1,
    most: int | None = None,
    spread: float | None = None,
    judging_share: float = 1.0,
) -> Outlook:
    """Of `num_judging` tasks of a world, or demonstrated tasks that are held out or judged by folds, with `num_states`
    altogether.

    `num_demonstrations`: of all demonstrated tasks; None: one each. `num_candidates`: those that share the error rate,
    earlier ones on the same evidence included. `most`: no more tasks can be had; None: there is no such bound.
    `spread`: the standard deviation of a unit's gain, where an earlier gate has seen it; None takes the guess.
    `judging_share`: of further demonstrations, so many will judge.
    """
    if spread is None:
        spread = sqrt(BETWEEN**2 + WITHIN / max(num_states / num_judging, 1.0)) if num_judging else USUAL_SPREAD
    level = ERROR_RATE / num_candidates
    can_show = detectable_gain(num_judging, spread, level)
    num_judging_more, would_show = _worth_collecting(num_judging, spread, level, can_show)
    num_more = ceil(num_judging_more / judging_share)
    if most is not None and num_judging + num_more > most:
        num_more, would_show = 0, can_show or 1.0
    is_repeated = num_demonstrations is not None and num_demonstrations > num_judging
    if num_demonstrations is not None and is_repeated:
        held = f"with {_number(num_demonstrations, kind)} of {_number(num_judging, 'tasks')}"
    else:
        held = f"with {_number(num_judging, kind)}" + (f" of {_number(num_states, 'states')}" if num_states else "")
    if can_show is not None:
        words = f"{held} a gain of {_points(can_show)} points or more can be shown"
    elif is_repeated and num_judging < fewest_pairs(level):
        missing = fewest_pairs(level) - num_judging
        needed = "1 other task is needed" if missing == 1 else f"{missing} other tasks are needed"
        words = f"{held} no gain can be shown: {needed} before anything can be"
    else:
        words = f"{held} no gain can be shown: a decision needs {fewest_pairs(level)} at the least"
    if num_more:
        words += f"; {_what_more(num_judging, num_more, kind, is_repeated)} would show {_points(would_show)}"
    return Outlook(num_judging, can_show, num_more, would_show, words)


def _what_more(num_judging: int, num_more: int, kind: str, is_repeated: bool) -> str:
    """Demonstrations are collected; a world's tasks are there, and the gate only has to be told to try them."""
    if kind == TASKS:
        return f"{num_judging + num_more} tasks (--learner-arg gate-tasks={num_judging + num_more})"
    return _number(num_more, "more demonstrations") + (" of other tasks" if is_repeated else "")


@dataclass(frozen=True, slots=True)
class Demonstrated:
    """How much was demonstrated."""

    num_tasks: int
    num_demonstrations: int
    num_states: int

    @classmethod
    def of(cls, demonstrations: Sequence[LoggedEpisode], task_of: Mapping[str, str]) -> Demonstrated:
        """`task_of`: of `learner.data.collect.Dealt`."""
        tasks = {task_of[each.episode.id] for each in demonstrations}
        return cls(len(tasks), len(demonstrations), sum(len(each.path) for each in demonstrations))


def import_outlook(held_out: Demonstrated, others: Demonstrated, held_out_share: float) -> Outlook:
    """What all demonstrations of a server can show, and how many more would help: said after an import."""
    if needs_folds(held_out.num_tasks):
        return evidence_outlook(
            held_out.num_tasks + others.num_tasks,
            held_out.num_states + others.num_states,
            num_demonstrations=held_out.num_demonstrations + others.num_demonstrations,
        )
    return evidence_outlook(
        held_out.num_tasks,
        held_out.num_states,
        "held-out demonstrations",
        num_demonstrations=held_out.num_demonstrations,
        judging_share=held_out_share or 1.0,
    )


def detectable_gain(num_pairs: int, spread: float, level: float, power: float = POWER) -> float | None:
    """The least mean gain that a one-sided t test finds with this power; None where no gain can pass."""
    if num_pairs < fewest_pairs(level):
        return None
    degrees = num_pairs - 1
    quantiles = student_quantile(1 - level, degrees) + student_quantile(power, degrees)
    gain = quantiles * spread / sqrt(num_pairs)
    return gain if gain <= 1.0 else None


def _worth_collecting(num_pairs: int, spread: float, level: float, can_show: float | None) -> tuple[int, float]:
    """(how many more, the gain they would show), for the largest target that is not reached yet; none at the end."""
    for target in TARGETS:
        if can_show is not None and _points(can_show) <= _points(target):
            continue
        for more in range(1, MOST_MORE):
            gain = detectable_gain(num_pairs + more, spread, level)
            if gain is not None and gain <= target:
                return more, target
    return 0, can_show or 1.0


def _points(gain: float) -> int:
    """As it is told: what is told as reached has been reached."""
    return round(100 * gain)


def _number(number: int, of: str) -> str:
    return f"{number} {of.removesuffix('s') if number == 1 else of}"


def student_quantile(probability: float, degrees: int) -> float:
    """Student's t by its expansion around the normal quantile (Abramowitz and Stegun, 26.7.5); good from 5 degrees."""
    z = NormalDist().inv_cdf(probability)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / degrees + second / degrees**2 + third / degrees**3
