"""Steps of demonstrations that their outcome, an expert or their peers contradict are listed; nothing else is."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from learner.__main__ import main
from learner.data.collect import LoggedEpisode, dealt_demonstrations
from learner.data.doubts import Doubt, DoubtKind, doubted, doubts_of
from learner.data.experts import Corrections, WorldExpert
from learner.options import CollectionOptions
from policies.types import FinalAnswer, MalformedAction
from runtime.agent.served_agent import ServedAgent
from runtime.agent.tools import Toolbox
from tests.conftest import ServeScripted
from tests.demonstrations import WORLD, expert_demonstration, post
from tests.records import make_episode, make_step
from tests.serving import Served


def asking(call: str, *, answer: str = "Done.", call_id: str = "a", said: str = "Please see to it.") -> dict[str, Any]:
    """A demonstration of one call and an answer."""
    tool = {"type": "function", "function": {"name": call, "arguments": '{"n": 1}'}, "id": call_id}
    tools = [
        {"type": "function", "function": {"name": name, "description": "", "parameters": {"type": "object"}}}
        for name in ("look", "leap")
    ]
    messages = [
        {"role": "user", "content": said},
        {"role": "assistant", "content": "", "tool_calls": [tool]},
        {"role": "tool", "tool_call_id": call_id, "content": "It is so."},
        {"role": "assistant", "content": answer},
    ]
    return {"messages": messages, "tools": tools}


def mistaken(index: int) -> dict[str, Any]:
    """An expert of the order desk who first asks for another task's item, then goes on as he should."""
    task, other = WORLD.task("train", index), WORLD.task("train", index + 1)
    episode = WORLD.open(task)
    wrong = WORLD.open(other).expert_action()
    messages = [*task.messages, wrong, *episode.play(wrong)]
    while (action := episode.expert_action()).get("tool_calls"):
        messages += [action, *episode.play(action)]
    return {**expert_demonstration(index), "messages": [*messages, action]}


def found(server: Served, *experts: Any) -> list[Doubt]:
    log = server.parts.log
    demonstrations = dealt_demonstrations(log, CollectionOptions(held_out_share=0.0)).demonstrations
    return asyncio.run(doubts_of(demonstrations, [Corrections(log), *experts], WORLD if experts else None))


def test_one_that_does_otherwise_than_most_at_the_same_state_is_doubted_and_they_are_not(
    serve_scripted: ServeScripted,
) -> None:
    server = serve_scripted()
    post(
        server,
        asking("look"),
        asking("look", call_id="b", answer="Done!"),
        asking("leap", call_id="c", answer="It is done."),
        asking("leap", said="Something else."),
    ).raise_for_status()
    (doubt,) = [each for each in found(server) if each.index == 0]
    assert doubt.kind is DoubtKind.PEERS
    assert (doubt.action, doubt.reason.split(": ")[-1]) == ("leap(n=1)", "look(n=1)")
    assert "2 of 2 other demonstrations" in doubt.reason


def test_two_who_contradict_each_other_are_both_listed(serve_scripted: ServeScripted) -> None:
    server = serve_scripted()
    post(server, asking("look"), asking("leap")).raise_for_status()
    assert [(each.index, each.kind) for each in found(server)] == [(0, DoubtKind.PEERS)] * 2


def test_many_at_one_state_are_not_held_against_each_other_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """With 800 that were, it took half a minute, and four times as long with twice as many."""

    def compared(*_: Any) -> None:
        raise AssertionError("each was held against each")

    monkeypatch.setattr("learner.data.doubts.compare", compared)
    actions = [FinalAnswer("Yes."), FinalAnswer(" yes. "), *[MalformedAction("<x", "no end")] * 2, FinalAnswer("Yes.")]
    made = [make_episode() for _ in actions * 40]
    demonstrations = [
        LoggedEpisode(each, (make_step(each, action=action),), None)
        for each, action in zip(made, actions * 40, strict=True)
    ]
    doubts = asyncio.run(doubts_of(demonstrations, [], None))
    assert len(doubts) == 80, "what cannot be read agrees with nothing, not even with its like"
    assert {doubt.action[:11] for doubt in doubts} == {"(malformed)"}


def test_a_worlds_expert_finds_the_mistake_and_not_the_steps_that_mend_it(serve_scripted: ServeScripted) -> None:
    server = serve_scripted()
    post(server, mistaken(3), *(expert_demonstration(number) for number in (7, 8))).raise_for_status()
    assert found(server) == []
    (doubt,) = found(server, WorldExpert(WORLD))
    assert (doubt.index, doubt.kind) == (0, DoubtKind.EXPERT)
    assert doubt.reason.startswith("world would do this: ")


def test_what_an_expert_would_do_as_well_is_doubted_by_nobody_else(serve_scripted: ServeScripted) -> None:
    """The right step of two peers was accused beside the wrong one, though the world's expert had confirmed it."""
    server = serve_scripted()
    post(server, mistaken(3), expert_demonstration(3)).raise_for_status()
    log = server.parts.log
    demonstrations = dealt_demonstrations(log, CollectionOptions(held_out_share=0.0)).demonstrations
    assert [each.kind for each in found(server)] == [DoubtKind.PEERS] * 2
    unlikely = [doubted(each.states()[0], DoubtKind.UNLIKELY, "9.0 nats") for each in demonstrations]
    doubts = asyncio.run(doubts_of(demonstrations, [WorldExpert(WORLD)], WORLD, unlikely))
    assert [each.kind for each in doubts] == [DoubtKind.EXPERT]
    assert [each.kind for each in asyncio.run(doubts_of(demonstrations[:1], [], WORLD, unlikely[:1]))] == ["unlikely"]


def test_a_correction_and_an_outcome_speak_against_a_demonstration_until_they_are_taken_back(
    serve_scripted: ServeScripted,
) -> None:
    server = serve_scripted()
    post(server, asking("look"), asking("look", said="Else.")).raise_for_status()
    first, second = sorted(server.parts.log.episodes(), key=lambda each: each.created_at)
    url = f"{server.url}/v1/episodes"
    said = httpx.post(f"{url}/{first.id}/outcome", json={"value": 0.0}).raise_for_status().json()
    step = server.parts.log.steps(second.id)[1]
    message = {"role": "assistant", "content": "Not done."}
    httpx.post(f"{url}/{second.id}/corrections", json={"step_id": step.id, "message": message}).raise_for_status()
    kinds = {(each.episode_id, each.index): each.kind for each in found(server)}
    assert kinds == {(first.id, 1): DoubtKind.OUTCOME, (second.id, 1): DoubtKind.EXPERT}
    httpx.request("DELETE", f"{url}/{first.id}/outcomes/{said['id']}").raise_for_status()
    assert [each.episode_id for each in found(server)] == [second.id]


def test_a_correction_of_an_episode_speaks_against_what_was_promoted_from_it(serve_scripted: ServeScripted) -> None:
    server = serve_scripted("It is here.")
    answer = server.client().chat.completions.with_raw_response.create(
        model="novice", messages=[{"role": "user", "content": "Where is it?"}]
    )
    url = f"{server.url}/v1/episodes/{answer.headers['x-episode-id']}"
    promoted = httpx.post(f"{url}/promote").raise_for_status().json()["id"]
    assert found(server) == []
    message = {"role": "assistant", "content": "I do not know."}
    body = {"step_id": answer.headers["x-step-id"], "message": message}
    httpx.post(f"{url}/corrections", json=body).raise_for_status()
    (doubt,) = found(server)
    assert (doubt.episode_id, doubt.kind) == (promoted, DoubtKind.EXPERT)
    assert doubt.reason.startswith("correction would do this")
    corrected = httpx.post(f"{url}/promote").raise_for_status().json()["id"]
    doubts = {(each.episode_id, each.kind) for each in found(server)}
    assert corrected != promoted
    assert doubts == {(promoted, DoubtKind.EXPERT), (corrected, DoubtKind.PEERS)}


def test_the_command_lists_them_and_says_what_of(
    serve_scripted: ServeScripted, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    server = serve_scripted()
    post(server, mistaken(3), *(expert_demonstration(number) for number in (7, 8))).raise_for_status()
    num_steps = server.parts.log.counts()["steps"]
    assert main(["doubts", "--state", str(tmp_path)]) == 0
    assert f"0 of {num_steps} steps of demonstrations are doubted" in capfd.readouterr().out
    assert main(["doubts", "--state", str(tmp_path), "--world", "order_desk", "--json"]) == 0
    (line,) = capfd.readouterr().out.splitlines()
    assert json.loads(line)["kind"] == "expert"
    assert main(["doubts", "--state", str(tmp_path), "--world", "nowhere"]) == 1
    assert "nowhere" in capfd.readouterr().err
    assert main(["doubts", "--state", str(tmp_path / "none")]) == 1


def test_an_import_says_that_demonstrations_contradict_each_other(
    serve_scripted: ServeScripted, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    server, path = serve_scripted(), tmp_path / "demos.jsonl"
    path.write_text("".join(f"{json.dumps(each)}\n" for each in (asking("look"), asking("leap"))))
    assert main(["import", str(path), "--url", f"{server.url}/v1", "--state", str(tmp_path)]) == 0
    assert "2 of the steps are contradicted: python -m learner doubts" in capfd.readouterr().out


def test_the_command_that_an_import_names_lists_the_doubts_of_its_agent(
    serve_scripted: ServeScripted, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """It named no agent, and listed the steps of the server's own: none."""
    server, path = serve_scripted(named_agents=(ServedAgent("night", "night", Toolbox()),)), tmp_path / "demos.jsonl"
    path.write_text("".join(f"{json.dumps(each)}\n" for each in (asking("look"), asking("leap"))))
    assert main(["import", str(path), "--url", f"{server.url}/v1", "--state", str(tmp_path), "--agent", "night"]) == 0
    _, _, named = capfd.readouterr().out.partition("python -m learner ")
    assert main(named.split()) == 0
    assert "2 of 4 steps of demonstrations are doubted" in capfd.readouterr().out


def test_what_networks_trained_on_the_others_do_not_expect_is_listed(
    serve_scripted: ServeScripted, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Really trained: an answer in other words than all the others is found without a world and without peers."""
    server = serve_scripted()
    odd = expert_demonstration(4)
    odd["messages"][-1] = {"role": "assistant", "content": "Sadly the clock is sold out and I am going home now."}
    post(server, odd, *(expert_demonstration(number) for number in (5, 6, 7, 8, 9))).raise_for_status()
    assert main(["doubts", "--state", str(tmp_path), "--cross-fit", "2", "--json"]) == 0
    told = [json.loads(line) for line in capfd.readouterr().out.splitlines() if line.startswith("{")]
    assert told[0]["kind"] == "unlikely"
    assert "I am going home" in told[0]["action"]
    assert len(told) <= 3


def test_one_task_alone_cannot_be_left_out(
    serve_scripted: ServeScripted, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    post(serve_scripted(), expert_demonstration(4)).raise_for_status()
    assert main(["doubts", "--state", str(tmp_path), "--cross-fit", "2"]) == 1
    assert "two tasks at least" in capfd.readouterr().err
