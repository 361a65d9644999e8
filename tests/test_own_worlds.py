"""A user's own world that is no world, or that opens no task: the server and practice say so before they begin."""

from __future__ import annotations

import asyncio
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from learner import practice
from runtime.config import parse_settings
from runtime.store.keys import KeyRing
from serve import build_parts
from tests.conftest import ServeScripted
from tools.worlds import load_world
from tools.worlds.order_desk import OrderDesk
from tools.worlds.world import Task, World, WorldFailed

FAULTS = [
    ("json:dumps", "dumps is no class"),
    ("os:getcwd", "getcwd is no class"),
    ("collections:OrderedDict", "is no world: it has no `name`"),
    ("no_such_module:World", "there is no module 'no_such_module'"),
    ("tests.faulty_worlds:Moon", "has no 'Moon'"),
    ("tests.faulty_module:World", "importing tests.faulty_module raised SystemExit: no configuration"),
    ("tests.faulty_worlds:NeedsArguments", r"its constructor wants some \(missing a required argument: 'path'\)"),
    ("tests.faulty_worlds:ConstructorRaises", "its constructor raised RuntimeError: kaput"),
    ("tests.faulty_worlds:ConstructorEnds", "its constructor raised SystemExit: 2"),
    ("tests.faulty_worlds:Abstract", "write its messages_of, open_item"),
    ("tests.faulty_worlds:NoName", "its `name` is None; it must be a text without a slash"),
    ("tests.faulty_worlds:SlashInName", "its `name` is 'my/world'"),
    ("tests.faulty_worlds:SplitsAreAList", "they must say how many tasks there are"),
    ("tests.faulty_worlds:SplitsAreTasks", "they must say how many tasks there are"),
    ("tests.faulty_worlds:TwoSplits", "a list of tasks, perhaps empty, for each of .* it was given none for heldout"),
    (
        "tests.faulty_worlds:NothingCalled",
        "its `splits` raised AttributeError: 'NothingCalled' object has no",
    ),
    ("tests.faulty_worlds:MessagesAreText", "a conversation begins with messages"),
    ("tests.faulty_worlds:MessagesWithoutRole", "a conversation begins with messages, .*; not .'content'"),
    ("tests.faulty_worlds:MessagesAreNoText", "cannot be written as JSON"),
    ("tests.faulty_worlds:OtherTask", "calls itself other/train/0"),
    ("tests.faulty_worlds:TaskRaises", "its simulator does not start"),
    ("tests.faulty_worlds:NoSteps", "its `max_steps` is 0"),
]


@pytest.mark.parametrize(("name", "words"), FAULTS)
def test_what_is_no_world_is_told_by_its_name(name: str, words: str) -> None:
    with pytest.raises(ValueError, match=words) as refused:
        load_world(name)
    assert repr(name) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_world_that_changes_the_working_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server made a new state folder there, and said that there was no model."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=re.escape(f"changes the working folder to {os.sep}: the server's own paths")):
        load_world("tests.faulty_worlds:ChangesFolder")


async def loaded(name: str) -> World:
    return load_world(name)


def test_a_world_may_run_an_event_loop_where_the_server_that_loads_it_has_one() -> None:
    world = asyncio.run(loaded("tests.faulty_worlds:RunsAnEventLoop"))
    assert world.splits["train"] == 6


def practice_says(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    monkeypatch.setattr(sys, "argv", ["practice", "--url", "http://127.0.0.1:9/v1", *arguments])
    assert asyncio.run(practice._main(practice._arguments())) == 2
    return capsys.readouterr().out.strip()


def server_says(folder: Path, *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        build_parts(parse_settings(["--state", str(folder / "state"), *arguments]))
    assert isinstance(ended.value.code, str)
    return ended.value.code


def test_the_server_and_practice_say_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--world", "tests.faulty_worlds:ConstructorEnds")
    said = server_says(tmp_path, *arguments)
    assert said.startswith("cannot start: the world 'tests.faulty_worlds:ConstructorEnds' cannot be made")
    assert practice_says(monkeypatch, capsys, *arguments) == said


def test_a_server_that_refuses_practice_is_up(
    serve_scripted: ServeScripted, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    served = serve_scripted(keys=KeyRing(operator_secret="s3cret"))
    monkeypatch.setattr(sys, "argv", ["practice", "--url", f"{served.url}/v1", "--episodes", "1"])
    assert asyncio.run(practice._main(practice._arguments())) == 1
    said = capsys.readouterr().out
    assert "did not do it: Error code: 401" in said
    assert "is the server up?" not in said


@pytest.mark.parametrize("error", [WorldFailed("its process ended: exit code 1"), RuntimeError("kaput")])
def test_a_listed_world_that_opens_no_task_is_told_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    def task(world: OrderDesk, split: str, index: int) -> Task:
        raise error

    monkeypatch.setattr(OrderDesk, "task", task)
    for said in (server_says(tmp_path), practice_says(monkeypatch, capsys)):
        assert said.startswith("cannot start: the world order_desk opens no task: ")
        assert str(error) in said


@pytest.mark.parametrize(("kind", "example"), [("NoTasks", "Hello! What can you do?"), ("NoneHeldOut", "Count to 1.")])
def test_a_world_without_held_out_tasks_is_served_all_the_same(tmp_path: Path, kind: str, example: str) -> None:
    parts = build_parts(parse_settings(["--state", str(tmp_path), "--world", f"tests.faulty_worlds:{kind}"]))
    try:
        assert parts.example == example
    finally:
        asyncio.run(_close(parts))


def test_agents_of_one_world_share_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two agents of a file of half a gigabyte held it twice."""
    name, made = "tests.faulty_worlds:Numbers", []
    monkeypatch.setattr("tools.worlds.load_world", lambda name: made.append(load_world(name)) or made[-1])
    agents = tmp_path / "agents.toml"
    agents.write_text("".join(f'[agents.{agent}]\nworld = "{name}"\n' for agent in ("first", "second")))
    arguments = ["--state", str(tmp_path / "state"), "--world", name, "--agents", str(agents)]
    asyncio.run(_close(build_parts(parse_settings(arguments))))
    assert len(made) == 1


async def _close(parts: Any) -> None:
    await parts.engine.close()
    for part in (parts.log, parts.registry, parts.shelf, parts.keys.store, parts.state):
        part.close()
