"""The hosting side of TextWorld: makes a game on first use, keeps its files, and plays it."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import textworld
from textworld.challenges import CHALLENGES
from textworld.generator import Game, QuestGenerationError, compile_game

from tools.worlds.cache import cache_folder
from tools.worlds.simulators.live import Frame, RawCall, Settings

_INFOS = textworld.EnvInfos(
    objective=True, description=True, policy_commands=True, won=True, lost=True, score=True, facts=True
)

MAX_DRAWS = 20
"""Seeds that are tried for a game."""
SEEDS_APART = 1_000_000
"""Far enough that no two tasks try the same seed."""


def games_folder() -> Path:
    """Where the games' files lie, half a megabyte each."""
    return cache_folder() / f"textworld-{textworld.__version__}"


def game_file(settings: Settings) -> Path:
    """The file of a game, made where it is missing (some seconds)."""
    name = hashlib.sha256(repr(sorted(settings.items())).encode()).hexdigest()[:24]
    folder = games_folder() / name
    if not folder.exists():
        games_folder().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=games_folder(), prefix="new-") as making:
            _make(settings, Path(making))
            try:
                os.rename(making, folder)  # whole or not at all, whoever else makes the same game
            except OSError:
                if not folder.exists():
                    raise
            else:
                os.mkdir(making)  # for the temporary folder to remove
    return folder / "game.z8"


def _make(settings: Settings, folder: Path) -> None:
    options = textworld.GameOptions()
    options.path = str(folder / "game.z8")
    compile_game(_generate(settings, options), options)
    for source in folder.iterdir():
        if source.suffix not in (".z8", ".json"):
            source.unlink()


def _generate(settings: Settings, options: textworld.GameOptions) -> Game:
    _, make, _ = CHALLENGES[settings["challenge"]]
    for number in range(MAX_DRAWS):
        options.seeds = settings["seed"] + number * SEEDS_APART
        try:
            return make(dict(settings["parameters"]), options)
        except QuestGenerationError:  # this map has no quest of that length; the next one may
            continue
    raise RuntimeError(f"no game could be made of {settings}")


class _Game:
    """One game that is being played."""

    def __init__(self, settings: Settings) -> None:
        self._env: Any = textworld.start(str(game_file(settings)), _INFOS)
        self._state: Any = self._env.reset()
        self.frame = Frame(
            f"{self._state.objective.strip()}\n\n{self._state.description.strip()}", state=self._digest()
        )

    def do(self, name: str, arguments: Mapping[str, Any]) -> None:
        self._state, _, is_done = self._env.step(arguments["command"])
        is_over = bool(is_done or self._state.won or self._state.lost)
        self.frame = Frame(self._state.feedback.strip(), is_over, float(self._state.won), self._digest())

    def expert(self) -> RawCall | None:
        commands = self._state.policy_commands
        return ("act", {"command": commands[0]}) if commands else None

    def close(self) -> None:
        self._env.close()

    def _digest(self) -> str:
        facts = "\n".join(sorted(map(str, self._state.facts)))
        return hashlib.sha256(facts.encode()).hexdigest()[:16]


class TextWorldHost:
    """Opens games."""

    def open(self, settings: Settings) -> _Game:
        return _Game(settings)
