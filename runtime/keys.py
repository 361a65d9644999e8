"""python -m runtime.keys: make, list, rotate and revoke the API keys of a server, also while it runs.

python -m runtime.keys make ann --role feedback --state state
"""

from __future__ import annotations

import argparse
import sqlite3
import sys
import time
from pathlib import Path

from runtime.store.adapter_registry import UNNAMED
from runtime.store.episodes import Role
from runtime.store.keys import Key, KeyProblem, KeyStore, Quota

BY_COMMAND = "command"
"""As whose deed a change is noted that was made on the server's own machine."""


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m runtime.keys", description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("make", help="make a key; its secret is printed this once")
    make.add_argument("name", help="whose key it is; never given again")
    make.add_argument("--role", type=Role, choices=list(Role), default=Role.USE, help="each includes those before it")
    for what in ("requests", "steps", "tokens"):
        make.add_argument(f"--{what}-per-day", type=int, default=None, help=f"most {what} in a day (UTC)")
    make.add_argument("--agent", action="append", default=[], metavar="NAME",
                      help=f"an agent that it may speak to and teach; repeat for more; {UNNAMED}: the server's own; "
                           "default: all")  # fmt: skip
    commands.add_parser("list", help="all keys, without their secrets")
    for name, text in (("rotate", "give a key another secret"), ("revoke", "refuse a key for ever")):
        commands.add_parser(name, help=text).add_argument("name")
    for command in commands.choices.values():
        command.add_argument("--state", type=Path, default=Path("state"), help="the server's state folder")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    database = options.state / "agent.db"
    if not database.exists():
        print(f"there is no {database}: start the server once, or name its --state", file=sys.stderr)
        return 1
    try:
        store = KeyStore(database)
        try:
            return _do(options, store)
        finally:
            store.close()
    except (KeyProblem, sqlite3.Error) as problem:
        print(problem, file=sys.stderr)
        return 1


def _do(options: argparse.Namespace, store: KeyStore) -> int:
    match options.command:
        case "make":
            if options.role is not Role.ADMIN and not store.all_keys():
                print("from now on this server answers nobody without a key: make one with --role admin too, or start "
                      "it with one (STEPAGENT_API_KEY)", file=sys.stderr)  # fmt: skip
            quota = Quota(options.requests_per_day, options.steps_per_day, options.tokens_per_day)
            print(store.make(options.name, options.role, quota, BY_COMMAND, options.agent))
        case "rotate":
            print(store.rotate(options.name, BY_COMMAND))
        case "revoke":
            store.revoke(options.name, BY_COMMAND)
            print(f"{options.name} is revoked")
        case "list":
            for key in store.all_keys():
                print(_line(key))
    return 0


def _line(key: Key) -> str:
    made = time.strftime("%Y-%m-%d %H:%M", time.gmtime(key.created_at))
    bounds = {"requests": key.quota.requests, "steps": key.quota.steps, "tokens": key.quota.tokens}
    quota = [f"{bound} {what} a day" for what, bound in bounds.items() if bound is not None]
    state = "revoked" if key.is_revoked else key.role.value
    agents = [f"for {', '.join(key.agents)}"] if key.agents else []
    return "  ".join((f"{key.name:<20}", f"{state:<8}", f"made {made} UTC", *agents, *quota))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
