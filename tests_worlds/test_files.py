"""Worlds of files that users bring: small files in the published shape, and files that are something else."""

from __future__ import annotations

import json
import math
import re
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests_worlds import promises
from tests_worlds.published_files import (
    WRITERS,
    hotpot_entry,
    write_2wiki,
    write_hotpotqa,
    write_mind2web,
    write_musique,
    write_webshop,
)
from tools import json_text, search
from tools.worlds import load_world
from tools.worlds.calls import answering, calling
from tools.worlds.questions import Question, QuestionEpisode
from tools.worlds.webshop import WebShop
from tools.worlds.world import Task, World


@pytest.fixture(params=sorted(WRITERS))
def world(request: pytest.FixtureRequest, tmp_path: Path) -> World:
    return load_world(WRITERS[request.param](tmp_path))


def test_every_promise_of_a_world(world: World) -> None:
    promises.assert_tasks_are_told_apart(world)
    left_out = 1 if world.name in ("musique", "mind2web") else 0
    assert sum(world.splits.values()) == 10 - left_out
    assert set(promises.outcomes_of_expert(world, promises.all_tasks(world)).values()) == {1.0}
    task = world.task("train", 0)
    promises.assert_tools_convert(world.open(task))
    promises.assert_found_by_text(world, task)
    promises.assert_episodes_do_not_mix(world, task)
    promises.assert_server_tools_act_as_play(world, task)
    promises.assert_same_effect_is_judged(world, task)
    promises.assert_reopens_quickly(world, task, limit_s=0.1)
    if world.name != "mind2web":  # there a wrong call ends the episode
        promises.assert_bad_calls_are_told_in_words(world, task)


def test_aliases_are_accepted_and_the_question_names_the_first_search(tmp_path: Path) -> None:
    for writer, alias in ((write_2wiki, "A long way."), (write_musique, "in 1900")):
        world = load_world(writer(tmp_path))
        episode = world.open(world.task("train", 0))
        assert isinstance(episode, QuestionEpisode)
        assert episode.question.queries[0] == "Alba"
        episode.play(answering(alias))
        assert episode.outcome() == 1.0


def test_webshop_scores_by_attributes_options_price_and_kind(tmp_path: Path) -> None:
    world = load_world(write_webshop(tmp_path))
    assert isinstance(world, WebShop)
    assert "price lower than" in world.task("train", 0).messages[0]["content"]

    def bought(product_id: str, *options: tuple[str, str]) -> float:
        episode = world.open(world.task("train", 0))
        episode.play(calling("open_product", {"product_id": product_id}, 0))
        for option, value in options:
            episode.play(calling("choose_option", {"option": option, "value": value}, 1))
        episode.play(calling("buy", {}, 2))
        return episode.outcome()

    assert bought("B000000000", ("Size", "small")) == 1.0
    assert bought("B000000000", ("size", "X-Large")) == pytest.approx(2 / 3)
    assert bought("B000000000") == pytest.approx(2 / 3)
    assert bought("B000000001", ("size", "small")) == 1.0, "another product that meets every wish will do"
    assert bought("nothing") == 0.0


def test_mind2web_shows_the_page_and_ends_where_the_recording_does_not_go_on(tmp_path: Path) -> None:
    world = load_world(write_mind2web(tmp_path))
    task = world.task("train", 0)
    assert "[4] input placeholder='From'" in task.messages[0]["content"]
    assert "[3] form  Find Alba One way" in task.messages[0]["content"]
    episode = world.open(task)
    [told] = episode.play(calling("type_text", {"element": "4", "text": " alba "}, 0))
    assert "[6] select" in told["content"]
    episode.play(calling("select_option", {"element": "4", "value": "One way"}, 1))
    assert (episode.is_done, episode.outcome(), episode.expert_action()) == (True, 0.0, None)


@pytest.mark.parametrize("name", sorted(WRITERS))
@pytest.mark.parametrize(
    "content", ["", "{", "[1, 2]", '[{"question": 5}]', '{"a": 1}', "[[[[", '[{"actions": 3}]', "null"]
)
def test_a_file_of_something_else_is_refused_in_words(name: str, content: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path)
    file = tmp_path / "items_shuffle_1000.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=re.escape(str(file))):
        load_world(f"{name}:{file}")


@pytest.mark.parametrize("name", sorted(WRITERS))
def test_a_file_that_is_missing_or_binary_is_told(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="items_shuffle_9"):
        load_world(f"{name}:{tmp_path / 'items_shuffle_9.json'}")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="binary"):
        load_world(f"{name}:{tmp_path / 'binary'}")
    with pytest.raises(ValueError, match="FILE"):
        load_world(name)


# --------------------------------------------------------------------------------------------------- rows

FILES = {
    "hotpotqa": ("hotpot_dev_distractor_v1.json",),
    "2wikimultihopqa": ("dev.json", "id_aliases.json"),
    "musique": ("musique_ans_v1.0_dev.jsonl",),
    "webshop": ("items_shuffle_1000.json", "items_ins_v2_1000.json", "items_human_ins.json"),
    "mind2web": ("train_0.json",),
}


def read(file: Path) -> Any:
    """What a file has: a list of rows, or an object of them."""
    if file.suffix == ".jsonl" or file.name == "id_aliases.json":
        return [json.loads(line) for line in file.read_text().splitlines()]
    return json.loads(file.read_text())


def write(file: Path, rows: Any) -> None:
    is_lines = file.suffix == ".jsonl" or file.name == "id_aliases.json"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows) if is_lines else json.dumps(rows))


def put(rows: Any, place: tuple[str | int, ...], value: Any) -> None:
    for step in place[:-1]:
        rows = rows[step]
    rows[place[-1]] = value


def with_value(name: str, folder: Path, file_name: str, place: tuple[str | int, ...], value: Any) -> World:
    """The world whose file has another value at one place."""
    spec = WRITERS[name](folder)
    rows = read(folder / file_name)
    put(rows, place, value)
    write(folder / file_name, rows)
    return load_world(spec)


def places_in(value: Any, at: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    if at:
        yield at
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places_in(inner, (*at, key))


texts = st.text(st.characters(), max_size=6) | st.sampled_from(
    ["", " ", "***", "the", "a/", "\ud800", "<![x", "{}", "small "]
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)


@pytest.mark.parametrize(("name", "file_name"), [(name, file) for name, files in FILES.items() for file in files])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_value_anywhere_is_played_to_an_end_or_refused_with_its_row(
    name: str, file_name: str, data: st.DataObject
) -> None:
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        WRITERS[name](folder)
        rows = read(folder / file_name)
        key: Any = min(5, len(rows) - 1) if isinstance(rows, list) else "B000000005"
        place = data.draw(st.sampled_from([(key,), *places_in(rows[key], (key,))]))
        value, world, refusal = data.draw(json_values), None, ""
        try:
            world = with_value(name, folder, file_name, place, value)
        except ValueError as error:
            refusal = str(error)
        if world is None:
            row = f"row {key + 1}" if isinstance(key, int) else f"product {key}"
            assert re.match(rf"{re.escape(str(folder / file_name))}, {row}\b", refusal), refusal
            assert "docs/WORLDS.md" in refusal
            assert not re.search("Error|Input should|NoneType", refusal), refusal
            return
        for task in promises.all_tasks(world):
            episode = world.open(task)
            assert len(promises.follow_expert(episode)) < promises.MOST_STEPS
            assert math.isfinite(episode.outcome())
            assert 0.0 <= episode.outcome() <= 1.0
            assert episode.is_done


@pytest.mark.parametrize(
    ("name", "file_name", "place", "value", "complaint"),
    [
        ("hotpotqa", "hotpot_dev_distractor_v1.json", (5, "answer"), None, "`answer` is missing, as in a test set"),
        ("hotpotqa", "hotpot_dev_distractor_v1.json", (5, "answer"), 1990, "`answer` must be a text, not a number"),
        ("hotpotqa", "hotpot_dev_distractor_v1.json", (5, "question"), None, "`question` must be a text, not null"),
        (
            "hotpotqa", "hotpot_dev_distractor_v1.json", (5, "context", 1, 1), "One text.",
            '`context[1][1]` must be a list, not the text "One text."',
        ),
        (
            "hotpotqa", "hotpot_dev_distractor_v1.json", (5, "context", 1, 1, 0), "x\ud800",
            "`context[1][1][0]` has half a character (a lone surrogate)",
        ),
        (
            "hotpotqa", "hotpot_dev_distractor_v1.json", (5, "context", 1, 0), ["T"],
            "`context[1][0]` must be a text, not a list of 1",
        ),
        (
            "2wikimultihopqa", "id_aliases.json", (0, "aliases"), "Braunek",
            '`aliases` must be a list, not the text "Braunek"',
        ),
        ("2wikimultihopqa", "id_aliases.json", (0, "aliases"), None, "`aliases` must be a list, not null"),
        ("2wikimultihopqa", "id_aliases.json", (0,), {"Q7": ["a"]}, "`Q_id` is missing"),
        ("2wikimultihopqa", "id_aliases.json", (0,), ["Q7"], 'must be a JSON object, not the text "Q7"'),
        (
            "musique", "musique_ans_v1.0_dev.jsonl", (5, "answer_aliases"), "M",
            '`answer_aliases` must be a list, not the text "M"',
        ),
        (
            "musique", "musique_ans_v1.0_dev.jsonl", (5, "answerable"), "false",
            '`answerable` must be true or false, not the text "false"',
        ),
        (
            "musique", "musique_ans_v1.0_dev.jsonl", (5, "paragraphs", 0, "paragraph_text"), None,
            "`paragraphs[0].paragraph_text` must be a text, not null",
        ),
        (
            "musique", "musique_ans_v1.0_dev.jsonl", (5, "question_decomposition", 0, "paragraph_support_idx"), 7,
            "`question_decomposition` has a `paragraph_support_idx` that is no paragraph's `idx`",
        ),
        (
            "webshop", "items_human_ins.json", ("B000000005", 0, "instruction_options"), "navy blue",
            '`instruction_options` must be a list, not the text "navy blue"',
        ),
        (
            "webshop", "items_shuffle_1000.json", (5, "full_description"), "\ud83d",
            "`full_description` has half a character (a lone surrogate)",
        ),
        (
            "mind2web", "train_0.json", (5, "actions", 0, "operation", "op"), "HOVER",
            "`actions[0].operation.op` must be 'CLICK', 'TYPE' or 'SELECT', not the text \"HOVER\"",
        ),
    ],
)  # fmt: skip
def test_a_refusal_names_the_row_the_field_and_what_is_wrong(
    name: str, file_name: str, place: tuple[str | int, ...], value: Any, complaint: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=re.escape(complaint)) as refused:
        with_value(name, tmp_path, file_name, place, value)
    row = f"row {place[0] + 1}" if isinstance(place[0], int) else f"product {place[0]}, row 1"
    assert str(refused.value).startswith(f"{tmp_path / file_name}, {row}")
    assert "\n" not in str(refused.value)


def test_a_test_set_is_refused_for_the_answer_that_it_lacks(tmp_path: Path) -> None:
    file = tmp_path / "test.json"
    write(file, [{key: hotpot_entry(0)[key] for key in ("_id", "question", "context", "supporting_facts")}])
    with pytest.raises(ValueError, match=r'row 1 \(id "5a8b57f25542995d1e6f1370"\): `answer` is missing'):
        load_world(f"hotpotqa:{file}")


@pytest.mark.parametrize("name", ["hotpotqa", "2wikimultihopqa", "musique"])
def test_an_empty_answer_is_none(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`answer` is empty, as in a test set"):
        with_value(name, tmp_path, FILES[name][0], (5, "answer"), " ")


@pytest.mark.parametrize("name", sorted(WRITERS))
@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("[" * 100_000, "is nested too deeply"),
        ('[{"question": ' + "9" * 5000 + "}]", "has a number of thousands of digits"),
        ('[{"question": 1', "cannot be read as JSON: Expecting ',' delimiter at line 1, column 16;"),
        ('\n[{"question": one', "cannot be read as JSON: Expecting value at line 2, column 15;"),
    ],
)
def test_json_that_cannot_be_read_is_told_without_pythons_words(
    name: str, content: str, complaint: str, tmp_path: Path
) -> None:
    spec = WRITERS[name](tmp_path)
    (tmp_path / FILES[name][0]).write_text(content)
    with pytest.raises(ValueError, match=complaint) as refused:
        load_world(spec)
    assert str(refused.value).startswith(str(tmp_path / FILES[name][0]))


def test_webshops_products_under_another_name_are_told_how_they_must_be_called(tmp_path: Path) -> None:
    write_webshop(tmp_path)
    (tmp_path / "items_shuffle_1000.json").rename(tmp_path / "products.json")
    with pytest.raises(
        ValueError, match=r"products\.json must be called items_shuffle_1000\.json or items_shuffle\.json"
    ):
        load_world(f"webshop:{tmp_path / 'products.json'}")


# --------------------------------------------------------------------------------------------- other forms


def all_messages(world: World) -> list[Any]:
    return [task.messages for task in promises.all_tasks(world)]


def played(world: World) -> list[Any]:
    """What the expert does and sees at each task."""
    return [(task.messages, promises.follow_expert(world.open(task))) for task in promises.all_tasks(world)]


@pytest.mark.parametrize("name", sorted(WRITERS))
def test_a_byte_order_mark_is_no_part_of_a_file(name: str, tmp_path: Path) -> None:
    spec = WRITERS[name](tmp_path)
    plain = all_messages(load_world(spec))
    for file in tmp_path.iterdir():
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert all_messages(load_world(spec)) == plain


@pytest.mark.parametrize("name", sorted(WRITERS))
def test_rows_are_read_as_a_list_or_one_a_line(name: str, tmp_path: Path) -> None:
    spec = WRITERS[name](tmp_path)
    plain = all_messages(load_world(spec))
    file = tmp_path / FILES[name][0]
    rows = read(file)
    for content in (json.dumps(rows, indent=1), "\r\n".join(json.dumps(row) for row in rows)):
        file.write_text(content)
        assert all_messages(load_world(spec)) == plain


def in_shards(file: Path, rows: list[Any], folder: Path) -> None:
    """In twelve files."""
    folder.mkdir()
    for number in range(12):
        write(folder / f"train-{number}-of-12{file.suffix}", rows[number::12])


@pytest.mark.parametrize("named", ["{folder}", "{folder}/train-*"])
@pytest.mark.parametrize("name", sorted({*WRITERS} - {"webshop"}))
def test_what_is_published_in_several_files_is_one_world(name: str, named: str, tmp_path: Path) -> None:
    spec, file = WRITERS[name](tmp_path), tmp_path / FILES[name][0]
    rows = read(file)
    rows += [{**row, "question": f"{row['question']} Say it.", "id": "x"} for row in rows[:2] if "question" in row]
    write(file, rows)
    plain = played(load_world(spec))
    in_shards(file, rows, tmp_path / "shards")
    (tmp_path / "shards" / "README.md").write_text("Not this one.")
    (tmp_path / "shards" / "._train-0.json").write_bytes(b"\0\5\26\7")  # what macOS leaves in archives
    for beside in FILES[name][1:]:
        (tmp_path / beside).rename(tmp_path / "shards" / beside)
    assert played(load_world(f"{name}:{named.format(folder=tmp_path / 'shards')}")) == plain


def test_the_steps_of_a_task_may_stand_in_several_files(tmp_path: Path) -> None:
    plain = played(load_world(write_mind2web(tmp_path)))
    steps = [step for row in read(tmp_path / "train_0.json") for step in in_steps(row)]
    in_shards(tmp_path / "train_0.json", steps, tmp_path / "shards")
    assert sorted(map(str, played(load_world(f"mind2web:{tmp_path / 'shards'}")))) == sorted(map(str, plain))


@pytest.mark.parametrize("named", ["shards", "shards/train-*.json"])
def test_a_folder_without_files_is_told(named: str, tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / named} stands for no file")):
        load_world(f"mind2web:{tmp_path / named}")


def as_columns(row: Any, key: str, names: tuple[str, str]) -> Any:
    return {name: [pair[at] for pair in row[key]] for at, name in enumerate(names)}


def as_objects(row: Any, key: str, names: tuple[str, str]) -> Any:
    return [dict(zip(names, pair, strict=True)) for pair in row[key]]


def as_text(row: Any, key: str, names: tuple[str, str]) -> Any:
    return json.dumps(as_objects(row, key, names))


@pytest.mark.parametrize("form", [as_columns, as_objects, as_text])
@pytest.mark.parametrize("sentences", ["sentences", "content"])
@pytest.mark.parametrize("name", ["hotpotqa", "2wikimultihopqa"])
def test_the_hubs_forms_are_the_published_pairs(
    name: str, sentences: str, form: Callable[[Any, str, tuple[str, str]], Any], tmp_path: Path
) -> None:
    spec = WRITERS[name](tmp_path)
    plain = played(load_world(spec))
    rows = read(tmp_path / FILES[name][0])
    for row in rows:
        row["id"] = row.pop("_id")
        row["context"] = form(row, "context", ("title", sentences))
        row["supporting_facts"] = form(row, "supporting_facts", ("title", "sent_id"))
    write(tmp_path / FILES[name][0], rows)
    assert played(load_world(spec)) == plain


def in_flashrag(row: Any) -> Any:
    """FlashRAG's row of a published one."""
    inner = {key: row[key] for key in ("type", "level", "answer_id") if key in row}
    if "context" in row:
        inner["context"] = as_columns(row, "context", ("title", "sentences"))
        inner["supporting_facts"] = as_columns(row, "supporting_facts", ("title", "sent_id"))
    else:
        hops = row["question_decomposition"]
        inner["question_decomposition"] = [
            {"id": hop["id"], "support_paragraph": row["paragraphs"][hop["paragraph_support_idx"]]} for hop in hops
        ]
    answers = [row["answer"], *row.get("answer_aliases", [])]
    return {"id": "dev_0", "question": row["question"], "golden_answers": answers, "metadata": inner}


@pytest.mark.parametrize("name", ["hotpotqa", "2wikimultihopqa", "musique"])
def test_flashrags_form_asks_the_same_and_accepts_the_same(name: str, tmp_path: Path) -> None:
    spec = WRITERS[name](tmp_path)
    rows = [row for row in read(tmp_path / FILES[name][0]) if row.get("answerable", True)]
    write(tmp_path / FILES[name][0], rows)
    plain = load_world(spec)
    write(tmp_path / FILES[name][0], [in_flashrag(row) for row in rows])
    world = load_world(spec)
    assert played(world) == played(plain)
    assert [asked(world, task).answers for task in promises.all_tasks(world)] == [
        asked(plain, task).answers for task in promises.all_tasks(plain)
    ]


def in_ircot(row: Any) -> Any:
    """IRCoT's row of a published one."""
    if "context" in row:
        facts = {title for title, _ in row["supporting_facts"]}
        paragraphs = [(title, " ".join(map(str.strip, texts)), title in facts) for title, texts in row["context"]]
    else:
        paragraphs = [(each["title"], each["paragraph_text"], each["is_supporting"]) for each in row["paragraphs"]]
    keys = ("title", "paragraph_text", "is_supporting")
    return {
        "question_id": row.get("_id") or row["id"],
        "question_text": row["question"],
        "answers_objects": [{"number": "", "date": {"day": "", "month": "", "year": ""}, "spans": [row["answer"]]}],
        "contexts": [{"idx": idx, **dict(zip(keys, each, strict=True))} for idx, each in enumerate(paragraphs)],
    }


@pytest.mark.parametrize("name", ["hotpotqa", "2wikimultihopqa", "musique"])
def test_ircots_form_asks_the_same_and_is_searched_for_the_same(name: str, tmp_path: Path) -> None:
    spec, file = WRITERS[name](tmp_path), tmp_path / FILES[name][0]
    rows = [row for row in read(file) if row.get("answerable", True)]
    write(file, rows)
    plain = played(load_world(spec))
    write(file, [in_ircot(row) for row in rows])
    assert played(load_world(spec)) == plain
    write(file, [in_ircot(row) | {"answers_objects": [{"spans": [" "]}]} for row in rows])
    with pytest.raises(ValueError, match=r"row 1 .*: `answers_objects` has an empty answer, as in a test set"):
        load_world(spec)


def asked(world: World, task: Task) -> Question:
    episode = world.open(task)
    assert isinstance(episode, QuestionEpisode)
    return episode.question


def test_a_list_is_read_piece_by_piece_and_its_faults_are_told_by_their_place_in_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = played(load_world(write_hotpotqa(tmp_path)))
    file = tmp_path / FILES["hotpotqa"][0]
    for piece in (1, 7, 100, 5000):
        monkeypatch.setattr(json_text, "CHUNK_BYTES", piece)
        for indent in (None, 2):
            text = json.dumps(read(file), indent=indent)
            file.write_text(text)
            assert played(load_world(f"hotpotqa:{file}")) == plain
            for broken in (text[:-200], text.replace('"level"', "level", 7), text + "]"):
                with pytest.raises(json.JSONDecodeError) as fault:
                    json.loads(broken)
                (tmp_path / "broken.json").write_text(broken)
                where = f"at line {fault.value.lineno}, column {fault.value.colno};"
                with pytest.raises(ValueError, match=where):
                    load_world(f"hotpotqa:{tmp_path / 'broken.json'}")


def test_a_large_list_is_never_held_as_a_whole(tmp_path: Path) -> None:
    file = tmp_path / "hotpot_train_v1.1.json"
    entry = hotpot_entry(0) | {"_id": "x" * 50_000}
    file.write_text(f"[{', '.join([json.dumps(entry)] * 400)}]")
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="holds 1 different tasks"):
            load_world(f"hotpotqa:{file}")
        assert tracemalloc.get_traced_memory()[1] < file.stat().st_size / 2
    finally:
        tracemalloc.stop()


def test_bytes_that_are_no_text_are_told_by_their_place_in_the_file(tmp_path: Path) -> None:
    text = json.dumps([hotpot_entry(number) for number in range(10)] * 200).encode()
    (tmp_path / "hotpot.json").write_bytes(text[:700_000] + b"\xff" + text[700_000:])
    with pytest.raises(ValueError, match="is not UTF-8 text from byte 700000 on"):
        load_world(f"hotpotqa:{tmp_path / 'hotpot.json'}")


def test_a_file_in_the_home_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_hotpotqa(tmp_path)
    assert load_world("hotpotqa:~/hotpot_dev_distractor_v1.json").splits["heldout"] == 2
    with pytest.raises(ValueError, match=r"~nobody-of-this-name/x\.json cannot be read: No such file"):
        load_world("hotpotqa:~nobody-of-this-name/x.json")


# ---------------------------------------------------------------------------------------------- duplicates


@pytest.mark.parametrize("name", sorted(WRITERS))
def test_a_task_that_stands_several_times_in_a_file_is_one_task(name: str, tmp_path: Path) -> None:
    spec = WRITERS[name](tmp_path)
    plain = all_messages(load_world(spec))
    file = tmp_path / ("items_human_ins.json" if name == "webshop" else FILES[name][0])
    rows = read(file)
    write(file, {id: listed * 3 for id, listed in rows.items()} if isinstance(rows, dict) else rows + rows[:7])
    assert all_messages(load_world(spec)) == plain


def test_a_passage_whose_title_begins_like_anothers_is_not_taken_for_it(tmp_path: Path) -> None:
    """Titles were read up to their first colon: one film of a series was as good as the other."""
    spec = write_hotpotqa(tmp_path)
    rows = read(tmp_path / FILES["hotpotqa"][0])
    rows[0]["context"] += [["Star Songs: Alba", ["It has 9 songs."]], ["Star Songs: Brod", ["It has 7 songs."]]]
    rows[0]["supporting_facts"] = [["Star Songs: Alba", 0]]
    write(tmp_path / FILES["hotpotqa"][0], rows)
    world = load_world(spec)
    for query, is_found in (("7 songs", False), ("9 songs", True)):
        episode = world.open(world.task("train", 0))
        [told] = episode.play(calling("search", {"query": query, "num_results": 1}, 0))
        assert ("9 songs" in told["content"]) == is_found
        expert = episode.expert_action()
        assert expert is not None
        assert ("tool_calls" not in expert) == is_found


def test_a_question_is_asked_once_whatever_its_spaces_and_answers(tmp_path: Path) -> None:
    spec = write_hotpotqa(tmp_path)
    rows = read(tmp_path / FILES["hotpotqa"][0])
    question = rows[0]["question"].replace(" ", "  ")
    write(tmp_path / FILES["hotpotqa"][0], [*rows, rows[0] | {"question": question, "answer": "x"}])
    assert sum(load_world(spec).splits.values()) == 10


def test_one_page_asked_for_with_other_right_steps_is_another_task(tmp_path: Path) -> None:
    spec = write_mind2web(tmp_path)
    rows = read(tmp_path / "train_0.json")
    rows[1] = json.loads(json.dumps(rows[0]))
    rows[1]["actions"][0]["operation"]["value"] = "Celje"
    write(tmp_path / "train_0.json", rows)
    assert sum(load_world(spec).splits.values()) == 9


def in_steps(row: Any) -> list[Any]:
    """The rows of Multimodal-Mind2Web for one of Mind2Web."""
    head = {key: row[key] for key in ("annotation_id", "website", "domain", "subdomain", "confirmed_task")}
    reprs = ["[x] y -> CLICK"] * len(row["actions"])
    return [
        {
            **head,
            "action_uid": action["action_uid"],
            "cleaned_html": action["cleaned_html"],
            "operation": json.dumps(action["operation"]),
            "pos_candidates": [json.dumps(each) for each in action["pos_candidates"]],
            "neg_candidates": [json.dumps(each) for each in action["neg_candidates"]],
            "action_reprs": reprs,
            "target_action_index": str(place),
            "target_action_reprs": reprs[place],
        }
        for place, action in enumerate(row["actions"])
    ]


def test_multimodal_mind2webs_rows_are_put_together_to_tasks(tmp_path: Path) -> None:
    spec = write_mind2web(tmp_path)
    plain = played(load_world(spec))
    rows = read(tmp_path / "train_0.json")
    first_steps = [in_steps(row)[0] for row in rows]
    later_steps = [step for row in rows for step in reversed(in_steps(row)[1:])]
    write(tmp_path / "train_0.json", first_steps + later_steps)
    assert played(load_world(spec)) == plain


def test_attributes_may_be_objects(tmp_path: Path) -> None:
    spec = write_mind2web(tmp_path)
    plain = played(load_world(spec))
    rows = read(tmp_path / "train_0.json")
    for action in (action for row in rows for action in row["actions"]):
        for candidate in (*action["pos_candidates"], *action["neg_candidates"]):
            candidate["attributes"] = json.loads(candidate["attributes"])
    write(tmp_path / "train_0.json", rows)
    assert played(load_world(spec)) == plain


def test_a_task_of_multimodal_mind2web_whose_steps_are_not_all_there_is_left_out(tmp_path: Path) -> None:
    spec = write_mind2web(tmp_path)
    steps = [step for row in read(tmp_path / "train_0.json") for step in in_steps(row)]
    write(tmp_path / "train_0.json", steps[1:])
    assert sum(load_world(spec).splits.values()) == 8, "the first has lost a step; the last has one without an element"
    del steps[4]["target_action_index"]
    write(tmp_path / "train_0.json", steps)
    with pytest.raises(ValueError, match=r"row 5 \(id \"annotation-1\"\): `target_action_index` is missing"):
        load_world(spec)


def test_every_fifth_task_is_held_out_in_the_files_order(tmp_path: Path) -> None:
    world = load_world(write_hotpotqa(tmp_path))
    for split, towns in {"heldout": "Evora Jena", "validation": "Delft Imola"}.items():
        asked = [world.task(split, index).messages[-1]["content"] for index in range(2)]
        assert asked == [f"How long is the river that flows through {town}?" for town in towns.split()]


# ------------------------------------------------------------------------------------------------- webshop


def outcome_of_expert(world: World, asked: str) -> float:
    [task] = [task for task in promises.all_tasks(world) if asked in task.messages[0]["content"]]
    episode = world.open(task)
    assert len(promises.follow_expert(episode)) < 20
    assert episode.is_done
    return episode.outcome()


@pytest.mark.parametrize(
    ("options", "wished", "outcome"),
    [
        ({"Size ": [{"value": " small "}]}, ["small"], 1.0),
        ({"Size": [{"value": "small/"}]}, ["small"], 1.0),
        ({"Color": [{"value": "black/white"}, {"value": "red"}]}, ["black | white"], 1.0),
        ({"Color": [{"value": "navy  blue"}]}, ["navy"], 1.0),
        ({"Color": [{"value": "navy blue"}, {"value": "navy"}]}, ["navy"], 1.0),
        ({"Size": [{"value": "small"}, {"value": "x small"}]}, ["x small"], 1.0),
        ({"Size": [{"value": "x small"}]}, ["small"], 2 / 3),
        ({"Size": [{"value": "small"}, {"value": "large"}]}, ["small", "large"], 3 / 4),
        ({"Color": [{"value": "red"}]}, ["sky blue"], 2 / 3),
        ({"Color": [{"value": "***"}, {"value": "+"}]}, ["+"], 1.0),
        ({"Color": []}, ["red"], 2 / 3),
        ("", ["red"], 2 / 3),
    ],
)
def test_the_expert_gets_what_of_a_wish_can_be_had(
    options: Any, wished: list[str], outcome: float, tmp_path: Path
) -> None:
    write_webshop(tmp_path)
    products = read(tmp_path / "items_shuffle_1000.json")
    products[5]["customization_options"] = options
    write(tmp_path / "items_shuffle_1000.json", products)
    place = ("B000000005", 0, "instruction_options")
    asks = read(tmp_path / "items_human_ins.json")
    put(asks, place, wished)
    write(tmp_path / "items_human_ins.json", asks)
    world = load_world(f"webshop:{tmp_path / 'items_shuffle_1000.json'}")
    assert outcome_of_expert(world, "Fulda") == pytest.approx(outcome)


@pytest.mark.parametrize("product_name", [None, "", "***"])
def test_a_product_without_a_name_is_found_by_its_id_and_bought(product_name: str | None, tmp_path: Path) -> None:
    world = with_value("webshop", tmp_path, "items_shuffle_1000.json", (5, "name"), product_name)
    assert outcome_of_expert(world, "Fulda") == 1.0
    [task] = [task for task in promises.all_tasks(world) if "Fulda" in task.messages[0]["content"]]
    assert "[B000000005]" in promises.follow_expert(world.open(task))[1]["content"]


def test_of_two_products_with_one_id_the_first_is_on_sale(tmp_path: Path) -> None:
    spec = write_webshop(tmp_path)
    plain = all_messages(load_world(spec))
    products = read(tmp_path / "items_shuffle_1000.json")
    write(tmp_path / "items_shuffle_1000.json", [*products, products[0] | {"name": "Another", "pricing": "$500"}])
    assert all_messages(load_world(spec)) == plain


@pytest.mark.parametrize("id", ["nan", "B00000000512"])
def test_what_has_no_id_of_a_product_is_not_on_sale(id: str, tmp_path: Path) -> None:
    spec = write_webshop(tmp_path)
    plain = all_messages(load_world(spec))
    products = read(tmp_path / "items_shuffle_1000.json")
    write(tmp_path / "items_shuffle_1000.json", [products[0] | {"asin": id}, *products])
    world = load_world(spec)
    assert all_messages(world) == plain
    told = world.open(world.task("train", 0)).play(calling("open_product", {"product_id": id}, 0))
    assert f"there is no product '{id}'" in told[0]["content"]


@pytest.mark.parametrize(
    ("pricing", "price"),
    [("$.99", "$0.99"), ("$10.99 - $20.00", "$10.99"), ("$1,299.00", "$1299.00"), ("", "$100.00"), (None, "$100.00")],
)
def test_a_price_is_read_as_it_is_published(pricing: str | None, price: str, tmp_path: Path) -> None:
    world = with_value("webshop", tmp_path, "items_shuffle_1000.json", (0, "pricing"), pricing)
    [told] = world.open(world.task("train", 0)).play(calling("open_product", {"product_id": "B000000000"}, 0))
    assert f"Price: {price}\n" in told["content"]


def test_webshops_searches_are_remembered_as_an_episode_is_opened_again_for_each_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = load_world(write_webshop(tmp_path))
    task, searched = world.task("train", 0), []
    monkeypatch.setattr(search, "_best_matches", lambda *arguments: searched.append(arguments) or [])
    for _ in range(3):
        world.open(task).play(calling("search", {"query": "shirt"}, 0))
    assert len(searched) == 1


# --------------------------------------------------------------------------------------------------- cache


@pytest.mark.parametrize("name", ["hotpotqa", "webshop"])
@pytest.mark.parametrize("pattern", ["*.jsonl", "*.fts.db"])
@pytest.mark.parametrize("share_left", [0.0, 0.5])
def test_a_search_corpus_that_was_damaged_in_the_cache_is_made_again(
    name: str, pattern: str, share_left: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    spec = WRITERS[name](tmp_path)
    load_world(spec)
    [kept] = (tmp_path / "cache" / "stepagent").glob(pattern)
    kept.write_bytes(kept.read_bytes()[: int(len(kept.read_bytes()) * share_left)])
    world = load_world(spec)
    told = promises.follow_expert(world.open(world.task("train", 0)))[1]["content"]
    assert "Alba" in told
