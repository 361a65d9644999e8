"""make demo, shortened: it runs to its end, and leaves the rows and the curve that others read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.demo import main


@pytest.mark.timeout(600)
def test_a_short_demo_leaves_its_table_and_its_curve(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = ["--cycles", "1", "--demonstrations", "6", "--practice", "2", "--tasks", "4"]
    assert main(["--state", str(tmp_path), *short, "--learner-arg", "gate-tasks=8"]) == 0
    novice, learned = json.loads((tmp_path / "demo" / "results.json").read_text())
    rates = {f"success_{side}{end}" for side in ("greedy", "t1") for end in ("", "_low", "_high")}
    told = {"num_tasks", "cycle_seconds", "swap_seconds", "requests_failed", "verdict", "reason"}
    assert novice.keys() == learned.keys() == {"adapter", "step_agreement", *rates, *told}
    assert (novice["adapter"], novice["verdict"], novice["cycle_seconds"]) == ("base", "", None)
    assert learned["verdict"] in ("promoted", "refused")
    assert novice["requests_failed"] == learned["requests_failed"] == 0
    for row in (novice, learned):
        assert 0 <= row["success_greedy_low"] <= row["success_greedy"] <= row["success_greedy_high"] <= 1
    assert (tmp_path / "demo" / "results.png").read_bytes().startswith(b"\x89PNG")
    assert learned["reason"] in capsys.readouterr().out
