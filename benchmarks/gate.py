"""The gate's operating curve: how often it promotes, by the number of demonstrations and by how much better a candidate
really is; and how much it tries, beside a test of fixed size.

    python -m benchmarks.gate

Simulated, with the gate's own test. A demonstration has 2 to 8 states. Both adapters agree with its expert at a state
with chances that share the demonstration's difficulty and the state's; beside it each has its own luck with the
demonstration. Two draws a state, half of them with the same luck for both. Every demonstration judges (by folds), and
the candidate of a fold is thought to gain as much as the one that is served; "fold luck" varies that.

The gate before this one is shown beside it: it held a fifth out, and asked for eight of those.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import sqrt
from statistics import fmean, stdev

import numpy as np
from tqdm import tqdm

from learner.evaluation.gate import level_for
from learner.evaluation.outlook import ERROR_RATE, evidence_outlook, student_quantile
from learner.evaluation.sequential import Answer, SequentialTest
from learner.evaluation.sign_flips import chance
from learner.practice import success_interval

NUMBERS = (6, 8, 10, 12, 16, 24, 40, 100)
GAINS = (0.0, -0.1, 0.1, 0.2, 0.3, 0.5)
LEAST_STATES, MOST_STATES = 2, 8
NUM_FOLDS = 3


@dataclass(frozen=True)
class Crowd:
    """Demonstrations, and two adapters that are tried on them. Spreads are standard deviations of log odds."""

    gain: float = 0.0
    """The candidate's true mean gain in agreement."""
    acting: float = 0.4
    """The acting adapter's true mean agreement."""
    demonstrations: float = 1.0
    """Spread of their difficulty."""
    states: float = 2.0
    """Spread of a state's difficulty within its demonstration."""
    own: float = 1.0
    """Spread of each adapter's own luck with a demonstration."""
    fold_luck: float = 0.0
    """Spread of the candidate's luck in each fold: what training makes of the same recipe."""
    same_luck: float = 0.5
    """Share of the draws in which both adapters get the same random number."""
    num_draws: int = 2

    def gains(self, number: int, draw: np.random.Generator) -> np.ndarray:
        """The observed gain of each of `number` demonstrations."""
        acting, candidate = _log_odds(self)
        num_states = draw.integers(LEAST_STATES, MOST_STATES + 1, size=number)
        is_state = np.arange(MOST_STATES) < num_states[:, None]
        shared = draw.normal(size=(number, 1)) * self.demonstrations
        shared = shared + draw.normal(size=(number, MOST_STATES)) * self.states
        own = draw.normal(size=(2, number, 1)) * self.own
        own[1] += (draw.normal(size=NUM_FOLDS) * self.fold_luck)[np.arange(number) % NUM_FOLDS, None]
        lucks = draw.random((2, number, MOST_STATES, self.num_draws))
        lucks[1] = np.where(draw.random(lucks[1].shape) < self.same_luck, lucks[0], lucks[1])
        agrees = [luck < _chance(odds + shared + each)[..., None] for luck, odds, each in
                  zip(lucks, (acting, candidate), own, strict=True)]  # fmt: skip
        difference = (agrees[1].astype(float) - agrees[0]).mean(axis=-1)
        return (difference * is_state).sum(axis=1) / num_states


@dataclass(frozen=True)
class RareHarm:
    """A candidate that is a little better at most demonstrations, and fails at one in ten: no gain in the mean."""

    def gains(self, number: int, draw: np.random.Generator) -> np.ndarray:
        return np.where(draw.random(number) < 0.1, -0.9, 0.1)


def _chance(log_odds: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-log_odds))


@cache
def _log_odds(crowd: Crowd) -> tuple[float, float]:
    """The mean log odds at which the acting adapter and the candidate agree as often as they should."""
    spread = sqrt(crowd.demonstrations**2 + crowd.states**2 + crowd.own**2)
    spread_new = sqrt(spread**2 + crowd.fold_luck**2)
    return _mean_odds(crowd.acting, spread), _mean_odds(crowd.acting + crowd.gain, spread_new)


def _mean_odds(agreement: float, spread: float) -> float:
    points = np.linspace(-6, 6, 2001)
    weights = np.exp(-(points**2) / 2)
    low, high = -20.0, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        is_low = np.average(_chance(middle + spread * points), weights=weights) < agreement
        low, high = (middle, high) if is_low else (low, middle)
    return low


# --------------------------------------------------------------------------------------------------- gates

Gate = Callable[[Sequence[float], float], tuple[bool, float]]
"""(whether it promotes, the share of the trials that it needed), from the gains and the error rate."""


def looking(gains: Sequence[float], level: float = ERROR_RATE) -> tuple[bool, float]:
    """The gate."""
    test = SequentialTest(len(gains), level)
    for look in test.planned_looks():
        answer = test.look(gains[:look], look == len(gains))
        if answer is not Answer.OPEN:
            break
    return test.answer is Answer.SHOWN, test.looks[-1] / len(gains)


def of_fixed_size(gains: Sequence[float], level: float = ERROR_RATE) -> tuple[bool, float]:
    return chance(gains) <= level, 1.0


def the_gate_before(gains: Sequence[float], _: float = ERROR_RATE) -> tuple[bool, float]:
    """At the error rate that it had."""
    held_out = list(gains)[: round(len(gains) / 5)]
    if len(held_out) < 8:
        return False, 0.2
    quantile = student_quantile(0.95, len(held_out) - 1)
    return fmean(held_out) > quantile * stdev(held_out) / sqrt(len(held_out)), 0.2


@dataclass(frozen=True)
class Rate:
    """How often a gate promoted."""

    num_promoted: int
    num_repeats: int
    share_tried: float

    def __str__(self) -> str:
        low, high = success_interval(self.num_promoted, self.num_repeats)
        return f"{100 * self.num_promoted / self.num_repeats:.1f} ({100 * low:.0f}-{100 * high:.0f})"


def rate(crowd: Crowd | RareHarm, number: int, gate: Gate, num_repeats: int, level: float = ERROR_RATE) -> Rate:
    """The repeats are the same for every gate."""
    draw = np.random.default_rng([number, num_repeats, int(1000 * getattr(crowd, "gain", 0.0)) % 2**31])
    results = [gate(list(crowd.gains(number, draw)), level) for _ in range(num_repeats)]
    return Rate(sum(promoted for promoted, _ in results), num_repeats, fmean(share for _, share in results))


def any_of(crowd: Crowd, number: int, num_repeats: int, num_candidates: int, num_cycles: int) -> Rate:
    """Whether any passes, of so many candidates in each of so many cycles on the same evidence."""
    draw, num_promoted = np.random.default_rng([number, num_candidates, num_cycles]), 0
    for _ in range(num_repeats):
        tried = [[list(crowd.gains(number, draw)) for _ in range(num_candidates)] for _ in range(num_cycles)]
        levels = [level_for(num_candidates, num_candidates * cycle) for cycle in range(num_cycles)]
        num_promoted += any(
            looking(each, level)[0] for cycle, level in zip(tried, levels, strict=True) for each in cycle
        )
    return Rate(num_promoted, num_repeats, 1.0)


# -------------------------------------------------------------------------------------------------- tables


def operating_curve(num_repeats: int) -> str:
    lines = ["| demonstrations | gain can be shown | " + " | ".join(_points(gain) for gain in GAINS) + " |"]
    lines.append("|" + "---|" * (len(GAINS) + 2))
    with tqdm(total=len(NUMBERS) * len(GAINS), desc="operating curve") as bar:
        for number in NUMBERS:
            can_show = evidence_outlook(number, 5 * number).can_show
            cells = []
            for gain in GAINS:
                found = rate(Crowd(gain), number, looking, num_repeats * (1 if gain > 0 else 2))
                cells.append(f"{found}, {found.share_tried:.0%}")
                bar.update()
            lines.append(f"| {number} | {_points(can_show)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def beside_others(num_repeats: int) -> str:
    gates = {"the gate": looking, "fixed size": of_fixed_size, "the gate before": the_gate_before}
    lines = ["| demonstrations | gain | " + " | ".join(gates) + " |", "|" + "---|" * (len(gates) + 2)]
    for number in (10, 24, 40, 100):
        for gain in (0.0, 0.3):
            found = [rate(Crowd(gain), number, gate, num_repeats) for gate in gates.values()]
            cells = [f"{each}, {each.share_tried:.0%}" for each in found]
            lines.append(f"| {number} | {_points(gain)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def harder(num_repeats: int) -> str:
    hard = Crowd(own=2.0, same_luck=0.0, num_draws=1)
    kinds: dict[str, Callable[[int, float], Rate]] = {
        "one draw, nothing shared, own luck doubled": lambda number, gain: rate(
            replace(hard, gain=gain), number, looking, num_repeats
        ),
        "fold luck of about 6 points": lambda number, gain: rate(
            Crowd(gain, fold_luck=0.45), number, looking, num_repeats
        ),
        "any of 2 candidates": lambda number, gain: any_of(Crowd(gain), number, num_repeats // 2, 2, 1),
        "any of 5 cycles on the same evidence": lambda number, gain: any_of(
            Crowd(gain), number, num_repeats // 2, 1, 5
        ),
    }
    lines = ["| | " + " | ".join(f"{n} demonstrations, {_points(g)}" for n in (10, 24) for g in (0.0, 0.3)) + " |"]
    lines.append("|" + "---|" * 5)
    for name, find in tqdm(kinds.items(), desc="harder"):
        lines.append(f"| {name} | " + " | ".join(str(find(n, g)) for n in (10, 24) for g in (0.0, 0.3)) + " |")
    rare = [rate(RareHarm(), number, looking, num_repeats) for number in (10, 24, 100)]
    return "\n".join([*lines, f"\nRare harm, no gain in the mean, 10 / 24 / 100: {' / '.join(map(str, rare))}"])


def _points(gain: float | None) -> str:
    return "none" if gain is None else f"{100 * gain:+.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--repeats", type=int, default=200, help="of each cell; twice as many where nothing got better")
    repeats = parser.parse_args().repeats
    print("Promoted, in percent (95 % interval), and the share of the planned trials that was tried, by true gain\n")
    print(operating_curve(repeats))
    print("\nThe same candidates under other gates\n")
    print(beside_others(repeats))
    print("\nWhere the model is harder\n")
    print(harder(2 * repeats))


if __name__ == "__main__":
    main()
