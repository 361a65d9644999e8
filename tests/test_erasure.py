"""What is erased is gone from every table and from the bytes of the files; what was made of it is named."""

from __future__ import annotations

import itertools
import random
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import httpx
import pytest

from policies.adapters.probe import LikelyToken, Probe, ProbePrompt, read_probe, write_probe
from policies.chat.chat_protocol import action_message
from runtime.store.episodes import Actor, Episode, Outcome, Purpose, Step
from runtime.store.erasure import STEPS_AT_ONCE, Eraser, Scope
from runtime.store.learning_log import CycleStage, LearningLog, LessonRole
from runtime.store.own_episodes import OwnEpisodes
from runtime.store.probe_scrubbing import forget_prompts
from runtime.store.soundness import problems_of
from runtime.store.step_log import StepLog, StepLogError
from runtime.store.step_rows import tokens_to_blob
from tests.conftest import ServeScripted
from tests.records import make_episode, make_step
from tests.serving import MODEL, Served, wait_until

ROOT = Path(__file__).parent.parent
SECRET = "Rumpelstiltskin"
TOOL = {"type": "function", "function": {"name": "look", "description": f"Looks at {SECRET}", "parameters": {}}}
OTHER = "the weather in Lisbon"


def chat(served: Served, text: str, **more: Any) -> httpx.Response:
    body = {"model": MODEL, "messages": [{"role": "user", "content": text}], "tools": [], **more}
    return httpx.post(f"{served.url}/v1/chat/completions", json=body, timeout=30)


def episode_of(served: Served, text: str, **more: Any) -> str:
    return chat(served, text, **more).raise_for_status().headers["x-episode-id"]


def ask(served: Served, method: str, path: str, **more: Any) -> httpx.Response:
    return httpx.request(method, f"{served.url}/v1{path}", timeout=60, **more)


def files_with(state: Path, word: str) -> list[str]:
    """The files of a state folder in whose bytes a word stands."""
    return [
        str(path.relative_to(state))
        for path in state.rglob("*")
        if path.is_file() and word.encode() in path.read_bytes()
    ]


def say_everything_about(served: Served) -> tuple[str, str]:
    """An episode with the secret in every table that can hold one; returns it and the demonstration made of it."""
    first = ask(
        served,
        "POST",
        "/responses",
        json={
            "model": MODEL, "input": f"I am {SECRET}.", "tools": [{**TOOL["function"], "type": "function"}],
            "metadata": {"note": SECRET}, "user": f"user {SECRET}",
        },
    )  # fmt: skip
    episode = first.raise_for_status().headers["x-episode-id"]
    (step,) = ask(served, "GET", f"/episodes/{episode}").json()["steps"]
    outcome = ask(served, "POST", f"/episodes/{episode}/outcome", json={"value": 1, "note": f"{SECRET} was content"})
    ask(
        served, "DELETE", f"/episodes/{episode}/outcomes/{outcome.json()['id']}", json={"reason": f"no, {SECRET}"}
    ).raise_for_status()
    message = {"role": "assistant", "content": f"Good day, {SECRET}."}
    corrected = ask(
        served, "POST", f"/episodes/{episode}/corrections", json={"step_id": step["id"], "message": message}
    )
    corrected.raise_for_status()
    promoted = ask(served, "POST", f"/episodes/{episode}/promote").raise_for_status().json()["id"]
    ask(served, "DELETE", f"/responses/{first.json()['id']}").raise_for_status()
    return episode, promoted


def test_an_erased_episode_is_gone_from_every_table_and_from_the_bytes_of_the_files(
    serve_scripted: ServeScripted, tmp_path: Path
) -> None:
    served = serve_scripted(f"Hello {SECRET}!", "Sunny.")
    episode, demonstration = say_everything_about(served)
    other = episode_of(served, OTHER)
    assert files_with(tmp_path, SECRET)
    (step,) = served.parts.log.steps(episode)
    said = tokens_to_blob(step.completion_token_ids)
    assert said in (tmp_path / "agent.db-wal").read_bytes()
    erased = ask(served, "DELETE", f"/episodes/{episode}", json={"reason": "asked by letter"}).raise_for_status().json()
    assert files_with(tmp_path, SECRET) == []
    assert said not in (tmp_path / "agent.db").read_bytes() + (tmp_path / "agent.db-wal").read_bytes()
    assert erased["state"] == "finished"
    assert [each["id"] for each in erased["episodes"]] == sorted([episode, demonstration])
    assert erased["demonstrations"] == [demonstration]
    assert (erased["reason"], erased["num_episodes"]) == ("asked by letter", 2)
    assert erased["report"]["rows"]["steps"] == 2
    assert files_with(tmp_path, OTHER)
    assert "Sunny." in ask(served, "GET", f"/episodes/{other}").text
    assert served.parts.log.verify() == []


def test_an_erased_episode_answers_gone_and_takes_nothing_more(serve_scripted: ServeScripted) -> None:
    served = serve_scripted()
    episode = episode_of(served, SECRET, metadata={"episode_id": "mine"})
    first = ask(served, "DELETE", f"/episodes/{episode}").raise_for_status().json()
    assert ask(served, "DELETE", f"/episodes/{episode}").json()["id"] == first["id"]
    for method, path in (("GET", ""), ("POST", "/promote")):
        gone = ask(served, method, f"/episodes/{episode}{path}")
        assert (gone.status_code, gone.json()["error"]["code"]) == (410, "episode_erased")
    assert chat(served, "Again", metadata={"episode_id": "mine"}).status_code == 410
    assert ask(served, "DELETE", "/episodes/never_was").status_code == 404
    assert ask(served, "GET", "/episodes").json()["data"] == []
    listed = ask(served, "GET", "/erasures").json()["data"]
    assert [each["id"] for each in listed] == [first["id"]]
    assert ask(served, "GET", f"/erasures/{first['id']}").json()["episodes"][0]["num_steps"] == 1


def test_all_episodes_for_a_user_go_and_those_of_others_stay(serve_scripted: ServeScripted, tmp_path: Path) -> None:
    served = serve_scripted()
    for number in range(5):
        episode_of(served, f"{SECRET} number {number}", user="rumpel")
    other = episode_of(served, OTHER, user="bob")
    assert ask(served, "DELETE", "/episodes").status_code == 400
    erased = ask(served, "DELETE", "/episodes", params={"user": "rumpel", "reason": "left"}).raise_for_status().json()
    assert (erased["num_episodes"], erased["scope"]) == (5, "user")
    assert files_with(tmp_path, SECRET) == files_with(tmp_path, "rumpel") == []
    assert [each["id"] for each in ask(served, "GET", "/episodes").json()["data"]] == [other]
    assert ask(served, "DELETE", "/episodes?user=nobody").json()["num_episodes"] == 0


# --------------------------------------------------------------------------------------------- the store's side


def many_steps(log: StepLog, number: int = 40, **fields: Any) -> tuple[Episode, list[Step]]:
    """A long episode in which every step says the secret."""
    episode = make_episode(**fields)
    steps: list[Step] = []
    for index in range(number):
        said: Any = {"role": "user", "content": f"{SECRET} said line {index} " + "and more " * 20}
        steps.append(make_step(episode, steps[-1] if steps else None, new_messages=(said,)))
    log.append(episode, *steps).result()
    return episode, steps


@pytest.fixture
def log(tmp_path: Path) -> Iterator[StepLog]:
    with closing(StepLog(tmp_path / "agent.db")) as log:
        yield log


def test_an_erasure_that_is_killed_in_the_middle_is_finished_at_the_next_start(log: StepLog, tmp_path: Path) -> None:
    episode, _ = many_steps(log)
    other, _ = many_steps(log, 3)
    program = (
        "import os, sys; from pathlib import Path; from runtime.store import erasure; "
        "from runtime.store.step_log import StepLog; erasure.STEPS_AT_ONCE = 5; state = Path(sys.argv[1]); "
        "eraser = erasure.Eraser(state, StepLog(state / 'agent.db', read_only=True)); calls = []; "
        "begun = eraser.begin([sys.argv[2]], erasure.Scope.EPISODE, 'kill me'); "
        "eraser.work(begun.id, lambda: calls.append(1) or (len(calls) == 4 and os.kill(os.getpid(), 9)))"
    )
    killed = subprocess.run([sys.executable, "-c", program, str(tmp_path), episode.id], cwd=ROOT, timeout=60)
    assert killed.returncode == -9
    assert log.episode(episode.id) is None
    left = len(log.query("SELECT 1 FROM steps WHERE episode_id = ?", episode.id))
    assert 0 < left < 40, "it was to be killed half-way"
    eraser = Eraser(tmp_path, log)
    (unfinished,) = eraser.unfinished()
    finished = eraser.work(unfinished)
    assert (finished.state, finished.reason, finished.num_steps) == ("finished", "kill me", 40)
    assert eraser.unfinished() == []
    assert log.query("SELECT 1 FROM steps WHERE episode_id = ?", episode.id) == []
    assert len(log.steps(other.id)) == 3
    assert log.verify() == []


def test_a_server_that_starts_goes_on_with_an_erasure_that_was_cut_off(
    serve_scripted: ServeScripted, tmp_path: Path
) -> None:
    with closing(StepLog(tmp_path / "agent.db")) as log:
        episode, _ = many_steps(log)
        begun = Eraser(tmp_path, log).begin([episode.id], Scope.EPISODE, "")
    served = serve_scripted()
    wait_until(lambda: ask(served, "GET", f"/erasures/{begun.id}").json()["state"] == "finished")
    assert files_with(tmp_path, SECRET) == []


def test_draws_that_were_not_chosen_go_with_their_step(serve_scripted: ServeScripted, tmp_path: Path) -> None:
    served = serve_scripted("Sunny.", f"Hello {SECRET}!", f"Hello {SECRET}!")
    headers = {"x-stepagent-best-of": "3", "x-stepagent-best-of-by": "majority"}
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Who is there?"}], "tools": []}
    answered = httpx.post(f"{served.url}/v1/chat/completions", json=body, headers=headers, timeout=30)
    episode = answered.raise_for_status().headers["x-episode-id"]
    (step,) = served.parts.log.steps(episode)
    assert len(served.parts.log.candidates(step.id)) == 3
    ask(served, "DELETE", f"/episodes/{episode}").raise_for_status()
    assert served.parts.log.candidates(step.id) == []
    assert files_with(tmp_path, SECRET) == []


def test_facts_can_be_deleted_only_where_a_tombstone_stands(log: StepLog, tmp_path: Path) -> None:
    episode, _ = many_steps(log, 2)
    log.append(Outcome("out_1", episode.id, 1.0, "user")).result()
    with closing(sqlite3.connect(tmp_path / "agent.db", isolation_level=None)) as other_program:
        for table in ("episodes", "steps", "outcomes", "tool_sets"):
            with pytest.raises(sqlite3.IntegrityError, match="facts"):
                other_program.execute(f"DELETE FROM {table}")
        Eraser(tmp_path, log).begin([episode.id], Scope.EPISODE, "")
        for edit in ("UPDATE erased_episodes SET owner = 'x'", "DELETE FROM erased_episodes", "DELETE FROM erasures"):
            with pytest.raises(sqlite3.IntegrityError, match="append-only"):
                other_program.execute(edit)
    with pytest.raises(StepLogError, match="was erased"):
        log.append(Outcome("out_2", episode.id, 1.0, "user")).result()
    with pytest.raises(StepLogError, match="was erased"):
        log.append(make_step(episode)).result()


def test_what_is_half_erased_is_no_damage(log: StepLog, tmp_path: Path) -> None:
    """A backup of such a moment was called damaged, and a nightly job would have thrown it away: found by kills."""
    one, steps = many_steps(log, STEPS_AT_ONCE + 50)
    other = make_episode()
    log.append(other, make_step(other, parent_id=steps[-1].id, index=len(steps))).result()
    log.append(Outcome("out_1", one.id, 1.0, "user")).result()
    eraser = Eraser(tmp_path, log)
    erasure = eraser.begin([one.id], Scope.EPISODE, "")
    asked = chain([False], repeat(True))
    assert eraser.work(erasure.id, lambda: next(asked)).state == "running"
    assert log.episode(one.id) is None
    assert len(list(log.steps(one.id))) == 50
    assert list(problems_of(tmp_path)) == []
    eraser.work(erasure.id)
    assert list(problems_of(tmp_path)) == []


def test_a_reader_goes_on_where_it_was_though_that_step_and_the_newest_ones_were_erased(
    log: StepLog, tmp_path: Path
) -> None:
    """Numbers of rows are given again where the newest ones go: a cursor beyond them would miss what comes next."""
    kept, _ = many_steps(log, 3)
    gone, gone_steps = many_steps(log, 3)
    learning_log = LearningLog(tmp_path)
    learning_log.note("cycle_1", CycleStage.REFUSED, last_step_id=gone_steps[-1].id)
    eraser = Eraser(tmp_path, log)
    eraser.work(eraser.begin([gone.id], Scope.EPISODE, "").id)
    later, later_steps = many_steps(log, 2)
    assert [step.id for step in log.steps_since(gone_steps[-1].id, 100)] == [step.id for step in later_steps]
    fresh = OwnEpisodes(log, [kept.adapter], learning_log.last_step_seen()).fresh(10)
    assert [episode.id for episode in fresh] == [later.id]
    eraser.work(eraser.begin([later.id, kept.id], Scope.EPISODE, "").id)
    _, last_steps = many_steps(log, 1)
    assert [step.id for step in log.steps_since(gone_steps[-1].id, 100)] == [step.id for step in last_steps]
    learning_log.close()


def test_what_a_learner_tried_at_the_states_of_an_episode_goes_with_it(log: StepLog, tmp_path: Path) -> None:
    """It begins with the same conversation. Learners of older releases did not say of which episode."""
    episode, steps = many_steps(log, 2)
    stranger = make_episode(purpose=Purpose.EVALUATION)
    begins_alike = make_episode(purpose=Purpose.EVALUATION)
    log.append(stranger, make_step(stranger)).result()
    said: Any = {"role": "user", "content": "And now to something else."}
    log.append(begins_alike, make_step(begins_alike, new_messages=(*steps[0].new_messages, said))).result()
    conversation = [*steps[0].new_messages, action_message(steps[0].action), *steps[1].new_messages]
    named = make_episode(purpose=Purpose.EVALUATION, metadata={"copied_from": episode.id})
    unnamed = make_episode(purpose=Purpose.EVALUATION)
    for each in (named, unnamed):
        log.append(each, make_step(each, new_messages=tuple(conversation))).result()
    demonstration = make_episode(actor=Actor.EXPERT, metadata={"promoted_from": episode.id})
    copy_of_it = make_episode(purpose=Purpose.EVALUATION, metadata={"copied_from": demonstration.id})
    for each in (demonstration, copy_of_it):
        log.append(each, make_step(each, new_messages=tuple(conversation))).result()
    eraser = Eraser(tmp_path, log)
    begun = eraser.begin([episode.id], Scope.EPISODE, "")
    causes = {stone.id: (stone.cause.value, stone.source) for stone in eraser.tombstones(begun.id)}
    assert causes.pop(unnamed.id)[0] == "copied"
    assert causes == {
        episode.id: ("named", ""),
        named.id: ("copied", episode.id),
        demonstration.id: ("promoted", episode.id),
        copy_of_it.id: ("copied", demonstration.id),
    }
    assert log.episode(stranger.id)
    assert log.episode(begins_alike.id)


def test_words_of_cycles_that_read_an_erased_episode_go_and_their_figures_stay(log: StepLog, tmp_path: Path) -> None:
    episode, _ = many_steps(log, 1)
    learning_log = LearningLog(tmp_path)
    (tmp_path / "learner.log").write_text(f"ValueError: {SECRET}")
    for cycle in ("cycle_1", "cycle_2"):
        report = {"expert_problems": {f"it said {SECRET}": 1}, "collected": {"own_new": 3}}
        learning_log.note(cycle, CycleStage.FAILED, f"ValueError: {SECRET}", report=report)
        learning_log.note_episodes(cycle, "", [(LessonRole.OWN, episode.id)])
    eraser = Eraser(tmp_path, log)
    erased = eraser.work(eraser.begin([episode.id], Scope.EPISODE, "").id)
    assert files_with(tmp_path, SECRET) == []
    status = learning_log.status("cycle_1")
    assert status is not None
    assert status.report == {"collected": {"own_new": 3}}
    assert erased.id in status.message
    assert eraser.consequences(erased.id).cycles == ["cycle_1", "cycle_2"]
    with pytest.raises(sqlite3.IntegrityError, match="append-only"):
        learning_log.db.execute("UPDATE cycle_episodes SET role = 'own'")
    learning_log.close()


def test_erased_prompts_leave_the_probes_of_adapters(log: StepLog, tmp_path: Path) -> None:
    episode, steps = many_steps(log, 2)
    learned = tuple(ProbePrompt(step.prompt_token_ids, ((LikelyToken(1, -0.5, -0.1),),)) for step in steps)
    neutral = ProbePrompt((7, 7, 7), ((LikelyToken(2, -0.5, -0.1),),))
    for name, prompts in (
        ("agent-v0001", (*learned, neutral)),
        ("agent-v0001/reward-1", (*learned, neutral)),
        ("agent-v0002", learned),
        ("agent-v0003", (neutral,)),
    ):
        (tmp_path / "adapters" / name).mkdir(parents=True)
        write_probe(tmp_path / "adapters" / name, Probe("base", 1e-3, prompts))
    eraser = Eraser(tmp_path, log)
    erased = eraser.work(eraser.begin([episode.id], Scope.EPISODE, "").id)
    assert erased.report["rows"]["probe_prompts"] == 6
    for name in ("agent-v0001", "agent-v0001/reward-1", "agent-v0003"):
        assert read_probe(tmp_path / "adapters" / name).prompts == (neutral,)
    assert not (tmp_path / "adapters" / "agent-v0002" / "probe.json").exists()


def test_prompts_are_erased_from_probes_while_adapters_come_and_go(log: StepLog, tmp_path: Path) -> None:
    """A folder that went while its neighbours were listed ended the erasure with an error."""
    places = [tmp_path / "adapters" / name for name in (".incoming-1", "agent-v0001")]
    episodes = [many_steps(log, 1) for _ in range(40)]
    prompts = tuple(ProbePrompt(step.prompt_token_ids, ((LikelyToken(1, -0.5, -0.1),),)) for _, (step,) in episodes)
    places[0].mkdir(parents=True)
    write_probe(places[0], Probe("base", 1e-3, prompts))
    for number in range(50):
        (tmp_path / "candidates" / str(number)).mkdir(parents=True)
    has_ended = threading.Event()

    def move() -> None:
        for here, there in itertools.cycle([places, places[::-1]]):
            if has_ended.is_set():
                return
            here.rename(there)
            time.sleep(0.0005)

    moving = threading.Thread(target=move)
    moving.start()
    try:
        for episode, _ in episodes:
            forget_prompts(tmp_path, log, [episode.id])
    finally:
        has_ended.set()
        moving.join()
    assert not list((tmp_path / "adapters").rglob("probe.json"))


def test_rewriting_the_file_keeps_every_rows_number(log: StepLog, tmp_path: Path) -> None:
    """A cursor is a number: were rows numbered anew, a cycle would read the log twice or miss a part of it."""
    episodes = [many_steps(log, 3)[0] for _ in range(10)]
    before = {row["id"]: row["rowid"] for row in log.query("SELECT rowid, id FROM steps")}
    eraser = Eraser(tmp_path, log)
    erased = eraser.work(eraser.begin([episodes[2].id, episodes[7].id], Scope.EPISODE, "").id)
    assert erased.report["file_was_rewritten"]
    after = {row["id"]: row["rowid"] for row in log.query("SELECT rowid, id FROM steps")}
    assert after == {id: number for id, number in before.items() if id in after}
    assert len(after) == 24


def test_an_erasure_that_finds_nothing_rewrites_nothing(log: StepLog, tmp_path: Path) -> None:
    """Any key may ask for one, and no answer can be logged while a file is rewritten."""
    episode, steps = many_steps(log, 2)
    eraser = Eraser(tmp_path, log)
    nobody = eraser.work(eraser.begin(eraser.episodes_of(user="nobody"), Scope.USER, "").id)
    assert (nobody.state, nobody.report["file_was_rewritten"]) == ("finished", False)
    assert log.steps(episode.id) == steps


def test_hundreds_of_erasures_leave_no_word_in_the_unused_parts_of_the_file(log: StepLog, tmp_path: Path) -> None:
    """SQLite copies rows when it balances a tree, and leaves the old copies where no page counts them."""
    draw, words = random.Random(3), {}
    for number in range(300):
        episode = make_episode()
        words[episode.id] = f"word{number:04d}-{draw.randbytes(6).hex()}"
        said: Any = {"role": "user", "content": words[episode.id] + "." * draw.choice([10, 400, 1500, 6000])}
        log.append(episode, make_step(episode, new_messages=(said,)))
    log.append(make_episode()).result()  # the last of them is written
    eraser, alive, gone = Eraser(tmp_path, log), list(words), list[str]()
    for _ in range(8):
        draw.shuffle(alive)
        chosen, alive = alive[:25], alive[25:]
        gone += chosen
        eraser.work(eraser.begin(chosen, Scope.EPISODE, "").id)
    content = b"".join(file.read_bytes() for file in tmp_path.iterdir())
    assert [id for id in gone if words[id].encode() in content] == []
    assert all(words[id].encode() in content for id in alive)
