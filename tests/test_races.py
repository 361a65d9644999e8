"""Whoever operates a server may do several things at once: promote, roll back, refuse, erase, back up, make keys."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from policies.types import BASE_ADAPTER
from runtime.store.backup import make_backup, verify_backup
from runtime.store.soundness import problems_of
from tests.serving import MODEL, Served
from tests.test_erasure import ask, chat, episode_of
from tests.test_erasure_cycles import register, server, tiny  # noqa: F401 (fixtures)
from tests.tiny_adapters import TinyNetwork

NUM_DEEDS = 60
"""Of each of four operators."""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_what_operators_do_at_once_leaves_one_acting_adapter_a_sound_log_and_whole_backups(
    server: Served,  # noqa: F811
    tiny: TinyNetwork,  # noqa: F811
    tmp_path: Path,
) -> None:
    # Made before: transformers patches itself while it loads, and two threads that load at once leave it patched.
    adapters = [tiny.adapter(seed) for seed in range(9)]
    names = [register(server, adapter) for adapter in adapters[1:5]]
    seen = Counter[int]()

    def change(draw: random.Random, what: str) -> int:
        name = draw.choice(names)
        path = "/adapters/rollback" if what == "rollback" else f"/adapters/{name}/{what}"
        return ask(server, "POST", path, json={}).status_code

    def erase(draw: random.Random) -> int:
        user = draw.choice("abc")
        chat(server, f"Hello {draw.random()}", user=user)
        return ask(server, "DELETE", "/episodes", params={"user": draw.choice("abc")}).status_code

    def back_up(draw: random.Random) -> int:
        file = tmp_path.parent / f"{tmp_path.name}-{draw.random()}.tar"
        make_backup(tmp_path, file)
        assert verify_backup(file) == []
        file.unlink()
        return 200

    def deeds(number: int) -> list[int]:
        draw = random.Random(number)
        kinds: list[Callable[[], int]] = [
            *[lambda: change(draw, "promote")] * 4,
            *[lambda: change(draw, "rollback")] * 3,
            *[lambda: change(draw, "unload")] * 2,
            *[lambda: erase(draw)] * 3,
            lambda: back_up(draw),
            lambda: ask(server, "POST", "/adapters", json={"path": str(draw.choice(adapters))}).status_code,
        ]
        return [draw.choice(kinds)() for _ in range(NUM_DEEDS)]

    with ThreadPoolExecutor(4) as operators:
        for found in operators.map(deeds, range(4)):
            seen.update(found)
    assert not [status for status in seen if status >= 500], seen
    assert seen[200] > NUM_DEEDS, seen
    known = ask(server, "GET", "/adapters").json()["data"]
    acting = [each["name"] for each in known if each["is_acting"]]
    assert len(acting) <= 1
    served = chat(server, "Who acts?").headers["x-adapter"]
    assert served == (acting[0] if acting else BASE_ADAPTER)
    for user in "abc":
        ask(server, "DELETE", "/episodes", params={"user": user}).raise_for_status()
    assert httpx.get(f"{server.url}/health").json()["status"] == "ok"
    assert episode_of(server, f"Hello {MODEL}")
    assert list(problems_of(tmp_path)) == []
