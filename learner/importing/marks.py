"""Marks that say whether a record, or one message of it, is worth learning: every tool and data set names them its way.

A record is judged by all its keys, and by what its metadata holds: one mark of a failure, and it is no expert's. A
message that is marked as not to be learned stays as context. A mark that cannot be understood refuses the record:
nobody guesses whether an example is good.
"""

from __future__ import annotations

from enum import Enum
from typing import Any

from learner.importing.fields import Fields, RefusedRecord, is_empty, is_harmless, snake_case, unknown

CONTAINERS = frozenset(
    "meta metadata meta_data info extra extras extra_info additional_info annotations custom attributes details "
    "extra_fields additional_fields custom_fields feedback feedback_stats evaluation eval judgement judgment".split()
)
"""Keys that hold whatever the source had beside the conversation: only marks are looked for in them."""


class Mark(Enum):
    """What a key says of the record or message that it stands at."""

    NONE = "none"  # it is no mark
    GOOD = "good"
    BAD = "bad"
    UNCLEAR = "unclear"  # it is a mark, but its value is not understood


_GOOD = frozenset(
    "success successful succeeded succeed resolved solved correct correctness passed pass passes accepted accept valid "
    "verified approved approval won win label labels reward rewards score scores outcome outcomes result verdict "
    "kto_tag chosen preferred preference desirable upvote upvoted upvotes thumbs_up helpful positive good gold "
    "feedback judgement judgment evaluation return returns accuracy reached achieved completed is_completed done "
    "value_score goal_reached test_result".split()
)
"""True, or more than zero: an expert's. False, or zero and less: not."""
_SCALES = frozenset("rating ratings grade stars quality rank preference_score".split())
"""Numbers on a scale that the file does not tell."""
_BAD = frozenset(
    "fail failed failure failures error errors exception exceptions rejected reject rejection bad wrong incorrect "
    "invalid negative undesirable aborted cancelled canceled interrupted truncated timeout timed_out crashed corrupted "
    "discarded excluded deleted flagged unsafe toxic harmful hallucinated hallucination downvote downvoted thumbs_down "
    "low_quality unsuccessful unresolved refused refusal broken incomplete skip skipped ignore ignored exclude "
    "blocked".split()
)
"""Anything but nothing: not an expert's."""
_PREFIXES = (
    "is_",
    "was_",
    "has_",
    "had_",
    "task_",
    "final_",
    "overall_",
    "episode_",
    "total_",
    "mean_",
    "avg_",
    "the_",
)
_REASONS = frozenset(
    "finish_reason stop_reason terminate_reason termination_reason terminated_reason exit_status exit_reason "
    "end_reason done_reason finish status state stopped_reason termination".split()
)

_GOOD_WORDS = frozenset(
    "true yes y good success successful succeeded resolved solved correct pass passed accepted accept approved chosen "
    "desirable preferred positive win won thumbs_up upvote like 1 ok completed complete done finished success_all c "
    "valid verified".split()
)
_BAD_WORDS = frozenset(
    "false no n bad fail failed failure unsuccessful unresolved unsolved incorrect wrong error rejected reject "
    "undesirable dispreferred negative lose lost loss thumbs_down downvote dislike 0 i invalid aborted cancelled "
    "canceled timeout timed_out crashed interrupted incomplete in_progress running pending partial refused "
    "-1".split()
)
_ENDS = frozenset(
    "stop end_turn tool_use tool_calls tool-calls tool_call function_call stop_sequence eos eos_token finished final "
    "submitted agent_finish stop_str end".split()
)
_CUT_OFF = frozenset(
    "length max_tokens max_output_tokens model_length content_filter content-filter safety recitation aborted abort "
    "error max_steps max_turns max_iterations step_limit context_length_exceeded exit_context exit_cost exit_error "
    "timeout deadline budget token_limit malformed malformed_function_call refusal pause_turn".split()
)


# --------------------------------------------------------------------------------------------------- of records


def close_record(fields: Fields, harmless: frozenset[str] = frozenset()) -> None:
    """Judge a record by the keys that are left. Raises RefusedRecord for a mark that it is no expert's, and by its name
    for a key that nobody knows."""
    for name, value in fields.left():
        if name not in harmless:
            judge(fields.where, name, value)


def judge(where: str, name: str, value: Any) -> None:
    """Raises RefusedRecord where this key says that the record is no expert's, or says what nobody understands."""
    if snake_case(name) in CONTAINERS and isinstance(value, dict | list):
        _judge_inside(value, name)
        return
    if _is_learning_mark(name):
        if not _learning(where, name, value):
            raise RefusedRecord(f"{name} is {value!r}: {where} is marked as not to be learned")
        return
    mark = mark_of(name, value)
    if mark is Mark.BAD:
        raise RefusedRecord(f"{name} is {_shown(value)}: {where} is marked as no expert's")
    if mark is Mark.UNCLEAR:
        raise RefusedRecord(
            f"{name} is {_shown(value)}, and nothing tells whether that is good: choose the records that are, "
            f"and say --ignore {name}"
        )
    if mark is Mark.NONE and not is_harmless(name, value):
        raise unknown(where, name)


_ELSEWHERE = frozenset("messages tools functions system system_prompt instructions system_instruction".split())


def _judge_inside(value: Any, where: str) -> None:
    """Look for marks in metadata, at any depth; what is none of ours is left alone there."""
    if isinstance(value, list):
        for each in value:
            _judge_inside(each, where)
    elif isinstance(value, dict):
        if isinstance(value.get("name"), str) and "value" in value:  # a score in a list of scores
            value = {"score": value["value"]}
        for name, held in value.items():
            if isinstance(held, dict | list) and mark_of(name, held) is Mark.NONE:
                _judge_inside(held, f"{where}.{name}")
            elif mark_of(name, held) is Mark.BAD or (_is_learning_mark(name) and held in (0, "false")):
                raise RefusedRecord(f"{where}.{name} is {_shown(held)}: it is marked as no expert's")
            if snake_case(name) in _ELSEWHERE and not is_empty(held):
                raise RefusedRecord(
                    f"{where} holds {name!r}, which is read from beside the messages only: move it there"
                )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def mark_of(name: str, value: Any) -> Mark:
    """What a key says of what it stands at."""
    if is_empty(value):
        return Mark.NONE
    snake = _bare(snake_case(name))
    if snake in _REASONS or snake.endswith(("_reason", "_status")):
        return _mark_of_reason(value)
    if snake in _SCALES:
        return Mark.UNCLEAR if _is_number(value) else _mark_of_value(value)
    words = snake.split("_")
    if snake in _BAD or words[-1] in _BAD or words[0] in ("failed", "rejected"):
        return _mark_of_failure(value)
    if snake in _GOOD or words[-1] in _GOOD:
        return _mark_of_value(value)
    return Mark.NONE


def _bare(snake: str) -> str:
    snake = snake.strip("_")
    while begun := next((prefix for prefix in _PREFIXES if snake.startswith(prefix) and snake != prefix), None):
        snake = snake[len(begun) :]
    return snake


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _mark_of_value(value: Any) -> Mark:
    if isinstance(value, bool):
        return Mark.GOOD if value else Mark.BAD
    if _is_number(value):
        return Mark.GOOD if value > 0 else Mark.BAD
    if isinstance(value, str):
        word = snake_case(value.strip())
        if word in _GOOD_WORDS or word in _BAD_WORDS:
            return Mark.GOOD if word in _GOOD_WORDS else Mark.BAD
        return _mark_of_value(_number(word)) if _number(word) is not None else Mark.UNCLEAR
    if isinstance(value, list) and all(_is_number(each) for each in value):  # of the steps
        return Mark.GOOD if sum(value) > 0 else Mark.BAD
    if isinstance(value, dict):
        value = value["value"] if "value" in value else list(value.values())
    marks = {_mark_of_value(each) for each in (value if isinstance(value, list) else [value])}
    return next((mark for mark in (Mark.BAD, Mark.UNCLEAR) if mark in marks), Mark.GOOD)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _mark_of_failure(value: Any) -> Mark:
    if (
        value is False
        or value == 0
        or (isinstance(value, str) and value.strip().lower() in ("false", "no", "none", "0"))
    ):
        return Mark.GOOD
    return Mark.BAD


def _mark_of_reason(value: Any) -> Mark:
    if not isinstance(value, str):
        return Mark.UNCLEAR
    word = snake_case(value.strip())
    if word in _ENDS or word in _GOOD_WORDS:
        return Mark.GOOD
    return Mark.BAD if word in _CUT_OFF or word in _BAD_WORDS or "exit_" in word else Mark.UNCLEAR


# -------------------------------------------------------------------------------------------------- of messages

_LEARNED_WHERE_TRUE = frozenset(
    "weight loss_weight loss train training trainable loss_mask learn learned is_learned include_in_loss compute_loss "
    "loss_scale train_on_turn train_turn train_on_message in_loss sample_weight example_weight message_weight "
    "turn_weight".split()
)
_LEARNED_WHERE_FALSE = frozenset("masked is_masked ignore_loss no_loss exclude_from_loss skip_training".split())


def _is_learning_mark(name: str) -> bool:
    snake = snake_case(name).strip("_")
    return snake in _LEARNED_WHERE_TRUE or snake in _LEARNED_WHERE_FALSE or snake in ("mask", "train_detail")


def _learning(where: str, name: str, value: Any) -> bool:
    snake = snake_case(name).strip("_")
    if snake == "mask":
        raise RefusedRecord(f"{where} has a mask, which some tools learn and others leave out: call it weight, 0 or 1")
    if isinstance(value, str) and value.strip().lower() in ("true", "false", "0", "1"):
        value = value.strip().lower() in ("true", "1")
    if value not in (0, 1):  # true and false too
        raise RefusedRecord(f"{where}: {name} must be 0 or 1, not {_shown(value)}")
    return bool(value) == (snake in _LEARNED_WHERE_TRUE)


def close_message(fields: Fields, is_assistant: bool, harmless: frozenset[str] = frozenset()) -> bool:
    """Whether a message is to be learned, by the keys that are left. Raises RefusedRecord for one that nobody knows.

    What is not the assistant's is never learned, whatever stands at it.
    """
    is_learned = True
    for name, value in fields.left():
        if name in harmless or (is_harmless(name, value) and not _is_learning_mark(name)):
            continue
        if _is_learning_mark(name):
            is_learned &= not is_assistant or _learning(fields.where, name, value)
            continue
        mark = Mark.GOOD if snake_case(name) in CONTAINERS and isinstance(value, dict) else mark_of(name, value)
        if mark is Mark.NONE:
            raise unknown(fields.where, name)
        if mark is Mark.UNCLEAR and is_assistant:
            raise RefusedRecord(f"{fields.where}: {name} is {_shown(value)}, and nothing tells whether that is good")
        if snake_case(name) in CONTAINERS and isinstance(value, dict):
            mark = _mark_inside(value)
        is_learned &= mark is not Mark.BAD
    return is_learned


def _mark_inside(value: dict[str, Any]) -> Mark:
    try:
        _judge_inside(value, "metadata")
    except RefusedRecord:
        return Mark.BAD
    return Mark.GOOD
