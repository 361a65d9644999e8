"""python -m runtime.backup: back up a server's state, also while it runs; check a backup; make a state folder of one.

python -m runtime.backup make /backups/monday.tar --state state
"""

from __future__ import annotations

import argparse
import sqlite3
import sys
from pathlib import Path

from runtime.store.backup import BackupError, make_backup, restore_backup, verify_backup
from runtime.store.damage import StepLogError
from runtime.store.salvage import salvage
from runtime.store.state_folder import StateFolderTaken


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m runtime.backup", description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("make", "write the log and the adapters of this moment to a new file"),
        ("restore", "make a state folder, which must be empty or not there, of a backup"),
        ("verify", "say what is wrong with a backup"),
        ("salvage", "make a new state folder of what can still be read of a damaged one"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("file", type=Path, help="the damaged folder" if name == "salvage" else "the backup")
        if name != "verify":
            command.add_argument("--state", type=Path, default=Path("state"), help="the server's state folder")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    """Exit code 1 where something is damaged, or could not be done."""
    options = parse(arguments)
    try:
        problems = _do(options)
    except (BackupError, StateFolderTaken, StepLogError, sqlite3.Error) as problem:
        print(problem, file=sys.stderr)
        return 1
    except OSError as error:
        print(f"{options.command} failed: {error.filename or options.file}: {error.strerror}", file=sys.stderr)
        return 1
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


def _do(options: argparse.Namespace) -> list[str]:
    """What is damaged, in sentences."""
    match options.command:
        case "make":
            problems = make_backup(options.state, options.file)
            print(f"{options.file} holds {options.state}" + (", which is damaged:" if problems else ""))
            return problems
        case "restore":
            restore_backup(options.file, options.state)
            print(f"{options.state} is as it was backed up: start the server with --state {options.state}")
            return []
        case "salvage":
            lost = salvage(options.file, options.state)
            print(f"{options.state} holds what can be read of {options.file}" + (", without:" if lost else ""))
            return lost
        case _:
            if not options.file.exists():
                raise BackupError(f"there is no {options.file}")
            problems = verify_backup(options.file)
            print(f"{options.file} is damaged:" if problems else f"{options.file} is sound")
            return problems


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
