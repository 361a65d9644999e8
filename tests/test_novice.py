"""The shipped novice loads anywhere, reads what it writes, and is a novice: it fails often, but lacks no skill."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from random import Random
from typing import Any
from unicodedata import normalize

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from policies.novice.build import (
    IGNORED,
    NOVICE_PATH,
    build_novice,
    count_skills,
    encode_lesson,
    render,
    roll_out,
    wilson_interval,
)
from policies.novice.curriculum import expert_lesson, hasty_lesson, with_preamble
from policies.novice.tokenizer import build_tokenizer
from tools.worlds.order_desk import OrderDesk

WORLD = OrderDesk()
TOKENIZER = AutoTokenizer.from_pretrained(NOVICE_PATH)
modest = settings(deadline=None, max_examples=100)


@pytest.fixture(scope="module")
def network() -> Any:
    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(NOVICE_PATH).eval()


# ------------------------------------------------------------------------------------- the shipped files


def test_the_shipped_files_are_together_under_3_megabytes() -> None:
    assert sum(file.stat().st_size for file in NOVICE_PATH.iterdir()) < 3_000_000


def test_the_network_has_a_standard_shape_that_vllm_takes(network: Any) -> None:
    config = network.config
    assert config.architectures == ["Qwen2ForCausalLM"]
    assert config.hidden_size // config.num_attention_heads == 32
    assert config.vocab_size == len(TOKENIZER)
    assert config.max_position_embeddings == TOKENIZER.model_max_length == 2048


def test_a_completion_ends_with_the_turn_and_padding_is_another_token(network: Any) -> None:
    assert TOKENIZER("<|im_end|>")["input_ids"] == [TOKENIZER.eos_token_id] == [network.generation_config.eos_token_id]
    assert TOKENIZER.pad_token_id == network.generation_config.pad_token_id != TOKENIZER.eos_token_id


def test_the_shipped_tokenizer_is_what_the_code_builds(tmp_path: Path) -> None:
    """A word added to the order desk shifts the ids: the novice must then be built again."""
    build_tokenizer().save_pretrained(tmp_path, save_jinja_files=False)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert json.loads((tmp_path / name).read_text()) == json.loads((NOVICE_PATH / name).read_text())


# ----------------------------------------------------------------------------- tokenizer and templates

# In Unicode's composed form: transformers' tokenizer of the Qwen family composes what it reads.
any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=60).map(partial(normalize, "NFC"))
plain_text = any_text.filter(lambda text: "<|" not in text and "<tool_call>" not in text)
json_values = st.one_of(any_text.filter(lambda text: "<|" not in text), st.integers(), st.booleans(), st.none())
calls = st.builds(
    lambda name, arguments: {"type": "function", "function": {"name": name, "arguments": arguments}},
    st.sampled_from(["look_up_customer", "fly", "x-1"]),
    st.dictionaries(st.text("abc_", min_size=1, max_size=4), json_values, max_size=3),
)
assistant_messages = st.builds(
    lambda content, calls: {"role": "assistant", "content": content, "tool_calls": calls},
    plain_text,
    st.lists(calls, max_size=3),
)
other_messages = st.builds(
    lambda role, content: {"role": role, "content": content}, st.sampled_from(["user", "tool"]), any_text
)


@modest
@given(any_text)
def test_any_text_goes_through_the_tokenizer_unharmed(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER(text)["input_ids"]) == text


@modest
@given(st.lists(st.one_of(other_messages, assistant_messages), min_size=1, max_size=6))
def test_a_longer_conversation_extends_the_rendering_of_a_shorter_one(messages: list[dict[str, Any]]) -> None:
    whole = render(TOKENIZER, messages)
    for length in range(1, len(messages)):
        assert whole.startswith(render(TOKENIZER, messages[:length]))
        if messages[length]["role"] == "assistant":
            assert whole.startswith(render(TOKENIZER, messages[:length], is_prompt=True))


@modest
@given(assistant_messages)
def test_an_assistant_message_is_read_back_as_it_was_written(message: dict[str, Any]) -> None:
    user = {"role": "user", "content": "Hello"}
    prompt = render(TOKENIZER, [user], is_prompt=True)
    completion = render(TOKENIZER, [user, message]).removeprefix(prompt)
    parsed = TOKENIZER.parse_response(completion, prefix=prompt)
    assert parsed.get("content", "") == message["content"]
    assert parsed.get("tool_calls", []) == message["tool_calls"]


def test_streamed_writing_is_read_like_whole_writing() -> None:
    task = WORLD.task("heldout", 0)
    prompt = render(TOKENIZER, task.messages, is_prompt=True)
    completion = render(TOKENIZER, [*task.messages, WORLD.open(task).expert_action()]).removeprefix(prompt)
    parser = TOKENIZER.get_response_parser(prefix=prompt)
    for token_id in TOKENIZER(completion)["input_ids"]:
        parser.feed(TOKENIZER.decode([token_id]))
    message, _ = parser.finalize()
    assert message == TOKENIZER.parse_response(completion, prefix=prompt)
    assert message["tool_calls"][0]["function"]["name"] == "look_up_customer"


def test_arguments_as_json_text_and_as_objects_are_written_alike() -> None:
    action = WORLD.open(WORLD.task("train", 0)).expert_action()
    function = action["tool_calls"][0]["function"]
    parsed = {**function, "arguments": json.loads(function["arguments"])}
    as_object = {**action, "tool_calls": [{"type": "function", "function": parsed}]}
    assert render(TOKENIZER, [action]) == render(TOKENIZER, [as_object])


def test_content_in_parts_is_written_like_plain_content() -> None:
    parts = [{"type": "text", "text": "Order "}, {"type": "text", "text": "1000"}]
    as_parts, plain = {"role": "user", "content": parts}, {"role": "user", "content": "Order 1000"}
    assert render(TOKENIZER, [as_parts]) == render(TOKENIZER, [plain])


def test_an_expert_episode_is_about_110_tokens() -> None:
    rows = [encode_lesson(TOKENIZER, _clean_lesson(index)) for index in range(100)]
    assert 100 <= sum(len(row.token_ids) for row in rows) / len(rows) <= 130


# --------------------------------------------------------------------------------------------- lessons


def _clean_lesson(index: int) -> Any:
    """An expert's lesson without slips."""
    for seed in range(100):
        lesson = expert_lesson(WORLD.task("train", index), Random(seed))
        if all(lesson.is_taught):
            return lesson
    raise AssertionError("every lesson had slips")


@modest
@given(st.integers(0, 4999), st.integers(0, 99), st.sampled_from([expert_lesson, hasty_lesson]))
def test_only_the_taught_completions_are_learned_from(index: int, seed: int, teach: Any) -> None:
    lesson = with_preamble(teach(WORLD.task("train", index), Random(seed)), 30, Random(seed))
    row = encode_lesson(TOKENIZER, lesson)
    learned = TOKENIZER.decode([label for label in row.labels if label != IGNORED])
    actions = [message for message in lesson.messages if message["role"] == "assistant"]
    taught = [action for action, is_taught in zip(actions, lesson.is_taught, strict=True) if is_taught]
    assert learned == "".join(_completion(action) for action in taught)
    assert all(label in (IGNORED, token_id) for label, token_id in zip(row.labels, row.token_ids, strict=True))


def _completion(action: dict[str, Any]) -> str:
    return render(TOKENIZER, [action]).removeprefix("<|im_start|>assistant\n").removesuffix("\n")


def test_slips_are_shown_but_not_taught() -> None:
    lessons = [expert_lesson(WORLD.task("train", index), Random(index)) for index in range(100)]
    assert 0.02 < sum(not all(lesson.is_taught) for lesson in lessons) / len(lessons) < 0.5


# -------------------------------------------------------------------------------------- how good it is


def test_the_novice_is_a_novice_and_writes_calls_that_can_be_read(network: Any) -> None:
    attempts = roll_out(network, TOKENIZER, [WORLD.task("heldout", index) for index in range(40)])
    assert 0.25 <= sum(attempt.episode.outcome() for attempt in attempts) / 40 <= 0.70
    assert sum(attempt.is_malformed for attempt in attempts) <= 1


def test_no_skill_is_missing(network: Any) -> None:
    """A skill that the base lacks does not come back with a small adapter."""
    count = count_skills(network, TOKENIZER, [WORLD.task("heldout", index) for index in range(80)])
    assert len(count.num_states) == 12
    assert {skill: n for skill, n in count.num_states.items() if count.num_right[skill] < 0.2 * n} == {}


def test_building_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    for name, seed in (("first", 0), ("second", 0), ("other", 1)):
        build_novice(tmp_path / name, seed=seed, num_gradient_steps=4)
    files = sorted(file.name for file in (tmp_path / "first").iterdir())
    assert files == sorted(file.name for file in NOVICE_PATH.iterdir())
    for file in files:
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()
    weights = "model.safetensors"
    assert (tmp_path / "first" / weights).read_bytes() != (tmp_path / "other" / weights).read_bytes()


def test_the_interval_is_wilsons() -> None:
    low, high = wilson_interval(50, 100)
    assert (round(low, 4), round(high, 4)) == (0.4038, 0.5962)
    assert wilson_interval(0, 20)[0] == pytest.approx(0.0, abs=1e-12)
