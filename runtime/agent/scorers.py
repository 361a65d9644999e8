"""Who chooses among several draws at a state: the cycle's discriminator, the policy's own sureness, or the majority.

None is believed to be right: what each gained, and what it cost, stands in benchmarks/RESULTS.md. Refused: the implicit
reward, log pi - log ref of the served adapter, and the discriminator's logit alone, a ratio of the expert's probability
to the policy's: neither was much better than chance in choosing.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cache

from policies.chat.meaning import meaning
from policies.types import Adapter, Draw, MalformedAction, Scorer, TokenIds
from runtime.adapters.reward_models import NoRewardModel, RewardModel, RewardModels

_log = logging.getLogger(__name__)


class ChosenBy(StrEnum):
    """What a draw is chosen by."""

    AUTO = "auto"  # the discriminator where there is one beside the adapter, else the mean logprob
    DISCRIMINATOR = "discriminator"  # the policy and the reward model beside its adapter: what an expert would do
    MEAN_LOGPROB = "mean_logprob"  # how sure the policy was of its tokens
    MAJORITY = "majority"  # how many draws mean the same


@dataclass(frozen=True, slots=True)
class Choosing:
    """How the action of a step is found."""

    num_draws: int = 1
    by: ChosenBy = ChosenBy.AUTO
    may_fall_back: bool = True
    """Nobody asked for `by` by name: where it cannot choose, another may."""


@dataclass(frozen=True, slots=True)
class ChoosingAsked:
    """What a request, or an agent's table, says of it; None where it does not."""

    num_draws: int | None = None
    by: ChosenBy | None = None


FIRST_DRAW, NOTHING_ASKED = Choosing(), ChoosingAsked()


@dataclass(frozen=True, slots=True)
class MeanLogprob:
    """The mean log probability of a draw's tokens."""

    name: str = ChosenBy.MEAN_LOGPROB.value

    async def scores(self, prompt_token_ids: TokenIds, draws: Sequence[Draw]) -> list[float]:
        return [sum(draw.logprobs) / len(draw.logprobs) for draw in draws]


@dataclass(frozen=True, slots=True)
class Majority:
    """How many of the draws mean the same (self-consistency, arXiv 2203.11171); what cannot be read means nothing."""

    name: str = ChosenBy.MAJORITY.value

    async def scores(self, prompt_token_ids: TokenIds, draws: Sequence[Draw]) -> list[float]:
        said = [None if isinstance(draw.action, MalformedAction) else meaning(draw.action) for draw in draws]
        votes = Counter(each for each in said if each is not None)
        return [0.0 if each is None else float(votes[each]) for each in said]


@dataclass(frozen=True, slots=True)
class ByReward:
    """What an expert would do most likely, by the policy and the reward model beside its adapter."""

    models: RewardModels
    reward: RewardModel
    name: str = ChosenBy.DISCRIMINATOR.value

    async def scores(self, prompt_token_ids: TokenIds, draws: Sequence[Draw]) -> list[float]:
        return await self.models.expert_likelihoods(self.reward, prompt_token_ids, draws)


async def scorer_of(
    chosen_by: ChosenBy, adapter: Adapter | None, models: RewardModels | None, may_fall_back: bool = False
) -> Scorer:
    """Who chooses among an adapter's draws.

    Where the discriminator is asked for and there is none, raises NoRewardModel; `may_fall_back`: the policy's sureness
    chooses then, as for `auto`, and the log says so once for each reason.
    """
    if chosen_by is ChosenBy.MAJORITY:
        return Majority()
    if chosen_by is ChosenBy.MEAN_LOGPROB:
        return MeanLogprob()
    try:
        if models is None:
            raise NoRewardModel("this server keeps no reward models")
        return ByReward(models, await models.find(adapter))
    except NoRewardModel as problem:
        if chosen_by is ChosenBy.DISCRIMINATOR and not may_fall_back:
            raise NoRewardModel(f"{problem}; ask for {ChosenBy.MEAN_LOGPROB} or {ChosenBy.MAJORITY}") from problem
        if chosen_by is ChosenBy.DISCRIMINATOR:
            _warn_once(str(problem))
        return MeanLogprob()


@cache
def _warn_once(problem: str) -> None:
    _log.warning("best of several by discriminator: %s; the mean logprob chooses", problem)


def best(draws: Sequence[Draw], scores: Sequence[float]) -> int:
    """The place of the draw that is taken: the best score; among equals the surer one, then the first.

    What cannot be read as an action is taken only where no draw can, and what a limit cut off only where none is whole.
    """

    def rank(place: int) -> tuple[bool, bool, float, float, int]:
        draw = draws[place]
        is_sound = not isinstance(draw.action, MalformedAction)
        return is_sound, not draw.is_cut, scores[place], sum(draw.logprobs) / len(draw.logprobs), -place

    return max(range(len(draws)), key=rank)
