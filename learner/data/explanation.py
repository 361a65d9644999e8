"""Which step of an episode lost it, and on what evidence.

Evidence is asked in the order of how far it is to be trusted: what somebody corrected, what could not be read, what an
expert would not have done, then what the learned rewards find least like an expert's. The first two kinds name a
mistake; a learned reward only says where to look first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from learner.data.comparison import compare
from learner.terminal import cut, plain
from policies.chat.chat_protocol import action_message
from policies.types import Action, FinalAnswer, MalformedAction
from runtime.store.episodes import Correction, Step
from runtime.store.learning_log import RewardSource, StepReward


class Evidence(StrEnum):
    """What speaks against a step; the strongest first."""

    CORRECTED = "corrected"  # somebody has said what should have been done
    MALFORMED = "malformed"  # it cannot be read as an action
    DISAGREES = "disagrees"  # an expert would have done something else
    UNLIKE_EXPERT = "unlike_expert"  # the discriminator's lowest reward of the episode
    UNLEARNED = "unlearned"  # the implicit reward's lowest of the episode: training moved away from it


@dataclass(frozen=True, slots=True)
class JudgedStep:
    """One step of an episode with what is known of its worth."""

    step: Step
    rewards: Mapping[RewardSource, StepReward]
    """As `to_compare` gives them; a source that has not judged it is left out."""
    corrections: Sequence[Correction] = ()

    def value(self, source: RewardSource) -> float | None:
        reward = self.rewards.get(source)
        return None if reward is None else reward.value

    def to_json(self) -> dict[str, Any]:
        return {
            "step_id": self.step.id,
            "index": self.step.index,
            "action": action_message(self.step.action),
            "rewards": {source.value: {"value": r.value, "cycle": r.cycle} for source, r in self.rewards.items()},
            "corrections": [action_message(correction.action) for correction in self.corrections],
        }


def to_compare(rewards: Sequence[StepReward]) -> dict[str, dict[RewardSource, StepReward]]:
    """By step and source the rewards to hold against each other, of all that an episode's steps have, oldest first.

    Agreement says the same in every cycle: the newest counts. Values of other sources compare within one cycle alone:
    they are those of the cycle that judged most of the steps, of equals the newest. A cycle that reads an episode for a
    correction reads the way to it, and no further.
    """
    by_cycle = dict[tuple[RewardSource, str], dict[str, StepReward]]()
    for reward in rewards:
        cycle = "" if reward.source is RewardSource.EXPERT_AGREEMENT else reward.cycle
        by_cycle.setdefault((reward.source, cycle), {})[reward.step_id] = reward
    found = dict[str, dict[RewardSource, StepReward]]()
    for (source, _), given in sorted(by_cycle.items(), key=lambda each: len(each[1])):  # stable: of equals the newest
        for each in found.values():
            each.pop(source, None)
        for step_id, reward in given.items():
            found.setdefault(step_id, {})[source] = reward
    return found


@dataclass(frozen=True, slots=True)
class Explanation:
    """The step that lost an episode."""

    step_id: str
    index: int
    evidence: Evidence
    reason: str
    """A sentence with the figures behind it."""

    def to_json(self) -> dict[str, Any]:
        return {"step_id": self.step_id, "index": self.index, "evidence": self.evidence.value, "reason": self.reason}


def lost_at(steps: Sequence[JudgedStep], outcome: float | None) -> Explanation | None:
    """The step that lost the episode. None where the outcome is 1, or nothing speaks against any step.

    Of an episode that nobody has judged, only what experts and corrections contradict is named, and what cannot be
    read: a learned reward alone is no reason to call it lost.
    """
    if outcome == 1.0:
        return None
    known: list[tuple[Evidence, Callable[[JudgedStep], str | None]]] = [
        (Evidence.CORRECTED, _corrected),
        (Evidence.MALFORMED, _malformed),
        (Evidence.DISAGREES, _disagrees),
    ]
    for evidence, reason_of in known:
        for each in steps:
            if reason := reason_of(each):
                return Explanation(each.step.id, each.step.index, evidence, reason)
    if outcome is None:
        return None
    lowest = _lowest(steps, RewardSource.DISCRIMINATOR, Evidence.UNLIKE_EXPERT)
    return lowest or _lowest(steps, RewardSource.IMPLICIT, Evidence.UNLEARNED)


def _corrected(judged: JudgedStep) -> str | None:
    newest = judged.corrections[-1] if judged.corrections else None
    if newest is None or compare(judged.step.action, newest.action).agrees:
        return None
    return f"{newest.source} says it should have been {short(newest.action)}"


def _malformed(judged: JudgedStep) -> str | None:
    action = judged.step.action
    return f"it cannot be read as an action: {action.problem}" if isinstance(action, MalformedAction) else None


def _disagrees(judged: JudgedStep) -> str | None:
    reward = judged.rewards.get(RewardSource.EXPERT_AGREEMENT)
    if reward is None or reward.value >= 0.5:
        return None
    return f"an expert would have done something else here (agreement {reward.value:g} in {reward.cycle})"


def _lowest(steps: Sequence[JudgedStep], source: RewardSource, evidence: Evidence) -> Explanation | None:
    """The step with the lowest reward, where at least two can be compared."""
    rewarded = [(value, each) for each in steps if (value := each.value(source)) is not None]
    if len(rewarded) < 2 or len({value for value, _ in rewarded}) == 1:
        return None
    value, lowest = min(rewarded, key=lambda each: each[0])
    others = [other for other, each in rewarded if each is not lowest]
    mean = sum(others) / len(others)
    reason = f"its {source} reward is the lowest: {value:.2f}, the other {len(others)} have {mean:.2f} on average"
    return Explanation(lowest.step.id, lowest.step.index, evidence, reason)


def short(action: Action, most_letters: int = 72) -> str:
    """An action in a line of a terminal: `pick(item='mug', count=2)`, or what is said."""
    if isinstance(action, FinalAnswer):
        text = f"says {action.text!r}"
    elif isinstance(action, MalformedAction):
        text = f"(malformed) {action.text!r}"
    else:
        text = ", ".join(_call(call.name, call.arguments) for call in action.calls)
    return cut(plain(text[: most_letters + 1]), most_letters)


def _call(name: str, arguments: object) -> str:
    given = arguments.items() if isinstance(arguments, Mapping) else [("", arguments)]
    return f"{name}({', '.join(f'{key}={value!r}' if key else repr(value) for key, value in given)})"
