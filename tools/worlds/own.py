"""A user's own world, named `module:Class`: made, and looked at before anything relies on it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from tools.worlds.blame import raised
from tools.worlds.threads import in_own_thread
from tools.worlds.world import SPLITS, Task, World, require_messages


def own_world(name: str) -> World:
    """The world of that `module:Class`. Raises ValueError, in words for who wrote it, for what is no world."""
    folder = Path.cwd()
    kind = _class(name)
    world = in_own_thread(partial(_made, name, kind))
    in_own_thread(partial(_require_world, name, world))
    if Path.cwd() != folder:  # the state folder was made where nobody looks for it
        raise ValueError(
            f"the world {name!r} changes the working folder to {Path.cwd()}: the server's own paths begin at "
            f"{folder}; let it name its files by whole paths, such as Path(__file__).with_name('rooms.json')"
        )
    return world


def _class(name: str) -> type[Any]:
    module_name, _, attribute = name.partition(":")
    try:
        module = import_module(module_name)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        if _is_about(error, module_name):
            raise ValueError(
                f"the world {name!r} is to be module:Class, and there is no module {module_name!r}: write it as in an "
                "import; it is looked for in this project's folder, in those on PYTHONPATH, and among what is installed"
            ) from error
        raise ValueError(f"the world {name!r} cannot be loaded: importing {module_name} {raised(error)}") from error
    if not hasattr(module, attribute):
        raise ValueError(f"the world {name!r} is to be module:Class, and {module_name} has no {attribute!r}")
    found = getattr(module, attribute)
    if not isinstance(found, type):
        raise ValueError(f"the world {name!r} is to be module:Class, and {attribute} is no class")
    return found


def _is_about(error: BaseException, module_name: str) -> bool:
    """Whether the module itself, or a package around it, is what was not found."""
    return (
        isinstance(error, ModuleNotFoundError)
        and error.name is not None
        and (module_name + ".").startswith(error.name + ".")
    ) or not module_name.strip(".")


def _made(name: str, kind: type[Any]) -> Any:
    if missing := sorted(getattr(kind, "__abstractmethods__", ())):
        raise ValueError(f"the world {name!r} does not say all that a world says: write its {', '.join(missing)}")
    try:
        inspect.signature(kind).bind()
    except TypeError as error:
        raise ValueError(
            f"the world {name!r} is made without arguments, but its constructor wants some ({error}): give them "
            "defaults"
        ) from error
    except ValueError:  # a class in C may not say what it takes
        pass
    try:
        return kind()
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise ValueError(f"the world {name!r} cannot be made: its constructor {raised(error)}") from error


def _require_world(name: str, world: Any) -> None:
    for part in ("name", "splits", "task", "find_task", "open"):
        value = _part(name, world, part)
        if part in ("task", "find_task", "open") and not callable(value):
            raise _without(name, part)
    _require_name(name, world.name)
    _require_splits(name, world.splits)
    steps = getattr(world, "max_steps", 1)
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"the world {name!r}: its `max_steps` is {steps!r}; it must be a whole number from 1 on")
    for split in SPLITS:
        if world.splits[split]:
            _require_task(name, world, split)


def _part(name: str, world: Any, part: str) -> Any:
    try:
        return getattr(world, part)
    except Exception as error:
        is_property = hasattr(type(world), part)  # it raises where the constructor has not called ListedWorld's
        if is_property or not isinstance(error, AttributeError):
            raise ValueError(f"the world {name!r}: its `{part}` {raised(error)}") from error
        raise _without(name, part) from error


def _without(name: str, part: str) -> ValueError:
    return ValueError(f"{name!r} is no world: it has no `{part}`; docs/WORLDS.md says what a world has")


def _require_name(name: str, said: object) -> None:
    if not isinstance(said, str) or not said.strip() or not said.isprintable() or "/" in said:
        raise ValueError(
            f"the world {name!r}: its `name` is {said!r}; it must be a text without a slash: the ids of its tasks "
            "begin with it, as in lamps/train/0"
        )


def _require_splits(name: str, splits: object) -> None:
    is_right = isinstance(splits, Mapping) and all(
        isinstance(size := splits.get(split), int) and not isinstance(size, bool) and size >= 0 for split in SPLITS
    )
    if not is_right:
        raise ValueError(
            f"the world {name!r}: its `splits` are {splits!r:.300}; they must say how many tasks there are of each of "
            f"{', '.join(SPLITS)}, as in {{'train': 60, 'validation': 20, 'heldout': 20}}"
        )


def _require_task(name: str, world: World, split: str) -> None:
    try:
        task = world.task(split, 0)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise ValueError(f"the world {name!r}: its `task({split!r}, 0)` {raised(error)}") from error
    if not isinstance(task, Task):
        raise ValueError(f"the world {name!r}: its `task({split!r}, 0)` gives {task!r:.300}; it must be a Task")
    if (task.world, task.split, task.index) != (world.name, split, 0):
        raise ValueError(f"the world {name!r}: its `task({split!r}, 0)` calls itself {task.id}")
    try:
        require_messages(task.messages)
    except ValueError as error:
        raise ValueError(f"the world {name!r}: the messages of its task {task.id} are none: {error}") from error
