"""The script for a borrowed GPU, here on a CPU in toy sizes: every section runs, and one that cannot loses no other."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_check
from benchmarks.gpu_check import Clock, NoTime, learned_orders, main, orders_in_tokens, section
from tests.serving import NOVICE_FOLDER


def test_in_toy_sizes_every_section_has_figures(tmp_path: Path) -> None:
    assert main(["--tiny", "--json", str(tmp_path / "gpu.json")]) == 0
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found.keys() == {"machine", "engine", "learner", "seconds"}
    assert all(row["is_same"] and row["packed_tokens_per_s"] > 0 for row in found["learner"])
    assert {row["at_once"] for row in found["engine"]} == {1, 8, 32}


def test_orders_are_learned_verified_and_tried(tmp_path: Path) -> None:
    orders = orders_in_tokens(NOVICE_FOLDER, 2, 1)
    found = learned_orders(NOVICE_FOLDER, orders, tmp_path / "adapter", "cpu", 4)
    assert found["verification"] == "verified"
    assert 0 <= found["agreement_before"] <= found["agreement_after"] <= 1
    assert found["num_states"] == len(orders["held_out"][0])


def test_without_peft_a_sentence_says_so_and_the_rest_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "engine", lambda *_: iter([{"at_once": 1}]))
    monkeypatch.setitem(sys.modules, "peft", None)
    assert main(["--tiny", "--json", str(tmp_path / "gpu.json")]) == 0
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["not_run"] == {"learner": "it needs the package peft, which is not here"}
    assert found["engine"] == [{"at_once": 1}]


def test_what_goes_wrong_is_noted_and_the_figures_so_far_are_kept(tmp_path: Path) -> None:
    results: dict[str, Any] = {"machine": "one"}
    with section("cycle", results, tmp_path / "gpu.json"):
        raise RuntimeError("CUDA error")
    with section("learner", results, tmp_path / "gpu.json"):
        Clock(1).need(5)
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["machine"] == "one"
    assert found["failed"] == {"cycle": "RuntimeError: CUDA error"}
    assert found["not_run"]["learner"].startswith("no time left for it")
    with pytest.raises(NoTime):
        Clock(1).need(2)
