"""A cycle ends with a better adapter or with a reason, whatever it is given; serving never notices."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import APIConnectionError

from learner.client import Endpoint
from learner.data.experts import Corrections, ModelExpert, WorldExpert
from learner.data.judge import Judge
from learner.evaluation.outlook import ERROR_RATE
from learner.options import CollectionOptions, CycleOptions, TrainingOptions
from policies.chat.chat_protocol import ChatProtocol
from policies.types import FinishReason, MalformedAction
from runtime.engines.embedded.engine import EmbeddedEngine
from runtime.store.adapter_registry import AdapterState
from runtime.store.episodes import Actor, Outcome, Purpose, StepCandidate, new_id
from runtime.store.learning_log import CycleStage, RewardSource
from tests.cycles import QUICK, WORLD, collaborators, practised, run
from tests.demonstrations import expert_demonstration, post
from tests.faulty_worlds import raising
from tests.serving import LIMITS, MODEL, SayingEngine, Served, parts_of, served
from tools.worlds.order_desk import OrderDeskEpisode


def test_a_log_with_nothing_in_it_ends_with_a_reason(
    novice_engine: EmbeddedEngine, protocol: ChatProtocol, tmp_path: Path
) -> None:
    with served(parts_of(novice_engine, protocol, tmp_path)) as server:
        status = run(server, tmp_path)
    assert status.stage is CycleStage.NOTHING_TO_LEARN
    assert "no demonstrations to train on, and no own episodes" in status.message


def test_demonstrations_that_are_all_held_out_are_told(
    novice_engine: EmbeddedEngine, protocol: ChatProtocol, tmp_path: Path
) -> None:
    with served(parts_of(novice_engine, protocol, tmp_path)) as server:
        post(server, expert_demonstration(1)).raise_for_status()
        options = replace(QUICK, collection=CollectionOptions(held_out_share=1.0, anchor_share=0.0))
        status = run(server, tmp_path, options=options)
    assert status.stage is CycleStage.NOTHING_TO_LEARN
    assert "no demonstrations to train on, 1 held out" in status.message


def test_a_policy_that_has_mastered_every_demonstrated_state_learns_nothing(
    protocol: ChatProtocol, tmp_path: Path
) -> None:
    with served(parts_of(SayingEngine(protocol), protocol, tmp_path)) as server:
        question = {"role": "user", "content": "Hi"}
        post(server, {"messages": [question, {"role": "assistant", "content": "All done."}]}).raise_for_status()
        status = run(server, tmp_path)
    assert status.stage is CycleStage.NOTHING_TO_LEARN
    assert "does what the experts do at all 1 states" in status.message


def test_own_successes_teach_a_policy_that_has_mastered_every_demonstrated_state(
    protocol: ChatProtocol, tmp_path: Path
) -> None:
    """After imitation the demonstrations are known by heart; a cycle once ended there, whatever users had said."""
    engine = SayingEngine(protocol, *["All done."] * 100)
    with served(parts_of(engine, protocol, tmp_path)) as server:
        question = {"role": "user", "content": "Hi"}
        post(server, {"messages": [question, {"role": "assistant", "content": "All done."}]}).raise_for_status()
        answer = server.client().chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "And now?"}], max_tokens=24
        )
        assert answer.choices[0].message.content == "All done."
        untold = run(server, tmp_path, options=replace(QUICK, objectives=("sft_rft",)))
        assert untold.stage is CycleStage.NOTHING_TO_LEARN
        assert "does what the experts do" in untold.message
        [own] = server.parts.log.episodes(limit=10, purpose=Purpose.SERVE, actor=Actor.POLICY)
        server.parts.log.append(Outcome(new_id("out"), own.id, 1.0, "user")).result()
        status = run(server, tmp_path, "cycle_2", options=replace(QUICK, objectives=("sft_rft",)))
    assert "sft_rft" in status.report["diagnostics"], status.message
    assert status.report["diagnostics"]["sft_rft"]["perplexity"] > 0
    assert status.report["diagnostics"]["own_episodes"] == {"num_successes": 1.0, "num_detours": 0.0}


def test_a_success_whose_words_nobody_could_read_teaches_nothing(protocol: ChatProtocol, tmp_path: Path) -> None:
    engine = SayingEngine(protocol, *["<tool_call>\nlook!\n</tool_call>"] * 100)
    with served(parts_of(engine, protocol, tmp_path)) as server:
        question = {"role": "user", "content": "Hi"}
        post(server, {"messages": [question, {"role": "assistant", "content": "All done."}]}).raise_for_status()
        tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
        body = {"model": MODEL, "messages": [question], "tools": [tool]}
        httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=30).raise_for_status()
        [own] = server.parts.log.episodes(limit=10, purpose=Purpose.SERVE, actor=Actor.POLICY)
        server.parts.log.append(Outcome(new_id("out"), own.id, 1.0, "user")).result()
        status = run(server, tmp_path, options=replace(QUICK, objectives=("rft",)))
        [step] = server.parts.log.steps(own.id)
    assert isinstance(step.action, MalformedAction)
    assert status.stage is CycleStage.NOTHING_TO_LEARN
    assert "no own success can be imitated: 1 own episodes, 1 succeeded" in status.message


def test_so_do_those_that_a_judge_alone_calls_successes(protocol: ChatProtocol, tmp_path: Path) -> None:
    """The judge was asked only after the cycle had ended for want of outcomes."""
    scores = '{"scores": [{"id": "1", "score": 1}, {"id": "2", "score": 0.2}]}'
    saying = SayingEngine(protocol, scores, limits=replace(LIMITS, max_context_tokens=65536))
    with (
        served(parts_of(SayingEngine(protocol, *["All done."] * 100), protocol, tmp_path / "agent")) as server,
        served(parts_of(saying, protocol, tmp_path / "judge")) as judge_server,
    ):
        question = {"role": "user", "content": "Hi"}
        post(server, {"messages": [question, {"role": "assistant", "content": "All done."}]}).raise_for_status()
        for seed in (1, 2):
            server.client().chat.completions.create(
                model=MODEL, messages=[{"role": "user", "content": "And now?"}], seed=seed, max_tokens=24
            )
        options = replace(QUICK, objectives=("sft_rft",), discriminator=False, implicit_rewards=False)
        judge = Judge(judge_server.async_client(), MODEL)
        status = run(server, tmp_path / "agent", options=options, judge=judge)
    assert status.report["judge"]["scored"] == 2
    assert "sft_rft" in status.report["diagnostics"], status.message


def test_anchors_that_are_demonstrations_are_rewarded_and_not_learned(protocol: ChatProtocol, tmp_path: Path) -> None:
    """A cycle reads them; `learner steps` said that none had."""
    with served(parts_of(SayingEngine(protocol, *["All done."] * 100), protocol, tmp_path)) as server:
        for asked in ("Hi", "And now?"):
            question = {"role": "user", "content": asked}
            post(server, {"messages": [question, {"role": "assistant", "content": "All done."}]}).raise_for_status()
        first, second = server.parts.log.episodes(limit=10, actor=Actor.EXPERT)
        collection = CollectionOptions(held_out_share=0.0, anchors=(first.id,))
        run(server, tmp_path, options=replace(QUICK, collection=collection))
        rewards = collaborators(server, tmp_path).learning_log.rewards("cycle_1")
        of_experts = {step.id for each in (first, second) for step in server.parts.log.steps(each.id)}
        assert of_experts <= {reward.step_id for reward in rewards}


def worth_of(draw: StepCandidate) -> tuple[bool, bool, float]:
    """What a choice goes by: readable, whole, liked."""
    is_readable = not isinstance(draw.action, MalformedAction)
    return is_readable, draw.finish_reason is not FinishReason.LENGTH, draw.score


def test_one_cycle_rewards_every_own_action_from_every_source_and_answers_own_states(
    engine: EmbeddedEngine, protocol: ChatProtocol, tmp_path: Path
) -> None:
    with served(parts_of(engine, protocol, tmp_path)) as server:
        post(server, *(expert_demonstration(number) for number in range(4))).raise_for_status()
        practised(server, first=100, number=6)
        options = replace(QUICK, objectives=("sft", "implicit", "inverse", "eto", "rft", "ppo"))
        status = run(server, tmp_path, options=options)
        who = collaborators(server, tmp_path)
        assert status.stage in (CycleStage.PROMOTED, CycleStage.REFUSED), status.message
        rewards = who.learning_log.rewards("cycle_1")
        taken = {
            step.id
            for episode in server.parts.log.episodes(limit=100, task_prefix="order_desk/train/10")
            for step in server.parts.log.steps(episode.id)
        }
        demonstrations = server.parts.log.episodes(limit=100, actor=Actor.EXPERT)
        demonstrated = {step.id for each in demonstrations for step in server.parts.log.steps(each.id)}
        for source in (RewardSource.EXPERT_AGREEMENT, RewardSource.IMPLICIT, RewardSource.DISCRIMINATOR):
            judged = {reward.step_id for reward in rewards if reward.source is source}
            assert taken <= judged, source
            assert demonstrated <= judged, source
            assert len({reward.value for reward in rewards if reward.source is source}) > 1
        report = status.report
        assert report["collected"]["own_new"] == 6
        assert report["inspection"]["expert_answers"]["world"] == len(taken)
        assert set(report["diagnostics"]) >= {"sft", "implicit", "inverse", "discriminator"}
        assert report["diagnostics"]["sft"]["chosen_logprob_change"] > 0
        assert 0 < report["diagnostics"]["inverse"]["effective_sample_share"] <= 1
        assert "no own episode failed on a demonstrated task" in report["not_trained"]["eto"]
        gate = report["gate"]
        assert {each["objective"] for each in gate.values()} >= {"sft", "implicit", "inverse"}
        assert len(who.learning_log.decisions("cycle_1")) == len(gate)
        assert not list((tmp_path / "candidates").glob("*"))
        first = server.parts.registry.adapters()[0]
        registered = httpx.post(f"{server.url}/v1/adapters", json={"path": str(first.path)}, timeout=60)
        made = registered.raise_for_status().json()["name"]  # another version, where its gate has refused the first
        by_reward = {"x-stepagent-best-of": "4", "x-stepagent-best-of-by": "discriminator"}
        asked = {"model": made, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 24}
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=asked, headers=by_reward, timeout=60)
        answer.raise_for_status()
        drawn = server.parts.log.candidates(answer.headers["x-step-id"])
        assert {(each.scorer, each.step_id) for each in drawn} == {("discriminator", answer.headers["x-step-id"])}
        (chosen,) = (each for each in drawn if each.is_chosen)
        assert worth_of(chosen) == max(map(worth_of, drawn))
        served_models = httpx.get(f"{server.url}/v1/models").json()["data"]
        assert f"{made}-reward1" not in {each["id"] for each in served_models}
        asked["model"] = f"{made}-reward1"
        assert httpx.post(f"{server.url}/v1/chat/completions", json=asked, timeout=60).status_code == 404

        httpx.post(f"{server.url}/v1/adapters/{made}/promote", json={}).raise_for_status()
        run(server, tmp_path, "cycle_2", replace(QUICK, objectives=("sft",), gate_tasks=2))
        newest = server.parts.registry.reward_of(made)
        assert newest is not None
        assert newest.name == f"{made}-reward2", "whatever the gate says: it was trained against this one's actions"


def test_without_a_world_all_demonstrations_are_the_gate(
    engine: EmbeddedEngine, protocol: ChatProtocol, tmp_path: Path
) -> None:
    with served(parts_of(engine, protocol, tmp_path)) as server:
        post(server, *(expert_demonstration(number) for number in range(24))).raise_for_status()
        options = replace(QUICK, collection=CollectionOptions(held_out_share=0.5, anchor_share=0.0))
        status = run(server, tmp_path, options=options, world=None, experts=())
    assert status.stage in (CycleStage.PROMOTED, CycleStage.REFUSED), status.message
    (decision,) = status.report["gate"].values()
    assert (decision["unit"], decision["num_planned"]) == ("demonstrations", 24)


def test_after_a_refusal_the_outlook_is_that_of_the_stricter_gate(
    engine: EmbeddedEngine, protocol: ChatProtocol, tmp_path: Path
) -> None:
    with served(parts_of(engine, protocol, tmp_path)) as server:
        post(server, *(expert_demonstration(number) for number in range(4))).raise_for_status()
        first = run(server, tmp_path, world=None, experts=())
        second = run(server, tmp_path, "cycle_2", world=None, experts=())
    assert (first.stage, second.stage) == (CycleStage.REFUSED, CycleStage.REFUSED)
    (decision,) = second.report["gate"].values()
    assert decision["level"] == ERROR_RATE / 2
    for status, fewest in ((first, 6), (second, 7)):
        assert f"a decision needs {fewest} at the least" in status.report["outlook"]["sentence"]


def test_a_stronger_model_teaches_at_own_states(engine: EmbeddedEngine, protocol: ChatProtocol, tmp_path: Path) -> None:
    stronger_engine = SayingEngine(protocol, *["Sadly the lantern is sold out."] * 100)
    with (
        served(parts_of(engine, protocol, tmp_path / "agent")) as server,
        served(parts_of(stronger_engine, protocol, tmp_path / "stronger")) as stronger,
    ):
        practised(server, first=200, number=3)
        expert = ModelExpert(stronger.async_client(), MODEL)
        status = run(server, tmp_path / "agent", experts=(expert,))
        assert status.report["expert_problems"] == {}
        assert status.report["inspection"]["expert_answers"] == {MODEL: stronger.parts.log.counts()["steps"]}
    assert status.stage in (CycleStage.PROMOTED, CycleStage.REFUSED), status.message


def test_a_worlds_expert_that_raises_costs_no_cycle(
    engine: EmbeddedEngine, protocol: ChatProtocol, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A world may be anybody's code."""
    with served(parts_of(engine, protocol, tmp_path)) as server:
        post(server, *(expert_demonstration(number) for number in range(4))).raise_for_status()
        practised(server, first=200, number=1)
        monkeypatch.setattr(OrderDeskEpisode, "expert_action", raising(KeyError("parcel")))
        status = run(server, tmp_path, experts=(WorldExpert(WORLD),))
    assert status.stage in (CycleStage.PROMOTED, CycleStage.REFUSED), status.message
    [problem] = status.report["expert_problems"]
    assert "`expert_action` of the world order_desk raised KeyError" in problem
    assert set(status.report["inspection"]["expert_answers"]) == {"nobody"}


def test_a_loss_that_runs_away_fails_the_cycle_and_leaves_no_adapter(
    novice_engine: EmbeddedEngine, protocol: ChatProtocol, tmp_path: Path
) -> None:
    with served(parts_of(novice_engine, protocol, tmp_path)) as server:
        post(server, *(expert_demonstration(number) for number in range(4))).raise_for_status()
        options = replace(QUICK, training=TrainingOptions(lr=1e30, epochs=4))
        status = run(server, tmp_path, options=options)
        assert status.stage is CycleStage.FAILED
        assert "loss became" in status.message
        assert server.parts.registry.adapters() == ()


def test_a_disk_that_takes_no_adapter_fails_the_cycle_and_serving_goes_on(
    novice_engine: EmbeddedEngine, protocol: ChatProtocol, tmp_path: Path
) -> None:
    with served(parts_of(novice_engine, protocol, tmp_path)) as server:
        post(server, *(expert_demonstration(number) for number in range(4))).raise_for_status()
        (tmp_path / "candidates").write_text("no folder can be made here")
        status = run(server, tmp_path)
        assert status.stage is CycleStage.FAILED
        assert "candidates" in status.message
        answer = server.client().chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "Hi"}], max_tokens=4
        )
        assert answer.choices


def test_an_acting_adapter_whose_files_are_damaged_is_not_trained_further(
    engine: EmbeddedEngine, protocol: ChatProtocol, tmp_path: Path
) -> None:
    """With a byte changed it was trained from what never acted; without its folder a cycle ended in the words of a
    library, after all sampling."""
    with served(parts_of(engine, protocol, tmp_path)) as server:
        options = learned_well(server)
        assert run(server, tmp_path, options=options).stage is CycleStage.PROMOTED
        weights = tmp_path / "adapters" / "agent-v0001" / "adapter_model.safetensors"
        whole = weights.read_bytes()
        weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        status = run(server, tmp_path, "cycle_2", options)
        assert status.stage is CycleStage.FAILED
        assert "its weights are not those that were registered; copy them back from a backup" in status.message
        shutil.rmtree(weights.parent)
        status = run(server, tmp_path, "cycle_3", options)
        assert status.stage is CycleStage.FAILED
        assert "agent-v0001 acts and cannot be trained further" in status.message
        assert "python -m learner rollback" in status.message
        assert status.report["collected"] == {}, "nothing was done before"


def test_a_server_that_goes_away_fails_the_cycle(
    novice_engine: EmbeddedEngine, protocol: ChatProtocol, tmp_path: Path
) -> None:
    with served(parts_of(novice_engine, protocol, tmp_path)) as server:
        post(server, expert_demonstration(1)).raise_for_status()
    status = run(server, tmp_path)
    assert status.stage is CycleStage.FAILED
    assert "Connection" in status.message


# ------------------------------------------------------------------------------------------- what is handed over


class MeddledWith(Endpoint):
    """Somebody else changes what acts, or the server refuses, between the gate and the promotion."""

    async def promote(self, name: str, reason: str, expected_acting: str) -> None:
        await super().promote(name, reason, expected_acting="agent-v9999")


def learned_well(server: Served) -> CycleOptions:
    """Options under which twelve demonstrations bring a better adapter; they are imported."""
    post(server, *(expert_demonstration(number) for number in range(12))).raise_for_status()
    return replace(QUICK, gate_tasks=30, training=TrainingOptions(lr=4e-3, epochs=8))


def test_a_candidate_for_another_parent_than_what_acts_is_refused_and_leaves_its_slot(
    engine: EmbeddedEngine, protocol: ChatProtocol, tmp_path: Path
) -> None:
    with served(parts_of(engine, protocol, tmp_path)) as server:
        meddled = MeddledWith(server.async_client(max_retries=2))
        status = run(server, tmp_path, options=learned_well(server), endpoint=meddled)
        assert status.stage is CycleStage.REFUSED
        assert "was better" in status.message
        assert "agent-v9999 does not act any more: base does" in status.message
        assert server.parts.registry.state("agent-v0001") is AdapterState.REFUSED
        assert engine.loaded_adapters() == ()


def test_a_candidate_may_begin_as_a_canary_and_no_cycle_starts_another_beside_it(
    engine: EmbeddedEngine, protocol: ChatProtocol, tmp_path: Path
) -> None:
    with served(parts_of(engine, protocol, tmp_path)) as server:
        options = replace(learned_well(server), canary_share=0.25)
        status = run(server, tmp_path, options=options)
        assert status.stage is CycleStage.PROMOTED, status.message
        assert "agent-v0001, canary of 25%" in status.message
        assert server.parts.swap.canary_of() == "agent-v0001"
        assert server.parts.registry.acting() is None
        second = run(server, tmp_path, "cycle_2", options=options)
        assert second.stage is CycleStage.NOTHING_TO_LEARN
        assert "agent-v0001 is a canary still" in second.message


class Breaking(Endpoint):
    """The server goes away in the gate, once a candidate is in the engine."""

    async def evaluate(self, world: Any, tasks: Any, adapter: str, *more: Any) -> Any:
        if adapter != "base":
            raise APIConnectionError(request=httpx.Request("POST", "http://127.0.0.1"))
        return await super().evaluate(world, tasks, adapter, *more)


def test_a_cycle_that_breaks_in_the_gate_gives_the_slot_back(
    engine: EmbeddedEngine, protocol: ChatProtocol, tmp_path: Path
) -> None:
    with served(parts_of(engine, protocol, tmp_path)) as server:
        post(server, *(expert_demonstration(number) for number in range(4))).raise_for_status()
        for number in range(2):
            status = run(server, tmp_path, f"cycle_{number}", endpoint=Breaking(server.async_client()))
            assert status.stage is CycleStage.FAILED
        assert [server.parts.registry.state(a.name) for a in server.parts.registry.adapters()] == ["refused"] * 2
        assert engine.loaded_adapters() == ()


# -------------------------------------------------------------------------------------------- odd training data


def test_one_demonstration_is_learned_from_and_judged(
    engine: EmbeddedEngine, protocol: ChatProtocol, tmp_path: Path
) -> None:
    with served(parts_of(engine, protocol, tmp_path)) as server:
        post(server, expert_demonstration(3)).raise_for_status()
        status = run(server, tmp_path)
    assert status.stage in (CycleStage.PROMOTED, CycleStage.REFUSED), status.message
    assert status.report["diagnostics"]["training_data"]["num_informative"] > 0
    assert "a discriminator needs" in status.report["no_discriminator"]


def test_outcomes_that_are_all_equal_teach_no_policy_gradient_and_say_so(
    novice_engine: EmbeddedEngine, protocol: ChatProtocol, tmp_path: Path
) -> None:
    with served(parts_of(novice_engine, protocol, tmp_path)) as server:
        practised(server, first=300, number=4)
        for episode in server.parts.log.episodes(limit=100):
            server.parts.log.append(Outcome(new_id("out"), episode.id, 1.0, "user")).result()
        status = run(server, tmp_path, options=replace(QUICK, objectives=("ppo",)))
    assert status.stage is CycleStage.NOTHING_TO_LEARN
    assert "the outcomes of all own episodes are equal: 4 own episodes, 4 succeeded" in status.message


def test_a_correction_of_an_episode_that_was_read_long_ago_is_learned(
    engine: EmbeddedEngine, protocol: ChatProtocol, tmp_path: Path
) -> None:
    with served(parts_of(engine, protocol, tmp_path)) as server:
        practised(server, first=400, number=6)
        options = replace(QUICK, collection=CollectionOptions(replay_share=0.0, anchor_share=0.0))
        assert run(server, tmp_path, options=options).report["collected"]["own_new"] == 6
        episode = server.parts.log.episodes(limit=1, purpose=Purpose.PRACTICE)[0]
        corrected = server.parts.log.steps(episode.id)[0]
        body = {"step_id": corrected.id, "message": {"role": "assistant", "content": "I cannot see to that."}}
        httpx.post(f"{server.url}/v1/episodes/{episode.id}/corrections", json=body, timeout=30).raise_for_status()
        experts = (Corrections(server.parts.log),)
        status = run(server, tmp_path, "cycle_2", options=options, experts=experts)
    assert status.report["inspection"]["expert_answers"]["correction"] == 1
    assert status.stage in (CycleStage.PROMOTED, CycleStage.REFUSED), status.message


def test_demonstrations_of_another_tool_set_are_their_own_gate(
    engine: EmbeddedEngine, protocol: ChatProtocol, tmp_path: Path
) -> None:
    """With the default world every adapter for another tool set was once judged by the order desk, and refused."""
    weigh = {"type": "function", "function": {"name": "weigh", "parameters": {"type": "object", "properties": {}}}}
    calls = [{"id": "call_1", "type": "function", "function": {"name": "weigh", "arguments": "{}"}}]
    with served(parts_of(engine, protocol, tmp_path)) as server:
        for number in range(24):
            messages = [
                {"role": "user", "content": f"What does parcel {number} weigh?"},
                {"role": "assistant", "content": "", "tool_calls": calls},
                {"role": "tool", "tool_call_id": "call_1", "content": f"{number} grams"},
                {"role": "assistant", "content": f"It weighs {number} grams."},
            ]
            post(server, {"messages": messages, "tools": [weigh]}).raise_for_status()
        options = replace(QUICK, collection=CollectionOptions(held_out_share=0.5, anchor_share=0.0))
        status = run(server, tmp_path, options=options)
    assert status.stage in (CycleStage.PROMOTED, CycleStage.REFUSED), status.message
    (decision,) = status.report["gate"].values()
    assert decision["unit"] == "demonstrations"
