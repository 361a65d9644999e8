"""Who may import whom: read from the syntax tree, so that an import within a function counts too."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = ("tools", "policies", "runtime", "learner")
"""From the ground up. A floor imports from those below and itself, and no other."""

MODULES = sorted(
    path.relative_to(ROOT)
    for folder in FLOORS
    for path in (ROOT / folder).rglob("*.py")
    if "__pycache__" not in str(path)
)
ATTIC = Path("serve.py")

HEAVY = {
    "vllm": ("runtime/engines/vllm/",),
    "peft": ("learner/training/", "runtime/engines/embedded/"),
    "torch": (
        "learner/packing/", "learner/objectives/", "learner/training/", "runtime/engines/embedded/",
        "runtime/engines/vllm/on_cpu.py", "policies/novice/",
    ),
    "sqlite_utils": ("runtime/store/", "tools/search.py"),
}  # fmt: skip
"""Heavy libraries and the rooms DESIGN gives them."""


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text("utf-8"))


@cache
def imports_of(path: Path) -> tuple[str, ...]:
    """The dotted names that a file imports, anywhere in it, except for types alone."""
    return tuple(_imports(tree_of(path)))


def _imports(node: ast.AST) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "imports are absolute here"
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        else:
            yield from _imports(child)


def floor_of(name: str) -> str | None:
    top = name.partition(".")[0]
    return top if top in FLOORS else None


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports_only_go_down(path: Path) -> None:
    height = FLOORS.index(path.parts[0])
    above = [name for name in imports_of(path) if (floor := floor_of(name)) and FLOORS.index(floor) > height]
    assert not above
    assert "serve" not in {name.partition(".")[0] for name in imports_of(path)}, "nobody imports the attic"


def test_the_ground_imports_nothing_of_ours_above_it() -> None:
    for path in MODULES:
        if path.parts[0] == "tools":
            ours = {floor_of(name) for name in imports_of(path)} - {None, "tools"}
            is_a_client = path == Path("learner/practice.py")
            assert not ours or is_a_client, f"{path} imports {ours}"


def test_the_learner_imports_the_store_and_nothing_else_of_the_runtime() -> None:
    for path in MODULES:
        if path.parts[0] == "learner":
            seen = {name for name in imports_of(path) if floor_of(name) == "runtime"}
            assert all(name.startswith("runtime.store.") for name in seen), f"{path} imports {seen}"


@pytest.mark.parametrize("library", HEAVY)
def test_heavy_libraries_stay_in_their_rooms(library: str) -> None:
    users = {str(path) for path in MODULES if library in {name.partition(".")[0] for name in imports_of(path)}}
    strangers = {user for user in users if not user.startswith(HEAVY[library])}
    assert not strangers, f"{library} has no business in {sorted(strangers)}"


@pytest.mark.parametrize("floor", FLOORS)
def test_no_circle_of_rooms(floor: str) -> None:
    """A room is a folder of a floor, or a file that lies beside the folders."""
    doors = rooms_of(floor)
    while doors:
        ground = {room for room, below in doors.items() if not below & doors.keys()}
        assert ground, f"these rooms import each other: {doors}"
        doors = {room: below for room, below in doors.items() if room not in ground}


def rooms_of(floor: str) -> dict[str, set[str]]:
    """The rooms of a floor, each with the other rooms of the floor that it imports."""
    rooms: dict[str, set[str]] = {}
    for path in MODULES:
        if path.parts[0] == floor and path.name != "__init__.py":
            room = path.parts[1].removesuffix(".py")
            ours = {name.split(".")[1] for name in imports_of(path) if floor_of(name) == floor}
            rooms.setdefault(room, set()).update(ours - {room})
    return rooms


def test_contracts_import_nothing_of_the_project() -> None:
    assert not [name for name in imports_of(Path("policies/types.py")) if floor_of(name)]
    ours = {name for name in imports_of(Path("runtime/store/episodes.py")) if floor_of(name)}
    assert all(name.startswith("policies.types.") for name in ours)


def test_the_agent_knows_nothing_of_http() -> None:
    http = {"fastapi", "starlette", "uvicorn", "httpx", "openai"}
    for path in MODULES:
        if path.parts[:2] in (("runtime", "agent"), ("runtime", "store"), ("runtime", "adapters")):
            assert not http & {name.partition(".")[0] for name in imports_of(path)}, path


def test_before_options_are_parsed_serve_imports_only_them() -> None:
    tree = tree_of(Path(ATTIC))
    at_the_top = ast.Module(
        [node for node in tree.body if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)], []
    )
    ours = {name for name in _imports(at_the_top) if floor_of(name)}
    assert all(name.startswith("runtime.config.") for name in ours)


def test_names_that_say_nothing_are_not_used() -> None:
    """STYLE's list of words to avoid, in the names of files and classes."""
    vague = ("Manager", "Handler", "Processor", "Helper", "Service")
    for path in [*MODULES, ATTIC]:
        assert path.stem not in ("utils", "common", "base", "helpers", "misc"), path
        classes = [node.name for node in ast.walk(tree_of(path)) if isinstance(node, ast.ClassDef)]
        assert not [name for name in classes if name.endswith(vague)], path


def test_every_file_says_what_it_is_for() -> None:
    for path in [*MODULES, ATTIC]:
        tree = tree_of(path)
        assert not tree.body or ast.get_docstring(tree), f"{path} needs a docstring"
