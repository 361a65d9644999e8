"""What the tests of the vLLM engine share: the novice, and real PEFT adapters of it with true probes.

A folder of its own beside tests/: these tests need vLLM, which has an environment of its own (`make test-vllm`).
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Iterator
from pathlib import Path

import pytest

from policies.chat_protocol import ChatProtocol
from tests.serving import NOVICE_FOLDER
from tests_vllm.novice_adapters import NoviceAdapters


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


def engine_processes_of(parent: int) -> list[int]:
    """vLLM's processes that this process has started and that still run."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            status = (folder / "status").read_text()
        except OSError:  # it has ended meanwhile
            continue
        if f"\nPPid:\t{parent}\n" in status and "EngineCor" in status.splitlines()[0] and "\tZ " not in status:
            found.append(int(folder.name))
    return found
