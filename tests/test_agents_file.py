"""`agents.toml` says what it means, or is refused with the line, the table and the key of everything that is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.agents import AgentsFile, AgentsFileProblem, line_of, read_agents
from tests.serving import ROOT


def write(folder: Path, text: str) -> Path:
    file = folder / "agents.toml"
    file.write_text(text, "utf-8")
    return file


def problem(folder: Path, text: str) -> str:
    with pytest.raises(AgentsFileProblem) as refusal:
        read_agents(write(folder, text))
    return str(refusal.value)


def test_the_example_says_what_it_means() -> None:
    found = read_agents(ROOT / "examples" / "agents.toml")
    assert list(found.agents) == ["clerk", "support", "plain"]
    assert found.agents["support"].sampling.said == {"temperature": 0.3, "max_tokens": 200}
    assert (found.agents["clerk"].promote, found.agents["clerk"].canary_share) == ("canary", 0.1)
    assert found.agents["plain"].system_prompt == ""


def test_paths_are_those_of_the_files_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "a.md").write_text("Be brief.\n")
    (tmp_path / "d.jsonl").touch()
    file = write(tmp_path, '[agents.a]\nsystem_file = "prompts/a.md"\ndemonstrations = ["d.jsonl"]\n')
    monkeypatch.chdir("/")
    agent = read_agents(file).agents["a"]
    assert agent.system_prompt == "Be brief."
    assert agent.demonstrations == (tmp_path / "d.jsonl",)


def test_tools_are_read_with_their_source_and_their_bounds(tmp_path: Path) -> None:
    text = """
[agents.a]
tools = ["shop", "sums", "calculator", "web"]
[tools.shop]
mcp = {command = "python", args = ["-m", "shop"], env = {SHOP = "1"}}
timeout_s = 2.5
max_output_chars = 1000
allow = ["find", "buy"]
[tools.sums]
import = "package.module:tools"
[tools.web]
mcp = {url = "https://tools.example/mcp", headers = {authorization = "Bearer x"}}
"""
    found = read_agents(write(tmp_path, text))
    shop = found.tools["shop"]
    assert shop.mcp is not None
    assert shop.mcp.words == ("python", "-m", "shop")
    assert (shop.timeout_s, shop.max_output_chars, shop.allow) == (2.5, 1000, ("find", "buy"))
    assert found.tools["sums"].import_path == "package.module:tools"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "it names no agent: write a table [agents.NAME]"),
        ("[agents.a]\nx = " + "[" * 5000, "is no TOML: maximum recursion depth"),
        ("[agents.a\n", "is no TOML: Expected ']' at the end of a table declaration (at line 1"),
        ("[agents.a]\n[agents.a]\n", "at line 2"),
        ("[agent.a]\n", "line 1, `agent`: there is no such key (did you mean 'agents'?)"),
        ("[agents]\na = 3\n", "line 2, agent 'a': this must be a table"),
        ("agents = 3\n", "line 1, `agents`: this must be a table"),
        ("# x\n[agents.a]\nsytem = 'x'\n", "line 3, agent 'a', `sytem`: there is no such key (did you mean 'system'?)"),
        ("[agents.a]\ntemperature = 1\n", "line 2, agent 'a', `temperature`: there is no such key (did you mean"),
        ("[agents.a]\nsystem = 3\n", "line 2, agent 'a', `system`: Input should be a valid string, not 3"),
        ("[agents.a]\nsampling = {top_p = 0}\n", "line 2, agent 'a', `sampling.top_p`: Input should be greater than 0"),
        ("[agents.a.sampling]\n\ntemperature = '1'\n", "line 3, agent 'a', `sampling.temperature`: Input should"),
        ("[agents.a]\npromote = 'yes'\n", "line 2, agent 'a', `promote`: Input should be 'auto', 'canary', 'ask' or"),
        ("[agents.a]\ncanary_share = 2\n", "line 2, agent 'a', `canary_share`: Input should be less"),
        ("[agents.a]\nlearn_every = -1\n", "line 2, agent 'a', `learn_every`"),
        ("[agents.a]\napproval_days = inf\n", "line 2, agent 'a', `approval_days`"),
        ("[agents.a]\ndemonstrations = ['no.jsonl']\n", "no.jsonl is not a file"),
        ("[agents.a]\nsystem_file = 'no.md'\n", "line 2, agent 'a', `system_file`:"),
        ("[agents.a]\nsystem = 'x'\nsystem_file = 'agents.toml'\n", "are both given: leave one of them out"),
        ("[agents.a]\ntools = ['calculater']\n", "no tool 'calculater' (did you mean 'calculator'?): there are"),
        ("[agents.a]\ntools = ['x', 'x']\n[tools.x]\nimport='a:b'", "line 2, agent 'a', `tools`: 'x' is named twice"),
        ("[agents.base]\n", "'base' is what an adapter is called"),
        ("[agents.agent]\n", "'agent' is what an adapter is called"),
        ("[agents.a-v0001]\n", "'a-v0001' is what an adapter is called"),
        ("[agents.'two words']\n", "'two words' is no name of an agent"),
        (f"[agents.{'a' * 60}]\n", "at most 48 of them"),
        ("[tools.x]\n", "line 1, tool 'x': give either `import` (an import path) or `mcp` (a server)"),
        ("[tools.x]\nimport = 'a.b'\n", "line 2, tool 'x', `import`: 'a.b' is no import path: write it as package.mod"),
        ("[tools.calculator]\nimport = 'a:b'\n", "'calculator' is a tool of the server already"),
        ("[tools.x]\nmcp = {}\n", "line 2, tool 'x', `mcp`: give either `command` (a program) or `url`"),
        ("[tools.x]\nmcp = {command = ''}\n", "`command` is empty: name the program"),
        ("[tools.x]\nmcp = {url = 'ftp://a'}\n", "line 2, tool 'x', `mcp.url`"),
        ("[tools.x]\nmcp = {url = 'http://a', args = ['b']}\n", "go with `command`, not with `url`"),
        ("[tools.x]\nmcp = {comand = 'a'}\n", "`mcp.comand`: there is no such key (did you mean 'command'?)"),
        ("[tools.x]\nimport = 'a:b'\nallow = []\n", "`allow` is empty, so that no tool is left"),
        ("[tools.x]\nimport = 'a:b'\ntimeout_s = 0\n", "line 3, tool 'x', `timeout_s`"),
    ],
)
def test_what_is_wrong_is_told_with_its_place(tmp_path: Path, text: str, said: str) -> None:
    told = problem(tmp_path, text)
    assert said in told
    assert str(tmp_path / "agents.toml") in told
    assert "pydantic" not in told


def test_an_editors_mark_of_utf8_is_part_of_neither_file_nor_prompt(tmp_path: Path) -> None:
    """Of the file it was no TOML, "at line 1, column 1"; of the prompt it was its first letter."""
    (tmp_path / "a.md").write_text("Be brief.", "utf-8-sig")
    file = tmp_path / "agents.toml"
    file.write_text('[agents.a]\nsystem_file = "a.md"\n', "utf-8-sig")
    assert read_agents(file).agents["a"].system_prompt == "Be brief."


def test_everything_that_is_wrong_is_told_at_once(tmp_path: Path) -> None:
    told = problem(tmp_path, "[agents.a]\nsystem = 1\n[agents.b]\nlearn_every = 'x'\nworlds = ''\n")
    assert [line.split(",")[0].rsplit(" ", 1)[1] for line in told.splitlines()] == ["2", "4", "5"]


def test_a_file_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    with pytest.raises(AgentsFileProblem, match="No such file"):
        read_agents(tmp_path / "none.toml")
    (tmp_path / "latin.toml").write_bytes(b"[agents.a]\nsystem = '\xe4'\n")
    with pytest.raises(AgentsFileProblem, match="cannot be read"):
        read_agents(tmp_path / "latin.toml")


_SCALARS: Any = st.one_of(st.booleans(), st.integers(-3, 3), st.floats(-2, 2), st.text("ab:-. ", max_size=6))
_KEYS = st.sampled_from([*AgentsFile.model_fields, "system", "sampling", "mcp", "import", "x", "top_p", "allow"])
_VALUES: Any = st.recursive(
    _SCALARS, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(_KEYS, inner, max_size=3), max_leaves=8
)


def toml_of(value: Any) -> str:
    """A value as TOML writes it in one line."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {toml_of(each)}" for key, each in value.items()) + "}"
    return "[" + ", ".join(map(toml_of, value)) + "]" if isinstance(value, list) else repr(value)


@given(st.dictionaries(_KEYS, _VALUES, max_size=4))
def test_whatever_the_file_says_it_is_read_or_refused_with_sentences(
    tmp_path_factory: pytest.TempPathFactory, tables: dict[str, Any]
) -> None:
    text = "".join(f"{key} = {toml_of(value)}\n" for key, value in tables.items())
    file = write(tmp_path_factory.getbasetemp(), text)
    said = []
    try:
        read_agents(file)
    except AgentsFileProblem as refusal:
        said = str(refusal).splitlines()
    assert all(str(file) in line for line in said)


def test_the_line_of_a_key_is_found_in_whatever_form_it_is_written() -> None:
    text = '[agents . "a"] # first\ntools = [\n  "x",\n]\n\n[agents.b]\nsampling.top_p = 1\n'
    assert line_of(text, ("agents", "a", "tools", "0")) == 2
    assert line_of(text, ("agents", "b", "sampling", "top_p")) == 7
    assert line_of(text, ("agents", "b", "world")) == 6
    assert line_of(text, ("tools", "x")) is None
