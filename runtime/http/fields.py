"""What becomes of each field that a request of OpenAI's forms may have: honoured, without effect, or refused.

This table is what the request schemas go by and what docs/CLIENTS.md is written from. A test holds it against the
installed `openai` package, so that a field that is new there has to be thought about here. A field that neither the
package nor this table knows is ignored, with a warning that names it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class Treatment(StrEnum):
    """What becomes of a field."""

    HONOURED = "honoured"
    NO_EFFECT = "accepted without effect"
    WARNED = "accepted without effect, with a warning"  # the answer may differ from what was hoped for
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Rule:
    """The treatment of one field, and why it is so."""

    treatment: Treatment
    note: str = ""
    """How it is honoured, or why it is not."""
    harmless: tuple[Any, ...] = ()
    """Values of a refused or warned field that ask for nothing; None, False and empty ones never do."""

    def asks_for_something(self, value: Any) -> bool:
        return bool(value) and value not in self.harmless


def _honoured(note: str = "") -> Rule:
    return Rule(Treatment.HONOURED, note)


def _without_effect(note: str) -> Rule:
    return Rule(Treatment.NO_EFFECT, note)


def _warned(note: str, *harmless: Any) -> Rule:
    return Rule(Treatment.WARNED, note, harmless)


def _refused(note: str, *harmless: Any) -> Rule:
    return Rule(Treatment.REFUSED, note, harmless)


_IN_BOTH = {
    "metadata": _honoured("logged with the episode; `episode_id`, `task` and `purpose` are read"),
    "model": _honoured("the served name, a named agent, or an adapter's name to pin it"),
    "moderation": _refused("there is no moderation model here"),
    "parallel_tool_calls": _honoured("false: the answer ends with its first call"),
    "prompt_cache_key": _without_effect("the engine finds equal prefixes by itself"),
    "prompt_cache_options": _without_effect("the engine finds equal prefixes by itself"),
    "prompt_cache_retention": _without_effect("the engine finds equal prefixes by itself"),
    "safety_identifier": _honoured("whose episode it is, within the key; goes before `user`"),
    "service_tier": _without_effect("there is one tier"),
    "stream": _honoured(),
    "temperature": _honoured(),
    "tool_choice": _honoured("`none` keeps the tools in the prompt; `allowed_tools` offers those alone"),
    "tools": _honoured("functions; tools of other types are left out, with a warning; an empty list is no list"),
    "top_logprobs": _honoured(),
    "top_p": _honoured(),
    "user": _honoured("whose episode it is, within the key"),
}

CHAT_FIELDS: dict[str, Rule] = _IN_BOTH | {
    "audio": _refused("only text is answered"),
    "frequency_penalty": _honoured("of what the answer has so far; logged logprobs stay the policy's own"),
    "function_call": _honoured("as `tool_choice`, which goes before it, but not beside `functions`"),
    "functions": _honoured("as `tools`; the answer has `function_call`"),
    "logit_bias": _honoured("by token ids of the served model; logged logprobs stay the policy's own"),
    "logprobs": _honoured("of the tokens of the content"),
    "max_completion_tokens": _honoured("of all steps of the answer together"),
    "max_tokens": _honoured("as `max_completion_tokens`, which goes before it"),
    "messages": _honoured("text; images, audio and files are refused; a `name` has no effect, with a warning"),
    "modalities": _refused("only text is answered", ["text"]),
    "n": _honoured(),
    "prediction": _without_effect("it would only make the answer quicker"),
    "presence_penalty": _honoured("of what the answer has so far; logged logprobs stay the policy's own"),
    "reasoning_effort": _honoured("where the chat template knows `reasoning_effort` or `enable_thinking`"),
    "response_format": _honoured("by grammar; beside tools the model calls one or answers in the schema"),
    "seed": _honoured(),
    "stop": _honoured(),
    "store": _without_effect("every answered step is logged, and nothing is listed under OpenAI's paths"),
    "stream_options": _honoured("`include_usage`; nothing is obfuscated"),
    "verbosity": _without_effect("no model here has such a setting: say it in the prompt"),
    "web_search_options": _warned("nothing is searched"),
}

RESPONSE_FIELDS: dict[str, Rule] = _IN_BOTH | {
    "access_programs": _without_effect("OpenAI's own programs"),
    "background": _honoured("the run goes on without its client; it ends with the server"),
    "background_options": _without_effect("a background run begins at once"),
    "context_management": _warned("nothing is compacted"),
    "conversation": _refused("conversations are not kept under a name: use previous_response_id"),
    "image": _without_effect("there are no images"),
    "include": _honoured("logprobs of the text; what cannot be kept (encrypted reasoning) is left out of the answer"),
    "input": _honoured("messages, function calls and outputs, reasoning, references to items; other items are refused"),
    "instructions": _honoured("they replace those of the response that is continued"),
    "max_output_tokens": _honoured("of all steps of the answer together"),
    "max_tool_calls": _warned("it counts OpenAI's built-in tools, and none of them is run"),
    "previous_response_id": _honoured("the conversation goes on from the logged token ids"),
    "prompt": _refused("prompts are not kept under a name: send `instructions`"),
    "reasoning": _honoured("`effort`, where the chat template knows it; no summaries are written"),
    "store": _honoured("false: the response cannot be retrieved or continued by its id; its steps are logged"),
    "stream_options": _without_effect("nothing is obfuscated"),
    "text": _honoured("`format`; `verbosity` has no effect"),
    "truncation": _without_effect("a conversation that does not fit is refused, never shortened in silence"),
}

MESSAGE_FIELDS: dict[str, Rule] = {
    "cache_control": _without_effect("the engine finds equal prefixes by itself"),
    "container": _refused("no code is run here"),
    "diagnostics": _without_effect("Anthropic's own"),
    "inference_geo": _without_effect("there is one place"),
    "max_tokens": _honoured("of all steps of the answer together"),
    "messages": _honoured("text, thinking, tool calls and results; images and documents are refused"),
    "metadata": _honoured("`user_id`: whose episode it is, within the key"),
    "model": _honoured("the served name, a named agent, or an adapter's name to pin it"),
    "output_config": _honoured("`format`, and `effort` where the chat template knows it"),
    "output_format": _honoured("as `output_config.format`, which it was called in Anthropic's beta"),
    "service_tier": _without_effect("there is one tier"),
    "speed": _without_effect("there is one speed"),
    "stop_sequences": _honoured(),
    "stream": _honoured(),
    "system": _honoured(),
    "temperature": _honoured(),
    "thinking": _honoured("where the chat template knows `enable_thinking`; shown where it is asked for"),
    "tool_choice": _honoured(),
    "tools": _honoured("the client's own; Anthropic's are left out, with a warning"),
    "top_k": _honoured(),
    "top_p": _honoured(),
    "user_profile_id": _without_effect("Anthropic's own"),
    "workspace_id": _without_effect("Anthropic's own"),
}
"""Of Anthropic's form."""

BESIDE_OPENAIS = {
    "best_of": _honoured("as the header `x-stepagent-best-of`, which goes before it; with `n` above 1 only `n` itself"),
    "chat_template_kwargs": _honoured("passed to the chat template, as vLLM does"),
    "min_p": _honoured(),
    "repetition_penalty": _honoured("of prompt and answer, as transformers and vLLM have it"),
    "top_k": _honoured(),
}
"""Not in OpenAI's chat form, but usual."""


SAMPLING = frozenset({"temperature", "top_p", "top_k", "min_p"})
"""Of which null says nothing: an agent's own way of sampling counts then."""


class FieldRefused(ValueError):
    """A field of a request that cannot be honoured, and why."""

    def __init__(self, param: str, problem: str) -> None:
        super().__init__(f"{param}: {problem}")
        self.param = param


def check_fields(body: Any, rules: Mapping[str, Rule], tool_types: Sequence[str] = ("function",)) -> Any:
    """A request's body with its warnings under `warnings`. Raises FieldRefused."""
    if not isinstance(body, dict):
        return body
    warnings = []
    for name, rule in rules.items():
        if not rule.asks_for_something(body.get(name)):
            continue
        if rule.treatment is Treatment.REFUSED:
            raise FieldRefused(name, f"it is not supported here ({rule.note}): leave it out")
        if rule.treatment is Treatment.WARNED:
            warnings.append(f"{name} has no effect: {rule.note}")
    warnings += _unknown_fields(body, rules)
    tools, warning = split_tools(body.get("tools"), tool_types)
    said = {name: value for name, value in body.items() if value is not None or name not in SAMPLING}
    return {**said, "tools": tools, "warnings": [*warnings, *warning]}


_MOST_NAMED = 5


def _unknown_fields(body: Mapping[str, Any], rules: Mapping[str, Rule]) -> list[str]:
    """A warning that names the fields that nobody here knows, and that ask for something."""
    known = {*rules, *(BESIDE_OPENAIS if rules is CHAT_FIELDS else ()), "warnings"}
    names = [name for name, value in body.items() if name not in known and value and name.isidentifier()]
    if not names:
        return []
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return [f"not known here and without effect: {', '.join(name[:64] for name in names[:_MOST_NAMED])}{more}"]


def split_tools(tools: Any, types: Sequence[str]) -> tuple[Any, list[str]]:
    """The tools that can be offered, and a warning that names the types of the others."""
    if not isinstance(tools, list):
        return tools, []
    kept, others = [], set[str]()
    for tool in tools:
        kind = tool.get("type") if isinstance(tool, dict) else None
        if isinstance(kind, str) and kind not in types:
            others.add(kind)
        else:
            kept.append(tool)
    left_out = ", ".join(sorted(others))
    return kept or None, [f"tools of these types are not run here and were left out: {left_out}"] if others else []
