"""A reward model chooses only where it is the registered one, is sound, and is scored by as it was trained."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from policies.adapters.files import WEIGHTS_FILE, weights_digest
from policies.adapters.probe import PROBE_FILE, read_probe
from policies.adapters.reward import REWARD_FOLDER, RewardCard, expert_likelihood, read_reward_card, write_reward_card
from policies.types import Adapter, Draw, EngineError, FinalAnswer, TokenIds
from runtime.adapters.reward_models import NoRewardModel, RewardModels
from runtime.adapters.swap import Swap
from runtime.agent.scorers import ByReward, ChosenBy, MeanLogprob, scorer_of
from runtime.store.adapter_registry import AdapterRegistry
from tests.scripted_engine import ScriptedEngine
from tests.tiny_adapters import TinyNetwork, faithful_script

CARD = RewardCard(accuracy=0.8, num_pairs=12)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyNetwork:
    return TinyNetwork(tmp_path_factory.mktemp("tiny"))


class House:
    """A registry with reward models, and an engine that scores as their probes say."""

    def __init__(self, tiny: TinyNetwork, folder: Path) -> None:
        self.tiny, self.folder = tiny, folder
        self.registry = AdapterRegistry(folder / "agent.db")
        self.engine = ScriptedEngine(faithful_script(self.registry))
        self.engine.scored = self.faithful
        self.swap = Swap(self.engine, self.registry, tiny.network)
        self.models = RewardModels(self.engine, self.registry, tiny.network, self.swap.changes)
        self.probe = read_probe(tiny.adapter(100))

    def faithful(self, tokens: TokenIds, name: str) -> Sequence[float]:
        """A probe's continuation has the trainer's logprobs; any other token t has -t / 10, half of it in the base."""
        for prompt in self.probe.prompts:
            greedy = [likeliest[0] for likeliest in prompt.continuation]
            if tokens == tuple(token.token_id for token in greedy):
                return [token.base_logprob if name == "base" else token.adapter_logprob for token in greedy]
        return [-token / (20 if name == "base" else 10) for token in tokens]

    def register(self, seed: int = 1, reward: int | None = 100) -> Adapter:
        made = self.tiny.copy(seed, self.folder / f"made-{seed}")
        if reward is not None:
            self.tiny.copy(reward, made / REWARD_FOLDER)
            write_reward_card(made / REWARD_FOLDER, CARD)
        adapter = self.registry.register(made)
        shutil.rmtree(made)
        return adapter

    def tiny_digest(self) -> str:
        return weights_digest(self.tiny.adapter(100))

    def loaded(self) -> list[str]:
        return [each.name for each in self.engine.loaded_adapters()]


@pytest.fixture
def house(tiny: TinyNetwork, tmp_path: Path) -> House:
    return House(tiny, tmp_path)


DRAWS = [Draw((3, 4), (-0.1, -0.1), FinalAnswer("a")), Draw((1,), (-0.1,), FinalAnswer("b"))]


def likelihoods(house: House, adapter: Adapter) -> list[float]:
    async def scored() -> list[float]:
        return await house.models.expert_likelihoods(await house.models.find(adapter), (5, 6), [*DRAWS, DRAWS[0]])

    return asyncio.run(scored())


def test_it_scores_by_its_own_logprobs_and_the_bases_and_is_no_adapter_that_acts(house: House) -> None:
    adapter = house.register()
    # Nats a token: log pi, and a quarter of 0.5 (log q - log base).
    expected = [(-0.2 + 0.25 * 0.5 * (-0.7 + 0.35)) / 2, -0.1 + 0.25 * 0.5 * (-0.1 + 0.05)]
    assert likelihoods(house, adapter) == pytest.approx([*expected, expected[0]])
    assert house.loaded() == [f"{adapter.name}-reward1"]
    assert [each.name for each in house.registry.adapters()] == [adapter.name]
    assert house.registry.reward_of(adapter.name) in house.engine.loaded_adapters()
    asyncio.run(house.swap.drain())
    assert house.loaded() == [f"{adapter.name}-reward1"], "a sweep knows of it and leaves it"


def test_an_adapter_without_one_is_chosen_for_by_its_sureness_or_refused_by_name(house: House) -> None:
    adapter = house.register(reward=None)
    assert isinstance(asyncio.run(scorer_of(ChosenBy.AUTO, adapter, house.models)), MeanLogprob)
    for acting in (adapter, None):
        with pytest.raises(NoRewardModel, match="ask for mean_logprob or majority"):
            asyncio.run(scorer_of(ChosenBy.DISCRIMINATOR, acting, house.models))
    with_one = house.register(seed=2)
    assert isinstance(asyncio.run(scorer_of(ChosenBy.AUTO, with_one, house.models)), ByReward)


def test_weights_that_were_changed_after_the_registration_are_never_loaded(house: House) -> None:
    adapter = house.register()
    shutil.copyfile(house.tiny.adapter(7) / WEIGHTS_FILE, adapter.path / REWARD_FOLDER / WEIGHTS_FILE)
    with pytest.raises(NoRewardModel, match="is not the one that was registered"):
        asyncio.run(house.models.find(adapter))
    assert house.loaded() == []


@pytest.mark.parametrize("broken", [PROBE_FILE, WEIGHTS_FILE, "adapter_config.json", "reward.json"])
def test_a_broken_one_is_refused_and_the_adapter_beside_it_acts(house: House, broken: str) -> None:
    made = house.tiny.copy(1, house.folder / "made")
    house.tiny.copy(100, made / REWARD_FOLDER)
    write_reward_card(made / REWARD_FOLDER, CARD)
    (made / REWARD_FOLDER / broken).write_bytes(b'{"bias": "NaN"}')
    adapter = house.registry.register(made)
    with pytest.raises(NoRewardModel) as refused:
        asyncio.run(house.models.find(adapter))
    assert str(house.folder) not in str(refused.value)
    asyncio.run(house.swap.bring_up(adapter.name))
    assert house.loaded() == [adapter.name]


@pytest.mark.parametrize("lost", [".", PROBE_FILE, WEIGHTS_FILE, "adapter_config.json", "reward.json"])
def test_what_is_gone_is_told_without_the_servers_folders(house: House, lost: str) -> None:
    """Clients are told why the discriminator does not choose."""
    adapter = house.register()
    folder = adapter.path / REWARD_FOLDER
    shutil.rmtree(folder) if lost == "." else (folder / lost).unlink()
    with pytest.raises(NoRewardModel) as refused:
        asyncio.run(house.models.find(adapter))
    assert str(house.folder) not in str(refused.value)
    assert "/" not in str(refused.value).replace("its folder/", "")


def test_an_engine_that_scores_otherwise_than_the_trainer_chooses_by_nothing(house: House) -> None:
    """Releases of vLLM told wrong logprobs of prompts under an adapter; or the base's, which is as silent."""
    adapter = house.register()
    house.engine.scored = lambda tokens, _: house.faithful(tokens, "base")
    with pytest.raises(NoRewardModel, match="does not score by what was trained"):
        likelihoods(house, adapter)
    assert house.loaded() == []
    with pytest.raises(NoRewardModel, match="does not score by what was trained"):
        asyncio.run(house.models.find(adapter))


def test_it_gives_its_slot_to_an_adapter_and_comes_again_when_there_is_one(house: House) -> None:
    adapters = [house.register(seed) for seed in (1, 2, 3)]
    likelihoods(house, adapters[0])

    async def all_up() -> None:
        for each in adapters:
            await house.swap.bring_up(each.name)

    asyncio.run(all_up())
    assert house.loaded() == [each.name for each in adapters]
    with pytest.raises(NoRewardModel, match="no slot"):
        likelihoods(house, adapters[0])
    asyncio.run(house.swap.unload(adapters[2].name))
    assert likelihoods(house, adapters[0])


def test_the_newest_is_used_and_a_broken_newer_one_is_no_reason_to_use_the_old(house: House) -> None:
    adapter = house.register()
    likelihoods(house, adapter)
    newer = house.tiny.copy(100, house.folder / "newer")
    write_reward_card(newer, RewardCard(accuracy=None, num_pairs=4))
    assert house.registry.add_reward(adapter.name, newer).digest == house.tiny_digest(), "the same weights: known"
    house.tiny.write_adapter(other := house.folder / "other", seed=5)
    write_reward_card(other, CARD)
    second = house.registry.add_reward(adapter.name, other, "cycle_2")
    assert second.path.name == "reward-0002"
    house.probe = read_probe(other)
    assert likelihoods(house, adapter)
    assert house.loaded() == [f"{adapter.name}-reward2"]
    (second.path / "reward.json").unlink()
    third = house.registry.add_reward(adapter.name, house.tiny.adapter(6))
    assert third.version > second.version
    with pytest.raises(NoRewardModel, match="reward3"):
        asyncio.run(house.models.find(adapter))


@pytest.mark.parametrize(("num_acting", "num_kept"), [(2, 1), (0, 2)])
def test_as_many_stay_as_there_is_room_for_and_nobody_loses_the_one_he_scores_by(
    house: House, num_acting: int, num_kept: int
) -> None:
    """As where two agents choose by reward models of their own."""
    first, second = house.register(1), house.register(2)
    for acting in (first, second)[:num_acting]:
        asyncio.run(house.swap.bring_up(acting.name))

    async def score(adapter: Adapter) -> list[float]:
        return await house.models.expert_likelihoods(await house.models.find(adapter), (5, 6), DRAWS)

    async def at_once() -> list[list[float]]:
        return list(await asyncio.gather(*(score(each) for each in (first, second) * 8)))

    told = asyncio.run(at_once())
    assert all(each == told[0] for each in told)
    assert len(house.loaded()) == num_acting + num_kept


def test_an_engine_that_has_died_is_an_error_and_no_verdict_on_it(house: House) -> None:
    adapter = house.register()
    asyncio.run(house.models.find(adapter))
    house.engine.is_alive = False
    with pytest.raises((EngineError, NoRewardModel)):
        likelihoods(house, adapter)
    house.engine.is_alive = True
    assert likelihoods(house, adapter)


def test_a_ratio_alone_does_not_choose_what_the_policy_hardly_ever_does() -> None:
    usual = expert_likelihood((-0.1, -0.1), (-0.2, -0.2), (-1.0, -1.0))
    slip = expert_likelihood((-9.0, -0.1), (-2.0, -0.2), (-9.0, -0.1))
    assert usual > slip, "though the reward model's logit of the slip is larger"
    wrong = expert_likelihood((-0.1, -0.1), (-9.0, -0.2), (-1.0, -0.1))
    assert usual > wrong, "what the policy likes alike, the reward model decides"


def test_its_card_is_read_as_it_was_written_and_one_of_a_release_before_too(tmp_path: Path) -> None:
    write_reward_card(tmp_path, CARD)
    assert read_reward_card(tmp_path) == CARD
    (tmp_path / "reward.json").write_text(json.dumps({"bias": 0.3, "accuracy": 0.8, "num_pairs": 12}))
    assert read_reward_card(tmp_path) == CARD
    (tmp_path / "reward.json").write_text(json.dumps({"accuracy": "high", "num_pairs": 1}))
    with pytest.raises(ValueError, match="cannot be read"):
        read_reward_card(tmp_path)
