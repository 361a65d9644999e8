"""Tools of MCP servers: real servers of the reference SDK, over stdio and HTTP, that answer, fail, hang and die."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from policies.types import ToolCall
from runtime.agent.tool_calls import run_tool_calls
from runtime.agent.tools import Toolbox
from runtime.store.episodes import ToolResult
from tests.conftest import ServeScripted
from tests.serving import MODEL, wait_until
from tests.test_serve import started
from tools.bounds import ToolBounds
from tools.mcp_servers import McpAddress
from tools.schemas import schema_of
from tools.shelf import OfferedTools, ToolShelf, ToolSource

pytest.importorskip("langchain_mcp_adapters", reason="needs the extra `mcp`")

SERVER = Path(__file__).with_name("mcp_shop.py")
Offer = Callable[..., OfferedTools]


@pytest.fixture
def offer() -> Iterator[Offer]:
    """Offers the tools of servers by their names."""
    shelves: list[ToolShelf] = []

    def make(names: list[str] | None = None, **sources: ToolSource) -> OfferedTools:
        shelves.append(ToolShelf(sources))
        return shelves[-1].offer(names or [*sources])

    yield make
    for shelf in shelves:
        shelf.close()


@pytest.fixture(scope="module")
def shop() -> Iterator[OfferedTools]:
    """The tools of one server, for tests that leave it alive."""
    shelf = ToolShelf({"shop": stdio()})
    yield shelf.offer(["shop"])
    shelf.close()


def stdio(*arguments: str, env: dict[str, str] | None = None, **more: Any) -> ToolSource:
    return ToolSource(mcp=McpAddress((sys.executable, str(SERVER), *arguments), env or {}), **more)


async def ask(offered: OfferedTools, name: str, timeout_s: float = 20.0, /, **arguments: Any) -> ToolResult:
    tools = {tool.name: tool for tool in offered.tools}
    (result,) = await run_tool_calls([ToolCall("c", name, arguments)], tools, timeout_s, offered.bounds)
    return result


async def said(offered: OfferedTools, name: str, **arguments: Any) -> str:
    result = await ask(offered, name, **arguments)
    assert not result.is_error, result.content
    return result.content


def tools_on_offer(url: str, agent: str) -> list[str]:
    """Their names, in the log of a request to this agent."""
    body = {"model": agent, "max_tokens": 1, "messages": [{"role": "user", "content": "Hello."}]}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body).raise_for_status()
    path = f"/v1/episodes/{answer.headers['x-episode-id']}?with_tokens=true"
    (step, *_) = httpx.get(f"{url}{path}").raise_for_status().json()["steps"]
    return [tool["function"]["name"] for tool in step["tools"]]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# ------------------------------------------------------------------------------------------------ stdio


async def test_its_tools_are_called_in_one_session_and_their_schemas_stay_as_they_are(shop: OfferedTools) -> None:
    schema = next(schema_of(tool) for tool in shop.tools if tool.name == "order")["function"]
    assert schema["parameters"]["$defs"]["Line"]["properties"]["item"] == {"title": "Item", "type": "string"}
    assert schema["parameters"]["properties"]["lines"]["items"] == {"$ref": "#/$defs/Line"}
    assert schema["description"] == "Order some things."
    assert await said(shop, "order", lines=[{"item": "globe", "number": 2}]) == "2 globe"
    first = await said(shop, "who")
    assert first == await said(shop, "who")


async def test_whatever_a_server_answers_is_text_for_the_agent(shop: OfferedTools) -> None:
    assert await said(shop, "picture") == "Here it is:\n[image image/png: not shown]"
    assert await said(shop, "nothing") == '{"result": []}'
    assert await said(shop, "record") == '{\n  "name": "globe",\n  "price": 12\n}'
    failed = await ask(shop, "fail", text="no such globe")
    assert (failed.is_error, failed.content) == (True, "error: Error executing tool fail: no such globe")
    wrong = await ask(shop, "order", lines="globe")
    assert wrong.is_error
    assert "lines" in wrong.content
    # Names that LangChain takes for its own.
    assert await said(shop, "odd", config="a", runtime="b", callbacks="c") == "abc"


async def test_a_call_is_bounded_in_time_and_its_result_in_size(shop: OfferedTools) -> None:
    bounds = dict.fromkeys(shop.bounds, ToolBounds(timeout_s=0.5, max_output_chars=50))
    bounded = OfferedTools(shop.tools, bounds)
    assert (
        await said(bounded, "repeat", text="x" * 500) == f"{'x' * 50}\n[cut here: the whole output has 500 characters]"
    )
    slow = await ask(bounded, "sleep", seconds=5)
    assert (slow.is_error, slow.content) == (True, "error: sleep took longer than 0.5 seconds")
    assert await said(shop, "repeat", text="y") == "y"


async def test_many_calls_run_at_once_in_one_session(shop: OfferedTools) -> None:
    began = time.monotonic()
    results = await asyncio.gather(*(said(shop, "sleep", seconds=0.5) for _ in range(20)))
    assert set(results) == {"awake"}
    assert time.monotonic() - began < 4.0


def test_an_allowed_tool_that_is_not_there_is_told(offer: Offer) -> None:
    with pytest.raises(ValueError, match=r"tools\.shop: allow names 'fly', but its tools are .*who"):
        offer(shop=stdio(allow=("fly",)))


async def test_a_tool_whose_name_is_taken_gets_its_servers_name_before_its_own(offer: Offer) -> None:
    two = stdio("--calculator", allow=("who", "calculator"))
    offered = offer(["calculator", "left", "right.shop"], left=two, **{"right.shop": two})
    names = [tool.name for tool in offered.tools]
    assert names == ["calculator", "left_who", "left_calculator", "right_shop_who", "right_shop_calculator"]
    assert await said(offered, "calculator", expression="2+2") == "4"
    assert await said(offered, "left_calculator", expression="2+2") == "the shop's: 2+2"
    assert await said(offered, "left_who") != await said(offered, "right_shop_who")


async def test_its_environment_is_what_is_listed_and_no_more(offer: Offer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEPAGENT_API_KEY", "secret")
    monkeypatch.setenv("SHOP_TOKEN", "t0ken")
    names = (await said(offer(shop=stdio(env={"SHOP": "${SHOP_TOKEN}!"})), "environment")).split()
    assert "SHOP=t0ken!" in names
    assert not [name for name in names if "secret" in name or name.startswith("SHOP_TOKEN")]
    with pytest.raises(ValueError, match="the variable NOT_SET is not set"):
        offer(shop=stdio(env={"SHOP": "${NOT_SET}"}))


async def test_a_server_that_died_is_started_again_and_ever_more_slowly(offer: Offer, tmp_path: Path) -> None:
    offered = offer(shop=stdio("--starts", str(tmp_path / "starts")))
    pid = int(await said(offered, "who"))
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not is_alive(pid))
    await asyncio.sleep(0.2)  # until its end is noticed; a call before that may or may not have reached it
    assert int(await said(offered, "who")) != pid
    (tmp_path / "starts.full").touch()  # from now on it ends at its start
    died = await ask(offered, "die")
    assert died.is_error
    assert died.content == "error: the MCP server 'shop' ended during this call: it may have had its effect"
    told = [""]
    too_late = time.monotonic() + 20.0
    while time.monotonic() < too_late and "Connection closed" not in told[-1]:
        told.append((await ask(offered, "who")).content)
    assert told[-1] == "error: the MCP server 'shop' is down and is being started again: Connection closed"
    assert len((tmp_path / "starts").read_text().split()) <= 4
    (tmp_path / "starts.full").unlink()
    while (answer := await ask(offered, "who")).is_error:
        assert time.monotonic() < too_late + 15, answer.content
        await asyncio.sleep(0.1)


async def test_a_server_that_hangs_is_started_again(offer: Offer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tools.mcp_servers.PING_S", 0.3)
    offered = offer(shop=stdio(bounds=ToolBounds(timeout_s=2.0)))
    pid = int(await said(offered, "who"))
    assert (await ask(offered, "hang")).content == "error: hang took longer than 2 seconds"
    wait_until(lambda: not is_alive(pid), 15.0)
    assert int(await said(OfferedTools(offered.tools), "who")) != pid


def test_no_server_outlives_the_shelf(offer: Offer) -> None:
    shelf = ToolShelf({"shop": stdio("--deaf")})
    pid = int(asyncio.run(said(shelf.offer(["shop"]), "who")))
    assert is_alive(pid)
    shelf.close()
    assert not is_alive(pid)


def test_no_server_outlives_a_process_that_was_killed(tmp_path: Path) -> None:
    code = f"""
import asyncio, sys
from tools.shelf import ToolShelf, ToolSource
from tools.mcp_servers import McpAddress
address = McpAddress((sys.executable, "{SERVER}", "--deaf"))
(tool,) = ToolShelf({{"shop": ToolSource(mcp=address, allow=("who",))}}).offer(["shop"]).tools
print(tool.loop.submit(tool.ainvoke({{}})).result()[0]["text"], flush=True)
import time; time.sleep(60)
"""
    root = Path(__file__).parent.parent
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=root, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert is_alive(pid)
    parent.kill()
    parent.wait()
    wait_until(lambda: not is_alive(pid))


def test_the_server_offers_them_to_its_agents_and_ends_them(tmp_path: Path) -> None:
    """serve.py from its file of agents to its end."""
    (tmp_path / "agents.toml").write_text(f"""
[agents.keeper]
system = "You keep a shop."
tools = ["shop", "calculator"]
[agents.plain]
system = "You keep a shop."
[tools.shop]
mcp = {{command = {sys.executable!r}, args = [{str(SERVER)!r}, "--starts", "starts"]}}
allow = ["who"]
""")
    state = ("--state", str(tmp_path / "state"), "--port", "0", "--learn-every", "0")
    with started("--agents", str(tmp_path / "agents.toml"), *state) as running:
        url = running.wait_for(r"listening +(http\S+)/v1")
        pid = int((tmp_path / "starts").read_text())
        assert is_alive(pid)
        assert tools_on_offer(url, "keeper") == ["who", "calculator"]
        assert tools_on_offer(url, "plain") == []
        assert running.end(signal.SIGTERM)[0] == 0
    assert not is_alive(pid)


def test_an_episode_over_http_uses_them(shop: OfferedTools, serve_scripted: ServeScripted) -> None:
    call = '<tool_call>\n{"name": "order", "arguments": {"lines": [{"item": "globe", "number": 2}]}}\n</tool_call>'
    served = serve_scripted(call, "It is ordered.", toolbox=Toolbox(shop.tools, bounds=shop.bounds))
    ask_for = [{"role": "user", "content": "Two globes, please."}]
    answer = served.client().chat.completions.create(model=MODEL, messages=ask_for)  # type: ignore[arg-type]
    assert answer.choices[0].message.content == "It is ordered."
    (episode,) = served.parts.log.episodes()
    (first, _) = served.parts.log.steps(episode.id)
    assert [result.content for result in first.tool_results] == ["2 globe"]


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (("no-such-program",), "there is no program 'no-such-program'. install it, or give its whole path"),
        ((sys.executable, "-c", "import sys; sys.exit(3)"), r"did not start: Connection closed"),
        ((sys.executable, str(SERVER), "--empty"), "offers no tools"),
    ],
)
def test_a_server_that_does_not_start_is_told(offer: Offer, command: tuple[str, ...], told: str) -> None:
    began = time.monotonic()
    with pytest.raises(ValueError, match=told):
        offer(shop=ToolSource(mcp=McpAddress(command)))
    assert time.monotonic() - began < 10


def test_a_program_that_says_what_is_no_message_does_not_fill_the_log(
    offer: Offer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("tools.mcp_servers.START_S", 3.0)
    chatty = "while True: print('Loading ...', flush=True)"
    with pytest.raises(ValueError, match="did not start"):
        offer(shop=ToolSource(mcp=McpAddress((sys.executable, "-c", chatty))))
    assert len(caplog.records) < 5


# ------------------------------------------------------------------------------------------------- HTTP


class HttpShop:
    """The same server at an address, that can be killed and started anew."""

    def __init__(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def source(self) -> ToolSource:
        headers = {"authorization": "Bearer ${SHOP_TOKEN}"}
        return ToolSource(mcp=McpAddress(url=f"http://127.0.0.1:{self.port}/mcp", headers=headers))

    def start(self) -> None:
        self.process = subprocess.Popen([sys.executable, str(SERVER), "--http", str(self.port)])
        wait_until(self.answers, 20.0)

    def answers(self) -> bool:
        with socket.socket() as trying:
            return trying.connect_ex(("127.0.0.1", self.port)) == 0

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()


@pytest.fixture
def http_shop(monkeypatch: pytest.MonkeyPatch) -> Iterator[HttpShop]:
    monkeypatch.setenv("SHOP_TOKEN", "t0ken")
    shop = HttpShop()
    shop.start()
    yield shop
    shop.kill()


async def test_a_server_at_an_address_is_called_and_found_again_when_it_was_started_anew(
    offer: Offer, http_shop: HttpShop
) -> None:
    offered = offer(shop=http_shop.source)
    assert await said(offered, "order", lines=[{"item": "globe", "number": 2}]) == "2 globe"
    assert await said(offered, "header") == "Bearer t0ken"
    first = await said(offered, "who")
    http_shop.kill()
    down = await ask(offered, "who", 10.0)
    assert down.is_error
    assert "the MCP server 'shop'" in down.content
    http_shop.start()
    deadline = time.monotonic() + 15
    while (answer := await ask(offered, "who")).is_error:
        assert time.monotonic() < deadline, answer.content
        await asyncio.sleep(0.1)
    assert answer.content != first


async def test_a_session_that_its_server_has_forgotten_is_begun_anew(offer: Offer, http_shop: HttpShop) -> None:
    """A server that was replaced between two calls answers 404 to the old session."""
    offered = offer(shop=http_shop.source)
    first = await said(offered, "who")
    http_shop.kill()
    http_shop.start()
    assert await said(offered, "who") != first


def test_an_address_where_nobody_listens_is_told(offer: Offer) -> None:
    shop = HttpShop()
    with pytest.raises(ValueError, match=r"the MCP server 'shop' \(http://127.0.0.1:\d+/mcp\) did not start: .*onnect"):
        offer(shop=ToolSource(mcp=McpAddress(url=f"http://127.0.0.1:{shop.port}/mcp")))
