"""What the tests of the vLLM engine share: the novice, and real PEFT adapters of it with true probes.

A folder of its own beside tests/: these tests need vLLM, which has an environment of its own (`make test-vllm`).
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Iterator

import pytest

from policies.chat.chat_protocol import ChatProtocol
from tests.serving import NOVICE_FOLDER
from tests_vllm.novice_adapters import NoviceAdapters
from tests_vllm.server_process import engine_processes_of


@pytest.fixture(scope="session")
def protocol() -> ChatProtocol:
    """The novice's chat protocol."""
    return ChatProtocol.load(NOVICE_FOLDER)


@pytest.fixture(scope="session")
def novice(tmp_path_factory: pytest.TempPathFactory) -> NoviceAdapters:
    return NoviceAdapters(NOVICE_FOLDER, tmp_path_factory.mktemp("adapters"))


@pytest.fixture(autouse=True, scope="session")
def no_process_is_left_behind() -> Iterator[None]:
    yield
    assert not engine_processes_of(os.getpid())
