"""The multi-turn tasks of the Berkeley Function Calling Leaderboard (package bfcl-eval): a user asks in several turns.

Four kinds of each of 200 conversations: as it is, with a function that comes only later, with a request that lacks
something, and with long observations. A turn ends with an answer, and the user goes on. The calls are run and the
outcome is judged by the package: after every turn the state and what was observed must hold what the right calls bring.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import ast
import inspect
import json
import os
import re
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from importlib import import_module
from typing import Any
from uuid import uuid4

from tools.worlds.cache import cache_folder
from tools.worlds.calls import ToolEpisode, ToolSchema, answering, calling
from tools.worlds.costly import refuse_costly_power, refuse_costly_precision, refuse_long_numbers
from tools.worlds.listed import ListedWorld, split_by_fives
from tools.worlds.right_calls import Call, RightCalls
from tools.worlds.world import SPLITS, Message

# On import the package makes folders there; by default beside the packages.
os.environ.setdefault("BFCL_PROJECT_ROOT", str(cache_folder() / "bfcl"))

from bfcl_eval.constants.default_prompts import DEFAULT_USER_PROMPT_FOR_ADDITIONAL_FUNCTION_FC
from bfcl_eval.constants.executable_backend_config import CLASS_FILE_PATH_MAPPING
from bfcl_eval.constants.type_mappings import GORILLA_TO_OPENAPI
from bfcl_eval.eval_checker.multi_turn_eval import multi_turn_utils
from bfcl_eval.eval_checker.multi_turn_eval.multi_turn_checker import multi_turn_checker, state_checker
from bfcl_eval.utils import load_dataset_entry, load_ground_truth_entry

KINDS = ("base", "miss_func", "miss_param", "long_context")
DONE_TEXT = "That is done."
CANNOT_TEXT = "I cannot do that yet: something that I need for it is missing."


@dataclass(frozen=True, slots=True)
class Conversation:
    """One task: what the user says turn by turn, and what is right."""

    entry: dict[str, Any]
    """The package's own, without the functions."""
    right_calls: tuple[tuple[str, ...], ...]
    """By turn, as the package writes them: `cd(folder='document')`."""
    user_texts: tuple[str, ...]
    schemas: tuple[tuple[ToolSchema, ...], ...]
    """The functions that can be called in each turn."""


class BfclEpisode(ToolEpisode):
    """One attempt at one conversation."""

    def __init__(self, conversation: Conversation) -> None:
        super().__init__()
        self._conversation = conversation
        self._name = f"episode_{uuid4().hex}"
        self._turns: list[list[list[str]]] = [[]]
        """Calls by turn and step, as the package writes them. After the last turn there is one more, empty."""
        self._right_calls = self._right_calls_of_turn()
        weakref.finalize(self, _forget_instances, self._name)
        self._execute([])  # loads the scenario

    @property
    def is_done(self) -> bool:  # type: ignore[override]
        """Every turn of the user's was answered."""
        return self._turn == len(self._conversation.user_texts)

    @property
    def _turn(self) -> int:
        return len(self._turns) - 1

    def schemas(self) -> list[ToolSchema]:
        by_turn = self._conversation.schemas
        return list(by_turn[min(self._turn, len(by_turn) - 1)])

    def run(self, name: str, arguments: dict[str, Any]) -> str:
        if self.is_done:
            raise ValueError("the user is content and has left; nothing is to be done any more")
        if not all(key.isidentifier() for key in arguments):
            raise ValueError("an argument's name must be a plain word")
        refuse_long_numbers(arguments)
        refuse_costly_precision(arguments.get("precision"))
        refuse_costly_power(arguments.get("base"), arguments.get("exponent"))
        # The package evaluates what is written here: only names checked above and literals may stand in it.
        written = f"{name}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})"
        is_right = self._right_calls.tick_off((name, arguments))
        before = None if is_right else deepcopy(self._instances)
        [told] = self._execute([written])
        self._turns[-1].append([written])
        if before is not None and not state_checker(before, self._instances)["valid"]:
            self._right_calls.lose()
        return told

    def answer(self, text: str) -> str | None:
        del text  # only what was done counts
        if self.is_done:
            return None
        was_lost = self._right_calls.is_lost or self._right_calls.next is not None
        self._turns.append([])
        if self.is_done:
            return None
        self._right_calls = self._right_calls_of_turn()
        if was_lost:
            self._right_calls.lose()
        return self._conversation.user_texts[self._turn]

    def outcome(self) -> float:
        if not self.is_done:
            return 0.0
        entry = self._conversation.entry
        right = [list(calls) for calls in self._conversation.right_calls]
        with _passing_name() as name:
            kind = entry["id"].rsplit("_", 1)[0]
            return float(multi_turn_checker(self._turns[:-1], right, entry, kind, name)["valid"])

    def expert_action(self) -> Message | None:
        """The next of the turn's right calls, then an answer."""
        if self.is_done:
            return answering(DONE_TEXT)
        if self._right_calls.is_lost:
            return None
        if (call := self._right_calls.next) is not None:
            # One conversation's right call is of a function that comes only later: nobody can make it.
            is_offered = any(schema["name"] == call[0] for schema in self.schemas())
            return calling(*call, self.num_moves) if is_offered else None
        return answering(DONE_TEXT if self._conversation.right_calls[self._turn] else CANNOT_TEXT)

    def reopened(self) -> BfclEpisode:
        return BfclEpisode(self._conversation)

    def is_where(self, other: BfclEpisode) -> bool:
        return self._turn == other._turn and state_checker(self._instances, other._instances)["valid"]

    def _right_calls_of_turn(self) -> RightCalls:
        calls = self._conversation.right_calls[self._turn]
        return RightCalls(_read(call, self._conversation.entry["involved_classes"]) for call in calls)

    def _execute(self, calls: list[str]) -> list[str]:
        entry = self._conversation.entry
        told, self._instances = multi_turn_utils.execute_multi_turn_func_call(
            calls,
            entry["initial_config"],
            entry["involved_classes"],
            self._name,
            entry["id"],
            long_context="long_context" in entry["id"],
        )
        return told


@contextmanager
def _passing_name() -> Iterator[str]:
    """A name under which the package keeps its instances for the while."""
    name = f"check_{uuid4().hex}"
    try:
        yield name
    finally:
        _forget_instances(name)


def _forget_instances(name: str) -> None:
    """The package keeps what it opens among its module's globals, for ever."""
    for key in [key for key in vars(multi_turn_utils) if key.startswith(name)]:
        delattr(multi_turn_utils, key)


def _read(written: str, class_names: list[str]) -> Call:
    """A call as the package writes it, with its arguments by name."""
    expression = ast.parse(written, mode="eval").body
    assert isinstance(expression, ast.Call)
    assert isinstance(expression.func, ast.Name)
    name = expression.func.id
    values = [ast.literal_eval(argument) for argument in expression.args]
    named = {str(word.arg): ast.literal_eval(word.value) for word in expression.keywords}
    arguments = inspect.signature(_method(name, class_names)).bind(None, *values, **named).arguments
    arguments.pop("self", None)
    return name, json.loads(json.dumps(arguments))


def _method(name: str, class_names: list[str]) -> Any:
    classes = [getattr(import_module(CLASS_FILE_PATH_MAPPING[each]), each) for each in class_names]
    return next(getattr(each, name) for each in classes if hasattr(each, name))


# ------------------------------------------------------------------------------------------------- world


class Bfcl(ListedWorld[Conversation]):
    """Every fifth conversation is held out, and every fifth is for validation, each in all its kinds."""

    name = "bfcl"
    max_steps = 60

    def __init__(self) -> None:
        schemas: dict[str, ToolSchema] = {}
        items: dict[str, list[Conversation]] = {split: [] for split in SPLITS}
        for kind in KINDS:
            for split, conversations in split_by_fives(_conversations(kind, schemas)).items():
                items[split] += conversations
        super().__init__(items)

    def messages_of(self, item: Conversation) -> tuple[Message, ...]:
        return ({"role": "user", "content": item.user_texts[0]},)

    def open_item(self, item: Conversation) -> BfclEpisode:
        return BfclEpisode(item)


def _conversations(kind: str, schemas: dict[str, ToolSchema]) -> list[Conversation]:
    entries = load_dataset_entry(f"multi_turn_{kind}")
    right = {entry["id"]: entry["ground_truth"] for entry in load_ground_truth_entry(f"multi_turn_{kind}")}
    # The kinds share their conversations by number; in this order one number has one place in every kind.
    entries.sort(key=lambda entry: int(re.findall(r"\d+$", entry["id"])[0]))
    return [_conversation(entry, right[entry["id"]], schemas) for entry in entries]


def _conversation(entry: dict[str, Any], right: list[list[str]], schemas: dict[str, ToolSchema]) -> Conversation:
    offered, by_turn, texts = entry.pop("function"), [], []
    for number, messages in enumerate(entry["question"]):
        offered = offered + entry.get("missed_function", {}).get(str(number), [])
        by_turn.append(tuple(_schema(function, schemas) for function in offered))
        texts.append(messages[0]["content"] if messages else DEFAULT_USER_PROMPT_FOR_ADDITIONAL_FUNCTION_FC)
    entry.pop("missed_function", None)
    return Conversation(entry, tuple(map(tuple, right)), tuple(texts), tuple(by_turn))


def _schema(function: dict[str, Any], schemas: dict[str, ToolSchema]) -> ToolSchema:
    """A function in OpenAI's form. One for all tasks: the package reads its papers anew for each."""
    if function["name"] not in schemas:
        schemas[function["name"]] = {
            "name": function["name"],
            "description": function["description"],
            "parameters": _json_schema(function["parameters"]),
        }
    return schemas[function["name"]]


def _json_schema(parameters: Any) -> Any:
    """The package's notation of types, in JSON schema's words."""
    if isinstance(parameters, list):
        return [_json_schema(each) for each in parameters]
    if not isinstance(parameters, dict):
        return parameters
    schema = {key: _json_schema(value) for key, value in parameters.items()}
    if isinstance(parameters.get("type"), str):
        schema["type"] = GORILLA_TO_OPENAPI[parameters["type"]]
    return schema
