"""What the worlds in processes of their own promise beyond `promises`: checks that their tests call."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import pytest

from tests_worlds import promises
from tools.worlds.simulators.pool import SimulatorPool
from tools.worlds.world import Message, Task, World

Said = list[list[Message]]


def said_by_expert(world: World, tasks: Iterable[Task]) -> Said:
    """The whole conversations, all of which end well."""
    conversations = []
    for task in tasks:
        episode = world.open(task)
        conversations.append([*task.messages, *promises.follow_expert(episode)])
        assert episode.outcome() == 1.0, task.id
    return conversations


def assert_the_same_in_new_processes(world: World, pool: SimulatorPool, tasks: list[Task]) -> None:
    """Nothing is left to chance, nor to what a process did before: other processes, other order, no memory."""
    before = said_by_expert(world, tasks)
    pool.close()
    pool.forget()
    again = said_by_expert(world, [world.task(task.split, task.index) for task in reversed(tasks)])
    assert list(reversed(again)) == before


def assert_turns_do_not_mix(world: World, pool: SimulatorPool, tasks: list[Task]) -> None:
    """Episodes that take turns, two of each task, hear what each hears alone."""
    alone = said_by_expert(world, tasks)
    pool.forget()
    episodes = [world.open(task) for task in tasks for _ in range(2)]
    moves = [[message for message in said if message["role"] == "assistant"] for said in alone for _ in range(2)]
    heard: Said = [[] for _ in episodes]
    for step in range(max(map(len, moves))):
        for episode, made, told in zip(episodes, moves, heard, strict=True):
            if step < len(made):
                told += episode.play(made[step])
    for number, told in enumerate(heard):
        assert told == [message for message in alone[number // 2] if message["role"] == "tool"]


def assert_missing_is_told(world_name: str, hidden_module: str, sentence: str) -> None:
    """A package that is not there gives one sentence that says what to install."""
    script = (
        "import sys\n"
        "class Hidden:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.partition('.')[0] == {hidden_module!r}:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Hidden())\n"
        "from tools.worlds import load_world\n"
        "try:\n"
        f"    load_world({world_name!r})\n"
        "except ValueError as error:\n"
        "    print(error)\n"
    )
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert told.count("\n") == 1
    assert sentence in told
    assert "make setup-worlds" in told


def skip_without(program: str, package: str) -> None:
    """Skip a module whose world needs a program that may not be installed here: make setup-worlds has said so."""
    if shutil.which(program) is None:
        pytest.skip(f"{program} is missing: apt-get install {package}", allow_module_level=True)


def assert_missing_program_is_told(world: type, monkeypatch: pytest.MonkeyPatch, sentence: str) -> None:
    monkeypatch.setitem(os.environ, "PATH", "/nowhere")
    with pytest.raises(ValueError, match=sentence):
        world()


def descendants(process_id: int) -> list[int]:
    """Of a process, on every level."""
    children = Path(f"/proc/{process_id}/task").glob("*/children")
    found = [int(child) for listed in children for child in listed.read_text().split()]
    return found + [below for child in found for below in descendants(child)]


def is_gone(process_id: int) -> bool:
    """Within ten seconds."""
    for _ in range(200):
        try:
            if Path(f"/proc/{process_id}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False
