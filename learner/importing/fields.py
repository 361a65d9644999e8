"""A JSON object of which every key is accounted for: read, known to be harmless, or the record is refused by its name.

This holds the rule of all formats: a key that would change messages, tools or what is learned is never dropped in
silence. A reader takes the keys that it knows and closes the object; whatever is left and not known to be harmless is
refused. A null says nothing: files in columns pad with nulls every key that some other row has.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import Any


class RefusedRecord(ValueError):
    """A record that is no demonstration; its text says why, in plain words."""


class Fields:
    """A JSON object, emptied key by key as it is read."""

    def __init__(self, value: Any, where: str) -> None:
        """`where` names the object in refusals: `message 3`. Raises RefusedRecord for what is no object."""
        if not isinstance(value, dict):
            raise RefusedRecord(f"{where} is {kind(value)}, not an object")
        self.where = where
        self._left = {key: held for key, held in value.items() if held is not None}

    def __contains__(self, name: str) -> bool:
        return name in self._left

    def take(self, *names: str) -> Any:
        """The value under the first of these names that holds something; None where none does.

        All of them are read with it. Raises RefusedRecord where two of them say different things.
        """
        held = {name: self._left.pop(name) for name in names if name in self._left}
        full = {name: value for name, value in held.items() if not is_empty(value)} or held
        values = list(full.values())
        if any(value != values[0] for value in values[1:]):
            raise RefusedRecord(f"{self.where} says different things under {' and '.join(map(repr, full))}")
        return values[0] if values else None

    def take_text(self, *names: str) -> str:
        """The text under the first of these names; empty where there is none."""
        value = self.take(*names)
        if value is None:
            return ""
        if not isinstance(value, str):
            raise RefusedRecord(f"{names[0]} of {self.where} is {kind(value)}, not text")
        return value

    def take_list(self, *names: str) -> list[Any]:
        """The list under the first of these names; empty where there is none."""
        value = self.take(*names)
        if value is None:
            return []
        if not isinstance(value, list):
            raise RefusedRecord(f"{names[0]} of {self.where} is {kind(value)}, not a list")
        return value

    def put(self, name: str, value: Any) -> None:
        """Add what the source means without writing it."""
        self._left[name] = value

    def left(self) -> Iterator[tuple[str, Any]]:
        """The keys that nobody has read yet, empty values left out."""
        return ((name, value) for name, value in self._left.items() if not is_empty(value))

    def close(self, harmless: Collection[str] = ()) -> None:
        """Raises RefusedRecord where a key is left that is not known to be harmless."""
        strangers = [name for name, value in self.left() if name not in harmless and not is_harmless(name, value)]
        if strangers:
            raise unknown(self.where, *strangers)


def unknown(where: str, *names: str) -> RefusedRecord:
    """The refusal that names all unknown keys of an object: what is told one by one takes as many attempts."""
    if len(names) == 1:
        has, it = f"the key {names[0]!r}, and nothing tells whether it changes", "it"
    else:
        has, it = f"the keys {', '.join(map(repr, names))}, and nothing tells whether they change", "them"
    return RefusedRecord(f"{where} has {has} what is learned: take {it} out, or say --ignore {','.join(names)}")


def is_empty(value: Any) -> bool:
    """Whether a value holds nothing. Zero and false do hold something."""
    return value is None or value in ("", [], {})


def is_padding(value: Any) -> bool:
    """Whether a value is null, or an object of nulls alone: what files in columns have where a row has nothing."""
    return value is None or (isinstance(value, dict) and bool(value) and all(map(is_padding, value.values())))


def kind(value: Any) -> str:
    """What a JSON value is, in words."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


# ------------------------------------------------------------------------------------------ names of all formats

SYSTEM_NAMES = (
    "system", "system_prompt", "systemPrompt", "system_message", "systemMessage", "instructions", "system_instruction",
    "systemInstruction", "system_instructions", "_system", "developer", "developer_message",
)  # fmt: skip
TOOL_NAMES = ("tools", "functions", "tool_definitions", "available_tools", "tool_schemas", "tools_schema", "_tools")
THINKING_NAMES = (
    "reasoning_content", "reasoning", "reasoning_details", "thinking", "thinking_blocks", "thinking_content", "thought",
    "thoughts", "reasoning_text", "think", "reasoningContent", "chain_of_thought", "cot", "thought_process",
    "thinking_process", "thinking_text", "thinking_trace", "reasoning_trace", "reasoning_summary", "inner_thoughts",
    "inner_monologue", "internal_monologue", "scratchpad", "tool_plan",
)  # fmt: skip
"""Beside an assistant's words: what it thought before it said them."""
PART_TYPE_NAMES = ("type", "part_kind", "kind", "block_type", "content_type")
"""What a part of a content is: pydantic-ai's, LlamaIndex's and Semantic Kernel's names, too."""
CACHE_MARK = {"cachePoint"}
"""The key of Bedrock's parts and tools that only say how far its cache of the prompt goes."""


# ---------------------------------------------------------------------------------------------- harmless keys

_HARMLESS = frozenset(
    """
    id ids uid uuid guid hash sha sha256 md5 digest index idx name title slug key source sources origin dataset subset
    split fold partition category categories subcategory domain subdomain topic topics theme language lang locale
    difficulty complexity tags url urls link license licence author authors annotator contributor created updated date
    time timestamp timestamps ts started ended start end model models provider engine deployment temperature top_p top_k
    min_p max_tokens max_completion_tokens max_output_tokens seed n stream stream_options presence_penalty
    frequency_penalty repetition_penalty stop stop_sequences keep_alive usage tokens cost price latency duration elapsed
    version schema_version
    object system_fingerprint service_tier parallel_tool_calls tool_choice store user username session conversation
    thread trace run repo repository commit branch cwd hostname platform environment task_type data_source ability
    num turns rounds length size logprobs logit_bias reasoning_effort verbosity prompt_cache_key safety_identifier
    generator teacher teacher_model model_name agent_name game_file file_name filename patch model_patch test_patch
    generated_patch gold_patch trajectory_format exp_name subset_name trace_name project_name app_name dataset_name
    provided_model_name last_updated turn trial
    top_logprobs
    """.split()
)
"""Names and places, dates, settings of the sampling, counts and costs: they say nothing of what was said or done."""
_HARMLESS_ENDINGS = (
    "_id", "_ids", "_uuid", "_guid", "_key_hash", "_hash", "_sha", "_at", "_time", "_timestamp", "_date", "_tokens",
    "_token_count", "_count", "_counts", "_url", "_urls", "_duration", "_ms", "_s", "_sec", "_seconds", "_version",
    "_cost", "_len", "_length", "_usage", "_usd", "_index", "_idx", "_path", "_number",
)  # fmt: skip
_HARMLESS_BEGINNINGS = ("num_", "n_", "total_", "__index_level_")
_OF_JUDGEMENT = re.compile(
    "fail|error|wrong|bad|reject|correct|success|pass|solved|reward|score|loss|mask|train|weight|label|vote|like|flag|"
    "delet|discard|exclu|valid|abort|cancel|toxic|harm|safe|hallucin|desir|refus|quality|verdict|judg|grade|rating"
)


_HARMLESS_OBJECTS = frozenset(
    "usage model user source sources cost environment stream_options logit_bias author authors tool_choice tags "
    "logprobs generator stop license".split()
)
"""Those of them that may be objects, or lists of objects; under another name that might be a conversation."""


def is_harmless(name: str, value: Any) -> bool:
    """Whether a key of this name says nothing of messages, tools or what is learned, in whatever format it stands."""
    snake = snake_case(name)
    if isinstance(value, dict) or (isinstance(value, list) and any(isinstance(each, dict | list) for each in value)):
        return snake in _HARMLESS_OBJECTS or snake.endswith(("_usage", "_tokens", "_counts", "_cost"))
    if snake in _HARMLESS:
        return True
    has_form = snake.endswith(_HARMLESS_ENDINGS) or snake.startswith(_HARMLESS_BEGINNINGS)
    return has_form and not _OF_JUDGEMENT.search(snake)


def snake_case(name: str) -> str:
    """`isCorrect`, `IsCorrect` and `is-correct` are `is_correct`."""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name)
    return re.sub(r"[\s.\-]+", "_", spaced).lower()
