"""What is worth watching about a candidate, measured alike for every objective: before and after its training.

A falling likelihood of the experts' actions, a distance from the reference that runs away, or ratios that leave few
effective samples are how training goes wrong without a word.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import TypeVar

import torch
from torch import Tensor

from learner.data.rewards import LoggedAction, logged_actions_of, policy_actions_of
from learner.data.training_data import NO_ANCESTOR, PolicyAction, State, TrainingData, Trajectory
from learner.objectives.losses import effective_sample_size, k3
from learner.objectives.objectives import action_sequence
from learner.packing.prefix_tree import ScoredSequence

T = TypeVar("T")

MAX_EXPERTS = 32
"""Experts' actions that are watched: their mean is all that is told, and each takes a pass before and one after."""


@dataclass(frozen=True, slots=True)
class WatchedActions:
    """The actions of a training data that are scored before and after training: the experts' (of many those of some
    trajectories: actions of one share their contexts) and the policy's own, which are measured, then the logged ones,
    which are rewarded; the same action in two of them is
    scored once."""

    experts: list[tuple[State, tuple[int, ...]]]
    policy_actions: list[tuple[State, PolicyAction]]
    logged: list[LoggedAction]

    @classmethod
    def of(cls, training_data: TrainingData, are_rewarded: bool = True) -> WatchedActions:
        experts = [_demonstrated(trajectory) for trajectory in training_data.trajectories]
        watched = _evenly_spread([each for each in experts if each], MAX_EXPERTS)
        logged = logged_actions_of(training_data) if are_rewarded else []
        return cls(watched, policy_actions_of(training_data), logged)

    def sequences(self) -> list[ScoredSequence]:
        """One a watched action: experts', own, logged."""
        watched = [*self.experts, *((s, a.token_ids) for s, a in self.policy_actions)]
        watched += [(action.state, action.token_ids) for action in self.logged]
        return [action_sequence(state.prompt, action, (state.id,)) for state, action in watched]


def _demonstrated(trajectory: Trajectory) -> list[tuple[State, tuple[int, ...]]]:
    return [(state, state.expert) for state in trajectory.states if state.expert is not None]


def _evenly_spread(groups: Sequence[list[T]], most: int) -> list[T]:
    """The items of all groups; where they are more than `most`, of groups at even distances, that many at most."""
    share = min(1.0, most / max(sum(map(len, groups)), 1))
    ends = [ceil((number + 1) * share) for number in range(len(groups))]
    begins = [0, *ends][: len(ends)]
    picked = [item for begin, end, group in zip(begins, ends, groups, strict=True) if end > begin for item in group]
    return picked[:most]


def diagnostics(watched: WatchedActions, before: Sequence[Tensor], after: Sequence[Tensor]) -> dict[str, float]:
    """`before` and `after` hold the token logprobs of `watched.sequences()`, under the reference and the candidate.

    chosen_logprob and its change: mean log pi of an expert's action, in nats; it must not fall. kl_to_reference: mean a
    token of the own actions. effective_sample_share: of the own actions' importance ratios reference / behavior, how
    many as good as fresh samples they are worth. versions_old: mean over these actions.
    """
    num_experts, num_measured = len(watched.experts), len(watched.experts) + len(watched.policy_actions)
    before, after = before[:num_measured], after[:num_measured]
    measured: dict[str, float] = {}
    if num_experts:
        was, now = (_sums(logprobs[:num_experts]).mean().item() for logprobs in (before, after))
        measured |= {"chosen_logprob": now, "chosen_logprob_change": now - was}
    if watched.policy_actions:
        ref, policy = torch.cat(list(before[num_experts:])), torch.cat(list(after[num_experts:]))
        # The samples are the reference's, so the estimate is of KL(reference || policy): never negative.
        measured["kl_to_reference"] = k3(ref, policy).mean().item()
        measured |= _staleness([action for _, action in watched.policy_actions], _sums(before[num_experts:]))
    return measured


def _staleness(own: Sequence[PolicyAction], ref_logprobs: Tensor) -> dict[str, float]:
    """Of the actions that a policy gradient could take."""
    ratios = [
        (ref - sum(action.behavior_logprobs), action.num_versions_old)
        for action, ref in zip(own, ref_logprobs.tolist(), strict=True)
        if action.behavior_logprobs and action.num_versions_old < NO_ANCESTOR
    ]
    if not ratios:
        return {}
    log_ratios = torch.tensor([log_ratio for log_ratio, _ in ratios])
    return {
        "effective_sample_share": effective_sample_size((log_ratios - log_ratios.max()).exp()) / len(ratios),
        "versions_old": sum(num_versions_old for _, num_versions_old in ratios) / len(ratios),
    }


def logged_action_sums(watched: WatchedActions, logprobs: Sequence[Tensor]) -> list[float]:
    """The logprob of each logged action as a whole."""
    num_measured = len(watched.experts) + len(watched.policy_actions)
    return _sums(logprobs[num_measured:]).tolist() if watched.logged else []


def _sums(logprobs: Sequence[Tensor]) -> Tensor:
    return torch.stack([tokens.sum() for tokens in logprobs])
