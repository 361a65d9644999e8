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
    """(candidate's, acting adapter's), each parallel to the states.

    A state is drawn at again as soon as both have acted there, whatever is still written at others.
    """
    places = asyncio.Semaphore(who.endpoint.concurrency)

    async def try_one(state: LoggedState) -> tuple[TriedState, TriedState]:
        async with places:
            return await _try_state(state, contestants, who, past)

    tried = await asyncio.gather(*map(try_one, states))
    return [candidate for candidate, _ in tried], [acting for _, acting in tried]


async def _try_state(
    state: LoggedState, contestants: Contestants, who: Collaborators, past: PastTrials
) -> tuple[TriedState, TriedState]:
    adapters = (contestants.candidate, contestants.acting)
    steps: tuple[list[Step], list[Step]] = ([], [])
    for number in range(NUM_DRAWS):
        trial = trial_of(state, number)
        drawn = await asyncio.gather(*(_draw(trial, adapter, who, past) for adapter in adapters))
        for kept, step in zip(steps, drawn, strict=True):
            kept += [step] if step else []
        if _are_alike(*drawn):
            break
    candidate, acting = (_tried(state, each, who.world) for each in steps)
    return candidate, acting


def score(states: Sequence[TriedState]) -> Trial | None:
    """Of one demonstration: the mean over its states of the share of draws that agree with its expert's action."""
    answered = [state for state in states if state.agreeing]
    if not answered:
        return None
    return Trial(fmean(fmean(state.agreeing) for state in answered), sum(state.num_malformed for state in answered))


async def _draw(trial: StateTrial, adapter: str, who: Collaborators, past: PastTrials) -> Step | None:
    """Drawn anew only where the log does not hold it."""
    known = past.of_state(adapter, trial)
    if known is not None:
        return known
    step_id = await who.endpoint.try_state(trial, adapter)
    step = who.log.step(step_id) if step_id else None
    if step is not None:
        past.remember(adapter, trial.name, step.episode_id)
    return step


def _are_alike(candidate: Step | None, acting: Step | None) -> bool:
    if candidate is None or acting is None or candidate.completion_token_ids != acting.completion_token_ids:
        return False
    return all(sum(step.behavior_logprobs or (SURE - 1,)) >= SURE for step in (candidate, acting))


def _tried(state: LoggedState, steps: Sequence[Step], world: World | None) -> TriedState:
    judge = same_effect_at(world, state)
    comparisons = [compare(step.action, state.step.action, judge) for step in steps]
    num_malformed = sum(comparison.verdict is Verdict.MALFORMED for comparison in comparisons)
    return TriedState(tuple(comparison.agrees for comparison in comparisons), num_malformed)
