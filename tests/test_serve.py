"""python serve.py as its users run it: a process that starts, serves, and ends when told; or says why it cannot."""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI

import serve
from benchmarks.demo import write_demonstrations
from policies.adapters.files import CONFIG_FILE, WEIGHTS_FILE
from runtime.config import parse_settings
from runtime.http.parts import Parts
from runtime.store.adapter_registry import AdapterState
from runtime.store.step_log import StepLog
from serve import build_parts
from tests.test_storage import files_no_larger_than

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("STEPAGENT_")}
ENVIRONMENT |= {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}


class Process:
    """A started server, and what it has said so far."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.said = ""

    def wait_for(self, pattern: str) -> str:
        """Read on until a line holds the pattern; returns what its first group matched."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said += line
            if found := re.search(pattern, line):
                return found[1]
        raise AssertionError(f"it ended without saying {pattern}:\n{self.said}")

    def end(self, with_signal: signal.Signals) -> tuple[int, float]:
        """Its exit code, and how many seconds it took to end."""
        began = time.monotonic()
        self.process.send_signal(with_signal)
        assert self.process.stdout is not None
        self.said += self.process.stdout.read()
        return self.process.wait(30), time.monotonic() - began


@contextmanager
def started(*arguments: str) -> Iterator[Process]:
    process = subprocess.Popen(
        [sys.executable, "serve.py", *arguments],
        cwd=ROOT, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        yield Process(process)
    finally:
        process.kill()
        process.wait()


def refused(*arguments: str) -> tuple[int, str]:
    """Exit code and words of a server that cannot start."""
    done = subprocess.run(
        [sys.executable, "serve.py", *arguments],
        cwd=ROOT, env=ENVIRONMENT, text=True, capture_output=True, timeout=90,
    )  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stderr


ASKED: list[Any] = [{"role": "user", "content": "Hello"}]


def test_it_says_where_it_listens_serves_and_ends_cleanly(tmp_path: Path) -> None:
    with started("--port", "0", "--state", str(tmp_path / "s")) as server:
        url = server.wait_for(r"listening +(\S+)")
        example = server.wait_for(r"try +(curl .*)")
        assert "novice_model" in server.said
        assert str(tmp_path / "s" / "agent.db") in server.said
        client = OpenAI(base_url=url, api_key="none", max_retries=0)
        answer = client.chat.completions.create(model="novice_model", messages=ASKED, max_tokens=8)
        assert answer.usage is not None
        *_, body = shlex.split(example)
        ready_made = httpx.post(f"{url}/chat/completions", content=body, headers={"content-type": "application/json"})
        assert ready_made.status_code == 200
        code, seconds = server.end(signal.SIGTERM)
    assert code == 0
    assert seconds < 8
    assert server.said.endswith("stopped.\n")
    assert "Traceback" not in server.said
    log = StepLog(tmp_path / "s" / "agent.db")
    assert log.counts()["episodes"] == 2
    assert log.verify() == []
    log.close()


def test_with_a_key_the_ready_made_requests_work_and_demonstrations_are_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ENVIRONMENT, "STEPAGENT_API_KEY", "s3cret")
    write_demonstrations(tmp_path / "demos.jsonl", 3)
    with (tmp_path / "demos.jsonl").open("a") as file:
        file.write("no record\n")
    options = ["--state", str(tmp_path), "--demonstrations", str(tmp_path / "demos.jsonl")]
    with started("--port", "0", *options) as server:
        url = server.wait_for(r"listening +(\S+)")
        cycle, example = server.wait_for(r"learner .*(curl .*) starts one now"), server.wait_for(r"try +(curl .*)")
        for request in (cycle, example):
            shown = subprocess.run(
                ["bash", "-c", f"printf '%s\\n' {request}"],
                env={"STEPAGENT_API_KEY": "s3cret", "PATH": os.environ["PATH"]}, text=True, capture_output=True,
            )  # fmt: skip
            assert "authorization: Bearer s3cret" in shown.stdout.splitlines()
        assert "s3cret" not in server.said
        assert server.wait_for(r"demos.jsonl: (\d imported, 0 known already, \d refused)") == (
            "3 imported, 0 known already, 1 refused"
        )
        assert httpx.get(f"{url}/models").status_code == 401
        server.end(signal.SIGTERM)


@pytest.mark.parametrize("with_signal", [signal.SIGTERM, signal.SIGINT])
def test_a_start_that_is_cut_off_ends_at_once(tmp_path: Path, with_signal: signal.Signals) -> None:
    """Whatever is being imported: an exception there was lost now and then, and left the import lock held."""
    for delay_s in (0.2, 1.0, 1.8):
        with started("--port", "0", "--state", str(tmp_path)) as server:
            server.wait_for("(loading)")
            time.sleep(delay_s)
            code, seconds = server.end(with_signal)
        assert (code, server.said.splitlines()[-1]) == (0, "stopped.")
        assert "Traceback" not in server.said, server.said
        assert seconds < 8


def test_streams_in_mid_sentence_do_not_hold_up_the_end(tmp_path: Path) -> None:
    with started("--port", "0", "--state", str(tmp_path)) as server:
        url = server.wait_for(r"listening +(\S+)")
        body = {"model": "novice_model", "messages": ASKED, "stream": True, "n": 8, "temperature": 2.0, "tools": []}
        with httpx.stream("POST", f"{url}/chat/completions", json=body, timeout=30) as response:
            next(response.iter_lines())
            code, seconds = server.end(signal.SIGINT)
    assert code == 0
    assert seconds < 15
    assert "Traceback" not in server.said, server.said


def test_a_port_in_use_is_told_before_anything_is_loaded(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        began = time.monotonic()
        code, said = refused("--port", str(port), "--state", str(tmp_path))
    assert code == 1
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use; try another --port" in said
    assert time.monotonic() - began < 5.0
    assert not (tmp_path / "agent.db").exists()


def test_a_model_that_is_not_there_ends_the_process_with_a_sentence(tmp_path: Path) -> None:
    code, said = refused("--port", "0", "--state", str(tmp_path), "--model", "no/such/folder")
    assert code == 1
    assert "cannot start" in said
    assert "no/such/folder" in said


# ------------------------------------------------------------------------- the same without a process for each


def test_a_disk_without_room_for_what_becomes_of_adapters_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that was started again on a full disk ended with a traceback, once something had been promoted."""
    settings = parse_settings(["--port", "0", "--state", str(tmp_path / "s")])
    parts = build_parts(settings)
    (tmp_path / CONFIG_FILE).write_text('{"r": 1}')
    for number in range(10):  # the start writes of each that its engine has ended
        (tmp_path / WEIGHTS_FILE).write_text(str(number))
        name = parts.registry.register(tmp_path).name
        for state in (AdapterState.VALIDATED, AdapterState.LOADED, AdapterState.VERIFIED):
            parts.registry.record(name, state)
    close(parts)
    monkeypatch.setattr(serve, "on_signals", lambda _: None)
    with files_no_larger_than(33 * 1024), pytest.raises(SystemExit) as ended:  # some pages of the write-ahead log
        asyncio.run(serve._serve(settings))
    assert re.fullmatch(r"cannot start: \S+agent.db cannot be used: .*; make room, .*", str(ended.value))


def close(parts: Parts) -> None:
    asyncio.run(parts.engine.close())
    assert parts.state is not None
    assert parts.keys.store is not None
    for store in (parts.log, parts.registry, parts.keys.store, parts.state):
        store.close()


def complaint(*arguments: str) -> str:
    """Why the parts of a server cannot be built."""
    with pytest.raises(SystemExit) as ended:
        build_parts(parse_settings(list(arguments)))
    assert isinstance(ended.value.code, str), "a sentence; Python ends with exit code 1 then"
    return ended.value.code


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--tools", "fly"], "no tool is called 'fly'"),
        (["--tools", "search"], "--search-corpus"),
        (["--world", "chess"], "no world is called 'chess'"),
        (["--model", "{tmp}"], "model"),
    ],
)
def test_what_cannot_be_served_is_told_in_a_sentence(tmp_path: Path, arguments: list[str], sentence: str) -> None:
    arguments = [argument.format(tmp=tmp_path) for argument in arguments]
    assert sentence in complaint("--state", str(tmp_path / "state"), *arguments)


@pytest.mark.parametrize(
    ("text", "more", "sentence"),
    [
        ("[agents.a]\nsytem = 'x'\n", (), "agents.toml line 2, agent 'a', `sytem`: there is no such key (did you mean"),
        ("[agents.novice_model]\n", (), "the agent 'novice_model' has the name of the model itself: choose another"),
        ("[agents.shop]\n", ("--served-name", "shop"), "the agent 'shop' has the name of the model itself"),
        ("[agents.a]\nworld = 'chess'\n", (), "agents.toml line 2, agent 'a', `world`: no world is called 'chess'"),
        ("[agents.a]\n[agents.b]\nworld = 'webshop:gone.json'\n", (), "agents.toml line 3, agent 'b', `world`: "),
        ('[agents.a]\nworld = "webshop:\\u001b[31mred"\n', (), "\\x1b[31mred"),
        ('[agents.a]\n"\\u001b[31mred" = 1\n', (), "`\\x1b[31mred`: there is no such key"),
        ("[agents.a]\ntools = ['search']\n", (), "--search-corpus"),
        (
            "[agents.a]\n[agents.b]\n",
            ("--max-adapters", "5"),
            "3 agents, the server's own included, need 6 adapters in the engine at a time",
        ),
        (
            "[agents.a]\npromote = 'canary'\n[agents.b]\npromote = 'canary'\n",
            ("--max-adapters", "6"),
            "3 agents, the server's own included, need 7 adapters in the engine at a time",
        ),
    ],
)
def test_agents_that_cannot_be_served_are_told_in_a_sentence(
    tmp_path: Path, text: str, more: tuple[str, ...], sentence: str
) -> None:
    (tmp_path / "agents.toml").write_text(text)
    asked = ("--state", str(tmp_path / "state"), "--agents", str(tmp_path / "agents.toml"), *more)
    assert sentence in complaint(*asked)


def test_a_server_of_several_agents_says_who_they_are_and_teaches_each_its_own(tmp_path: Path) -> None:
    write_demonstrations(tmp_path / "demos.jsonl", 3)
    (tmp_path / "agents.toml").write_text(
        '[agents.clerk]\nworld = "order_desk"\nsystem = "You are a clerk."\ndemonstrations = ["demos.jsonl"]\n'
        "[agents.plain]\n"
    )
    options = ["--state", str(tmp_path / "s"), "--agents", str(tmp_path / "agents.toml")]
    with started("--port", "0", *options) as server:
        url = server.wait_for(r"listening +(\S+)")
        assert server.wait_for(r"agent +(clerk), adapter base") == "clerk"
        assert server.wait_for(r"demos.jsonl: (\d) imported") == "3"
        client = OpenAI(base_url=url, api_key="none", max_retries=0)
        assert [model.id for model in client.models.list()][:3] == ["novice_model", "clerk", "plain"]
        for agent in ("clerk", "plain"):
            client.chat.completions.create(model=agent, messages=ASKED, max_tokens=4)
        for agent, number in (("clerk", 3), ("plain", 0), ("novice_model", 0)):
            listed = httpx.get(f"{url}/demonstrations", params={"agent": agent}).json()["data"]
            assert len(listed) == number, agent
        server.end(signal.SIGTERM)


def test_a_model_folder_without_a_tokenizer_is_told(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(ROOT / "policies" / "novice_model" / name, model)
    assert "cannot start" in complaint("--state", str(tmp_path / "state"), "--model", str(model))


def test_a_state_folder_that_is_a_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("not a folder")
    assert str(tmp_path / "state") in complaint("--state", str(tmp_path / "state"))


def test_a_log_that_is_no_database_is_told(tmp_path: Path) -> None:
    (tmp_path / "agent.db").write_bytes(b"no database at all, not even an empty one" * 100)
    assert "agent.db" in complaint("--state", str(tmp_path))


def test_a_log_of_a_newer_release_is_told(tmp_path: Path) -> None:
    StepLog(tmp_path / "agent.db").close()
    with sqlite3.connect(tmp_path / "agent.db") as db:
        db.execute("INSERT INTO _sqlite_migrations (migration_set, name) VALUES ('step_log', 'of_tomorrow')")
    assert "newer release" in complaint("--state", str(tmp_path))
