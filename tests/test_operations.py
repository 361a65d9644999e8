"""docs/OPERATIONS.md names metrics, commands, options and files that there are."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import httpx

from policies.chat.chat_protocol import ChatProtocol
from runtime.backup import parse as parse_backup
from runtime.config import Settings
from runtime.http.load import Load
from runtime.http.metrics import Metrics
from runtime.keys import parse as parse_keys
from tests.conftest import ServeScripted
from tests.serving import SayingEngine

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "OPERATIONS.md").read_text("utf-8")


def test_every_metric_it_names_is_told(serve_scripted: ServeScripted, protocol: ChatProtocol) -> None:
    engine = SayingEngine(protocol)
    metrics = Metrics(engine)
    server = serve_scripted(engine=engine, metrics=metrics, load=Load(metrics=metrics.registry))
    told = httpx.get(f"{server.url}/metrics").text
    families = set(re.findall(r"^# TYPE (\S+)", told, re.MULTILINE))
    named = set(re.findall(r"stepagent_[a-z_]+", TEXT))
    assert len(named) > 10
    assert named <= families | {f"{family}_total" for family in families}, named - families


def test_every_option_it_names_exists() -> None:
    ours = {f"--{name.replace('_', '-')}" for name in Settings.model_fields}
    of_commands = {
        "--state",
        "--role",
        "--agent",
        "--requests-per-day",
        "--tokens-per-day",
        "--steps-per-day",
        "--profile",
        "--rm",
    }
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", TEXT)) - {"--help"}
    assert named <= ours | of_commands, named - ours


def test_every_file_it_names_exists() -> None:
    named = re.findall(r"(?:examples|tests|docs|benchmarks)/[\w./-]*\w", TEXT)
    assert named
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_its_commands_can_be_parsed() -> None:
    for line in re.findall(r"python -m runtime\.backup (\w+ /.*?)(?:  |$)", TEXT, re.MULTILINE):
        parse_backup(line.split())
    parse_keys(["make", "ann", "--role", "use", "--requests-per-day", "1"])


def test_the_learners_verify_takes_a_folder() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "learner", "verify", "--state", "/nowhere"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
