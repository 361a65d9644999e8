"""The tools that come with the server: arithmetic that cannot be talked into more, and search that takes any query."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from langchain_core.tools import BaseTool
from langchain_core.utils.function_calling import convert_to_openai_tool

from tools import TOOL_NAMES
from tools.calculator import calculator
from tools.search import search_tool
from tools.shelf import ToolShelf


def work_out(expression: str) -> str:
    return calculator.invoke({"expression": expression})


# -------------------------------------------------------------------------------------------- calculator

expressions = st.recursive(
    st.integers(0, 10**6).map(str) | st.floats(0, 1e6).map(repr),
    lambda inner: (
        st.tuples(inner, st.sampled_from(["+", "-", "*", "/", "//", "%"]), inner).map(
            lambda parts: f"({parts[0]} {parts[1]} {parts[2]})"
        )
        | inner.map(lambda operand: f"-{operand}")
    ),
    max_leaves=6,
)


@given(expression=expressions)
def test_it_works_out_what_python_does(expression: str) -> None:
    try:
        expected = eval(expression)
    except ZeroDivisionError:
        with pytest.raises(ValueError, match=r"zero|modulo"):
            work_out(expression)
        return
    if not math.isfinite(expected):
        with pytest.raises(ValueError, match="too large"):
            work_out(expression)
        return
    assert float(work_out(expression)) == pytest.approx(float(expected))


@pytest.mark.parametrize(
    ("expression", "result"),
    [
        ("2 + 2", "4"),
        ("(12.5 * 4) / 3", "16.666666666666668"),
        ("10 / 2", "5"),
        ("2 ** 64", "18446744073709551616"),
        ("  7 // 2 ", "3"),
        ("-3 % 5", "2"),
        ("1e300 * 10", "1e+301"),
        ("2 ** -1", "0.5"),
        ("0.1 + 0.2", "0.30000000000000004"),
        ("12_000 + 1", "12001"),
    ],
)
def test_results_are_written_plainly(expression: str, result: str) -> None:
    assert work_out(expression) == result


@pytest.mark.parametrize(
    "expression",
    [
        "__import__('os').system('true')", "().__class__.__bases__", "open('/etc/passwd').read()", "x", "x := 3",
        "[1, 2][0]", "lambda: 3", "'a' * 10", "b'a'", "f'{1}'", "True + 1", "None", "1 if 1 else 2", "1 < 2", "1 and 2",
        "1 << 10", "~1", "1 @ 2", "1; 2", "import os", "2 + ", "", " ", "(", "3j", "1e400", "1e308 * 10", "-1e400",
        "9 ** 9 ** 9", "(-9) ** 9 ** 9", "2 ** 10 ** 10", "(2 ** 4000) ** 4000", "(-1) ** 0.5", "1 / 0", "1 % 0",
        "0 ** -1", "0.0 ** -1", "2 ** 4000 * 1.5", "1.5 ** 100000", "(1e308 * 10) - (1e308 * 10)", "1" * 501,
        "\x00", "1 +\x00 1", "２ ＋ ２", "\ud83d", "1+" * 249 + "1j", "2 ** 10 ** 400",
        "9" * 499 + "é", "((-1) ** 0.5) // 1", "((-1) ** 0.5) % 1", "(" * 249 + "1" + ")" * 249,
    ],
)  # fmt: skip
def test_anything_else_is_refused_in_one_sentence_and_at_once(expression: str) -> None:
    began = time.process_time()
    with pytest.raises(ValueError, match=r".") as caught:
        work_out(expression)
    assert time.process_time() - began < 0.5
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700


@given(expression=st.text("0123456789.+-*/%()e_j \n", max_size=60))
def test_no_text_is_anything_but_a_number_or_a_refusal(expression: str) -> None:
    try:
        result = work_out(expression)
    except ValueError:
        return
    assert float(result) == float(result)


def test_deep_arithmetic_is_still_arithmetic() -> None:
    assert work_out("-" * 499 + "1") == "-1"
    assert work_out("1+" * 249 + "1") == "250"


def test_large_whole_numbers_are_written_out_or_refused() -> None:
    """Python itself refuses to write integers of more than 4300 digits, in words that help no agent."""
    assert len(work_out("2 ** 4095")) == 1233
    expression = " * ".join(["2 ** 4000"] * 40)
    with pytest.raises(ValueError, match="too large"):
        work_out(expression)


# ------------------------------------------------------------------------------------------------ search


def corpus_of(folder: Path, *documents: dict[str, str]) -> Path:
    path = folder / "corpus.jsonl"
    path.write_text("".join(json.dumps(document, ensure_ascii=False) + "\n" for document in documents), "utf-8")
    return path


@pytest.fixture
def search(tmp_path: Path) -> BaseTool:
    return search_tool(
        corpus_of(
            tmp_path,
            {"title": "Globes", "text": "A brass globe shows the seas and the shipping lanes."},
            {"title": "Teapots", "text": "A silver teapot pours well. It is not a globe, but globes are round too."},
            {"title": "Grüße", "text": "Müllers Straße führt zum 図書館 and the Café."},
        )
    )


def found(search: BaseTool, query: str, **options: int) -> str:
    return search.invoke({"query": query, **options})


def test_the_best_passage_comes_first(search: BaseTool) -> None:
    results = found(search, "brass globe")
    assert results.startswith("Globes: A brass globe")
    assert "Teapots:" in results


def test_words_are_found_in_any_form(search: BaseTool) -> None:
    assert found(search, "ships pouring").count("\n\n") == 1


def test_the_title_counts_too(search: BaseTool) -> None:
    assert found(search, "teapots").startswith("Teapots:")


@pytest.mark.parametrize("query", ["müllers", "MULLERS", "図書館", "cafe", "Straße"])
def test_any_script_is_found(search: BaseTool, query: str) -> None:
    assert found(search, query).startswith("Grüße:")


@pytest.mark.parametrize("num_results", [-3, 0, 1])
def test_at_least_one_result_is_shown(search: BaseTool, num_results: int) -> None:
    assert found(search, "globe", num_results=num_results).count("\n\n") == 0


def test_nothing_found_is_said(search: BaseTool) -> None:
    assert found(search, "zeppelin") == "No passage matches these words."


@pytest.mark.parametrize("query", ["", " ", '"', "***", "()", "\x00", "\u200b"])
def test_a_query_without_words_is_refused(search: BaseTool, query: str) -> None:
    with pytest.raises(ValueError, match="no words"):
        found(search, query)


@pytest.mark.parametrize(
    "query",
    ['globe"', "globe AND", "NEAR(globe", "globe*", "title:globe", "globe -brass", "NOT", "' OR 1=1 --", "{globe}",
     "^globe", "globe\x00brass", "é" * 5000, "globe " * 5000, "\ud83dglobe", "_", "³"],
)  # fmt: skip
def test_no_query_is_an_error_of_the_database(search: BaseTool, query: str) -> None:
    assert found(search, query)


def test_a_changed_corpus_is_indexed_anew(tmp_path: Path) -> None:
    path = corpus_of(tmp_path, {"title": "Old", "text": "globe"})
    search_tool(path)
    corpus_of(tmp_path, {"title": "New", "text": "globe"})
    os.utime(path, (time.time() + 10,) * 2)
    assert found(search_tool(path), "globe") == "New: globe"


def test_a_changed_corpus_is_noticed_where_the_clock_did_not_move(tmp_path: Path) -> None:
    path = corpus_of(tmp_path, {"title": "Old", "text": "globe"})
    search_tool(path)
    stat = path.stat()
    corpus_of(tmp_path, {"title": "Newer", "text": "globe"})
    os.utime(path, ns=(stat.st_mtime_ns, stat.st_mtime_ns))
    assert found(search_tool(path), "globe") == "Newer: globe"


@pytest.mark.parametrize("line", ["not json", "[]", '"text"', '{"title": "x"}', "3", "[" * 5000])
def test_a_line_that_is_no_document_is_named(tmp_path: Path, line: str) -> None:
    path = corpus_of(tmp_path, {"title": "A", "text": "b"})
    path.write_text(path.read_text("utf-8") + "\n" + line, "utf-8")
    with pytest.raises(ValueError, match=r"corpus\.jsonl line 3"):
        search_tool(path)


def test_a_corpus_that_is_missing_or_not_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a file"):
        search_tool(tmp_path / "nothing.jsonl")
    binary = tmp_path / "binary.jsonl"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"binary\.jsonl"):
        search_tool(binary)


def test_an_index_that_is_damaged_is_made_anew(tmp_path: Path) -> None:
    path = corpus_of(tmp_path, {"title": "A", "text": "globe"})
    path.with_name("corpus.jsonl.fts.db").write_bytes(b"not a database, but long enough to be read as one" * 100)
    assert found(search_tool(path), "globe") == "A: globe"


def test_a_long_query_does_not_take_long(search: BaseTool) -> None:
    began = time.process_time()
    found(search, " ".join(f"word{number}" for number in range(20_000)))
    assert time.process_time() - began < 1.0


def test_an_empty_corpus_finds_nothing(tmp_path: Path) -> None:
    assert found(search_tool(corpus_of(tmp_path)), "globe") == "No passage matches these words."


def test_a_unicode_line_separator_within_a_document_does_not_split_it(tmp_path: Path) -> None:
    """JSON text may hold U+2028 raw; JSONL's lines end at a newline alone."""
    path = corpus_of(tmp_path, {"title": "A", "text": "one\u2028two\x85three"})
    assert "two" in found(search_tool(path), "two")


# ----------------------------------------------------------------------------------------------- loading


def test_tools_are_loaded_by_name_in_order(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path, {"title": "A", "text": "b"})
    names = ["search", "calculator"]
    assert [each.name for each in ToolShelf({}, corpus).offer(names).tools] == names
    assert set(names) == set(TOOL_NAMES)


def test_an_unknown_tool_or_a_missing_corpus_says_what_to_give() -> None:
    with pytest.raises(ValueError, match="no tool is called 'fly'; there are: calculator, search"):
        ToolShelf().offer(["fly"])
    with pytest.raises(ValueError, match="--search-corpus"):
        ToolShelf().offer(["search"])


def test_every_tool_describes_itself_and_its_arguments(tmp_path: Path) -> None:
    for each in ToolShelf({}, corpus_of(tmp_path)).offer(TOOL_NAMES).tools:
        function = convert_to_openai_tool(each)["function"]
        assert len(function["description"]) > 20
        assert function["parameters"]["properties"]
