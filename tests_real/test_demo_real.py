"""make demo-real, shortened and with the novice: both parts run to their end, and what is done is not done again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.demo_real import main
from tests.serving import NOVICE_FOLDER

SHORT = [
    "--model", str(NOVICE_FOLDER), "--cycles", "2", "--practice", "2", "--demonstrations", "6", "--tasks", "4",
    "--transcripts", "10", "--held-out", "3", "--learner-arg", "gate-tasks=4", "--learner-arg", "min-gradient-steps=2",
]  # fmt: skip


@pytest.mark.timeout(600)
def test_both_parts_come_to_their_end_and_are_not_done_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--state", str(tmp_path), "--part", "desk", "order_desk", *SHORT]
    assert main(arguments) == 0
    path = tmp_path / "demo-real" / "results.json"
    results = json.loads(path.read_text())
    base, learned, again = results["desk"]
    assert (base["adapter"], base["num_tasks"]) == ("base", 4)
    assert all(row["cycle"]["ended"] in ("promoted", "refused") for row in (learned, again))
    before, after = results["order_desk"]
    assert len(before["each"]) == len(after["each"]) == 3
    assert after["cycle"]["ended"] in ("promoted", "refused")
    assert after["gain"][1] <= after["gain"][0] <= after["gain"][2]
    written = path.stat().st_mtime_ns
    assert main(arguments) == 0
    assert path.stat().st_mtime_ns == written
    assert "cycle s  ended" in capsys.readouterr().out
