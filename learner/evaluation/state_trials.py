"""Tries both adapters at the states of demonstrations: does each act there as the expert did?

Both draw with the same luck. Where both are nearly sure of the very same tokens, one draw tells all; only elsewhere
more are drawn. The rule does not know which adapter is which, so that it favours none.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from math import log
from statistics import fmean

from learner.client import StateTrial
from learner.data.collaborators import Collaborators
from learner.data.collect import LoggedState
from learner.data.comparison import Verdict, compare
from learner.data.experts import same_effect_at
from learner.data.inspection import trial_of
from learner.evaluation.evidence import Trial
from learner.evaluation.gate import Contestants
from learner.evaluation.past_trials import PastTrials
from runtime.store.episodes import Step
from tools.worlds.world import World

NUM_DRAWS = 2
"""At a state where the adapters are not sure of the same."""
SURE = log(0.9)
"""Log-likelihood of an action that further draws would hardly differ from."""


@dataclass(frozen=True, slots=True)
class TriedState:
    """How one adapter did at one state; a draw that was not answered is left out."""

    agreeing: tuple[bool, ...]
    num_malformed: int


async def try_states(
    states: Sequence[LoggedState], contestants: Contestants, who: Collaborators, past: PastTrials
) -> tuple[list[TriedState], list[TriedState]]:
    """(candidate's, acting adapter's), each parallel to the states."""
    adapters = (contestants.candidate, contestants.acting)
    drawn: tuple[list[list[Step]], ...] = tuple([[] for _ in states] for _ in adapters)
    places = list(range(len(states)))
    for number in range(NUM_DRAWS):
        trials = [trial_of(states[place], number) for place in places]
        sides = await asyncio.gather(*(_draw(trials, adapter, who, past) for adapter in adapters))
        for steps, side in zip(drawn, sides, strict=True):
            for place, step in zip(places, side, strict=True):
                steps[place] += [step] if step else []
        places = [place for place, *both in zip(places, *sides, strict=True) if not _are_alike(*both)]
    candidate, acting = (
        [_tried(state, each, who.world) for state, each in zip(states, steps, strict=True)] for steps in drawn
    )
    return candidate, acting


def score(states: Sequence[TriedState]) -> Trial | None:
    """Of one demonstration: the mean over its states of the share of draws that agree with its expert's action."""
    answered = [state for state in states if state.agreeing]
    if not answered:
        return None
    return Trial(fmean(fmean(state.agreeing) for state in answered), sum(state.num_malformed for state in answered))


async def _draw(trials: Sequence[StateTrial], adapter: str, who: Collaborators, past: PastTrials) -> list[Step | None]:
    """Drawn anew only where the log does not hold it."""
    drawn = [past.of_state(adapter, trial) for trial in trials]
    missing = [place for place, step in enumerate(drawn) if step is None]
    step_ids = await who.endpoint.try_states([trials[place] for place in missing], adapter)
    for place, step_id in zip(missing, step_ids, strict=True):
        if step_id and (step := who.log.step(step_id)):
            drawn[place] = step
            past.remember(adapter, trials[place].name, step.episode_id)
    return drawn


def _are_alike(candidate: Step | None, acting: Step | None) -> bool:
    if candidate is None or acting is None or candidate.completion_token_ids != acting.completion_token_ids:
        return False
    return all(sum(step.behavior_logprobs or (SURE - 1,)) >= SURE for step in (candidate, acting))


def _tried(state: LoggedState, steps: Sequence[Step], world: World | None) -> TriedState:
    judge = same_effect_at(world, state)
    comparisons = [compare(step.action, state.step.action, judge) for step in steps]
    num_malformed = sum(comparison.verdict is Verdict.MALFORMED for comparison in comparisons)
    return TriedState(tuple(comparison.agrees for comparison in comparisons), num_malformed)
