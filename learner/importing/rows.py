"""Rows of data sets and of fine-tuning files: a conversation, or a question and its answer, and what stands beside."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from learner.importing.contents import plain_text
from learner.importing.fields import SYSTEM_NAMES, TOOL_NAMES, Fields, RefusedRecord, is_empty, kind, unknown
from learner.importing.marks import close_record
from learner.importing.messages import is_item, is_langchain, read_message, read_turns
from learner.importing.tool_schemas import read_tools
from learner.importing.turns import Draft, SourceFormat, Turn
from learner.importing.written_calls import (
    bracket_calls,
    named_result,
    react_call,
    read_call,
    read_literal,
    tools_in_text,
)

_ID_NAMES = ("item_id", "id", "prompt_id", "instance_id", "task_id", "uuid", "session_id", "trace_id", "custom_id")
_UNSEEN = (
    "images",
    "videos",
    "audios",
    "image",
    "audio",
    "video",
    "documents",
    "chat_template_kwargs",
    "_images",
    "previous_response_id",
    "builtin_tools",
)
"""What the model saw and no message of ours can show."""
_OF_REQUESTS = frozenset({"function_call", "task", "remaining_steps", "is_last_step"})


def take_beside(fields: Fields) -> tuple[list[Turn], list[Any], str | None]:
    """(system turns, tools, the record's name) of what stands beside a conversation. Raises RefusedRecord."""
    given = [fields.take(name) for name in SYSTEM_NAMES]
    texts = list(dict.fromkeys(text for value in given if (text := plain_text(value, "the system text")).strip()))
    tools = [fields.take(name) for name in TOOL_NAMES]
    tools += [fields.take(name) for name in ("toolConfig", "tool_config") if _holds_tools(fields, name)]
    _take_setting(fields)
    tools += [_take_template_settings(fields)]
    for name in _UNSEEN:
        if not is_empty(fields.take(name)):
            raise RefusedRecord(
                f"it has {name}, which changes what the model saw and cannot be kept: leave such records out"
            )
    found = [value for name in _ID_NAMES if (value := fields.take(name)) is not None]
    item_id = next((str(value) for value in found if isinstance(value, str | int)), None)
    return [Turn("system", text) for text in texts], tools, item_id


def _take_template_settings(fields: Fields) -> list[Any]:
    """The tools among a chat template's settings, SmolTalk2's. How a model was to think is taken; others stay."""
    held = fields.take("chat_template_kwargs")
    if not isinstance(held, dict):
        return []
    settings = Fields(held, "chat_template_kwargs")
    tools = settings.take("xml_tools", "tools")
    _take_setting(settings)
    if rest := dict(settings.left()):
        fields.put("chat_template_kwargs", rest)
    return tools or []


def _holds_tools(fields: Fields, name: str) -> bool:
    """Bedrock keeps the tools where Gemini only says how they may be called."""
    held = dict(fields.left()).get(name)
    return isinstance(held, dict) and "tools" in held


def with_system(system: Sequence[Turn], turns: list[Turn]) -> list[Turn]:
    """A conversation behind its system text, which some files repeat as its first message."""
    begun = {turn.text for turn in turns[:1] if turn.role == "system"}
    return [*(turn for turn in system if turn.text not in begun), *turns]


# -------------------------------------------------------------------------------------------- conversations


def read_conversation(record: dict[str, Any], name: str) -> Draft:
    """`messages`, or `conversations`, or whatever else the list of messages is called."""
    fields = Fields(record, "the record")
    messages = fields.take(name)
    if isinstance(messages, str):
        messages = read_literal(messages, name)
    system, tools, item_id = take_beside(fields)
    task = take_task(fields)
    learn_from = fields.take("learn_from")
    _take_other_side(fields)
    repeated = [(key, fields.take(key)) for key in _REPEATED]
    _take_repeated(fields, messages)
    is_gym = "item_id" in record or _has_loss(messages)
    close_record(fields, _OF_REQUESTS)
    turns, inner_tools = read_turns(messages, name)
    for key, text in repeated:
        if not is_empty(text) and not (isinstance(text, str) and any(text.strip() in turn.text for turn in turns)):
            raise unknown("the record", key)
    turns = _read_written(turns)
    if any(isinstance(each, dict) and "from" in each for each in messages):
        source = SourceFormat.AGENTGYM if is_gym else SourceFormat.SHAREGPT
    elif any(is_langchain(each) for each in messages):
        source = SourceFormat.LANGCHAIN
    else:
        is_items = any(isinstance(each, dict) and is_item(each) for each in messages)
        source = SourceFormat.ITEMS if is_items else SourceFormat.OPENAI
    turns = with_system(system, turns)
    if learn_from is not None:
        turns = _learning_only(turns, learn_from)
    return Draft(source, turns, _tools(turns, [*tools, *inner_tools]), item_id, task)


def _learning_only(turns: list[Turn], learn_from: Any) -> list[Turn]:
    """Our own export says by their numbers which messages are learned."""
    if not isinstance(learn_from, list) or not all(isinstance(each, int) for each in learn_from):
        raise RefusedRecord("learn_from is not a list of numbers")
    said = {number for number, turn in enumerate(turns) if turn.role == "assistant"}
    if strangers := set(learn_from) - said:
        raise RefusedRecord(f"learn_from names message {min(strangers)}, which is no message of the assistant")
    return [replace(turn, is_learned=turn.is_learned and n in learn_from) for n, turn in enumerate(turns)]


_REPEATED = ("prompt", "question", "query", "instruction", "task_description", "completion", "response")
"""Keys in which data sets repeat a message of the conversation."""
_WORLD_TASK = re.compile(r"[A-Za-z0-9_-]+/[A-Za-z0-9_-]+/\d+")


def take_task(fields: Fields) -> str | None:
    """`world/split/index` of a world's task, as our own export has it; any other text under that name is not read."""
    held = dict(fields.left()).get("task")
    return fields.take("task") if isinstance(held, str) and _WORLD_TASK.fullmatch(held) else None


def _take_setting(fields: Fields) -> None:
    """How much a model was to think, in requests to it: no text."""
    left = dict(fields.left())
    for name in _OPTIONS:
        options = left.get(name)
        if isinstance(options, dict) and not any(isinstance(value, dict | list) for value in options.values()):
            fields.take(name)
    for name in ("reasoning", "thinking", "think", "enable_thinking"):
        is_switch = isinstance(left.get(name), bool) or left.get(name) in _EFFORTS
        if isinstance(left.get(name), dict) or is_switch:
            fields.take(name)
    fields.take("additionalModelRequestFields")  # Bedrock's, of one model's own


_OPTIONS = ("options", "inferenceConfig", "inference_config")
"""Settings of the sampling: Ollama's, Bedrock's."""
_EFFORTS = ("low", "medium", "high", "max", "on", "off")


def _take_other_side(fields: Fields) -> None:
    """An answer that was not chosen, beside a conversation that was: it is not put to use.

    A plain text under `rejected` is not taken for one: it may as well say that, or why, the conversation is bad.
    """
    left = dict(fields.left())
    for name in ("rejected_response", "rejected_messages", "rejected"):
        if isinstance(left.get(name), list | dict) or (name != "rejected" and isinstance(left.get(name), str)):
            fields.take(name)


def _has_loss(messages: Any) -> bool:
    return isinstance(messages, list) and any(isinstance(each, dict) and "loss" in each for each in messages)


def _take_repeated(fields: Fields, messages: Any) -> None:
    """Some files have the conversation twice, under two names."""
    for name in ("messages", "conversations", "conversation"):
        if name in fields and fields.take(name) != messages:
            raise RefusedRecord(f"it has two conversations; the second is {name}")


def _tools(turns: Sequence[Turn], given: list[Any]) -> tuple[Any, ...]:
    """The tools of a record; where it has none of its own, those that its system message writes out."""
    if all(is_empty(each) or each == "[]" for each in given):
        given = [tools_in_text(turn.text) for turn in turns if turn.role == "system"]
    return read_tools(*given)


def _read_written(turns: list[Turn]) -> list[Turn]:
    """A conversation with the calls that are written out in the assistant's text."""
    read: list[Turn] = []
    for number, turn in enumerate(turns, 1):
        where = f"message {number}"
        if turn.role == "assistant" and not turn.calls:
            is_answered = number < len(turns) and turns[number].role == "tool"
            calls = bracket_calls(turn.text, where)
            text = "" if calls else turn.text
            if not calls and (is_answered or "\nAction: Finish" in turn.text):
                text, calls = react_call(turn.text, where)
            turn = replace(turn, text=text, calls=calls)
        elif turn.role == "tool" and turn.result_of is None and turn.tool_name is None:
            call_id, name = named_result(turn.text)
            turn = replace(turn, result_of=call_id, tool_name=name)
        read.append(turn)
    return read


# -------------------------------------------------------------------------- questions, answers, preferences

PROMPT_NAMES = ("prompt", "question", "instruction", "query", "input_text", "text_input")
ANSWER_NAMES = ("completion", "response", "output", "answer", "target", "output_text")
CHOSEN_NAMES = ("chosen", "chosen_response", "chosen_messages")


def read_preference(record: dict[str, Any]) -> Draft:
    """TRL's and LlamaFactory's rows with `chosen` and `rejected`; the chosen side is the demonstration.

    Learned is what stands in the chosen side alone: TRL takes what both begin with for the prompt.
    """
    fields = Fields(record, "the record")
    system, tools, item_id = take_beside(fields)
    chosen = fields.take(*CHOSEN_NAMES)
    rejected = fields.take("rejected", "rejected_response", "rejected_messages")
    if dict(fields.left()).get("messages") == chosen:  # UltraFeedback's rows have the chosen side twice
        fields.take("messages")
    prompt, inner_tools = _read_prompt(fields)
    if chosen is not None and chosen == rejected:
        raise RefusedRecord("chosen and rejected are the same")
    if isinstance(chosen, str) and not prompt:
        raise RefusedRecord("chosen is plain text without a prompt: nothing tells where the answer begins")
    _take_scores(fields)
    task = take_task(fields)
    close_record(fields)
    side = _read_side(chosen, "chosen", "assistant", inner_tools)
    other = [] if is_empty(rejected) else _read_side(rejected, "rejected", "assistant", [])
    turns = _behind(prompt, side)
    num_shared = len(prompt) or _num_equal(side, other)
    learned = [replace(t, is_learned=t.is_learned and n >= num_shared) for n, t in enumerate(turns)]
    turns = with_system(system, learned)
    return Draft(SourceFormat.PREFERENCE, turns, _tools(turns, [*tools, *inner_tools]), item_id, task)


def _take_scores(fields: Fields) -> None:
    """Scores of the two sides, which belong to the choice and not to the record."""
    chosen, rejected = fields.take("score_chosen", "chosen_score"), fields.take("score_rejected", "rejected_score")
    is_contrary = isinstance(chosen, int | float) and isinstance(rejected, int | float) and chosen < rejected
    if is_contrary:
        raise RefusedRecord("its chosen side has the lower score: nothing tells which side is the better one")
    for name in (
        "margin",
        "chosen_model",
        "rejected_model",
        "chosen_rating",
        "rejected_rating",
        "chosen_id",
        "rejected_id",
    ):
        fields.take(name)


def read_openai_preference(record: dict[str, Any]) -> Draft:
    """OpenAI's preference tuning: `input`, `preferred_output`, `non_preferred_output`."""
    fields = Fields(record, "the record")
    asked = Fields(fields.take("input"), "input")
    messages = asked.take("messages", "input")
    system, tools, item_id = take_beside(asked)
    more_system, more_tools, own_id = take_beside(fields)
    preferred = fields.take("preferred_output", "preferred_completion")
    other = fields.take("non_preferred_output", "non_preferred_completion")
    if preferred == other:
        raise RefusedRecord("preferred_output and non_preferred_output are the same")
    close_record(asked)
    close_record(fields)
    prompt, inner_tools = read_turns(messages, "input.messages")
    side = _read_side(preferred, "preferred_output", "assistant", inner_tools)
    turns = [*(replace(turn, is_learned=False) for turn in prompt), *side]
    turns = with_system([*system, *more_system], turns)
    return Draft(SourceFormat.PREFERENCE, turns, _tools(turns, [*tools, *more_tools, *inner_tools]), own_id or item_id)


def read_completion(record: dict[str, Any]) -> Draft:
    """`prompt` and `completion`, as text or as messages; Alpaca's `instruction`, `input`, `output`, `history`."""
    fields = Fields(record, "the record")
    system, tools, item_id = take_beside(fields)
    history = _read_history(fields)
    prompt, inner_tools = _read_prompt(fields)
    answer = fields.take(*ANSWER_NAMES)
    thinking = fields.take_text("reasoning", "thinking", "reasoning_content", "thought", "cot")
    _take_other_side(fields)
    _take_token_ids(fields)
    text = dict(fields.left()).get("text")
    if isinstance(text, str) and isinstance(answer, str) and answer.strip() and answer.strip() in text:
        fields.take("text")  # Alpaca's, of all fields in one
    close_record(fields)
    if not prompt:
        raise RefusedRecord("it has an answer, but nothing that was asked")
    side = _read_side(answer, "completion", "assistant", inner_tools)
    if thinking:
        if side[0].role != "assistant" or side[0].thinking not in ("", thinking):
            raise RefusedRecord("it has different thinking in different places")
        side[0] = replace(side[0], thinking=thinking)
    turns = with_system(system, _behind([*history, *(replace(turn, is_learned=False) for turn in prompt)], side))
    return Draft(SourceFormat.COMPLETION, turns, _tools(turns, [*tools, *inner_tools]), item_id)


def _take_token_ids(fields: Fields) -> None:
    """Ollama's `context`: the conversation so far, as token ids of its model."""
    held = dict(fields.left()).get("context")
    if isinstance(held, list) and all(isinstance(each, int) for each in held):
        fields.take("context")


def _read_history(fields: Fields) -> list[Turn]:
    """Alpaca's turns before: pairs of a question and its answer, learned like the last one."""
    turns = []
    for number, pair in enumerate(fields.take_list("history"), 1):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise RefusedRecord(f"turn {number} of the history is not a question and its answer")
        turns += [Turn("user", pair[0]), *_read_side(pair[1], "history", "assistant", [])]
    return turns


def _read_prompt(fields: Fields) -> tuple[list[Turn], list[Any]]:
    """What was asked, and tools within it; empty where a row has no prompt of its own."""
    tools: list[Any] = []
    prompt = fields.take(*PROMPT_NAMES)
    more = fields.take("input")
    before = fields.take("conversations", "messages")
    if isinstance(more, str) and more.strip():
        if isinstance(prompt, str) and prompt.strip():
            prompt = f"{prompt}\n{more}"  # as LlamaFactory and axolotl join them
        elif is_empty(prompt):
            prompt = more
        else:
            raise RefusedRecord("it has messages as its prompt, and an input beside them")
    elif not is_empty(more):
        raise RefusedRecord(f"its input is {kind(more)}, not text")
    if not is_empty(before):
        if not is_empty(prompt):
            raise RefusedRecord("it has a prompt and a conversation")
        turns, tools = read_turns(before, "conversations")
        return _read_written(turns), tools
    return ([] if is_empty(prompt) else _read_side(prompt, "prompt", "user", tools)), tools


def _read_side(side: Any, name: str, role: str, tools: list[Any]) -> list[Turn]:
    if isinstance(side, str):
        return read_message({"role": role, "content": side}, name, tools)
    if isinstance(side, dict):
        side = [side]
    turns, found = read_turns(side, name)
    tools += found
    return _read_written(turns)


def _behind(prompt: list[Turn], side: list[Turn]) -> list[Turn]:
    """Some data sets repeat the prompt in each side, some do not."""
    return side if prompt and _num_equal(prompt, side) == len(prompt) else [*prompt, *side]


def _num_equal(left: list[Turn], right: list[Turn]) -> int:
    """How many turns two conversations share from their beginning on, whatever is learned of them."""
    pairs = zip(left, right, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if _unmarked(a) != _unmarked(b)), min(len(left), len(right)))


def _unmarked(turn: Turn) -> Turn:
    return replace(turn, is_learned=True)


# ---------------------------------------------------------------------------------------------------- xLAM


def read_xlam(record: dict[str, Any]) -> Draft:
    """`query`, `answers` (calls, often as JSON text) and `tools`."""
    fields = Fields(record, "the record")
    system, tools, item_id = take_beside(fields)
    query = fields.take_text("query")
    answers = fields.take("answers")
    close_record(fields)
    if isinstance(answers, str):
        answers = read_literal(answers, "answers")
    if not isinstance(answers, list) or not answers:
        raise RefusedRecord("its answers are no list of calls")
    calls = tuple(read_call(call, f"call {number}") for number, call in enumerate(answers, 1))
    turns = [*system, Turn("user", query), Turn("assistant", calls=calls)]
    return Draft(SourceFormat.XLAM, turns, read_tools(*tools), item_id)


# -------------------------------------------------------------------------------------------------- Gemini


def read_gemini(record: dict[str, Any]) -> Draft:
    """Gemini's `contents`, and what `generateContent` takes beside them."""
    fields = Fields(record, "the record")
    contents = fields.take("contents")
    system, tools, item_id = take_beside(fields)
    config = fields.take("config", "generationConfig", "generation_config")
    if isinstance(config, dict):
        settings = Fields(config, "config")
        inner_system, inner_tools, _ = take_beside(settings)
        close_record(settings, _OF_GEMINI)
        system, tools = [*system, *inner_system], [*tools, *inner_tools]
    preferred = _preferred_completion(fields)
    answer = preferred or _candidate(fields)
    close_record(fields, _OF_GEMINI)
    if not isinstance(contents, list):
        contents = [contents]
    asked, _ = read_turns([_as_message(each) for each in contents], "contents")
    if preferred:  # tuning by preference learns the completion alone
        asked = [replace(turn, is_learned=False) for turn in asked]
    said = read_turns([_as_message(each) for each in answer], "the answer")[0] if answer else []
    turns = with_system(system, [*asked, *said])
    return Draft(SourceFormat.GEMINI, turns, _tools(turns, tools), item_id)


_OF_GEMINI = frozenset(
    "toolConfig tool_config safetySettings safety_settings labels thinkingConfig thinking_config responseMimeType "
    "response_mime_type responseModalities response_modalities automaticFunctionCalling automatic_function_calling "
    "responseLogprobs usageMetadata modelVersion createTime promptFeedback".split()
)


def _preferred_completion(fields: Fields) -> list[Any]:
    """The better of the two answers of a row for tuning by preference. Raises RefusedRecord where none is."""
    rated = [Fields(each, "a completion") for each in fields.take_list("completions")]
    sides = [(each.take("score"), each.take("completion")) for each in rated]
    for each in rated:
        each.close()
    if not sides:
        return []
    best = [said for score, said in sides if isinstance(score, int | float) and score > 0]
    if len(best) != 1 or len(sides) < 2:
        raise RefusedRecord(
            "its completions are not one with a score of 1 and another with 0: nothing tells the better"
        )
    return best


def _as_message(content: Any) -> Any:
    """A content as a message: without a role it is the user's, and what holds results alone is the tools'."""
    if isinstance(content, str):
        return {"role": "user", "parts": [{"text": content}]}
    return {"role": "user", **content} if isinstance(content, dict) else content


def _candidate(fields: Fields) -> list[Any]:
    """The answer that is logged beside its request."""
    response = fields.take("response")
    candidates = response.get("candidates") if isinstance(response, dict) else fields.take("candidates")
    if isinstance(response, dict):
        close_record(Fields({k: v for k, v in response.items() if k != "candidates"}, "the response"), _OF_GEMINI)
    if not candidates:
        return []
    if not isinstance(candidates, list) or len(candidates) != 1 or not isinstance(candidates[0], dict):
        raise RefusedRecord("it has several candidates as its answer, and nothing tells which was taken")
    candidate = Fields(candidates[0], "the answer")
    content = candidate.take("content")
    close_record(candidate, frozenset({"safetyRatings", "citationMetadata", "groundingMetadata", "avgLogprobs"}))
    return [content]
