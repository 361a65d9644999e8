"""The programs in examples/ run against a real server, and stay short enough to be read at a glance."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from policies.chat.chat_protocol import ChatProtocol
from runtime.engines.embedded.engine import EmbeddedEngine
from runtime.store.learning_log import ENDINGS
from tests.demonstrations import expert_demonstration
from tests.serving import Served, parts_of, served

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))


def load(name: str) -> ModuleType:
    (path,) = [path for path in EXAMPLES if path.stem == name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_short(path: Path) -> None:
    code = [line for line in path.read_text().split('"""', 2)[2].splitlines() if line.strip()]
    assert len(code) <= (60 if path.stem == "own_world" else 40)


def test_a_client_with_tools_of_its_own(novice_server: Served) -> None:
    assert load("own_tools").main(f"{novice_server.url}/v1")


def test_the_servers_tools_and_each_step_as_it_is_taken(novice_server: Served) -> None:
    steps, text = load("server_tools").main(f"{novice_server.url}/v1")
    assert steps[-1]["stop_reason"] == "final_answer"
    assert text == "Done: the miniature barometer is on its way to Cairo."


def test_whoever_waits_for_a_cycle_knows_all_its_endings() -> None:
    """With `--promote ask` the example waited for ever: it did not know that a cycle may end `proposed`."""
    assert set(load("from_log_to_adapter").ENDINGS) == ENDINGS


@pytest.mark.slow
def test_from_a_log_to_a_promoted_adapter(engine: EmbeddedEngine, protocol: ChatProtocol, tmp_path: Path) -> None:
    path = tmp_path / "demonstrations.jsonl"
    path.write_text("".join(json.dumps(expert_demonstration(number)) + "\n" for number in range(24)))
    with served(parts_of(engine, protocol, tmp_path)) as server:
        cycle = load("from_log_to_adapter").main(path, f"{server.url}/v1")
        assert (cycle["stage"], server.parts.registry.acting() is not None) == ("promoted", True), cycle["message"]
