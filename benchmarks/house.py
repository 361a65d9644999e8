"""How easy the house is to live in: files, rooms, arrows and levels by floor, and how many files one request crosses.

    python -m benchmarks.house                     this tree
    python -m benchmarks.house --root ../before    another tree: what can be read from its files alone

Arrows are read from the syntax trees; the files that a streamed request and a learner cycle cross are counted from a
trace of the calls.
"""

from __future__ import annotations

import argparse
import ast
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).parent.parent
FLOORS = ("tools", "policies", "runtime", "learner")
Arrows = dict[str, set[str]]


def modules_of(root: Path, floor: str) -> dict[str, Path]:
    """Dotted name -> file, packages' empty `__init__` left out."""
    paths = [path for path in (root / floor).rglob("*.py") if path.read_text().strip()]
    return {".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


def arrows_of(modules: dict[str, Path]) -> Arrows:
    """Which of the modules each one imports, imports for types included."""
    return {name: _imported(path, modules) - {name} for name, path in modules.items()}


def _imported(path: Path, modules: dict[str, Path]) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if name in modules else node.module for name in names} & modules.keys()
    return found


def rooms_of(arrows: Arrows) -> Arrows:
    """The same, by room: a folder of the floor, or a file beside the folders."""
    rooms: Arrows = {}
    for name, below in arrows.items():
        room = _room(name)
        rooms.setdefault(room, set()).update({_room(each) for each in below} - {room})
    return rooms


def _room(name: str) -> str:
    return ".".join(name.split(".")[:2])


def num_levels(arrows: Arrows) -> int:
    """The longest way down. A circle counts as endless."""
    depth: dict[str, int] = {}

    def height(name: str, above: frozenset[str]) -> int:
        assert name not in above, f"a circle through {name}"
        if name not in depth:
            depth[name] = 1 + max((height(below, above | {name}) for below in arrows[name]), default=0)
        return depth[name]

    return max(height(name, frozenset()) for name in arrows)


def num_lines(paths: Iterator[Path]) -> int:
    return sum(len(path.read_text().splitlines()) for path in paths)


@contextmanager
def traced(root: Path) -> Iterator[set[str]]:
    """The files of the project in which a function was called meanwhile, in any thread."""
    seen: set[str] = set()
    prefixes = tuple(f"{root / floor}/" for floor in FLOORS)

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(prefixes):
            seen.add(frame.f_code.co_filename.removeprefix(f"{root}/"))

    threading.setprofile_all_threads(note) if sys.version_info >= (3, 12) else threading.setprofile(note)
    sys.setprofile(note)
    try:
        yield seen
    finally:
        threading.setprofile(None)
        sys.setprofile(None)


def files_of_a_streamed_request() -> set[str]:
    """A request without tools, streamed: the server runs its own. The files of the engine are not counted."""
    from policies.chat.chat_protocol import ChatProtocol
    from tests.serving import MODEL, NOVICE_FOLDER, SayingEngine, parts_of, served

    protocol = ChatProtocol.load(NOVICE_FOLDER)
    with tempfile.TemporaryDirectory() as folder, traced(ROOT) as seen:
        parts = parts_of(SayingEngine(protocol, "Hello.", "Hello again."), protocol, Path(folder))
        with served(parts) as server:
            ask: Callable[[], Any] = lambda: [  # noqa: E731
                *server.client().chat.completions.create(
                    model=MODEL, messages=[{"role": "user", "content": "Hi"}], stream=True
                )
            ]
            ask()
            seen.clear()  # what the start needed
            ask()
            crossed = set(seen)  # what the end of the server needs is not the request's
    return {name for name in crossed if "/engines/" not in name}


def files_of_a_cycle() -> set[str]:
    """One cycle with eight demonstrations, in the learner's process; the server's files are not counted."""
    from policies.chat.chat_protocol import ChatProtocol
    from tests.conftest import novice_engine_of
    from tests.cycles import run
    from tests.demonstrations import expert_demonstration, post
    from tests.serving import NOVICE_FOLDER, parts_of, served

    protocol = ChatProtocol.load(NOVICE_FOLDER)
    with (
        tempfile.TemporaryDirectory() as folder,
        served(parts_of(novice_engine_of(protocol), protocol, Path(folder))) as server,
    ):
        post(server, *(expert_demonstration(number) for number in range(8))).raise_for_status()
        with traced(ROOT) as seen:
            threading.setprofile(None)  # the server's threads
            run(server, Path(folder))
        return seen


def report(root: Path) -> None:
    print(
        "| floor | files | arrows | levels | rooms | arrows between rooms | levels of rooms |\n"
        "|---|---|---|---|---|---|---|"
    )
    for floor in FLOORS:
        arrows = arrows_of(modules_of(root, floor))
        rooms = rooms_of(arrows)
        files = (len(arrows), sum(map(len, arrows.values())), num_levels(arrows))
        figures = (*files, len(rooms), sum(map(len, rooms.values())), num_levels(rooms))
        print(f"| {floor} | {' | '.join(map(str, figures))} |")
    product = [path for floor in FLOORS for path in (root / floor).rglob("*.py")]
    tests = [path for folder in root.glob("tests*") for path in folder.rglob("*.py")]
    print(f"\nlines of product {num_lines(iter(product))}, of tests {num_lines(iter(tests))}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--root", type=Path, default=ROOT)
    root = parser.parse_args().root.resolve()
    report(root)
    if root == ROOT:
        request, cycle = files_of_a_streamed_request(), files_of_a_cycle()
        print(
            f"files that a streamed request crosses, without the engine: {len(request)}: {', '.join(sorted(request))}"
        )
        print(f"files that a cycle crosses: {len(cycle)}")


if __name__ == "__main__":
    main()
