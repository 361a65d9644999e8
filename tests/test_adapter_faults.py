"""Broken adapters over HTTP on the real engine: each is refused with its reason while users go on being answered."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from benchmarks.swap import make_network, make_versions
from policies.adapters.base_network import read_base_network
from policies.adapters.files import CONFIG_FILE, WEIGHTS_FILE
from policies.chat.chat_protocol import ChatProtocol
from runtime.adapters.swap import Swap
from runtime.engines.embedded.engine import EmbeddedEngine
from runtime.store.adapter_registry import AdapterRegistry
from tests.serving import MODEL, Served, parts_of, served, wait_until


@dataclass(frozen=True)
class House:
    """A server on which the first of two sound versions acts."""

    server: Served
    folder: Path
    versions: list[Path]

    def post(self, route: str = "", /, **body: Any) -> httpx.Response:
        return httpx.post(f"{self.server.url}/v1/adapters{route}", json=body, timeout=60)

    def loaded(self) -> list[str]:
        return [adapter.name for adapter in self.server.parts.engine.loaded_adapters()]

    def listed(self) -> list[dict[str, Any]]:
        return httpx.get(f"{self.server.url}/v1/adapters").json()["data"]


@pytest.fixture(scope="module")
def house(protocol: ChatProtocol, tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    folder = tmp_path_factory.mktemp("faults")
    network = make_network(folder / "network")
    versions = make_versions(network, folder / "versions", 2)
    engine = EmbeddedEngine(network, tokenizer=protocol.tokenizer, device="cpu", num_threads=1)
    registry = AdapterRegistry(folder / "agent.db")
    swap = Swap(engine, registry, read_base_network(network))
    with served(parts_of(engine, protocol, folder, registry=registry, swap=swap)) as server:
        house = House(server, folder, versions)
        assert house.post(path=str(versions[0])).status_code == 201
        assert house.post("/agent-v0001/promote").status_code == 200
        yield house
    asyncio.run(engine.close())


@dataclass
class Users:
    """What users saw who asked all the while."""

    adapters: list[str] = field(default_factory=list)
    """Of each answer that came whole."""
    failures: list[str] = field(default_factory=list)


@contextmanager
def users_asking(server: Served) -> Iterator[Users]:
    """Two users who ask without a pause, answered at least once before, and once after, what is done within."""
    users, is_over = Users(), threading.Event()
    threads = [threading.Thread(target=keep_asking, args=(server, users, is_over)) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        wait_until(lambda: len(users.adapters) >= 2 or bool(users.failures), 30)
        yield users
        seen = len(users.adapters)
        wait_until(lambda: len(users.adapters) >= seen + 2 or bool(users.failures), 30)
    finally:
        is_over.set()
        for thread in threads:
            thread.join()


def keep_asking(server: Served, users: Users, is_over: threading.Event) -> None:
    ask = server.client().chat.completions.with_raw_response.create
    while not is_over.is_set():
        try:
            messages: Any = [{"role": "user", "content": "Hi"}]
            answer = ask(model=MODEL, messages=messages, max_tokens=40, stream=True, tools=[])
            last = list(answer.parse())[-1]
            assert last.choices[0].finish_reason
            users.adapters.append(answer.headers["x-adapter"])
        except Exception as error:
            users.failures.append(repr(error))


def edit_tensors(folder: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    file = folder / WEIGHTS_FILE
    save_file({name: np.ascontiguousarray(change(tensor)) for name, tensor in load_file(file).items()}, file)


def edit_config(folder: Path, **settings: Any) -> None:
    config = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps({**config, **settings}))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def train_elsewhere(folder: Path) -> None:
    """An adapter of a network of equal sizes and other weights."""
    network = make_network(folder.parent / "elsewhere")
    weights = load_file(network / "model.safetensors")
    save_file({name: 1.5 * tensor for name, tensor in weights.items()}, network / "model.safetensors")
    [stranger] = make_versions(network, folder.parent / "strangers", 1)
    shutil.rmtree(folder)
    stranger.rename(folder)


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "the folder is missing": (shutil.rmtree, "does not exist"),
    "the weights are missing": (lambda folder: (folder / WEIGHTS_FILE).unlink(), f"has no {WEIGHTS_FILE}"),
    "the configuration is missing": (lambda folder: (folder / CONFIG_FILE).unlink(), f"has no {CONFIG_FILE}"),
    "the probe is missing": (lambda folder: (folder / "probe.json").unlink(), "has no probe.json"),
    "the weights are cut short": (lambda folder: cut(folder / WEIGHTS_FILE), "damaged or cut short"),
    "the weights are no numbers": (lambda folder: edit_tensors(folder, lambda t: t * np.nan), "not finite"),
    "the rank is not the weights'": (lambda folder: edit_config(folder, r=8), "but rank 8"),
    "the rank is above the limit": (lambda folder: edit_config(folder, r=512), "above the engine's limit of 64"),
    "it was trained on another base": (train_elsewhere, "trained on another base network"),
    "it is not what was trained": (
        lambda folder: edit_tensors(folder, lambda t: t * 1.2),
        "does not serve what was trained",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_adapter_is_refused_and_nobody_who_is_served_notices(house: House, fault: str, tmp_path: Path) -> None:
    break_it, reason = FAULTS[fault]
    folder = shutil.copytree(house.versions[1], tmp_path / "broken")
    break_it(folder)
    before = house.listed()
    with users_asking(house.server) as users:
        answer = house.post(path=str(folder))
        assert answer.status_code == 409
        assert reason in answer.json()["error"]["message"]
    assert users.failures == []
    assert set(users.adapters) == {"agent-v0001"}
    recorded = house.listed()[len(before) :]
    assert all(one["state"] == "refused" and reason in one["events"][-1]["reason"] for one in recorded)
    for one in recorded:
        assert house.post(f"/{one['name']}/promote").status_code == 409
    assert house.loaded() == ["agent-v0001"]


def test_an_adapter_whose_folder_is_gone_since_cannot_be_promoted_and_nobody_notices(house: House) -> None:
    name = house.post(path=str(house.versions[1])).json()["name"]
    assert house.post(f"/{name}/promote").status_code == 200
    assert house.post("/rollback").json() == {"acting": "agent-v0001"}
    wait_until(lambda: house.loaded() == ["agent-v0001"], 15)  # the server unloads what nobody uses
    shutil.rmtree(house.server.parts.registry.adapter(name).path)
    with users_asking(house.server) as users:
        answer = house.post(f"/{name}/promote")
        assert answer.status_code == 409
        assert "does not exist" in answer.json()["error"]["message"]
    assert users.failures == []
    assert set(users.adapters) == {"agent-v0001"}


def test_rolling_back_goes_to_the_base_and_no_further_and_nobody_is_refused(house: House) -> None:
    with users_asking(house.server) as users:
        assert house.post("/rollback", reason="worse").json() == {"acting": "base"}
        answer = house.post("/rollback", reason="and again")
        assert answer.status_code == 409
        assert "nothing to roll back to" in answer.json()["error"]["message"]
        assert house.post("/agent-v0001/promote").status_code == 200
    assert users.failures == []
    assert set(users.adapters) <= {"agent-v0001", "base"}
