"""Few demonstrations judge by folds: who tries what, in which slots, and what is left for the next gate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import pytest
from httpx import Request, Response
from openai import APIStatusError

import learner.training.candidates
from learner.data.collaborators import Collaborators
from learner.data.collect import collect
from learner.evaluation.fold_contest import FoldContest
from learner.evaluation.folds import NUM_FOLDS, left_out
from learner.evaluation.gate import Contestants, NoContest
from learner.evaluation.trials import CycleTrials
from learner.evaluation.twins import Twin, as_evidence, needed_later, twins_of
from learner.objectives.build import NothingToLearn
from learner.objectives.objectives import Objective
from learner.options import CollectionOptions, CycleOptions, TrainingOptions
from learner.report import CycleRecord
from learner.training.candidates import Candidate
from learner.training.trainer import Trainer, TrainingReport
from policies.chat.chat_protocol import ChatProtocol
from policies.types import BASE_ADAPTER
from runtime.engines.embedded.engine import EmbeddedEngine
from runtime.store.adapter_registry import AdapterState
from runtime.store.learning_log import CycleStage, LearningLog
from tests.cycles import QUICK, collaborators, practised, run
from tests.demonstrations import expert_demonstration, post
from tests.serving import SayingEngine, parts_of, served


@dataclass
class ScriptedServer:
    """Names what is registered by its folder, and remembers what is in its engine."""

    loaded: list[str] = field(default_factory=list)
    most_loaded: int = 0
    refused: dict[str, str] = field(default_factory=dict)

    async def register(self, folder: Path, parent: str, reason: str, cycle: str) -> str:
        if why := self.refused.get(folder.name, ""):
            response: Any = Response(409, request=Request("POST", "http://127.0.0.1"))
            raise APIStatusError(why, response=response, body=None)
        self.loaded.append(folder.name)
        self.most_loaded = max(self.most_loaded, len(self.loaded))
        return folder.name

    async def unload(self, name: str) -> None:
        self.loaded.remove(name)


@dataclass
class House:
    """A candidate before its gate, and what it begins from."""

    server: ScriptedServer
    log: LearningLog
    folder: Path
    begun_from: list[str] = field(default_factory=list)

    def contest(self, acting: str) -> FoldContest:
        who = cast(Any, Collaborators)(self.server, None, self.log, None, None, (), Path("base"), self.folder)
        candidate = Candidate("sft", self.folder / "sft", [])
        self.server.loaded = [name for name in (acting, "sft") if name != BASE_ADAPTER]
        return FoldContest(CycleRecord("cycle_2", self.log), who, candidate, "sft", acting, self.train)

    def train(self, fold: int, objective: str, begin: str, folder: Path) -> set[str]:
        if fold == 2:
            raise NothingToLearn("nothing is left")
        self.begun_from.append(begin)
        return {f"demo_{fold}"}


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    log = LearningLog(tmp_path)
    yield House(ScriptedServer(), log, tmp_path)
    log.close()


def passed(house: House, name: str, twins: dict[int, Twin], promote: bool = True) -> None:
    house.log.add_decision("cycle_1", name, BASE_ADAPTER, promote, "a test", as_evidence(twins))


async def tried_under(contest: FoldContest, folds: Sequence[int | None]) -> list[Contestants | NoContest]:
    tried = list[Contestants | NoContest]()
    for fold in folds:
        async with contest.contest(fold) as contestants:
            tried.append(contestants)
    return tried


async def test_a_first_candidates_folds_are_held_against_the_base_network(house: House) -> None:
    contest = house.contest(BASE_ADAPTER)
    assert await tried_under(contest, [None, 0, None]) == [
        Contestants("sft", BASE_ADAPTER),
        Contestants("sft-without-fold-0", BASE_ADAPTER),
        Contestants("sft", BASE_ADAPTER),
    ]
    assert contest.twins == {0: Twin("sft-without-fold-0", frozenset({"demo_0"}))}
    assert house.server.most_loaded == 1


async def test_a_fold_is_tried_by_the_acting_adapters_twin_and_what_goes_on_from_it(house: House) -> None:
    passed(house, "agent-v0001", {0: Twin("agent-v0002", frozenset({"demo_9"}))})
    contest = house.contest("agent-v0001")
    assert await tried_under(contest, [None, 0, None]) == [
        Contestants("sft", "agent-v0001"),
        Contestants("sft-without-fold-0", "agent-v0002"),
        Contestants("sft", "agent-v0001"),
    ]
    assert house.begun_from == ["agent-v0002"]
    assert contest.twins[0].has_seen == {"demo_0", "demo_9"}, "what its twin has seen, it has seen"
    assert house.server.most_loaded == 3, "of four slots: a canary's, or a better candidate's, is left"
    assert house.server.loaded == ["agent-v0001", "sft"]


async def test_a_fold_that_cannot_be_trained_has_no_contestants_and_says_why(house: House) -> None:
    contest = house.contest(BASE_ADAPTER)
    assert await tried_under(contest, [2]) == [NoContest("no candidate could be trained without it: nothing is left")]
    assert contest.record.report.not_trained == {"sft-without-fold-2": "nothing is left"}
    assert contest.twins == {}


async def test_a_lost_twin_leaves_its_fold_out(house: House) -> None:
    passed(house, "agent-v0001", {0: Twin("agent-v0002")})
    house.server.refused = {"agent-v0002": "the adapter folder does not exist"}
    contest = house.contest("agent-v0001")
    why = "the server did not take in an adapter that was trained without it: the adapter folder does not exist"
    assert await tried_under(contest, [0, None]) == [NoContest(why), Contestants("sft", "agent-v0001")]
    assert contest.record.report.not_registered == {"sft-without-fold-0": "the adapter folder does not exist"}
    assert house.begun_from == []


async def test_a_trial_that_breaks_leaves_no_fold_in_the_engine(house: House) -> None:
    with pytest.raises(ConnectionError):
        async with house.contest(BASE_ADAPTER).contest(0):
            raise ConnectionError
    assert house.server.loaded == []


def test_twins_are_those_of_what_acts_and_only_passed_ones_are_needed_later(house: House) -> None:
    passed(house, "agent-v0001", {0: Twin("agent-v0002"), 1: Twin("agent-v0003")})
    passed(house, "agent-v0004", {0: Twin("agent-v0005")}, promote=False)
    passed(house, "agent-v0006", {})
    assert {fold: twin.adapter for fold, twin in twins_of("agent-v0001", house.log).items()} == {
        0: "agent-v0002",
        1: "agent-v0003",
    }
    assert twins_of("agent-v0006", house.log) == {} == twins_of("agent-v0099", house.log)
    assert len(twins_of(BASE_ADAPTER, house.log)) == NUM_FOLDS
    assert needed_later(["cycle_1"], house.log) == {"agent-v0002", "agent-v0003"}


def test_what_the_acting_adapters_twin_has_seen_does_not_judge(protocol: ChatProtocol, tmp_path: Path) -> None:
    """An adapter without twins has seen every fold; a demonstration may have come into another fold since."""
    with served(parts_of(SayingEngine(protocol), protocol, tmp_path)) as server:
        post(server, *(expert_demonstration(number) for number in range(8))).raise_for_status()
        who = collaborators(server, tmp_path, world=None)
        found = collect(server.parts.log, None, ("base",), CollectionOptions(held_out_share=0.0, anchor_share=0.0), 0)

        def judging(acting: str) -> set[str]:
            return {unit.name for unit in CycleTrials.of_cycle(acting, found, who, 4).units}

        every = {each.episode.id for each in found.demonstrations}
        seen = sorted(every & left_out(0, found.groups_of))[0]
        twins = {0: Twin("agent-v0002", frozenset({seen})), 1: Twin("agent-v0003")}
        who.learning_log.add_decision("cycle_1", "agent-v0001", BASE_ADAPTER, True, "a test", as_evidence(twins))
        assert judging(BASE_ADAPTER) == every
        assert judging("agent-v0009") == set()
        assert judging("agent-v0001") == every - {seen} - left_out(2, found.groups_of)


# --------------------------------------------------------------------------------------------- a real cycle


@dataclass
class Trained:
    """What an adapter was trained on, and from."""

    begin: Path | None
    episodes: set[str]


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> dict[str, Trained]:
    """By folder. The real trainer, watched."""
    found: dict[str, Trained] = {}

    class Watched(Trainer):
        episodes: set[str]

        def train(self, objective: Objective, *more: Any, **named: Any) -> TrainingReport:
            self.episodes = {sequence.owner[0] for sequence in objective.sequences}  # type: ignore[index]
            return super().train(objective, *more, **named)

        def save(self, folder: Path, *more: Any, **named: Any) -> None:
            super().save(folder, *more, **named)
            found[folder.name] = Trained(self._parent, self.episodes)

    monkeypatch.setattr(learner.training.candidates, "Trainer", Watched)
    return found


def require_that_no_fold_was_trained_on(trained: dict[str, Trained], groups_of: dict[str, frozenset[str]]) -> None:
    for fold in range(NUM_FOLDS):
        episodes = trained[f"sft-without-fold-{fold}"].episodes
        assert episodes == trained["sft"].episodes - left_out(fold, groups_of)
        assert episodes < trained["sft"].episodes


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_twelve_demonstrations_and_no_world_promote_and_their_twins_judge_the_next_cycle(
    engine: EmbeddedEngine, protocol: ChatProtocol, tmp_path: Path, trained: dict[str, Trained]
) -> None:
    """With fewer than about forty demonstrations no cycle could ever promote."""
    options = CycleOptions(objectives=("sft",), training=TrainingOptions(lr=4e-3, epochs=8))
    with served(parts_of(engine, protocol, tmp_path)) as server:
        post(server, *(expert_demonstration(number) for number in range(12))).raise_for_status()
        practised(server, first=0, number=3)  # at demonstrated tasks: the policy's own ways go with their folds
        practised(server, first=100, number=3)
        who = collaborators(server, tmp_path, world=None)
        found = collect(server.parts.log, None, ("base",), options.collection, 0)
        first = run(server, tmp_path, options=options, world=None)
        assert first.stage is CycleStage.PROMOTED, first.message
        (decision,) = who.learning_log.decisions("cycle_1")
        evidence = decision["evidence"]
        assert (evidence["unit"], evidence["num_planned"], evidence["num_trials"]) == ("demonstrations", 12, 12)
        assert first.report["outlook"]["num_pairs"] == 12
        assert evidence["gain_low"] > 0
        assert {unit: fold for unit, fold, *_ in evidence["pairs"]} == judging_folds(found)
        require_that_no_fold_was_trained_on(trained, found.groups_of)

        acting, twins = first.report["promoted"], twins_of(first.report["promoted"], who.learning_log)
        assert list(twins) == list(range(NUM_FOLDS))
        assert set(first.report["diagnostics"]) >= {"sft"}
        assert not [name for name in first.report["diagnostics"] if "fold" in name]
        assert [adapter.name for adapter in engine.loaded_adapters()] == [acting]
        states = {server.parts.registry.state(twin.adapter) for twin in twins.values()}
        assert states == {AdapterState.UNLOADED}

        trained.clear()
        post(server, *(expert_demonstration(number) for number in range(12, 16))).raise_for_status()
        options = replace(
            options, collection=CollectionOptions(held_out_share=0.0, anchor_share=0.0)
        )  # so that a fold comes first
        second = run(server, tmp_path, "cycle_2", options=options, world=None)
        assert second.stage in (CycleStage.PROMOTED, CycleStage.REFUSED), second.message
        (decision,) = who.learning_log.decisions("cycle_2")
        assert decision["against"] == acting
        assert decision["evidence"]["num_planned"] == 16
        assert trained["sft"].begin == who.adapter_folder(acting)
        assert trained["sft-without-fold-0"].begin == who.adapter_folder(twins[0].adapter)
        left = {adapter.name: server.parts.registry.state(adapter.name) for adapter in server.parts.registry.adapters()}
        assert {left[twin.adapter] for twin in twins.values()} == {AdapterState.UNLOADED}, "they may judge again"
        if second.stage is CycleStage.REFUSED:
            mine = set(left) - {acting, *(twin.adapter for twin in twins.values())}
            assert {left[name] for name in mine} == {AdapterState.REFUSED}
            assert [adapter.name for adapter in engine.loaded_adapters()] == [acting]


def test_copies_of_one_transcript_end_with_what_is_missing_and_nothing_is_promoted(
    engine: EmbeddedEngine, protocol: ChatProtocol, tmp_path: Path
) -> None:
    """The cycle ended with "none of 12 demonstrations was finished under the acting adapter"."""
    copy = expert_demonstration(0)
    with served(parts_of(engine, protocol, tmp_path)) as server:
        clocks = [{"role": "system", "content": f"It is 12:{minute:02}."} for minute in range(12)]
        copies = [{**copy, "messages": [clock, *copy["messages"]]} for clock in clocks]
        post(server, *copies).raise_for_status()
        status = run(server, tmp_path, options=QUICK, world=None, experts=())
    assert status.stage is CycleStage.REFUSED
    assert "1 of 1 demonstrated tasks could not be tried, those of fold" in status.message
    assert "no candidate could be trained without it: " in status.message
    assert status.message.endswith("; import demonstrations of other tasks")
    assert status.report["outlook"]["sentence"].startswith("with 12 demonstrations of 1 task no gain can be shown")


def judging_folds(found: Any) -> dict[str, int | None]:
    """By demonstration, the fold that it judges for; None: it is held out."""
    folds: dict[str, int | None] = {each.episode.id: None for each in found.held_out}
    for fold in range(NUM_FOLDS):
        demonstrations = {each.episode.id for each in found.demonstrations}
        folds |= dict.fromkeys(demonstrations & left_out(fold, found.groups_of), fold)
    return folds
