"""Brings up the newest reward model beside an adapter, proves that the engine scores by it, and scores actions.

A reward model lies in the engine like an adapter and never acts: no lease, no name that a client could pin. It is
brought up when a step is first to be chosen by it: validated and held against the digest it was registered with,
loaded, and verified. Verified means that the engine tells, for the continuations of its probe, the log probabilities
that its trainer saw, under it and under the base network: an engine that scores wrongly (some releases of vLLM did,
with adapters) chooses by nothing. It gives way where an adapter needs its slot.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

from policies.adapters.base_network import BaseNetwork
from policies.adapters.files import AdapterRefused, validate_adapter
from policies.adapters.probe import Deviation, Probe
from policies.adapters.reward import RewardCard, expert_likelihood, read_reward_card
from policies.types import Adapter, Draw, Engine, EngineError, TokenIds
from runtime.adapters.verification import require_told_apart, too_alike
from runtime.store.adapter_registry import AdapterRegistry

_log = logging.getLogger(__name__)


class NoRewardModel(ValueError):
    """There is no reward model to choose by, and why."""


@dataclass(frozen=True, slots=True)
class RewardModel:
    """A reward model that was found sound."""

    adapter: Adapter
    card: RewardCard
    probe: Probe


class RewardModels:
    """Those beside the registered adapters."""

    def __init__(self, engine: Engine, registry: AdapterRegistry, base: BaseNetwork, loading: asyncio.Lock) -> None:
        """`loading` is held while something is loaded into the engine (`Swap.changes`)."""
        self._loading = loading
        self._engine = engine
        self._registry = registry
        self._base = base
        self._sound: dict[str, RewardModel] = {}
        """By the reward model's name."""
        self._problems: dict[str, str] = {}
        """Why one is not used, by its name; found once."""
        self._changes = asyncio.Lock()
        self._num_scoring = 0
        self._is_idle = asyncio.Event()
        self._is_idle.set()

    async def find(self, adapter: Adapter | None) -> RewardModel:
        """The newest reward model beside an adapter. Raises NoRewardModel where there is none, or it is not sound."""
        if adapter is None:
            raise NoRewardModel("the base network has no reward model beside it: a learner's cycle makes one")
        reward = self._registry.reward_of(adapter.name)
        if reward is None:
            raise NoRewardModel(f"{adapter.name} has no reward model beside it: no cycle made a discriminator for it")
        if reward.name in self._problems:
            raise NoRewardModel(self._problems[reward.name])
        if reward.name not in self._sound:
            try:
                self._sound[reward.name] = await asyncio.to_thread(self._validated, reward)
            except AdapterRefused as error:
                # Clients are told of it, and are to learn nothing of the server's folders.
                raise self._refusal(reward.name, str(error).replace(str(reward.path), "its folder")) from error
        return self._sound[reward.name]

    async def expert_likelihoods(
        self, reward: RewardModel, prompt_token_ids: TokenIds, draws: Sequence[Draw]
    ) -> list[float]:
        """Of each draw, `expert_likelihood`. Equal draws are scored once; of one that fills the context, what the
        engine can read. Raises NoRewardModel where the reward model is refused or has no slot now, EngineError where
        the engine fails."""
        room = self._engine.limits.max_context_tokens - 1 - len(prompt_token_ids)
        different = [tokens for tokens in dict.fromkeys(draw.token_ids[:room] for draw in draws) if tokens]
        asked = [(tokens, adapter) for tokens in different for adapter in (reward.adapter, None)]
        async with self._loaded(reward):
            try:
                told = await asyncio.gather(*(self._engine.score(prompt_token_ids, *each) for each in asked))
            except EngineError as error:
                if self._engine.health().is_alive and reward.adapter not in self._engine.loaded_adapters():
                    raise NoRewardModel(f"{reward.adapter.name} gave its slot to an adapter") from error
                raise
        scored = {tokens: sides for tokens, *sides in zip(different, told[::2], told[1::2], strict=True)}
        return [expert_likelihood(draw.logprobs, *scored.get(draw.token_ids[:room], ((), ()))) for draw in draws]

    # ------------------------------------------------------------------------------------------ in the engine

    @asynccontextmanager
    async def _loaded(self, reward: RewardModel) -> AsyncIterator[None]:
        """Hold a reward model in the engine. One that has to be brought up waits until nobody scores by another."""
        async with self._changes:
            if reward.adapter not in self._engine.loaded_adapters():
                await self._is_idle.wait()
                async with self._loading:
                    await self._bring_up(reward)
            self._num_scoring += 1
            self._is_idle.clear()
        try:
            yield
        finally:
            self._num_scoring -= 1
            if not self._num_scoring:
                self._is_idle.set()

    async def _bring_up(self, reward: RewardModel) -> None:
        name = reward.adapter.name
        others = [each for each in self._engine.loaded_adapters() if each.is_reward]
        outdated = [each for each in others if each.parent == reward.adapter.parent]
        for other in outdated:
            await self._engine.unload_adapter(other)
        for other in others:
            if self._is_full() and other not in outdated:
                await self._engine.unload_adapter(other)
        if self._is_full():
            raise NoRewardModel(f"{name} has no slot in the engine now: adapters hold all of them")
        try:
            await self._engine.load_adapter(reward.adapter)
        except EngineError as error:
            raise NoRewardModel(f"{name} cannot be loaded: {error}") from error
        try:
            await verify_scores(self._engine, reward.adapter, reward.probe)
        except AdapterRefused as error:
            await self._engine.unload_adapter(reward.adapter)
            raise self._refusal(name, str(error)) from error
        except BaseException:  # else one that nobody has verified would be found loaded
            with suppress(EngineError):
                await self._engine.unload_adapter(reward.adapter)
            raise

    def _is_full(self) -> bool:
        return len(self._engine.loaded_adapters()) >= self._engine.limits.max_adapters

    # ------------------------------------------------------------------------------------------------- files

    def _validated(self, reward: Adapter) -> RewardModel:
        files = validate_adapter(reward.path, self._engine.limits, self._base)
        if files.digest != reward.digest:
            raise AdapterRefused(f"{reward.name} is not the one that was registered")
        try:
            return RewardModel(reward, read_reward_card(reward.path), files.probe)
        except (OSError, ValueError) as error:
            raise AdapterRefused(f"{reward.name}: {error}") from error

    def _refusal(self, name: str, problem: str) -> NoRewardModel:
        self._problems[name] = problem
        _log.warning("%s is not used: %s", name, problem)
        return NoRewardModel(problem)


async def verify_scores(engine: Engine, adapter: Adapter, probe: Probe) -> None:
    """Hold an engine's scores of the probe's continuations against the trainer's. Raises AdapterRefused."""
    tolerance = require_told_apart(engine, probe, "reward model")
    by_reward, by_base = await _scores(engine, probe, adapter), await _scores(engine, probe, None)
    greedy = [likeliest[0] for prompt in probe.prompts for likeliest in prompt.continuation]
    of_reward, of_base = [token.adapter_logprob for token in greedy], [token.base_logprob for token in greedy]
    for name, expected, told in ((adapter.name, of_reward, by_reward), ("the base", of_base, by_base)):
        off = Deviation.between(zip(expected, told, strict=True))
        if not off.is_within(tolerance):
            raise AdapterRefused(
                f"the engine does not score by what was trained: under {name} {off.in_words(tolerance)}"
            )
    apart = Deviation.between(zip(of_reward, by_base, strict=True))
    if not apart.tells_apart(tolerance):
        raise AdapterRefused(too_alike(apart, tolerance, "reward model"))


async def _scores(engine: Engine, probe: Probe, scored_by: Adapter | None) -> list[float]:
    """Of the probe's continuations, prompt after prompt."""
    told = list[float]()
    for prompt in probe.prompts:
        token_ids = [likeliest[0].token_id for likeliest in prompt.continuation]
        told += await engine.score(prompt.prompt_token_ids, token_ids, scored_by)
    return told
