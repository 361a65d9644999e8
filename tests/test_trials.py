"""What the gate tries, through a served agent: no trial twice, no draw that tells nothing, no outcome made up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from learner.client import StateTrial
from learner.data.collect import Collected, collect
from learner.data.inspection import inspect_demonstrations, most_tokens
from learner.evaluation.folds import NUM_FOLDS, fold_of, left_out
from learner.evaluation.gate import Contestants
from learner.evaluation.state_trials import NUM_DRAWS
from learner.evaluation.trials import CycleTrials, fitting_world
from learner.evaluation.twins import Twin, as_evidence
from learner.options import CollectionOptions
from policies.chat.chat_protocol import ChatProtocol
from policies.types import Adapter, SampledToken, SamplingParams
from runtime.engines.embedded.engine import EmbeddedEngine
from runtime.store.episodes import Actor, Outcome, Purpose, new_id
from tests.cycles import collaborators
from tests.demonstrations import expert_demonstration, post
from tests.faulty_worlds import NoneHeldOut
from tests.serving import MODEL, SayingEngine, Served, parts_of, served
from tools.worlds.order_desk import OrderDesk
from tools.worlds.world import Task, World

WORLD = OrderDesk()
BOTH_BASE = Contestants("base", "base")
GREETING_AND_GOODBYE = [
    {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Bye"}, {"role": "assistant", "content": "Farewell."},
]  # fmt: skip


def collected(server: Served, share: float, world: World | None = None, **options: Any) -> Collected:
    wanted = CollectionOptions(held_out_share=share, **options)
    return collect(server.parts.log, None, ("base",), wanted, 0, world)


def trials_of(
    server: Served,
    folder: Path,
    share: float = 1.0,
    world: World | None = None,
    num_tasks: int = 4,
) -> CycleTrials:
    who = collaborators(server, folder, world=world)
    return CycleTrials.of_cycle("base", collected(server, share, world), who, num_tasks)


def num_evaluations(server: Served) -> int:
    return len(server.parts.log.episodes(limit=1000, purpose=Purpose.EVALUATION))


@contextmanager
def saying(protocol: ChatProtocol, folder: Path, *says: Any) -> Iterator[Served]:
    """A server whose agent says these, with one demonstration of two states: it greets, then says goodbye."""
    with served(parts_of(SayingEngine(protocol, *says), protocol, folder)) as server:
        post(server, {"messages": GREETING_AND_GOODBYE}).raise_for_status()
        yield server


def test_a_demonstrations_score_is_the_mean_agreement_over_its_states(protocol: ChatProtocol, tmp_path: Path) -> None:
    with saying(protocol, tmp_path, *["Hello."] * 100) as server:
        trials = trials_of(server, tmp_path)
        (pair,) = asyncio.run(trials.pairs(trials.units, BOTH_BASE))
    assert (pair.candidate.score, pair.acting.score) == (0.5, 0.5)
    assert trials.kind == "held-out demonstrations"
    assert trials.outlook(1).sentence.startswith("with 1 held-out demonstration of 2 states no gain can be shown")


@pytest.mark.parametrize(("logprob", "num_draws"), [(-0.001, 1), (-0.5, 2)])
def test_where_both_are_sure_of_the_same_one_draw_is_made(
    protocol: ChatProtocol, tmp_path: Path, logprob: float, num_draws: int
) -> None:
    tokens = [SampledToken(token, logprob) for token in protocol.encode("Hello.<|im_end|>")]
    with saying(protocol, tmp_path, *[tokens] * 8) as server:
        trials = trials_of(server, tmp_path)
        asyncio.run(trials.pairs(trials.units, BOTH_BASE))
        assert num_evaluations(server) == 2 * 2 * num_draws  # states, adapters


class SlowToSayGoodbye(SayingEngine):
    """Answers what came after the greeting only when both adapters have drawn at the greeting for the last time."""

    def __init__(self, protocol: ChatProtocol, *says: str) -> None:
        super().__init__(protocol, *says)
        self.greeting = protocol.render(GREETING_AND_GOODBYE[:1])
        self.has_greeted = asyncio.Event()

    async def generate(
        self, prompt_token_ids: Sequence[int], sampling: SamplingParams, adapter: Adapter | None, *, stream: bool = True
    ) -> AsyncIterator[SampledToken]:
        if tuple(prompt_token_ids) != self.greeting:
            await self.has_greeted.wait()
        async for token in super().generate(prompt_token_ids, sampling, adapter, stream=stream):
            yield token
        if self.prompts.count(self.greeting) == 2 * NUM_DRAWS:
            self.has_greeted.set()


@pytest.mark.timeout(30)
def test_a_state_is_drawn_again_though_another_still_waits_for_its_first_answer(
    protocol: ChatProtocol, tmp_path: Path
) -> None:
    texts = [f"Answer {number}." for number in range(100)]  # no two alike: each state is drawn again
    with served(parts_of(SlowToSayGoodbye(protocol, *texts), protocol, tmp_path)) as server:
        post(server, {"messages": GREETING_AND_GOODBYE}).raise_for_status()
        trials = trials_of(server, tmp_path)
        asyncio.run(trials.pairs(trials.units, BOTH_BASE))
        assert num_evaluations(server) == 2 * 2 * NUM_DRAWS


def test_trials_are_repeated_neither_in_a_cycle_nor_in_the_next(
    engine: EmbeddedEngine, protocol: ChatProtocol, tmp_path: Path
) -> None:
    with served(parts_of(engine, protocol, tmp_path)) as server:
        post(server, expert_demonstration(1)).raise_for_status()
        first, again = trials_of(server, tmp_path), trials_of(server, tmp_path)
        pairs = asyncio.run(first.pairs(first.units, BOTH_BASE))
        made = num_evaluations(server)
        assert asyncio.run(first.pairs(first.units, BOTH_BASE)) == pairs
        assert asyncio.run(again.pairs(again.units, BOTH_BASE)) == pairs
        assert num_evaluations(server) == made
        assert again.past.num_reused > 0


def test_what_an_inspection_drew_is_not_drawn_again_by_the_gate(
    engine: EmbeddedEngine, protocol: ChatProtocol, tmp_path: Path
) -> None:
    with served(parts_of(engine, protocol, tmp_path)) as server:
        post(server, expert_demonstration(1), expert_demonstration(2)).raise_for_status()
        demonstrations = collected(server, 1.0).held_out
        who = collaborators(server, tmp_path, world=None)
        _, compared = asyncio.run(inspect_demonstrations(who, demonstrations, "base", 2))
        made = num_evaluations(server)
        assert made == 2 * len(compared)
        trials = trials_of(server, tmp_path)
        assert len(asyncio.run(trials.pairs(trials.units, BOTH_BASE))) == 2
        assert num_evaluations(server) == made


def test_a_worlds_tasks_are_tried_with_the_same_luck_and_found_again(
    engine: EmbeddedEngine, protocol: ChatProtocol, tmp_path: Path
) -> None:
    with served(parts_of(engine, protocol, tmp_path)) as server:
        trials, again = trials_of(server, tmp_path, world=WORLD), trials_of(server, tmp_path, world=WORLD)
        assert trials.units == again.units  # the same as long as the same adapter acts
        pairs = asyncio.run(trials.pairs(trials.units, BOTH_BASE))
        assert all(pair.candidate == pair.acting for pair in pairs)
        made = num_evaluations(server)
        assert asyncio.run(again.pairs(again.units, BOTH_BASE)) == pairs
        assert num_evaluations(server) == made
        seeds = {
            server.parts.log.steps(episode.id)[0].sampling.seed
            for episode in server.parts.log.episodes(limit=1000, purpose=Purpose.EVALUATION)
        }
        assert len(seeds) == len(trials.units)


def test_in_a_task_a_step_is_bounded_by_what_experts_write(protocol: ChatProtocol, tmp_path: Path) -> None:
    babble = [protocol.encode("and so on ")[:2] * 1000]
    with served(parts_of(SayingEngine(protocol, *babble * 8), protocol, tmp_path)) as server:
        post(server, expert_demonstration(1)).raise_for_status()
        trials = trials_of(server, tmp_path, world=WORLD, num_tasks=1)
        (longest,) = [
            max(len(step.completion_token_ids) for step in each.path) for each in collected(server, 1.0).held_out
        ]
        assert trials.max_task_tokens == 2 * longest + 64
        asyncio.run(trials.pairs(trials.units, BOTH_BASE))
        for episode in server.parts.log.episodes(limit=1000, purpose=Purpose.EVALUATION):
            for step in server.parts.log.steps(episode.id):
                assert step.sampling.max_tokens == trials.max_task_tokens
        again = trials_of(server, tmp_path, world=WORLD, num_tasks=1)
        (task,) = [unit.subject for unit in trials.units if isinstance(unit.subject, Task)]
        assert again.past.of_task("base", task, 0, trials.max_task_tokens) is not None
        assert again.past.of_task("base", task, 0, 8) is None, "it was allowed more then"


def test_an_outcome_that_somebody_made_up_changes_no_trial(
    engine: EmbeddedEngine, protocol: ChatProtocol, tmp_path: Path
) -> None:
    with served(parts_of(engine, protocol, tmp_path)) as server:
        trials = trials_of(server, tmp_path, world=WORLD)
        pairs = asyncio.run(trials.pairs(trials.units, BOTH_BASE))
        for episode in server.parts.log.episodes(limit=1000, purpose=Purpose.EVALUATION):
            server.parts.log.append(Outcome(new_id("out"), episode.id, 0.5, "world")).result()
        again = trials_of(server, tmp_path, world=WORLD)
        assert asyncio.run(again.pairs(again.units, BOTH_BASE)) == pairs


def test_a_request_that_only_bears_a_trials_name_is_not_taken_for_it(protocol: ChatProtocol, tmp_path: Path) -> None:
    with saying(protocol, tmp_path, "Hello.") as server:
        trials = trials_of(server, tmp_path)
        (held_out,) = collected(server, 1.0).held_out
        state = held_out.states()[0]
        trial = StateTrial(state.messages, state.step.tools, 0, most_tokens(state.step))
        made_up: Any = {"purpose": "evaluation", "trial": trial.name}
        easier = [{"role": "user", "content": "Say Hello."}]
        server.client().chat.completions.create(model=MODEL, messages=easier, metadata=made_up)  # type: ignore[arg-type]
        assert trials.past.of_state("base", trial) is None


def test_few_demonstrations_all_judge_each_by_a_fold_that_was_not_trained_on_it(
    protocol: ChatProtocol, tmp_path: Path
) -> None:
    with served(parts_of(SayingEngine(protocol), protocol, tmp_path)) as server:
        post(server, *(expert_demonstration(number) for number in range(12))).raise_for_status()
        trials = trials_of(server, tmp_path, share=0.2)
        found = collected(server, 0.2)
    assert len(trials.units) == 12
    assert trials.kind == "demonstrations"
    folds = [unit.fold for unit in trials.units if unit.fold is not None]
    assert folds == sorted(folds)
    assert trials.units[: len(found.held_out)] == tuple(unit for unit in trials.units if unit.fold is None)
    for fold in trials.folds:
        names = {unit.name for unit in trials.units if unit.fold == fold}
        assert names == left_out(fold, found.groups_of) & {each.episode.id for each in found.demonstrations}


def clocked(number: int, copy: int, **said: Any) -> dict[str, Any]:
    """A copy of a transcript whose system prompt differs by a clock."""
    demonstration = expert_demonstration(number, **said)
    clock = {"role": "system", "content": f"It is 12:{copy:02}."}
    return {**demonstration, "messages": [clock, *demonstration["messages"]]}


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_copies_of_a_transcript_and_beginnings_of_it_are_one_piece_of_evidence(
    protocol: ChatProtocol, tmp_path: Path, share: float
) -> None:
    """Two tasks, six copies each, were twelve pairs: so many pass by chance with one in four of what is no better."""
    whole = expert_demonstration(0)
    with served(parts_of(SayingEngine(protocol), protocol, tmp_path)) as server:
        post(server, *(clocked(number, copy) for number in (0, 1) for copy in range(6))).raise_for_status()
        post(server, {**whole, "messages": whole["messages"][:2]}).raise_for_status()
        trials, found = trials_of(server, tmp_path, share), collected(server, share)
        pairs = asyncio.run(trials.pairs(trials.units, BOTH_BASE))
    demonstrations = found.demonstrations or found.held_out
    assert len(demonstrations) == 13
    assert sorted(len(unit.demonstrations) for unit in trials.units) == [6, 7]
    assert sum(unit.num_states for unit in trials.units) == sum(len(each.path) for each in demonstrations)
    assert [pair.unit for pair in pairs] == [unit.name for unit in trials.units]
    assert {unit.name for unit in trials.units} <= {each.episode.id for each in demonstrations}
    held = "held-out " if share else ""
    assert trials.kind == f"{held}demonstrated tasks"
    assert trials.outlook(1).num_pairs == 2
    assert trials.outlook(1).sentence.startswith(
        f"with 13 {held}demonstrations of 2 tasks no gain can be shown: 4 other"
    )


def test_a_task_of_which_a_twin_has_seen_any_demonstration_does_not_judge(
    protocol: ChatProtocol, tmp_path: Path
) -> None:
    with served(parts_of(SayingEngine(protocol), protocol, tmp_path)) as server:
        post(server, *(clocked(number, copy) for number in range(4) for copy in range(2))).raise_for_status()
        found, who = collected(server, 0.0), collaborators(server, tmp_path, world=None)
        every = CycleTrials.of_cycle("base", found, who, 4).units
        seen = every[0].demonstrations[-1].episode.id
        twins = {fold: Twin("agent-v0002", frozenset({seen})) for fold in range(NUM_FOLDS)}
        who.learning_log.add_decision("cycle_1", "agent-v0001", "base", True, "a test", as_evidence(twins))
        assert CycleTrials.of_cycle("agent-v0001", found, who, 4).units == every[1:]


FOLDS_OF_OLD = [1, 2, 0, 0, 0, 1, 0, 0]
"""Of `world/train/0` to 7, as they were when folds were made first."""


def test_folds_are_about_equal_and_never_move() -> None:
    sizes = [sum(fold_of(f"asked {number}") == fold for number in range(3000)) for fold in range(NUM_FOLDS)]
    assert all(900 < size < 1100 for size in sizes)
    assert [fold_of(f"task world/train/{number}") for number in range(8)] == [
        fold_of(f"task world/train/{n}") for n in range(8)
    ]


def test_what_the_policy_did_at_a_folds_task_is_left_out_with_it() -> None:
    groups_of = {"demo_1": frozenset({"task a"}), "ep_1": frozenset({"task a"}), "ep_2": frozenset[str]()}
    assert left_out(fold_of("task a"), groups_of) == {"demo_1", "ep_1"}
    assert left_out((fold_of("task a") + 1) % NUM_FOLDS, groups_of) == set()


@pytest.mark.parametrize("num_other", [0, 1, 3])
def test_the_world_judges_where_most_demonstrations_are_of_it(
    protocol: ChatProtocol, tmp_path: Path, num_other: int
) -> None:
    """One demonstration without tools once switched the gate to another kind of trial."""
    weigh = {"type": "function", "function": {"name": "weigh", "parameters": {"type": "object", "properties": {}}}}
    with served(parts_of(SayingEngine(protocol), protocol, tmp_path)) as server:
        for number in range(num_other):
            messages = [{"role": "user", "content": f"{number}?"}, {"role": "assistant", "content": "Yes."}]
            post(server, {"messages": messages, "tools": [weigh]}).raise_for_status()
        post(server, {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]})
        post(server, expert_demonstration(1)).raise_for_status()
        found = collected(server, 0.0, WORLD)
    assert (fitting_world(WORLD, found.demonstrations) is WORLD) == (num_other <= 1)


def test_without_tasks_demonstrations_judge_though_there_is_a_world(protocol: ChatProtocol, tmp_path: Path) -> None:
    with served(parts_of(SayingEngine(protocol), protocol, tmp_path)) as server:
        for index in range(3):
            post(server, expert_demonstration(index)).raise_for_status()
        assert trials_of(server, tmp_path, world=WORLD, num_tasks=4).kind == "tasks"
        assert trials_of(server, tmp_path, world=WORLD, num_tasks=0).kind == "held-out demonstrations"


# ------------------------------------------------------------------------------------------------ anchors


def contented(server: Served, number: int) -> list[str]:
    """Served episodes that users were content with."""
    ids = []
    for index in range(number):
        question: Any = [{"role": "user", "content": f"What is {index} and {index}?"}]
        answer = server.client().chat.completions.create(model=MODEL, messages=question)
        ids.append((answer.model_extra or {})["stepagent"]["choices"][0][0]["episode_id"])
        server.parts.log.append(Outcome(new_id("out"), ids[-1], float(index % 2), "user")).result()
    return ids


def test_a_share_of_what_users_were_content_with_is_tried_and_never_trained_on(
    protocol: ChatProtocol, tmp_path: Path
) -> None:
    with served(parts_of(SayingEngine(protocol), protocol, tmp_path)) as server:
        ids = contented(server, 40)
        found, none = collected(server, 0.0, anchor_share=0.5), collected(server, 0.0, anchor_share=0.0)
    anchors = {anchor.episode.id for anchor in found.anchors}
    assert 3 < len(anchors) <= 16
    assert anchors < set(ids[1::2])
    assert {each.episode.id for each in found.policy_episodes} == set(ids) - anchors
    assert not none.anchors


def test_anchors_that_a_user_lists_are_tried_and_unknown_ones_are_told(protocol: ChatProtocol, tmp_path: Path) -> None:
    with saying(protocol, tmp_path) as server:
        (demonstration,) = server.parts.log.episodes(actor=Actor.EXPERT)
        listed = (demonstration.id, "order_desk/train/3")
        found = collected(server, 0.0, WORLD, anchors=listed)
        assert (found.demonstrations, found.held_out) == ([], [])
        trials = CycleTrials.of_cycle("base", found, collaborators(server, tmp_path), 4)
        assert [unit.name for unit in trials.anchors] == list(listed)
        assert len(asyncio.run(trials.pairs(trials.anchors, BOTH_BASE))) == 2
        with pytest.raises(ValueError, match="'ep_none' is neither a logged episode nor a task of the world"):
            collected(server, 0.0, WORLD, anchors=("ep_none",))


def test_a_world_without_tasks_to_validate_on_leaves_the_gate_to_demonstrations() -> None:
    assert fitting_world(NoneHeldOut(), []) is None
