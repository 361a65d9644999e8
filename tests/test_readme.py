"""The README is true: commands exist, links lead somewhere, the house is the house, figures were measured."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tools.worlds.order_desk import OrderDesk

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_first_command_stands_before_line_20() -> None:
    assert "make serve" in "\n".join(README.splitlines()[:20])


@pytest.mark.parametrize("target", re.findall(r"\]\((?!http)([^)#]+)\)", README))
def test_every_link_leads_to_a_file(target: str) -> None:
    assert (ROOT / target).exists()


@pytest.mark.parametrize("target", sorted(set(re.findall(r"make ([a-z-]+)", README)) - {"a", "s"}))
def test_every_make_target_exists(target: str) -> None:
    asked = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=False)
    assert asked.returncode == 0, asked.stderr


@pytest.mark.parametrize("module", sorted(set(re.findall(r"python -m ([\w.]+)", README))))
def test_every_module_that_is_run_exists(module: str) -> None:
    place = ROOT / module.replace(".", "/")
    assert place.with_suffix(".py").exists() or (place / "__main__.py").exists()


def test_the_picture_of_the_house_names_every_floor() -> None:
    floors = {path.name for path in ROOT.iterdir() if (path / "__init__.py").exists()} - {
        "tests",
        "tests_vllm",
        "tests_real",
        "tests_clients",
        "tests_worlds",
        "tests_cycles",
        "benchmarks",
    }
    drawn = set(re.findall(r"^(?:floor \d|ground) +(\w+)/", README, re.MULTILINE))
    assert drawn == floors


def test_what_is_asked_in_the_example_is_a_task_that_the_server_has_tools_for() -> None:
    """It was once a request of no task, for which there are no tools: a newcomer's first answer was empty."""
    asked = OrderDesk().task("heldout", 0).messages[-1]["content"]
    assert f'"content": "{asked}"' in README


def test_every_figure_of_the_table_stands_in_the_results() -> None:
    results = (ROOT / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8")
    rows = [line for line in README.splitlines() if line.startswith("| ") and "measured" not in line]
    figures = {number for row in rows for number in re.findall(r"\d+(?:\.\d+)?", row) if "](" not in row}
    assert figures, "the README shows measured figures"
    assert {figure for figure in figures if figure not in results} == set()
