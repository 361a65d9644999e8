"""BabyAI in words: a small grid of rooms, a mission such as "put the red ball next to the blue key".

Missions, rooms, success and expert are those of the package `minigrid`; the words say what its 7 x 7 view shows.
The expert is the package's bot. It plans along with whatever the agent does; where it gives up (a box was opened), a
new bot that begins here is asked, and where that fails too the expert does not know.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import gymnasium
import minigrid  # noqa: F401  it registers its levels
from minigrid.core.constants import IDX_TO_COLOR, IDX_TO_OBJECT
from minigrid.envs.babyai.core import roomgrid_level
from minigrid.utils.baby_ai_bot import BabyAIBot

from tools.worlds.reading import Arguments, Call, ReadingEpisode
from tools.worlds.world import Message, Task

# The package prints each mission that it rejects; a server's output is no place for that.
roomgrid_level.__dict__["print"] = lambda *_: None

LEVELS = (
    "GoToRedBall-v0 GoToObjS6-v1 GoToLocal-v0 GoToDoor-v0 GoToObjDoor-v0 OpenRedDoor-v0 OpenDoor-v0 OpenDoorColor-v0 "
    "OpenDoorLoc-v0 OpenTwoDoors-v0 OpenRedBlueDoors-v0 PickupLoc-v0 PickupDist-v0 PutNextLocalS5N3-v0 "
    "PutNextLocalS6N4-v0 PutNextLocal-v0 ActionObjDoor-v0 OneRoomS8-v0 UnlockLocal-v0 UnlockPickup-v0"
).split()
"""Those that the bot solves in at most some 25 steps; a task's index says its level."""
MAX_CALLS = 64
"""A task ends after so many calls, where the package does not end it earlier."""

# ------------------------------------------------------------------------------------------------- tools


class TurnLeft(Arguments):
    """Turn left on the spot."""


class TurnRight(Arguments):
    """Turn right on the spot."""


class GoForward(Arguments):
    """Go one step forward, where nothing stands in the way."""


class PickUp(Arguments):
    """Pick up the thing that is 1 step forward; one thing can be carried at a time."""


class PutDown(Arguments):
    """Put the carried thing down, 1 step forward, where the place is free."""


class Toggle(Arguments):
    """Open or close the door or box that is 1 step forward; a locked door needs the carried key of its color."""


READERS: dict[str, type[Arguments]] = {
    "turn_left": TurnLeft,
    "turn_right": TurnRight,
    "go_forward": GoForward,
    "pick_up": PickUp,
    "put_down": PutDown,
    "toggle": Toggle,
}
TOOL_NAMES = tuple(READERS)
"""In the order of the package's action numbers."""
DONE_ACTION = len(TOOL_NAMES)
"""The package's seventh action, by which the bot says that it sees nothing left to do."""

# ------------------------------------------------------------------------------------------------- words

DOOR_STATES = ("open", "closed", "locked")
UNTOLD = ("unseen", "empty", "floor", "agent")


def _steps(number: int, where: str) -> str:
    return f"{number} step{'s' if number != 1 else ''} {where}"


def _place(forward: int, right: int) -> str:
    side = _steps(abs(right), "right" if right > 0 else "left") if right else ""
    ahead = _steps(forward, "forward") if forward else ""
    return " and ".join(part for part in (ahead, side) if part)


def _thing(cell: Sequence[int]) -> str:
    kind, color = IDX_TO_OBJECT[cell[0]], IDX_TO_COLOR[cell[1]]
    return f"{DOOR_STATES[cell[2]]} {color} door" if kind == "door" else f"{color} {kind}"


def _told_cells(image: Any) -> Iterator[str]:
    """The things in view, near ones first, then the nearest wall straight ahead."""
    width, depth = image.shape[:2]
    middle = width // 2
    cells = [(depth - 1 - row, column - middle, image[column, row]) for column in range(width) for row in range(depth)]
    for forward, right, cell in sorted(cells, key=lambda told: (told[0] + abs(told[1]), told[1])):
        if IDX_TO_OBJECT[cell[0]] not in (*UNTOLD, "wall") and (forward, right) != (0, 0):
            yield f"a {_thing(cell)} {_place(forward, right)}"
    for forward in range(1, depth):
        if IDX_TO_OBJECT[image[middle, depth - 1 - forward][0]] == "wall":
            yield f"a wall {_steps(forward, 'forward')}"
            return


def describe(env: Any) -> str:
    """What the agent sees and carries."""
    seen = ", ".join(_told_cells(env.gen_obs()["image"])) or "nothing"
    carried = f"a {env.carrying.color} {env.carrying.type}" if env.carrying else "nothing"
    return f"You see {seen}. You carry {carried}."


# ----------------------------------------------------------------------------------------------- episode


def _make(level: str, seed: int) -> Any:
    env = gymnasium.make(f"BabyAI-{level}").unwrapped
    env.reset(seed=seed)
    return env


def _state(env: Any) -> tuple[Any, ...]:
    carried = (env.carrying.type, env.carrying.color) if env.carrying else None
    return env.grid.encode().tobytes(), tuple(map(int, env.agent_pos)), int(env.agent_dir), carried, env.mission


class BabyAIEpisode(ReadingEpisode):
    """One attempt at one mission."""

    readers = READERS

    def __init__(self, level: str, seed: int) -> None:
        super().__init__()
        self._level, self._seed = level, seed
        self._env = _make(level, seed)
        self._bot = BabyAIBot(self._env)
        self._advice = self._ask_bot(None)
        self._is_over, self._is_success = False, False

    @property
    def is_done(self) -> bool:
        """The mission is accomplished, or time is up."""
        return self._is_over or len(self.calls) >= MAX_CALLS

    def outcome(self) -> float:
        """1.0 where the package gave a reward."""
        return float(self._is_success)

    def do(self, call: Call) -> str:
        action = TOOL_NAMES.index(call.name)
        _, reward, terminated, truncated, _ = self._env.step(action)
        self._is_over, self._is_success = terminated or truncated, reward > 0
        if self._is_over:
            verdict = "The mission is accomplished." if self._is_success else "The mission has failed."
            return f"{describe(self._env)} {verdict}"
        self._advice = self._ask_bot(action)
        return describe(self._env)

    def _ask_bot(self, last_action: int | None) -> int | None:
        for take_over in (False, True):
            try:
                if take_over:
                    self._bot, last_action = BabyAIBot(self._env), None
                return self._bot.replan(last_action)
            except Exception:  # its own errors, assertions and index errors, where a state was not foreseen
                continue
        return None

    def expert_call(self) -> Call | None:
        if self._advice is None or self._advice == DONE_ACTION:
            return None
        return Call(TOOL_NAMES[self._advice], {})

    def reopened(self) -> BabyAIEpisode:
        return BabyAIEpisode(self._level, self._seed)

    def is_where(self, other: BabyAIEpisode) -> bool:
        return (self.state, self.is_done) == (other.state, other.is_done)

    @property
    def state(self) -> tuple[Any, ...]:
        """All that is true of the room, the agent and the mission."""
        return _state(self._env)


# ------------------------------------------------------------------------------------------------- world

_SHARES = {"train": range(0, 70), "validation": range(70, 80), "heldout": range(80, 100)}
"""Of all missions, in percent; a digest of the room says where it belongs, so that no split holds another's room."""


@lru_cache(maxsize=20_000)
def _draw(split: str, index: int) -> tuple[str, int, str]:
    """A task's level, its seed, and its text."""
    level = LEVELS[index % len(LEVELS)]
    for seed in range(index * 10_000, (index + 1) * 10_000):
        env = _make(level, seed)
        digest = hashlib.sha256(repr(_state(env)).encode()).digest()
        if int.from_bytes(digest[:4], "big") % 100 in _SHARES[split]:
            return level, seed, f"Your mission: {env.mission}. {describe(env)}"
    raise AssertionError(f"no room for {split}/{index} in 10,000 draws")


class BabyAI:
    """The world of BabyAI's small levels."""

    name = "babyai"
    max_steps = MAX_CALLS + 1
    splits: Mapping[str, int] = {"train": 8000, "validation": 1000, "heldout": 2000}

    def task(self, split: str, index: int) -> Task:
        """One mission. Raises KeyError for an unknown split, IndexError for an index beyond its end."""
        if not 0 <= index < self.splits[split]:
            raise IndexError(f"{self.name}/{split} has tasks 0 to {self.splits[split] - 1}, not {index}")
        return Task(self.name, split, index, ({"role": "user", "content": _draw(split, index)[2]},))

    def find_task(self, messages: Sequence[Message]) -> Task | None:
        """None: many rooms have the same text, so a request has to name its task."""
        return None

    def open(self, task: Task) -> BabyAIEpisode:
        """A fresh attempt at a mission."""
        level, seed, _ = _draw(task.split, task.index)
        return BabyAIEpisode(level, seed)
