"""One step, chosen among several draws: nothing is shown before the choice, then the chosen one as it was drawn.

Every draw is logged with its score. The draws run side by side in the engine's batch, where they share their prompt.
The first has the seed of the request, so that it is what would have been answered without the choice.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace

from policies.types import Draw, FinishReason, Scorer, TokenIds
from runtime.adapters.reward_models import NoRewardModel
from runtime.agent.scorers import MeanLogprob, best
from runtime.agent.step import Progress, SampledStep, StepSampler
from runtime.agent.turn import Policy, Turn
from runtime.store.episodes import StepCandidate


class BestOf:
    """Lets the policy act once, as `StepSampler` does: iterate `progress`, then take `sampled`."""

    def __init__(
        self,
        policy: Policy,
        turn: Turn,
        prompt: TokenIds,
        scorer: Scorer,
        deadline: float | None = None,
        shows_calls: bool = False,
    ) -> None:
        """As StepSampler's; raises ContextFull too."""
        self._prompt = prompt
        self._scorer = scorer
        self._samplers = [
            StepSampler(policy, _drawn_turn(turn, number), prompt, deadline, shows_calls)
            for number in range(turn.sampling.best_of)
        ]
        self._sampled: SampledStep | None = None

    @property
    def sampled(self) -> SampledStep:
        """What was chosen, and all that it was chosen among; there once `progress` has ended."""
        assert self._sampled is not None, "the step is sampled to its end first"
        return self._sampled

    async def progress(self, choice: int) -> AsyncGenerator[Progress, None]:
        """Draw, choose, and tell the chosen one. Raises EngineError where the engine fails at any of them."""
        began = time.perf_counter()
        told = await self._draw_all(choice)
        sampled = [sampler.sampled for sampler in self._samplers]
        draws = [_draw_of(each) for each in sampled]
        name, scores = await self._scores(draws)
        chosen = best(draws, scores)
        candidates = tuple(
            StepCandidate(
                step_id=each.turn.step_id,
                number=number,
                action=each.action,
                completion_token_ids=draw.token_ids,
                logprobs=draw.logprobs,
                finish_reason=each.finish_reason,
                score=score,
                scorer=name,
                is_chosen=number == chosen,
            )
            for number, (each, draw, score) in enumerate(zip(sampled, draws, scores, strict=True))
        )
        # The client has waited for all of them, and for the choice.
        latency_ms = (time.perf_counter() - began) * 1000
        times = {"first_token_ms": latency_ms, "latency_ms": latency_ms, "created_at": sampled[0].created_at}
        self._sampled = replace(sampled[chosen], candidates=candidates, **times)
        for progress in told[chosen]:
            yield progress

    async def _draw_all(self, choice: int) -> list[list[Progress]]:
        """What each draw makes visible. Where one fails, the others are given up."""
        drawing = [asyncio.create_task(_whole(sampler, choice)) for sampler in self._samplers]
        try:
            return list(await asyncio.gather(*drawing))
        finally:
            for task in drawing:
                task.cancel()
            await asyncio.gather(*drawing, return_exceptions=True)

    async def _scores(self, draws: list[Draw]) -> tuple[str, list[float]]:
        """Whose scores they are, and the scores. A reward model that was refused, or has lost its slot, since the
        request was admitted does not take the answer with it: then the policy's sureness chooses, and is logged so."""
        try:
            return self._scorer.name, await self._scorer.scores(self._prompt, draws)
        except NoRewardModel:
            surer = MeanLogprob()
            return surer.name, await surer.scores(self._prompt, draws)


def sampler_of(
    policy: Policy, turn: Turn, prompt: TokenIds, deadline: float | None = None, shows_calls: bool = False
) -> StepSampler | BestOf:
    """What lets the policy act once: one draw, or the best of several."""
    if policy.scorer is None or turn.sampling.best_of == 1:
        return StepSampler(policy, turn, prompt, deadline, shows_calls)
    return BestOf(policy, turn, prompt, policy.scorer, deadline, shows_calls)


async def _whole(sampler: StepSampler, choice: int) -> list[Progress]:
    async with aclosing(sampler.progress(choice)) as stream:
        return [progress async for progress in stream]


def _draw_of(sampled: SampledStep) -> Draw:
    logprobs = tuple(token.logprob for token in sampled.tokens)
    is_cut = sampled.finish_reason is FinishReason.LENGTH
    return Draw(sampled.completion_token_ids, logprobs, sampled.action, is_cut)


def _drawn_turn(turn: Turn, number: int) -> Turn:
    seed = turn.sampling.seed
    if seed is not None and number:
        # Far from the seeds of an answer's other choices, which count up by one; within 64 bits with a sign.
        seed = (seed + 2**63 + number * 0x9E3779B97F4A7C15) % 2**64 - 2**63
    return replace(turn, stream=False, sampling=replace(turn.sampling, seed=seed))
