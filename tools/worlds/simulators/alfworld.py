"""The hosting side of ALFWorld: furnishes one of the package's rooms as a PDDL problem, and plays it on its engine.

The package's published games cannot be had from a package registry. What it carries is used here: the floor plans with
their furniture and kinds of things, what may lie where, goals, task sentences, domain and grammar. Which thing lies
where is drawn by the task's seed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any

import alfworld.gen
import alfworld.gen.constants as alfred
import fast_downward
import textworld
from alfworld.agents.environment.alfred_tw_env import AlfredDemangler
from alfworld.gen.goal_library import gdict as GOALS
from alfworld.info import ALFRED_PDDL_PATH, ALFRED_TWL2_PATH
from textworld.envs.pddl import PddlEnv

from tools.worlds.simulators.live import Frame, RawCall, Settings

_LAYOUTS = Path(alfworld.gen.__file__).parent / "layouts"
_FURNITURE = frozenset(alfred.RECEPTACLES) - frozenset(alfred.MOVABLE_RECEPTACLES)
_MAY_LIE_IN: Mapping[str, list[str]] = {
    place: sorted(things) for place, things in sorted(alfred.VAL_RECEPTACLE_OBJECTS.items()) if place in _FURNITURE
}
_PICKUPABLE = frozenset(thing for things in _MAY_LIE_IN.values() for thing in things if not thing.endswith("Sliced"))
_LAMPS = ("DeskLamp", "FloorLamp")
_NEEDED = {
    "pick_clean_then_place_in_recep": ("SinkBasin", "Cleanable"),
    "pick_heat_then_place_in_recep": ("Microwave", "Heatable"),
    "pick_cool_then_place_in_recep": ("Fridge", "Coolable"),
}
"""The furniture that a task of this kind takes, and what it is done to."""
NUM_OTHER_THINGS = 8
"""Things that lie about and are not what the task is about."""


@dataclass(frozen=True, slots=True)
class Room:
    """A floor plan: its furniture (name to kind) and the kinds of things in it."""

    furniture: Mapping[str, str]
    things: tuple[str, ...]


@lru_cache
def read_room(number: int) -> Room:
    """One of the package's floor plans. A kind of furniture whose place it does not give stands there once."""
    kinds = json.loads((_LAYOUTS / f"FloorPlan{number}-objects.json").read_text("utf-8"))
    placed = json.loads((_LAYOUTS / f"FloorPlan{number}-openable.json").read_text("utf-8"))
    furniture = {name: _kind(name) for name in sorted(placed)}
    for kind in sorted(set(kinds) & _FURNITURE - set(furniture.values())):
        furniture[f"{kind}|1"] = kind
    things = tuple(sorted(kind for kind in set(kinds) if kind in _PICKUPABLE or kind in _LAMPS))
    return Room({name: kind for name, kind in furniture.items() if kind in _FURNITURE}, things)


def _kind(name: str) -> str:
    parts = name.split("|")
    return parts[-1] if parts[-1].endswith("Basin") else parts[0]


@dataclass(frozen=True, slots=True)
class _Wish:
    """What a task is about."""

    kind: str
    thing: str
    place: str
    """The kind of furniture that the thing is to come to; empty where it is to be looked at."""
    lamp: str = ""


def _wishes(room: Room, kind: str) -> Iterator[_Wish]:
    """All tasks of a kind that make sense in a room."""
    places = sorted(set(room.furniture.values()))
    tool, done_to = _NEEDED.get(kind, ("", ""))
    if tool and tool not in places:
        return
    for thing in room.things:
        if thing in _LAMPS or (done_to and thing not in alfred.VAL_ACTION_OBJECTS[done_to]):
            continue
        if kind == "look_at_obj_in_light":
            yield from (_Wish(kind, thing, "", lamp) for lamp in _LAMPS if lamp in room.things)
        else:
            # It must have lain somewhere else before, and what is cleaned, heated or cooled is brought elsewhere.
            elsewhere = [place for place in places if thing in _MAY_LIE_IN.get(place, ())]
            yield from (_Wish(kind, thing, place) for place in elsewhere if len(elsewhere) > 1 and place != tool)


def _mangled(name: str) -> str:
    for sign, word in (("|", "_bar_"), ("+", "_plus_"), ("-", "_minus_"), (".", "_dot_"), (",", "_comma_")):
        name = name.replace(sign, word)
    return name


class _Problem:
    """A PDDL problem that is being written."""

    def __init__(self, room: Room) -> None:
        self.objects = ["agent1 - agent", "loc_start - location"]
        self.facts = ["(atLocation agent1 loc_start)"]
        self._furniture = room.furniture
        for number, (name, kind) in enumerate(room.furniture.items()):
            self.objects += [f"{_mangled(name)} - receptacle", f"loc_{number} - location"]
            self.facts += [
                f"(receptacleType {_mangled(name)} {kind}Type)",
                f"(receptacleAtLocation {_mangled(name)} loc_{number})",
            ]
            if kind in alfred.OPENABLE_CLASS_SET:
                self.facts.append(f"(openable {_mangled(name)})")

    def put(self, name: str, kind: str, place: str) -> None:
        """Lay a thing somewhere."""
        thing, number = _mangled(name), list(self._furniture).index(place)
        self.objects.append(f"{thing} - object")
        self.facts += [
            f"(objectType {thing} {kind}Type)",
            f"(inReceptacle {thing} {_mangled(place)})",
            f"(objectAtLocation {thing} loc_{number})",
            f"(toggleable {thing})" if kind in _LAMPS else f"(pickupable {thing})",
        ]
        for ability in ("Heatable", "Coolable", "Cleanable", "Sliceable"):
            if kind in alfred.VAL_ACTION_OBJECTS[ability]:
                self.facts.append(f"({ability.lower()} {thing})")

    def text(self, kinds: set[str], goal: str) -> str:
        """The whole of it; `kinds` are those of the things."""
        places = sorted(set(self._furniture.values()))
        types = [f"{kind}Type - otype" for kind in sorted(kinds)] + [f"{place}Type - rtype" for place in places]
        may_lie = [
            f"(canContain {place}Type {kind}Type)"
            for place in places
            for kind in sorted(kinds & {*_MAY_LIE_IN.get(place, ())})
        ]
        # Conditions of the domain name these types, be there such furniture or not.
        types += [f"{kind}Type - rtype" for kind in ("SinkBasin", "Microwave", "Fridge") if kind not in places]
        types += [f"{kind}Type - otype" for kind in ("Knife", "ButterKnife") if kind not in kinds]
        listed = "\n    ".join([*self.objects, *types])
        facts = "\n    ".join(["(= (total-cost) 0)", *self.facts, *may_lie])
        head = f"(define (problem room)\n  (:domain alfred)\n  (:objects\n    {listed}\n  )"
        return f"{head}\n  (:init\n    {facts}\n  )\n{goal}"


def _room_and_wish(settings: Settings, random: Random) -> tuple[Room, _Wish]:
    """The first of the rooms that has a task of the kind."""
    for number in settings["rooms"]:
        room = read_room(number)
        if wishes := list(_wishes(room, settings["kind"])):
            return room, random.choice(wishes)
    raise ValueError(f"none of the floor plans {settings['rooms']} has a task {settings['kind']}")


def make_game(settings: Settings) -> dict[str, str]:
    """What the package's engine plays: domain, grammar with the task's sentence, problem."""
    random = Random(json.dumps(settings, sort_keys=True))
    room, wish = _room_and_wish(settings, random)
    problem = _Problem(room)
    kinds = _lay_things(problem, room, wish, random)
    words = {"obj": wish.thing, "recep": wish.place, "toggle": wish.lamp}
    goal = GOALS[wish.kind]["pddl"].format(**words).replace("#", "-").rstrip()
    sentence = random.choice(GOALS[wish.kind]["templates"]).format(**{k: word.lower() for k, word in words.items()})
    return {
        "pddl_domain": Path(ALFRED_PDDL_PATH).read_text("utf-8"),
        "grammar": Path(ALFRED_TWL2_PATH).read_text("utf-8").replace("UNKNOWN GOAL", sentence),
        "pddl_problem": problem.text(kinds, goal),
    }


def _lay_things(problem: _Problem, room: Room, wish: _Wish, random: Random) -> set[str]:
    """Lay out what the task is about and other things; the kinds of all."""
    others = [kind for kind in room.things if kind not in (wish.thing, *_LAMPS)]
    kinds = random.sample(others, min(NUM_OTHER_THINGS, len(others)))
    num_wanted = 2 if wish.kind == "pick_two_obj_and_place" else 1
    laid = [(f"{wish.thing}|{number}", wish.thing) for number in range(num_wanted)]
    laid += [(f"{kind}|0", kind) for kind in kinds]
    for name, kind in laid:
        places = [place for place, what in room.furniture.items() if kind in _MAY_LIE_IN.get(what, ())]
        if kind == wish.thing:
            places = [place for place in places if room.furniture[place] != wish.place]
        if places:
            problem.put(name, kind, random.choice(places))
    if wish.lamp:
        tables = [place for place, what in room.furniture.items() if what not in alfred.OPENABLE_CLASS_SET]
        problem.put(f"{wish.lamp}|0", wish.lamp, random.choice(tables))
    return {kind for _, kind in laid} | ({wish.lamp} if wish.lamp else set())


class _House:
    """One task in one room."""

    def __init__(self, settings: Settings) -> None:
        infos = textworld.EnvInfos(won=True, facts=True, admissible_commands=True)
        self._env: Any = AlfredDemangler(PddlEnv(infos))
        self._env.load(make_game(settings))
        self._state = self._env.reset()
        text = self._state.feedback.replace("-= Welcome to TextWorld, ALFRED! =-", "").strip()
        self.frame = Frame(text, state=self._digest())

    def do(self, name: str, arguments: Mapping[str, Any]) -> None:
        # The engine's own names end with a space where they have no number.
        command = self._known_as(arguments["command"])
        self._state, _, _ = self._env.step(command)
        won = bool(self._state.won)
        self.frame = Frame(self._state.feedback.strip(), won, float(won), self._digest())

    def _known_as(self, command: str) -> str:
        wanted = " ".join(command.split())
        return next((known for known in self._state["_valid_commands"] if " ".join(known.split()) == wanted), wanted)

    def expert(self) -> RawCall | None:
        inner = self._env.unwrapped
        plan = inner._pddl_state.replan(inner._entity_infos)  # what `policy_commands` asks for after every step
        return ("act", {"command": " ".join(plan[0].split())}) if plan else None

    def close(self) -> None:
        self._env.close()
        fast_downward.close_lib(self._env.unwrapped.downward_lib)  # a copy of the planner for each episode

    def _digest(self) -> str:
        facts = "\n".join(
            sorted(str(fact) for fact in self._state.facts if not fact.name.startswith(("checked", "new-axiom")))
        )
        return hashlib.sha256(facts.encode()).hexdigest()[:16]


class AlfWorldHost:
    """Opens rooms."""

    def __init__(self) -> None:
        # The engine translates a problem four times to open it once, which takes seconds; the translation only reads.
        fast_downward.pddl2sas = lru_cache(maxsize=16)(fast_downward.pddl2sas)

    def open(self, settings: Settings) -> _House:
        return _House(settings)
