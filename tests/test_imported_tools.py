"""Tools of the user's own code: found by an import path or refused in words; whatever they do, the server lives."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

from policies.types import ToolCall
from runtime.agent import tool_calls
from runtime.agent.tool_calls import run_tool_calls
from runtime.agent.tool_outputs import shown
from runtime.agent.tool_threads import MAX_LEFT_BEHIND, ToolThreads
from runtime.agent.tools import Toolbox
from runtime.store.episodes import ToolResult
from tests.conftest import ServeScripted
from tests.serving import MODEL
from tools.bounds import ToolBounds
from tools.imported import imported_tools
from tools.shelf import OfferedTools, ToolShelf, ToolSource

CODE = '''
import asyncio, sys, threading, time
from dataclasses import dataclass
from typing import Annotated, Any
from langchain_core.documents import Document
from langchain_core.messages import ToolMessage
from langchain_core.tools import BaseTool, BaseToolkit, InjectedToolArg, StructuredTool, tool
from pydantic import BaseModel

def undecorated(text: str) -> str:
    """A function."""
    return text

@tool
def greet(name: str) -> str:
    """Greet somebody."""
    return f"Good day, {name}."

class Greet(BaseTool):
    name: str = "greet_again"
    description: str = "Greet somebody once more."
    def _run(self, name: str) -> str:
        return f"Good day again, {name}."

class Kit(BaseToolkit):
    def get_tools(self):
        return [greet, Greet()]

def make_tools():
    return [greet, Greet()]

def make_none():
    return None

def make_wrong():
    return [greet, "greet"]

def make_nothing():
    return []

def make_failing():
    raise KeyError("no such shop")

async def make_later():
    return [greet]

class Holder:
    greet = greet

twice = [greet, greet]

@tool("a name with spaces")
def spaced() -> str:
    """Has no name that models know."""
    return ""

@tool("calculator")
def sums(expression: str) -> str:
    """Has the name of another tool."""
    return ""

@tool
def lonely(shop: Annotated[Any, InjectedToolArg], name: str) -> str:
    """Wants what the model does not give."""
    return ""

class Unwritable(BaseModel):
    model_config = {"arbitrary_types_allowed": True}
    lock: type(threading.Lock())

@tool(description="Half of a letter: \\ud800.")
def halved(text: str) -> str:
    return text

@tool(args_schema=Unwritable)
def locked(lock) -> str:
    """Has arguments that JSON has no schema for."""
    return ""

@dataclass
class Price:
    amount: int
    of: Any = None

class Item(BaseModel):
    name: str

OUTPUTS = {
    "none": None, "bytes": b"gr\\xc3\\xbc\\xc3\\x9fe", "noise": b"\\xff\\xfe\\x00", "number": 12,
    "price": Price(3, Item(name="globe")), "set": {1}, "pair": {(1, 2): 3}, "nan": float("nan"), "object": Price,
    "message": ToolMessage("hi", tool_call_id="x"),
    "blocks": [{"type": "text", "text": "a"}, {"type": "image", "base64": "AAAA", "mime_type": "image/png"}],
    "documents": [Document("a globe")], "surrogate": "a\\ud83d", "long": "x" * 10**8, "many": list(range(10**6)),
    "huge": 10**5000, "long bytes": b"x" * 10**7,
}

@tool
def give(kind: str) -> Any:
    """Give back anything."""
    return OUTPUTS[kind]

@tool
def circle() -> Any:
    """Give back what holds itself."""
    found = []
    found.append(found)
    return found

class Mute(Exception):
    def __str__(self):
        raise RuntimeError

@tool
def go_wrong(kind: str) -> str:
    """Raise something."""
    raise {"exit": SystemExit(3), "interrupt": KeyboardInterrupt(), "stop": StopIteration("x"), "memory": MemoryError(),
           "cancelled": asyncio.CancelledError(), "generator": GeneratorExit(), "mute": Mute(),
           "recursion": RecursionError("deep")}[kind]

@tool
async def go_wrong_later(kind: str) -> str:
    """Raise something on an event loop."""
    go_wrong.func(kind)

@tool
def where() -> str:
    """The thread it runs in."""
    return threading.current_thread().name

released = threading.Event()

@tool
def hang() -> str:
    """Wait for a long time."""
    released.wait(60)
    return "released"

@tool
async def block() -> str:
    """Block the event loop it runs on."""
    released.wait(60)
    return "released"

@tool
async def loop_of() -> str:
    """The loop it runs on."""
    return str(id(asyncio.get_running_loop()))

forgot_to_await = StructuredTool.from_function(make_later, name="forgot", description="Forgot to await.")
'''


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("code")
    (folder / "shop_tools.py").write_text(CODE)
    (folder / "broken_tools.py").write_text("import no_such_package_at_all")
    (folder / "failing_tools.py").write_text("1 / 0")
    (folder / "ending_tools.py").write_text("raise SystemExit(3)")
    sys.path.insert(0, str(folder))
    import shop_tools  # type: ignore[import-not-found]

    yield shop_tools
    sys.path.remove(str(folder))


def names(path: str, *allow: str) -> list[str]:
    return [tool.name for tool in imported_tools(path, allow or None)]


# ------------------------------------------------------------------------------------------------ found


@pytest.mark.parametrize(
    ("attribute", "expected"),
    [
        ("greet", ["greet"]),
        ("make_tools", ["greet", "greet_again"]),
        ("Greet", ["greet_again"]),
        ("Kit", ["greet", "greet_again"]),
        ("Holder.greet", ["greet"]),
    ],
)
def test_a_path_names_a_tool_or_whatever_gives_tools(code: Any, attribute: str, expected: list[str]) -> None:
    assert names(f"shop_tools:{attribute}") == expected


def test_they_stand_beside_the_built_in_ones_in_order(code: Any) -> None:
    source = ToolSource("shop_tools:make_tools", bounds=ToolBounds(2.0, 10), allow=("greet_again",))
    offered = ToolShelf({"shop": source}).offer(["calculator", "shop_tools:greet", "shop"])
    assert [tool.name for tool in offered.tools] == ["calculator", "greet", "greet_again"]
    assert offered.bounds == {"greet_again": ToolBounds(2.0, 10)}


@pytest.mark.parametrize(
    ("path", "told"),
    [
        (
            "no_such_shop.tools:x",
            "there is no module 'no_such_shop'; is it installed here, or its folder on",
        ),
        ("shop_tools.inner:x", "there is no module 'shop_tools.inner'"),
        ("broken_tools:x", "broken_tools needs the module 'no_such_package_at_all', which is not installed"),
        ("failing_tools:x", "importing failing_tools failed: ZeroDivisionError: division by zero"),
        ("ending_tools:x", "importing ending_tools failed: SystemExit: 3"),
        ("shop_tools:nothing", "shop_tools has no 'nothing'; its tools are greet, spaced, sums"),
        ("shop_tools:undecorated", "takes arguments .*: decorate it with @tool of langchain_core.tools"),
        ("shop_tools:OUTPUTS", "is a dict, not a LangChain tool"),
        ("shop_tools:make_none", "is nothing .None., not a LangChain tool"),
        ("shop_tools:make_wrong", "is a list, not a LangChain tool"),
        ("shop_tools:make_nothing", "gives no tools"),
        ("shop_tools:make_failing", "calling it failed: KeyError: 'no such shop'"),
        ("shop_tools:make_later", "is asynchronous"),
        ("shop_tools:twice", "two tools are called 'greet'"),
        ("shop_tools:spaced", "'a name with spaces' is no name that models know tools by"),
        ("shop_tools:lonely", "lonely wants shop from LangGraph"),
        ("shop_tools:halved", "the schema of the tool 'halved' cannot be written as JSON"),
        ("shop_tools:locked", "the arguments of locked have no JSON schema: PydanticInvalidForJsonSchema"),
    ],
)
def test_what_is_no_tool_is_refused_in_words(code: Any, path: str, told: str) -> None:
    with pytest.raises(ValueError, match=told) as refusal:
        ToolShelf().offer([path])
    assert str(refusal.value).startswith(path)


def test_two_tools_of_one_name_are_refused(code: Any) -> None:
    with pytest.raises(ValueError, match="the tools calculator, shop_tools:sums: two tools are called 'calculator'"):
        ToolShelf().offer(["calculator", "shop_tools:sums"])


def test_an_allowed_tool_that_is_not_there_is_told(code: Any) -> None:
    assert names("shop_tools:make_tools", "greet_again") == ["greet_again"]
    with pytest.raises(ValueError, match="allow names 'fly', but its tools are greet, greet_again"):
        names("shop_tools:make_tools", "fly")


def test_the_server_says_so_before_it_starts(code: Any, tmp_path: Path) -> None:
    command = [sys.executable, "serve.py", "--state", str(tmp_path), "--port", "0", "--tools", "no_such_shop:x"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
    assert ended.returncode == 1
    assert ended.stderr.startswith("cannot start: no_such_shop:x: there is no module 'no_such_shop'")


# -------------------------------------------------------------------------------------------------- run


async def call(tool: Any, timeout_s: float = 5.0, /, bounds: ToolBounds = ToolBounds(), **arguments: Any) -> ToolResult:  # noqa: B008
    calls = [ToolCall("c", tool.name, arguments)]
    (result,) = await run_tool_calls(calls, {tool.name: tool}, timeout_s, {tool.name: bounds})
    return result


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        ("none", "null"), ("bytes", "grüße"), ("noise", "[3 bytes that are no text]"), ("number", "12"),
        ("price", '{"amount": 3, "of": {"name": "globe"}}'), ("set", "[1]"), ("pair", "{(1, 2): 3}"), ("nan", "NaN"),
        ("object", "\"<class 'shop_tools.Price'>\""), ("message", "hi"), ("blocks", "a\n[image image/png: not shown]"),
        ("surrogate", "a?"),
    ],
)  # fmt: skip
async def test_whatever_a_tool_gives_back_is_text(code: Any, kind: str, content: str) -> None:
    result = await call(code.give, kind=kind)
    assert (result.is_error, result.content) == (False, content)


@pytest.mark.parametrize("kind", ["long", "long bytes", "many", "documents"])
async def test_of_what_is_long_the_beginning_is_shown_with_a_mark(code: Any, kind: str) -> None:
    began = time.process_time()
    result = await call(code.give, kind=kind, bounds=ToolBounds(max_output_chars=30))
    assert not result.is_error
    assert "[cut here: the whole output " in result.content
    assert len(result.content) < 100
    assert time.process_time() - began < 1.0


async def test_what_cannot_be_written_is_an_error(code: Any) -> None:
    assert (await call(code.give, kind="huge")).is_error
    assert (await call(code.circle)).content == "[[...]]"


@pytest.mark.parametrize("kind", ["exit", "interrupt", "stop", "memory", "cancelled", "generator", "mute", "recursion"])
async def test_whatever_a_tool_raises_is_an_observation(code: Any, kind: str) -> None:
    for tool in (code.go_wrong, code.go_wrong_later):
        result = await call(tool, kind=kind)
        assert result.is_error
        assert result.content.startswith("error: ")
        assert "took longer" not in result.content
    assert (await call(code.greet, name="Ada")).content == "Good day, Ada."
    assert not (await call(code.loop_of)).is_error


async def test_a_forgotten_await_is_told(code: Any) -> None:
    result = await call(code.forgot_to_await)
    assert "gave back a coroutine" in result.content


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch, code: Any) -> Iterator[ToolThreads]:
    """Those of a test that leaves calls behind."""
    code.released.clear()
    threads = ToolThreads()
    monkeypatch.setattr(tool_calls, "_threads", threads)
    yield threads
    code.released.set()


@pytest.mark.parametrize("name", ["hang", "block"])
async def test_tools_that_hang_cost_nobody_else_anything(
    code: Any, threads: ToolThreads, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pool of threads was full after six such calls, and then nothing was logged any more."""
    monkeypatch.setattr("runtime.agent.tool_threads.STUCK_AFTER_S", 0.05)
    tool = getattr(code, name)
    for _ in range(MAX_LEFT_BEHIND):
        assert (await call(tool, 0.1)).content == f"error: {name} took longer than 0.1 seconds"
        assert await asyncio.wait_for(asyncio.to_thread(lambda: "free"), 1.0) == "free"
        assert (await call(code.greet, name="Ada")).content == "Good day, Ada."
        await asyncio.sleep(0.06)
    assert "hang" in (await call(tool, 0.1)).content
    code.released.set()
    await asyncio.sleep(0.2)
    assert (await call(tool)).content == "released"


async def test_asynchronous_tools_share_a_loop_that_is_not_the_servers(code: Any) -> None:
    first, second = (await call(code.loop_of)).content, (await call(code.loop_of)).content
    assert first == second != str(id(asyncio.get_running_loop()))
    assert (await call(code.where)).content == "tool-where"


def test_a_hanging_tool_does_not_keep_the_process_from_ending(code: Any, tmp_path: Path) -> None:
    program = f"""
import asyncio, sys
sys.path.insert(0, {str(Path(code.__file__).parent)!r})
from policies.types import ToolCall
from runtime.agent.tool_calls import run_tool_calls
from shop_tools import hang
print(asyncio.run(run_tool_calls([ToolCall("c", "hang", {{}})], {{"hang": hang}}, 0.1))[0].content)
"""
    began = time.monotonic()
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=50, check=True)
    assert ended.stdout == "error: hang took longer than 0.1 seconds\n"
    assert time.monotonic() - began < 40


CALL = '<tool_call>\n{{"name": "{}", "arguments": {}}}\n</tool_call>'


def test_an_episode_goes_on_whatever_its_tools_do(
    code: Any, threads: ToolThreads, serve_scripted: ServeScripted
) -> None:
    tools = [code.go_wrong, code.hang, code.give, code.greet]
    says = [
        CALL.format("go_wrong", '{"kind": "exit"}'),
        CALL.format("hang", "{}"),
        CALL.format("give", '{"kind": "long"}'),
        CALL.format("greet", '{"name": "Ada"}'),
        "That was all.",
    ]
    box = Toolbox(tools, bounds={"hang": ToolBounds(timeout_s=0.1), "give": ToolBounds(max_output_chars=10)})
    served = serve_scripted(*says, toolbox=box)
    client: OpenAI = served.client()
    answer = client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "Try them all."}])
    assert answer.choices[0].message.content == "That was all."
    (episode,) = served.parts.log.episodes()
    results = [step.tool_results[0].content for step in served.parts.log.steps(episode.id) if step.tool_results]
    assert results == [
        "error: it ended with SystemExit (3)",
        "error: hang took longer than 0.1 seconds",
        "xxxxxxxxxx\n[cut here: the whole output has 100000000 characters]",
        "Good day, Ada.",
    ]


def test_nothing_that_is_shown_is_longer_than_it_may_be() -> None:
    for output in ("é" * 100, b"\xc3\xa9" * 100, ["é" * 100], {"a": "b" * 100}, [{"type": "text", "text": "é" * 100}]):
        text = shown(output, 25)
        assert len(text.partition("\n[cut here")[0]) == 25
        assert "\n[cut here: the whole output" in text


def test_the_example_of_offered_tools_is_empty_by_default() -> None:
    assert OfferedTools().tools == ()
    assert threading.active_count() < 200
