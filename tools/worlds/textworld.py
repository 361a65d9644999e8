"""TextWorld: text games that the package `textworld` generates: cook a meal, collect a coin, hunt a treasure.

Games, observations, scores and expert (the commands of the package's winning policy, from every state that can still be
won) are the package's own. A game is made when it is first opened, which takes some seconds, and kept in the user's
cache folder.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib.util import find_spec
from random import Random
from typing import Any, ClassVar

from pydantic import Field, field_validator

from tools.worlds.reading import Arguments
from tools.worlds.simulators.episode import SimulatedEpisode
from tools.worlds.simulators.pool import SimulatorPool
from tools.worlds.world import Message, Task

_FOODS = {"train": "train", "validation": "valid", "heldout": "test"}
"""The package's own division of its foods."""
_FIRST_SEED = {"train": 100_000, "validation": 200_000, "heldout": 300_000}
_KINDS = ("cooking", "coin", "treasure")
_ABOUT_PROGRAM = frozenset(
    "save restore restart quit q undo script transcript noscript unscript recording replay verify".split()
)
"""Words that write or read files, begin anew or end: other attempts would see them, and the expert loses its way."""


class Act(Arguments):
    """Type one command into the game, such as: look, inventory, go north, open fridge, take knife from table."""

    command: str = Field(description="The command.", min_length=1, max_length=200, pattern=r"^[^\n\r]+$")

    @field_validator("command")
    @classmethod
    def _is_for_the_game(cls, command: str) -> str:
        if not command.isprintable():
            raise ValueError("a command is one line of printable text")
        first_words = {(part.split() or [""])[0].lower() for part in re.split(r"[.,;]|\bthen\b", command)}
        if about_program := sorted(word for word in first_words if word in _ABOUT_PROGRAM or word.startswith("tw-")):
            raise ValueError(f"{', '.join(about_program)} is for the program that runs the game, and not part of it")
        return command


def _cooking(split: str, random: Random) -> dict[str, Any]:
    num_ingredients = random.choice((1, 2, 3))
    skills = {skill: random.random() < 0.5 for skill in ("open", "cook", "cut")}
    rooms = {"take": num_ingredients, "go": random.choice((1, 6))}
    recipe = {"recipe": num_ingredients, "recipe_seed": random.randrange(1_000_000)}
    return {**recipe, **rooms, **skills, "drop": False, "split": _FOODS[split]}


def game_settings(split: str, index: int) -> dict[str, Any]:
    """What makes a task's game."""
    kind, random = _KINDS[index % len(_KINDS)], Random(f"textworld/{split}/{index}")
    seed = _FIRST_SEED[split] + index
    if kind == "cooking":
        return {"challenge": "tw-cooking", "seed": seed, "parameters": _cooking(split, random)}
    if kind == "coin":
        level = random.choice((4, 5, 6, 7, 104, 105, 106, 107))
        return {"challenge": "tw-coin_collector", "seed": seed, "parameters": {"level": level}}
    return {"challenge": "tw-treasure_hunter", "seed": seed, "parameters": {"level": random.randint(4, 20)}}


@lru_cache(maxsize=1)
def _pool() -> SimulatorPool:
    return SimulatorPool("tools.worlds.simulators.textworld:TextWorldHost", num_processes=2, timeout_s=60.0)


class TextWorldEpisode(SimulatedEpisode):
    """One attempt at one game."""

    readers: ClassVar = {"act": Act}
    max_calls = 50


class TextWorld:
    """The world of generated text games."""

    name = "textworld"
    max_steps = TextWorldEpisode.max_calls + 1
    splits: Mapping[str, int] = {"train": 300, "validation": 60, "heldout": 120}

    def __init__(self) -> None:
        if find_spec("textworld") is None:
            raise ModuleNotFoundError("No module named 'textworld'", name="textworld")

    def task(self, split: str, index: int) -> Task:
        """One game. Raises KeyError for an unknown split, IndexError for an index beyond its end."""
        if not 0 <= index < self.splits[split]:
            raise IndexError(f"{self.name}/{split} has tasks 0 to {self.splits[split] - 1}, not {index}")
        opening = _pool().frame(game_settings(split, index), ()).observation
        return Task(self.name, split, index, ({"role": "user", "content": opening},))

    def find_task(self, messages: Sequence[Message]) -> Task | None:
        """None: to know all games' texts, all would have to be made. A request has to name its task."""
        return None

    def open(self, task: Task) -> TextWorldEpisode:
        """A fresh attempt at a game."""
        return TextWorldEpisode(_pool(), game_settings(task.split, task.index))
