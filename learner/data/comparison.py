"""Holds the agent's actions against the expert's at the same state, by what they mean and not by how they are written.

Rewarding the expert's exact words was refused: it scored below plain imitation, while accepting every action that is
as good, and keeping only the states where the agent is not sure of it yet, scored above (PivotRL, arXiv 2603.21383).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from policies.chat.chat_protocol import action_message
from policies.chat.meaning import meaning
from policies.types import Action, FinalAnswer, MalformedAction, Message, ToolCalls

SameEffect = Callable[[Message, Message], bool]
"""A world's judgement, at the state in question: whether two assistant messages lead to the same place."""


class Verdict(StrEnum):
    """How the agent's action stands to the expert's; the first that holds, in the order of this list."""

    MALFORMED = "malformed"  # one of them cannot be read as an action: it never agrees
    SAME_ACTION = "same_action"  # the same tools are called with the same arguments
    SAME_EFFECT = "same_effect"  # the world says that both lead to the same place
    SAME_TEXT = "same_text"  # both answer, with the same words but for case, spaces and Unicode spelling
    DIFFERENT = "different"  # none of these: to the best of our knowledge another decision


_AGREEING = frozenset({Verdict.SAME_ACTION, Verdict.SAME_EFFECT, Verdict.SAME_TEXT})


@dataclass(frozen=True, slots=True)
class Comparison:
    """One action of the agent, held against the expert's at the same state."""

    agent_action: Action
    expert_action: Action
    verdict: Verdict

    @property
    def agrees(self) -> bool:
        return self.verdict in _AGREEING


def compare(agent_action: Action, expert_action: Action, same_effect: SameEffect | None = None) -> Comparison:
    """Hold one action against the expert's. `same_effect` is asked only where the calls themselves differ."""
    try:
        verdict = _judge(agent_action, expert_action, same_effect)
    except RecursionError:  # arguments nested about as deep as Python reads them: a policy may write anything
        verdict = Verdict.DIFFERENT
    return Comparison(agent_action, expert_action, verdict)


def _judge(left: Action, right: Action, same_effect: SameEffect | None) -> Verdict:
    if isinstance(left, MalformedAction) or isinstance(right, MalformedAction):
        return Verdict.MALFORMED
    if isinstance(left, ToolCalls) and isinstance(right, ToolCalls) and meaning(left) == meaning(right):
        return Verdict.SAME_ACTION
    if same_effect is not None and same_effect(action_message(left), action_message(right)):
        return Verdict.SAME_EFFECT
    if isinstance(left, FinalAnswer) and isinstance(right, FinalAnswer) and meaning(left) == meaning(right):
        return Verdict.SAME_TEXT
    return Verdict.DIFFERENT


# ------------------------------------------------------------------------------------------------- states


class DropReason(StrEnum):
    """Why a state teaches nothing."""

    MASTERED = "mastered"  # every sampled action agrees with the expert
    NO_SAMPLES = "no_samples"  # the policy was not asked, or never answered
    EXPERT_MALFORMED = "expert_malformed"  # the expert's own action cannot be read: nothing to hold against


@dataclass(frozen=True, slots=True)
class ComparedState:
    """One state: K sampled actions of the policy, each held against the expert's.

    A state where no sample agrees is kept, and so is one where all are malformed: among equals a policy gradient finds
    no difference there, but the expert's action is one, and these are the states that need it most.
    """

    expert_action: Action
    comparisons: tuple[Comparison, ...]
    """In the order of the samples."""

    @property
    def num_agreeing(self) -> int:
        return sum(comparison.agrees for comparison in self.comparisons)

    @property
    def agreement_rate(self) -> float | None:
        """Share of the samples that agree with the expert, in [0, 1]; None without samples."""
        return self.num_agreeing / len(self.comparisons) if self.comparisons else None

    @property
    def is_all_malformed(self) -> bool:
        """There are samples, the expert's action is sound, and not one sample could be read."""
        is_sound = not isinstance(self.expert_action, MalformedAction)
        verdicts = {comparison.verdict for comparison in self.comparisons}
        return is_sound and verdicts == {Verdict.MALFORMED}

    @property
    def drop_reason(self) -> DropReason | None:
        """Why nothing can be learned here; None: the state is informative."""
        if isinstance(self.expert_action, MalformedAction):
            return DropReason.EXPERT_MALFORMED
        if not self.comparisons:
            return DropReason.NO_SAMPLES
        return DropReason.MASTERED if self.num_agreeing == len(self.comparisons) else None


def compare_state(
    sampled_actions: Sequence[Action], expert_action: Action, same_effect: SameEffect | None = None
) -> ComparedState:
    """Hold the policy's sampled actions at one state against the expert's."""
    return ComparedState(
        expert_action, tuple(compare(action, expert_action, same_effect) for action in sampled_actions)
    )


# -------------------------------------------------------------------------------------------------- report


@dataclass(frozen=True, slots=True)
class ComparisonReport:
    """What a cycle says of its comparisons."""

    num_states: int
    num_kept: int
    num_dropped: dict[DropReason, int]
    """Every reason, also those that did not occur. With `num_kept`, all states."""
    num_verdicts: dict[Verdict, int]
    """Every verdict, over the samples of states with a sound expert's action."""
    num_all_malformed: int
    """Kept states where not one sample could be read: many of them mean a broken policy or chat protocol."""
    agreement_rate: float | None
    """Mean over the states that have samples and a sound expert's action; None where there is none."""

    def to_json(self) -> dict[str, Any]:
        """For the cycle's row and its HTTP answer."""
        return {
            "num_states": self.num_states,
            "num_kept": self.num_kept,
            "num_dropped": {reason.value: count for reason, count in self.num_dropped.items()},
            "num_verdicts": {verdict.value: count for verdict, count in self.num_verdicts.items()},
            "num_all_malformed": self.num_all_malformed,
            "agreement_rate": self.agreement_rate,
        }


def report_on(states: Iterable[ComparedState]) -> ComparisonReport:
    """Count what was kept, what was dropped and why."""
    states = list(states)
    judged = [state for state in states if state.drop_reason in (None, DropReason.MASTERED)]
    reasons = Counter(state.drop_reason for state in states)
    verdicts = Counter(comparison.verdict for state in judged for comparison in state.comparisons)
    rates = [state.num_agreeing / len(state.comparisons) for state in judged]
    return ComparisonReport(
        num_states=len(states),
        num_kept=reasons[None],
        num_dropped={reason: reasons[reason] for reason in DropReason},
        num_verdicts={verdict: verdicts[verdict] for verdict in Verdict},
        num_all_malformed=sum(state.is_all_malformed for state in states),
        agreement_rate=sum(rates) / len(rates) if rates else None,
    )
