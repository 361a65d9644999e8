"""Clients that are programs: curl, Node's libraries, the Codex CLI."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests_clients.conftest import MODEL, Server, call, require_one_chain

NPM = Path(__file__).parent / "npm"


def output_of(*command: str, **environment: str) -> str:
    """Its standard output. Fails with what it said where it fails."""
    done = subprocess.run(
        command, cwd=NPM, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def test_curl(server: Server) -> None:
    server.says("A globe.")
    body = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "What is it?"}]})
    said = output_of(
        "curl", "-sS", f"{server.url}/v1/chat/completions", "-H", "content-type: application/json", "-d", body
    )
    assert json.loads(said)["choices"][0]["message"]["content"] == "A globe."


def test_openai_for_node_runs_tools(server: Server) -> None:
    server.says(call("look", at="shelf"), "A globe.")
    assert output_of("node", "openai_run_tools.mjs").strip() == "A globe."
    require_one_chain(server.steps, 2)


@pytest.mark.parametrize("kind", ["responses", "chat", "compatible"])
def test_the_ai_sdk_over_two_turns(server: Server, kind: str) -> None:
    server.says(call("look", at="shelf"), "A globe.", "You are welcome.")
    assert output_of("node", "ai_sdk.mjs", kind).split("\n")[:2] == ["A globe.", "You are welcome."]
    require_one_chain(server.steps, 3)


def test_codex(server: Server, tmp_path: Path) -> None:
    """Codex CLI, one task with a command: it sends tools of many types, reasoning, include and store."""
    config: dict[str, Any] = {
        "model": MODEL, "model_provider": "ours", "model_providers.ours.name": "ours",
        "model_providers.ours.base_url": f"{server.url}/v1", "model_providers.ours.wire_api": "responses",
    }  # fmt: skip
    options = [part for name, value in config.items() for part in ("-c", f'{name}="{value}"')]
    codex = shutil.which("codex", path=str(NPM / "node_modules" / ".bin"))
    assert codex is not None, "npm install in tests_clients/npm brings it"
    server.says(call("shell", command=["echo", "found it"]), "I found it.")
    said = output_of(
        codex, "exec", "--skip-git-repo-check", "--sandbox", "danger-full-access", *options, "Find it.",
        CODEX_HOME=str(tmp_path),
    )  # fmt: skip
    assert "I found it." in said
    require_one_chain(server.steps, 2)
