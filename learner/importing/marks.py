"""Marks that say whether a record, or one message of it, is worth learning: every tool and data set names them its way.

A record is judged by all its keys, and by what its metadata holds: one mark of a failure, and it is no expert's. A
message that is marked as not to be learned stays as context. A mark that cannot be understood refuses the record:
nobody guesses whether an example is good.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from enum import Enum
from typing import Any

from learner.importing.fields import (
    SYSTEM_NAMES,
    THINKING_NAMES,
    TOOL_NAMES,
    Fields,
    RefusedRecord,
    is_empty,
    is_harmless,
    snake_case,
    unknown,
)

CONTAINERS = frozenset(
    "meta metadata meta_data info extra extras extra_info additional_info annotations custom attributes details "
    "extra_fields additional_fields custom_fields feedback feedback_stats evaluation eval judgement judgment metrics "
    "response_metadata provider_specific_fields generation_info llm_output final_metrics verifier_result assessments "
    "summary".split()
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
"""True, or half and more: an expert's. False, or zero and less: not. What is between, nobody can tell."""
_SCALES = frozenset("rating ratings grade stars quality rank preference_score".split())
"""Numbers on a scale that the file does not tell."""
_BAD = frozenset(
    "fail failed failure failures error errors exception exceptions rejected reject rejection bad wrong incorrect "
    "invalid negative undesirable aborted cancelled canceled interrupted truncated timeout timed_out crashed corrupted "
    "discarded excluded deleted flagged unsafe toxic harmful hallucinated hallucination downvote downvoted thumbs_down "
    "low_quality unsuccessful unresolved refused refusal broken incomplete skip skipped ignore ignored exclude "
    "blocked downvotes dislike dislikes disliked mistake mistakes removed archived invalidated invalidation withdrawn "
    "retracted flags toxicity hallucinations harm spam".split()
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
    "desirable preferred positive win won thumbs_up upvote like 1 + ok completed complete done finished success_all c "
    "valid verified".split()
)
_BAD_WORDS = frozenset(
    "false no n bad fail failed failure unsuccessful unresolved unsolved incorrect wrong error rejected reject "
    "undesirable dispreferred negative lose lost loss thumbs_down downvote dislike 0 i invalid aborted cancelled "
    "canceled timeout timed_out crashed interrupted incomplete in_progress running pending partial refused "
    "-1 - limits_exceeded".split()
)
_ENDS = frozenset(
    "stop end_turn tool_use tool_calls tool-calls tool_call function_call stop_sequence eos eos_token finished final "
    "submitted submit agent_finish stop_str end".split()
)
_CUT_OFF = frozenset(
    "length max_tokens max_output_tokens model_length content_filter content-filter safety recitation aborted abort "
    "error max_steps max_turns max_iterations step_limit context_length_exceeded exit_context exit_cost exit_error "
    "timeout deadline budget token_limit malformed malformed_function_call refusal pause_turn".split()
)


_GROUPS = frozenset("tag tags split partition subset fold category categories subset_name".split())
_GROUPS_OF_BAD = frozenset(
    "bad wrong incorrect fail failed failure failures reject rejected undesirable dispreferred negative unsuccessful "
    "unresolved low_quality discard discarded excluded do_not_train no_train thumbs_down".split()
)
"""How a file's maker calls the heap of those that are not to be learned."""

_OPINIONS = frozenset("thumb thumbs vote reaction".split())
_OPINIONS_IN_FEEDBACK = frozenset("value type kind sentiment emoji user_rating".split())
"""Names that say nothing elsewhere, and in a feedback what somebody thought of it."""
_GOOD_OPINIONS = frozenset("up 👍 thumbs_up thumbsup thumb_up upvote like positive good".split())
_BAD_OPINIONS = frozenset("down 👎 thumbs_down thumbsdown thumb_down downvote dislike negative bad".split())
_SKIN_TONES = re.compile("[\U0001f3fb-\U0001f3ff\ufe0f]")
"""And the mark that asks for an emoji in colour."""


# --------------------------------------------------------------------------------------------------- of records


def close_record(fields: Fields, harmless: frozenset[str] = frozenset()) -> None:
    """Judge a record by the keys that are left. Raises RefusedRecord for a mark that it is no expert's, and by its name
    for a key that nobody knows. What a harmless key holds is looked through for marks all the same."""
    strangers = []
    for name, value in fields.left():
        if name not in harmless or _is_container(name, value):
            if _is_stranger(name, value):
                strangers.append(name)
            else:
                judge(fields.where, name, value)
    if strangers:
        raise unknown(fields.where, *strangers)


def _is_stranger(name: str, value: Any) -> bool:
    """Whether a key is neither a mark, nor a container of marks, nor known to be harmless."""
    is_mark = _is_container(name, value) or _is_learning_mark(name) or mark_of(name, value) is not Mark.NONE
    return not is_mark and not is_harmless(name, value)


def _is_container(name: str, value: Any) -> bool:
    return snake_case(name) in CONTAINERS and isinstance(value, dict | list)


def judge(where: str, name: str, value: Any) -> None:
    """Raises RefusedRecord where this key says that the record is no expert's, or says what nobody understands."""
    if _is_container(name, value):
        judge_inside(value, name)
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
    if snake_case(name) in _GROUPS and (bad := _bad_group(value)):
        raise RefusedRecord(f"{name} holds {bad!r}: {where} is marked as no expert's")


def _bad_group(value: Any) -> str | None:
    texts = [each for each in (value if isinstance(value, list) else [value]) if isinstance(each, str)]
    return next((text for text in texts if snake_case(text.strip()) in _GROUPS_OF_BAD), None)


def judge_inside(value: Any, where: str) -> None:
    """Look for marks in metadata, at any depth; what is none of ours is left alone there. Raises RefusedRecord."""
    _require_nothing_said(value, where, _TOLD_BESIDE)
    for name, held, mark in _marks_inside(value, where):
        if mark is Mark.BAD:
            raise RefusedRecord(f"{name} is {_shown(held)}: it is marked as no expert's")
        if mark is Mark.UNCLEAR:
            raise RefusedRecord(f"{name} is {_shown(held)}, and nothing tells whether that is good")


_TOLD_BESIDE = frozenset({"messages", *TOOL_NAMES, *SYSTEM_NAMES} - {"developer"})
_TOLD_APART = frozenset(
    "exit_status exit_reason end_reason terminate_reason termination_reason terminated_reason finish_reason stop_reason"
    " done_reason reward rewards score".split()
)
"""Names that say a thing's outcome wherever they stand: one that is not understood refuses, deep in metadata too."""


_OF_PROVIDERS = frozenset(
    "safety_ratings safety_settings content_filter_results prompt_filter_results prompt_feedback grounding_metadata "
    "citation_metadata logprobs avg_logprobs token_usage usage usage_metadata".split()
)
"""What an API says of its own filters and sources: its scores are no marks."""


def _marks_inside(value: Any, where: str) -> Iterator[tuple[str, Any, Mark]]:
    """The marks within metadata: (name with its place, value, mark), those left out that may be something else."""
    if isinstance(value, list):
        for each in value:
            yield from _marks_inside(each, where)
    elif isinstance(value, dict):
        for name, held in _scored(value).items():
            mark = mark_of(name, held)
            if mark is Mark.NONE and _is_opinion_inside(snake_case(name), where):
                mark = _mark_of_opinion(held)
            if _is_learning_mark(name):
                mark = Mark.BAD if held in (0, "false") else Mark.NONE
            inside = f"{where}.{name}"
            if isinstance(held, dict | list) and (mark is Mark.NONE or snake_case(name) in _OF_PROVIDERS):
                if snake_case(name) not in _OF_PROVIDERS:
                    yield from _marks_inside(held, inside)
                continue
            if isinstance(held, dict | list) and snake_case(name).endswith("feedback"):
                yield from _bad_opinions(held, inside)
            if mark is not Mark.UNCLEAR or _bare(snake_case(name)) in _TOLD_APART | _SCALES:
                yield inside, held, mark


def _bad_opinions(feedback: Any, where: str) -> Iterator[tuple[str, Any, Mark]]:
    """Those within a feedback that is a mark itself, whose values alone do not tell thumbs from other words."""
    for inside, held, mark in _marks_inside(feedback, where):
        if mark is Mark.BAD and snake_case(inside.rpartition(".")[2]) in _OPINIONS | _OPINIONS_IN_FEEDBACK:
            yield inside, held, mark


def _is_opinion_inside(snake: str, where: str) -> bool:
    """A user_rating is one in any metadata; at a record's top a number there would be no sign of a good one."""
    is_of_feedback = any(snake_case(part).endswith("feedback") for part in where.split("."))
    return snake == "user_rating" or (is_of_feedback and snake in _OPINIONS_IN_FEEDBACK)


def _scored(value: dict[str, Any]) -> dict[str, Any]:
    """An object by its keys; a score in a list of scores by the score's name."""
    name = value.get("name")
    if not isinstance(name, str) or not {"value", "stringValue"} & set(value):
        return value
    held = value.get("stringValue") if value.get("value") is None else value.get("value")
    return {name if mark_of(name, held) is not Mark.NONE else "score": held}


def _require_nothing_said(value: Any, where: str, names: frozenset[str]) -> None:
    """Raises RefusedRecord where metadata holds what belongs to the conversation."""
    if isinstance(value, list):
        for each in value:
            _require_nothing_said(each, where, names)
    elif isinstance(value, dict):
        for name, held in value.items():
            is_setting = name in THINKING_NAMES and not isinstance(held, str | list)
            if name in names and not is_empty(held) and not is_setting:
                raise RefusedRecord(f"{where} holds {name!r}, which is read from beside the words only: move it there")
            if isinstance(held, dict | list):
                _require_nothing_said(held, f"{where}.{name}", names)


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
        return _mark_on_scale(value)
    if snake_case(name) in _OPINIONS:
        return _mark_of_opinion(value)
    when, _, end = snake.rpartition("_")
    if end in _TIMES and when in _BAD | _GOOD:  # deleted_at, approved_at: that it happened is the mark
        return Mark.BAD if when in _BAD else Mark.GOOD
    words = (when if end in _NUMBERS and when in _BAD else snake).split("_")
    if snake in _BAD or words[-1] in _BAD or words[0] in ("failed", "rejected"):
        return _mark_of_failure(value)
    if words[-1] in _DEGREES and set(words) & _BAD:  # toxicity_score, error_rate: less is better
        return _mark_of_degree(value)
    if words[-1] in ("reached", "exceeded", "hit") and _LIMITS & set(words):  # max_steps_reached: no goal
        return _mark_of_failure(value)
    if snake in _GOOD or words[-1] in _GOOD or words[-2:] in (["success", "rate"], ["pass", "rate"]):
        return _mark_of_value(value)
    return Mark.NONE


_LIMITS = frozenset("max maximum limit limits budget cap quota deadline timeout steps turns".split())
_TIMES = ("at", "date", "time", "timestamp", "on", "by")
_NUMBERS = ("count", "counts")
_DEGREES = ("score", "scores", "rate", "probability", "prob")


def _mark_on_scale(value: Any) -> Mark:
    """Of a number nobody knows whether it is high, unless it is below all scales."""
    if not _is_number(value):
        return _mark_of_value(value)
    return Mark.BAD if value < 0 else Mark.UNCLEAR


def _mark_of_opinion(value: Any) -> Mark:
    """Of a thumb, a vote or the like; what is neither for nor against says nothing, 0 included."""
    if isinstance(value, str):
        written = _SKIN_TONES.sub("", value).strip()
        if (number := _number(written)) is not None:
            return _mark_of_opinion(number)
        word = snake_case(written)
        return Mark.BAD if word in _BAD_OPINIONS else Mark.GOOD if word in _GOOD_OPINIONS else Mark.NONE
    if not _is_number(value):
        return Mark.NONE
    return Mark.BAD if value < 0 else Mark.GOOD if value > 0 else Mark.NONE


def _mark_of_degree(value: Any) -> Mark:
    if not _is_number(value):
        return Mark.UNCLEAR
    return Mark.GOOD if value <= 0 else Mark.BAD if value >= 0.5 else Mark.UNCLEAR


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
        return Mark.BAD if value <= 0 else Mark.GOOD if value >= 0.5 else Mark.UNCLEAR
    if isinstance(value, str):
        word = value.strip() if value.strip() in ("+", "-") else snake_case(value.strip())
        if word in _GOOD_WORDS or word in _BAD_WORDS:
            return Mark.GOOD if word in _GOOD_WORDS else Mark.BAD
        return _mark_of_value(_number(word)) if _number(word) is not None else Mark.UNCLEAR
    if isinstance(value, list) and all(_is_number(each) for each in value):  # of the steps
        return Mark.GOOD if sum(value) > 0 else Mark.BAD
    if isinstance(value, dict):
        value = _scores_value(value)
    if is_empty(value):
        return Mark.NONE
    marks = {_mark_of_value(each) for each in (value if isinstance(value, list) else [value])}
    return next((mark for mark in (Mark.BAD, Mark.UNCLEAR) if mark in marks), Mark.GOOD)


def _scores_value(score: dict[str, Any]) -> Any:
    """What a score says: its value, or the word for it where it has none; of any other object, all that it holds."""
    if "value" not in score:
        return list(score.values())
    return score.get("stringValue") if score["value"] is None else score["value"]


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
_LEARNED_WHERE_FALSE = frozenset(
    "masked is_masked ignore_loss no_loss exclude_from_loss skip_training no_train exclude_from_training".split()
)


def _is_learning_mark(name: str) -> bool:
    snake = snake_case(name).strip("_")
    return snake in _LEARNED_WHERE_TRUE or snake in _LEARNED_WHERE_FALSE or snake in ("mask", "train_detail")


def _learning(where: str, name: str, value: Any) -> bool:
    snake = snake_case(name).strip("_")
    if snake == "mask":
        raise RefusedRecord(f"{where} has a mask, which some tools learn and others leave out: call it weight, 0 or 1")
    if isinstance(value, str):
        word = value.strip().lower()
        value = {"true": 1, "false": 0}.get(word, _number(word) if _number(word) is not None else value)
    if value not in (0, 1):  # true and false too
        raise RefusedRecord(f"{where}: {name} must be 0 or 1, not {_shown(value)}")
    return bool(value) == (snake in _LEARNED_WHERE_TRUE)


def close_message(fields: Fields, is_assistant: bool, harmless: frozenset[str] = frozenset()) -> bool:
    """Whether a message is to be learned, by the keys that are left. Raises RefusedRecord for one that nobody knows.

    What is not the assistant's is never learned, whatever stands at it.
    """
    is_learned = True
    strangers = []
    for name, value in fields.left():
        if _is_container(name, value):
            is_learned &= _is_good_inside(value, f"{fields.where}: {name}", is_assistant)
            continue
        if name in harmless or (is_harmless(name, value) and not _is_learning_mark(name)):
            continue
        if _is_learning_mark(name):
            is_learned &= not is_assistant or _learning(fields.where, name, value)
            continue
        mark = mark_of(name, value)
        if mark is Mark.NONE:
            strangers.append(name)
        if mark is Mark.UNCLEAR and is_assistant:
            raise RefusedRecord(f"{fields.where}: {name} is {_shown(value)}, and nothing tells whether that is good")
        is_learned &= mark is not Mark.BAD
    if strangers:
        raise unknown(fields.where, *strangers)
    return is_learned


_SAID_BESIDE = frozenset({*TOOL_NAMES, *THINKING_NAMES, "tool_calls", "function_call"})


def _is_good_inside(value: Any, where: str, is_assistant: bool) -> bool:
    """Whether nothing in a message's metadata says that it is not to be learned. Raises RefusedRecord for what is said
    there: thinking, calls, and outcomes that are not understood."""
    if not is_assistant:
        return True
    _require_nothing_said(value, where, _SAID_BESIDE)
    marks = list(_marks_inside(value, where))
    for name, held, mark in marks:
        if mark is Mark.UNCLEAR:
            raise RefusedRecord(f"{name} is {_shown(held)}, and nothing tells whether that is good")
    return all(mark is not Mark.BAD for _, _, mark in marks)
