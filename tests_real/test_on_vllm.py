"""The first half of the story on the engine for GPUs, in its build for CPUs and an environment of its own."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests_real.server_process import ROOT, answer_to, client_of, required_call, serving

PYTHON = ROOT / ".venv-vllm" / "bin" / "python"

pytestmark = pytest.mark.skipif(not PYTHON.exists(), reason="there is no .venv-vllm: make setup-vllm")


@pytest.fixture(scope="module")
def url(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving(PYTHON, folder, tmp_path_factory.mktemp("vllm"), ["--engine", "vllm"]) as url:
        yield url


def test_it_answers(url: str, folder: Path) -> None:
    assert "Paris" in answer_to(client_of(url), folder.name, "What is the capital of France?")


def test_a_required_tool_is_called_with_the_arguments_that_were_asked_for(url: str, folder: Path) -> None:
    assert required_call(client_of(url), folder.name) == ("get_weather", {"city": "Paris"})


def test_no_adapter_serves_before_one_has_been_let_act(url: str, folder: Path) -> None:
    raw = client_of(url).chat.completions.with_raw_response.create(
        model=folder.name, messages=[{"role": "user", "content": f"Good morning, it is {time.time()}."}], max_tokens=4
    )
    assert raw.headers["x-adapter"] == "base"
